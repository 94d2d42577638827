"""Folders and files given as a model that are something else: a line says what, and what to do."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers import pieces, shared
from model_helpers import MISTRAL_7B, folder_of, model, published
from zephyr import config
from zephyr.config import DPOConfig, SFTConfig
from zephyr.model import Mistral
from zephyr.tokenizer import Tokenizer
from zephyr.weights import base, config_json, hub, locate, tokenizer_json
from zephyr.weights.mistral import convert

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4943162336\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.fixture
def good(tmp_path):
    return folder_of(model(), tmp_path / "good")


def put(folder: Path, **contents: bytes | str | dict) -> Path:
    """Write files, `__` in a name for a point, and make what folders they need."""
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def refused(folder: Path) -> str:
    """The line that a run from this folder ends with."""
    with pytest.raises(ValueError) as raised:
        shape = base.open_folder(folder).shape
        hub.load(folder, Mistral(shape))
    assert str(raised.value).isprintable()
    return str(raised.value)


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


def test_a_lora_adapter(tmp_path, good):
    adapter = put(tmp_path / "my lora", adapter_config__json={"base_model_name_or_path": "a/b"})
    line = refused(adapter)
    assert "my lora is a LoRA adapter (adapter_config.json) of 'a/b', not a model" in line
    merge, copy = line.partition("merge the two: ")[2].split("; cp ")
    words = shlex.split(merge)
    assert words[:2] == ["python", "-c"] and f"from_pretrained('{adapter}', dtype=" in words[2]
    compile(words[2], "line", "exec")
    assert shlex.split(copy) == ["BASE/tokenizer.model", f"{adapter}-merged"]
    put(good, adapter_config__json={})  # transformers would add it to the weights
    assert "is a LoRA adapter" in refused(good)
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


def test_rows_above_the_pieces_are_kept_and_never_sampled(tmp_path):
    wide = model(vocab_size=103)
    folder = folder_of(wide, tmp_path / "wide")
    (note,) = base.open_folder(folder).notes
    assert note == (
        f"{folder} has 2 embedding rows above the 101 pieces of its tokenizer.model: padding or "
        "added tokens, which no text becomes; they are kept, and never sampled"
    )
    put(folder, added_tokens__json={"<|im_start|>": 101, "<|im_end|>": 102, "x": 7, "y": "z"})
    (note,) = base.open_folder(folder).notes
    assert "tokenizer.model: added tokens (<|im_end|>, <|im_start|>), which no text" in note
    put(
        folder,
        added_tokens__json={},
        tokenizer__json={"added_tokens": [{"id": 102, "content": "<pad>"}, 3, {"content": []}]},
    )
    assert "added tokens (<pad>), which" in base.open_folder(folder).notes[0]
    (folder / "tokenizer.json").unlink()
    hub.save(wide, tmp_path / "out", folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.lm_head.weight.shape[0] == 103

    from zephyr import generate

    with torch.no_grad():
        wide.lm_head.weight[101:] = 9 * wide.lm_head.weight.abs().sum(0)
        wide.model.norm.weight.abs_()
    prompt = [[1, 5, 6]]
    free = torch.tensor(list(generate.stream(wide, prompt, 40, seed=3)))
    kept = torch.tensor(list(generate.stream(wide, prompt, 40, seed=3, pieces=101)))
    assert (free >= 101).any() and (kept < 101).all()


def test_fewer_rows_than_pieces(tmp_path):
    folder = folder_of(model(vocab_size=100), tmp_path / "narrow")
    assert refused(folder) == (
        f"{folder}/tokenizer.model has 101 pieces, the model only 100 embedding rows: it is another"
        f" model's tokenizer; fetch the one that belongs to {folder}"
    )


def test_a_tied_model_whose_file_has_another_head(tmp_path):
    tied = model(tie_word_embeddings=True)
    same, other = tied.model.embed_tokens.weight.detach().clone(), torch.ones(101, 32)
    head = "lm_head.weight"
    folder = folder_of(tied, tmp_path / "same", **{head: same})
    hub.load(folder, Mistral(config_json.read(folder)))
    for k, odd in enumerate((other, same[:, :16].clone(), same + 1e-3)):
        line = refused(folder_of(tied, tmp_path / f"other{k}", **{head: odd}))
        assert line == (
            f"{tmp_path}/other{k}: its config says tie_word_embeddings, yet lm_head.weight is "
            "another than model.embed_tokens.weight; write tie_word_embeddings false, or leave "
            "lm_head.weight out of the file"
        )


def settings(folder: Path, **changes) -> DPOConfig:
    c = DPOConfig(model=str(folder), data=("d",), out="o", max_length=64, max_prompt_length=32)
    return replace(c, **changes)


def test_max_length_beyond_the_positions(good):
    assert base.look(settings(good))[0].max_length == 64
    for c in (settings(good, max_length=65), SFTConfig(model=str(good), data=("d",), out="o")):
        with pytest.raises(ValueError) as raised:
            base.look(c)
        assert str(raised.value) == (
            f"--max-length {c.max_length} is beyond the 64 positions that {good} was made for "
            "(max_position_embeddings); use 64 or less"
        )


def test_the_empty_system_message_is_the_folders_own(good):
    def look(**changes) -> tuple[bool, list[str]]:
        c, _, _, notes = base.look(settings(good, **changes))
        return c.empty_system, notes

    assert look() == (True, []) and look(empty_system=False) == (False, [])
    put(good, chat_template__jinja=config_json.chat_template(True))
    assert look() == (True, []) and look(empty_system=True) == (True, [])
    decided, (note,) = look(empty_system=False)
    assert decided is False and note == (
        f"the chat template of {good} inserts an empty system message, this run does otherwise: "
        "--no-empty-system"
    )
    put(good, chat_template__jinja=config_json.chat_template(False))
    decided, (note,) = look()
    assert decided is False and note == (
        f"the chat template of {good} inserts no empty system message, and so does this run: "
        "--no-empty-system"
    )
    assert look(empty_system=False)[0] is False
    decided, (note,) = look(empty_system=True)
    assert decided is True and "this run does otherwise: --empty-system" in note
    put(good, chat_template__jinja="{{ '<|im_start|>' }}")
    assert look() == (
        True,
        [f"{good} has a chat template of its own; Zephyr's is used in its place, see docs/data.md"],
    )


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig])
def test_the_empty_system_message_in_flags_and_recipes(cls, tmp_path):
    own = ["--model", "m", "--data", "d", "--out", "o"]
    for flags, value in (([], None), (["--empty-system"], True), (["--no-empty-system"], False)):
        c, _ = config.parse(cls, own + flags)
        assert c.empty_system is value
        path = tmp_path / "again.toml"
        path.write_text(config.to_toml(replace(c, empty_system=value)))
        assert config.parse(cls, [str(path)])[0] == c


def test_the_bases_own_tokenizer_json(good):
    tokenizer = Tokenizer(good)
    ours = tokenizer_json.build(tokenizer)
    assert base.look(settings(good))[3] == []
    put(good, tokenizer__json=ours)
    assert base.look(settings(good))[3] == []
    pairs = [pair.split(" ") for pair in ours["model"]["merges"]]  # as tokenizers 0.20 on writes
    put(good, tokenizer__json=ours | {"model": ours["model"] | {"merges": pairs}})
    assert base.look(settings(good))[3] == []
    vocab, first = ours["model"]["vocab"], list(ours["model"]["vocab"])[9]
    for change, what in (
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, "pre_tokenizer"),
        ({"normalizer": None}, "normalizer"),
        ({"model": ours["model"] | {"merges": pairs[::-1]}}, "merges"),
        ({"model": ours["model"] | {"merges": 7}, "normalizer": {}}, "merges, normalizer"),
        ({"model": ours["model"] | {"vocab": vocab | {"new": 101}}}, "vocab"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}, "the kind of model"),
    ):
        put(good, tokenizer__json=ours | change)
        (note,) = base.look(settings(good))[3]
        assert note == (
            f"{good}/tokenizer.json differs from tokenizer.model in {what}, so who reads it may "
            "get other ids; the saved model gets one that gives the ids of training"
        )
    put(good, tokenizer__json=ours | {"model": ours["model"] | {"vocab": vocab | {first: 3}}})
    with pytest.raises(ValueError, match="json gives .* the id 3, tokenizer.model 9: one of them"):
        base.look(settings(good))


def test_mistrals_tokenizer_json_as_converters_write_it(tmp_path):
    """Of its runs of spaces, which all have one score, the longest come first."""
    put(tmp_path, tokenizer__model=shared("mistral/tokenizer.model").read_bytes())
    tokenizer = Tokenizer(tmp_path)
    theirs = tokenizer_json.build(tokenizer)
    merges = [pair.split(" ") for pair in theirs["model"]["merges"]]
    runs = [pair for pair in merges if set("".join(pair)) == {tokenizer_json.SPACE}]
    merges = [pair for pair in merges if pair not in runs] + runs[::-1]
    assert len(runs) > 20 and merges != [x.split(" ") for x in theirs["model"]["merges"]]
    theirs["model"]["merges"] = merges
    put(tmp_path, tokenizer__json=theirs, config__json=MISTRAL_7B)
    assert base.look(settings(tmp_path))[3] == []
    merges[5], merges[6] = merges[6], merges[5]
    put(tmp_path, tokenizer__json=theirs)
    assert "differs from tokenizer.model in merges, so" in base.look(settings(tmp_path))[3][0]


def test_a_tokenizer_that_cannot_be_saved_is_refused_at_the_start(good, tmp_path):
    put(good, tokenizer__model=pieces(101, add_dummy_prefix=False))
    with pytest.raises(ValueError, match="no tokenizer.json gives its ids"):
        base.look(settings(good))
    source = published(tmp_path / "raw", model())
    put(source, tokenizer__model__v1=pieces(101, add_dummy_prefix=False))
    with pytest.raises(ValueError, match="no tokenizer.json gives its ids"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
