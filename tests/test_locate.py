"""Folders and files given as a model that are something else: a line says what, and what to do."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_helpers import MISTRAL_7B, folder_of, model, put, refused
from zephyr.files import shown
from zephyr.model import Mistral
from zephyr.weights import base, config_json, hub, locate

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4943162336\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "model.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS, "is a Git LFS pointer, not the data; run git lfs pull"),
        (PAGE, "is an HTML or XML page, not data; download the raw file"),
        (
            b"\xef\xbb\xbf\n  <?xml version='1.0'?><Error>AccessDenied</Error>",
            "is an HTML or XML page",
        ),
        (b"PK\x03\x04" + bytes(99), "is a pickle of torch.save, which can run code as it is read"),
        (b"GGUF" + bytes(99), "is a GGUF file, for llama.cpp; take what it was made from"),
        (b"\x1f\x8b\x08" + bytes(99), "is gzip-compressed"),
    ],
)
def test_a_file_whose_content_is_another_thing(good, name, content, what):
    if "index" in name:
        (good / locate.SINGLE).unlink()
    (good / name).write_bytes(content)
    assert refused(good).startswith(f"{good / name} {what}")


def test_other_tokenizers(good):
    path = good / "tokenizer.model"
    put(good, tokenizer__model=b"IQ== 0\nIg== 1\nIw== 2\n" * 50)
    assert (
        refused(good) == f"{path} is a tiktoken file, as Llama 3's; sentencepiece alone is "
        "implemented"
    )
    path.unlink()
    assert refused(good) == f"{path}: no such file; a model folder needs its tokenizer.model"
    put(good, vocab__json={})
    assert "no such file, but vocab.json, which does not say" in refused(good)
    put(good, tokenizer__json={})
    assert refused(good) == (
        f"{path}: no such file, but tokenizer.json, which does not say all that training needs; "
        "fetch the other from the model's repository (hf download REPO tokenizer.model --local-dir "
        f"{good}); a model that has none is not implemented"
    )
    put(good, tekken__json={})
    assert "but tekken.json, which is not sentencepiece and not implemented" in refused(good)
    put(good, tokenizer__model__v1=b"", tokenizer__model__v3=b"")
    assert "no such file, but tokenizer.model.v3: copy it under this name" in refused(good)
    path.symlink_to("../gone")
    assert refused(good) == f"{path}: links to ../gone, which is not there; fetch it again"


def test_what_is_no_model_folder(tmp_path, good):
    def line(path: Path) -> str:
        with pytest.raises(ValueError) as raised:
            config_json.read(path)
        return str(raised.value)

    file = good / "config.json"
    assert line(file) == f"{file} is a file; give the model's folder, as {good}"
    put(tmp_path, **{"m__gguf": b"GGUF", "all/m__q4__gguf": b"GGUF"})
    assert "m.gguf is a GGUF file, for llama.cpp; take what" in line(tmp_path / "m.gguf")
    assert "all has no config.json, but m.q4.gguf, for llama.cpp" in line(tmp_path / "all")
    (tmp_path / "link").symlink_to("nowhere")
    assert line(tmp_path / "link") == f"{tmp_path}/link links to nowhere, which is not there"
    assert line(tmp_path) == f"{tmp_path} has no config.json; did you mean good in it?"
    mistral = put(tmp_path / "raw", params__json={}, consolidated__safetensors=b"")
    assert f"convert it with python -m zephyr.weights {mistral} TARGET" in line(mistral)
    for name in ("quantize_config__json", "quant_config__json"):
        path = put(tmp_path / name, config__json=MISTRAL_7B, **{name: {"bits": 4}})
        assert "holds quantized weights (quant" in line(path)
    cache = tmp_path / "cache" / "hub" / "models--a--b"
    put(cache, **{"snapshots/0/x": b"", "snapshots/1f/config__json": MISTRAL_7B, "refs/main": ""})
    found = f"is Hugging Face's cache; the folder of the model is {cache}/snapshots/1f"
    for place in (cache, cache.parent, cache.parent.parent):
        assert line(place) == f"{place} {found}"


def test_a_run_and_its_checkpoints(tmp_path):
    run = put(tmp_path / "run", config__toml="", run__json={})
    with pytest.raises(ValueError, match=r"run is a run that has not ended, .*; continue it$"):
        config_json.read(run)
    for step in (9, 10, 100):
        put(run / "checkpoints" / f"step-{step}", SHA256SUMS=b"", state__json={})
    newest = run / "checkpoints" / "step-100"
    with pytest.raises(ValueError, match=f"or python -m zephyr.weights {newest} NEW$"):
        config_json.read(run)
    with pytest.raises(ValueError, match=f"is a run's checkpoint; .* zephyr.weights {newest} NEW$"):
        config_json.read(newest)
    with pytest.raises(ValueError, match="has no config.json; did you mean step-10, step-100"):
        config_json.read(run / "checkpoints")
    put(run, **{"model/config__json": MISTRAL_7B})
    with pytest.raises(ValueError, match=f"run is a run; its model is {run}/model$"):
        config_json.read(run)
    assert config_json.read(run / "model").vocab_size == 32000


@pytest.mark.parametrize(
    ("key", "value", "how"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ("quantization_config", {"quant_method": "awq"}, "'awq'"),
        ("quantization_config", {"quant_method": "fp8"}, "'fp8'"),
        ("quantization_config", {"load_in_4bit": True}, "{'load_in_4bit': True}"),
        ("compression_config", {"format": "pack-quantized"}, "{'format': 'pack-quantized'}"),
        ("quantization", {"group_size": 64, "bits": 4}, "{'bits': 4, 'group_size': 64}"),
        ("quantization_config", ["x"], "['x']"),
    ],
)
def test_quantized_by_its_config(tmp_path, key, value, how):
    put(tmp_path, config__json=MISTRAL_7B | {key: value})
    with pytest.raises(ValueError) as raised:
        config_json.read(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/config.json: {key} says {how}: quantized weights cannot be trained; take the "
        "model that they were made from"
    )
    put(tmp_path, config__json=MISTRAL_7B | {key: None})
    assert config_json.read(tmp_path).vocab_size == 32000


@pytest.mark.parametrize("ending", ["qweight", "weight_scale_inv", "weight.absmax", "SCB"])
def test_quantized_by_its_tensors(tmp_path, ending):
    name = "model.layers.0.mlp.up_proj"
    odd = {f"{name}.weight": None, f"{name}.{ending}": torch.ones(3)}
    line = refused(folder_of(model(), tmp_path / "odd", **odd))
    assert f"odd has {name}.{ending}: quantized weights cannot be trained; take the model" in line


@pytest.mark.parametrize(
    "named", ["", "x" * 5000, "~no-such-user/x", "a\0b", "\ud800", 3, [], None], ids=repr
)
def test_an_adapter_whose_base_is_no_path(tmp_path, monkeypatch, named):
    """An empty name is not the working folder, and one too long is refused as any other."""
    monkeypatch.chdir(tmp_path)
    folder = put(tmp_path / "it", adapter_config__json={"base_model_name_or_path": named})
    line = f"{folder} is a LoRA adapter (adapter_config.json) of {shown(named)}, which is no folder"
    with pytest.raises(ValueError) as raised:
        locate.parts(folder)
    assert str(raised.value).startswith(line) and len(str(raised.value)) < 600


def test_a_lora_adapter(tmp_path, good):
    adapter = put(tmp_path / "my lora", adapter_config__json={"base_model_name_or_path": "a/b"})
    is_of = "my lora is a LoRA adapter (adapter_config.json) of 'a/b', "
    assert f"{is_of}which is no folder here; give --base" in refused(adapter)
    with pytest.raises(ValueError, match="not a model; merge the two: ") as raised:
        config_json.read(adapter)
    command = shlex.split(str(raised.value).partition("merge the two: ")[2])
    assert command == ["python", "-m", "zephyr.weights", str(adapter), f"{adapter}-merged"]
    with pytest.raises(ValueError, match="--base x is for a LoRA adapter, and .*good is none"):
        locate.parts(good, "x")
    other = put(tmp_path / "other", adapter_config__json={"base_model_name_or_path": str(adapter)})
    assert f"is a LoRA adapter of another, {adapter}; make a model" in refused(other)
    put(good, adapter_config__json={})  # transformers would add it to the weights
    assert "is a LoRA adapter (adapter_config.json) and a model (model.safetensors) at" in refused(
        good
    )
    names = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}
    both = folder_of(model(), tmp_path / "both", **names)
    assert "a LoRA adapter beside the weights" in refused(both)


def test_weights_that_are_not_safetensors(good):
    whole = load_file(good / locate.SINGLE)
    (good / locate.SINGLE).rename(good / "model-00002-of-00003.safetensors")
    assert refused(good) == (
        f"{good} has 1 of 3 shards and no model.safetensors.index.json, which says what is in them;"
        f" fetch it: hf download REPO model.safetensors.index.json --local-dir {good}"
    )
    (good / "model-00002-of-00003.safetensors").rename(good / "model.fp16.safetensors")
    assert refused(good).endswith("index.json, but model.fp16.safetensors")
    (good / "model.fp16.safetensors").unlink()
    (good / locate.SINGLE).symlink_to("../../blobs/4d7a")
    assert "as a link to ../../blobs/4d7a, which is not there; fetch it" in refused(good)
    (good / locate.SINGLE).unlink()
    put(good, params__json={}, consolidated__safetensors=b"")
    assert "convert them with python -m zephyr.weights" in refused(good)
    (good / "params.json").unlink()
    put(good, zero_to_fp32__py=b"")
    script = f"python {good}/zero_to_fp32.py {good} {good} --safe_serialization"
    assert refused(good).endswith(f"has DeepSpeed's shards; join them: {script}")
    (good / "zero_to_fp32.py").unlink()
    torch.save(whole, good / "pytorch_model.bin")
    assert "only pytorch_model.bin, and reading a pickle can run code" in refused(good)


def test_the_lines_that_convert_a_pickle_work(tmp_path, good):
    good = good.rename(tmp_path / "it's good")
    whole = load_file(good / locate.SINGLE)
    torch.save(whole, good / "pytorch_model.bin")
    (good / locate.SINGLE).unlink()
    line = refused(good)
    commands = line.partition("trust it, ")[2].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(commands, shell=True, check=True, capture_output=True)
    new = tmp_path / "it's good-safetensors"
    shape = base.open_folder(new).shape
    again = Mistral(shape)
    hub.load(new, again)
    assert shape == base.open_folder(good).shape
    assert all(torch.equal(p, whole[name]) for name, p in again.named_parameters())


@pytest.mark.parametrize("link", ["snapshot", "local dir"])
def test_links_into_hugging_faces_cache_are_read(tmp_path, good, link):
    """A snapshot, as its files all are links, and a folder as hf download once made."""
    repo = tmp_path / "hub" / "models--a--b"
    inner = repo / "snapshots" / "1f" if link == "snapshot" else tmp_path / "local"
    inner.mkdir(parents=True)
    (repo / "blobs").mkdir(parents=True)
    hub.save(model(), tmp_path / "sharded", good, shard_bytes=20_000)
    for k, path in enumerate((tmp_path / "sharded").iterdir()):
        path.rename(repo / "blobs" / str(k))
        (inner / path.name).symlink_to(os.path.relpath(repo / "blobs" / str(k), inner))
    assert (inner / locate.INDEX).is_file()
    shape, tokenizer, *_ = base.open_folder(inner)
    again = Mistral(shape)
    hub.load(inner, again)
    before = dict(model().named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    assert hub.digest(inner)
    hub.save(again, tmp_path / "out", inner)  # of files, not of links
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    other = tmp_path / "elsewhere"
    first = next(inner.glob("model-*.safetensors"))
    other.write_bytes(first.read_bytes())
    first.unlink()
    first.symlink_to(other)
    with pytest.raises(ValueError, match="links out of the folder"):
        locate.weight_files(inner)
