"""Weights in and out against transformers, on one rank and on several."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers import WORKERS, pieces
from model_helpers import folder_of, model, packed, refused, tokens
from zephyr import files
from zephyr.architecture import MistralConfig
from zephyr.model import Mistral
from zephyr.weights import config_json, hub, locate, safetensor_files


def empty(config: MistralConfig) -> Mistral:
    """A model as training builds it, its memory not yet filled."""
    with torch.device("meta"):
        m = Mistral(config)
    return m.to_empty(device="cpu")


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("shards", ["single", "sharded"])
@pytest.mark.parametrize("style", [4, 5])
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {"rope_theta": 5e5}),
        ("bfloat16", {"sliding_window": None, "head_dim": 6}),
        ("float16", {"tie_word_embeddings": True}),
        ("bfloat16", {"model_type": "llama", "sliding_window": None}),
    ],
    ids=str,
)
def test_round_trip_through_transformers(tmp_path, dtype, changes, style, shards):
    limit = 20_000 if shards == "sharded" else 10**9
    first = model(**changes)
    huggingface_type = getattr(transformers, config_json.CLASSES[first.config.model_type])
    base = folder_of(first, tmp_path / "first")
    theirs = huggingface_type.from_pretrained(base, dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "base", max_shard_size=limit)
    base = tmp_path / "base"
    (base / "tokenizer.model").write_bytes(pieces(101))
    if style == 4:
        config = files.read_json(base / "config.json")
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")
        files.write_json(base / "config.json", config)

    ours = empty(config_json.read(base))
    hub.load(base, ours)
    assert ours.config == first.config
    hub.save(ours, tmp_path / "out", base, shard_bytes=limit)

    again, report = huggingface_type.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert (tmp_path / "out" / locate.INDEX).exists() == (shards == "sharded")
    same(dict(again.state_dict()), dict(theirs.state_dict()))
    assert files.read_json(tmp_path / "out" / "config.json")["torch_dtype"] == dtype
    x = tokens(23)
    with torch.no_grad():
        expected = again.float()(x[None]).logits[0]
        torch.testing.assert_close(ours.logits(x, packed(23)), expected, rtol=0, atol=1e-5)


def test_what_a_saved_folder_holds(tmp_path):
    base = folder_of(model(), tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    config = files.read_json(base / "config.json") | {"eos_token_id": 7, "auto_map": {}}
    files.write_json(base / "config.json", config)
    hub.save(model(), tmp_path / "out", base, torch.bfloat16)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()} == {"0o644"}
    config = files.read_json(tmp_path / "out" / "config.json")
    assert config["torch_dtype"] == "bfloat16" and config["eos_token_id"] == 2
    assert "auto_map" not in config
    with pytest.raises(ValueError, match="out exists already; choose another name"):
        hub.save(model(), tmp_path / "out", base)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    base, opened = folder_of(model(), tmp_path / "base"), []

    def full_disk(tensors, path, metadata):
        opened.append(path)
        if len(opened) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save_file(tensors, path, metadata)

    monkeypatch.setattr(safetensor_files, "save_file", full_disk)
    with pytest.raises(ValueError, match="out: cannot write: .*No space left on device"):
        hub.save(model(), tmp_path / "out", base, shard_bytes=20_000)
    (base / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.model: no such file; a model folder needs"):
        hub.save(model(), tmp_path / "out", base)
    broken = model()
    broken.model.norm.weight.data[3] = torch.nan
    (base / "tokenizer.model").write_bytes(pieces(101))
    with pytest.raises(ValueError, match="NaN or infinity in model.norm.weight; the weights are"):
        hub.save(broken, tmp_path / "out", base)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


K, Q = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({K: None}, f"folder lacks {K}, which its config asks for"),
        ({K: None, Q: None, NORM: None, HEAD: None}, f"lacks {HEAD}, {Q}, {K} and 1 more"),
        ({"model.layers.2.x": torch.ones(1)}, "folder has model.layers.2.x, unknown to its config"),
        ({K: torch.ones(32, 16)}, rf"{K} is \[32, 16\]; its config says \[16, 32\]"),
        ({HEAD: torch.ones(102, 32)}, rf"{HEAD} is \[102, 32\]; its config says \[101, 32\]"),
        ({NORM: torch.ones(32).int()}, f"{NORM} is I32; weights are one of F64, F32, F16, BF16"),
        ({NORM: torch.ones(32).to(torch.float8_e4m3fn)}, f"{NORM} is F8_E4M3; weights are one"),
        ({NORM: torch.full((32,), torch.nan)}, f"NaN or infinity in {NORM} as torch.float32$"),
        ({NORM: torch.ones(32).double() * 1e300}, f"infinity in {NORM} as torch.float32$"),
        (
            {
                n: torch.full(s, torch.inf)
                for n, s in {K: (16, 32), Q: (32, 32), NORM: (32,), HEAD: (101, 32)}.items()
            },
            f"{HEAD} as .*, {Q} as .*, {K} as .* and 1 more",
        ),
    ],
    ids=range(10),
)
def test_refused(tmp_path, changes, message):
    m = model()
    folder = folder_of(m, tmp_path / "folder", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        hub.load(folder, empty(m.config))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_load_casts_and_overlooks_what_follows_from_the_config(tmp_path):
    m, inv_freq = model(), "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {inv_freq: torch.ones(4), NORM: m.model.norm.weight.detach().double()}
    folder = folder_of(m, tmp_path / "folder", **extra)
    ours = empty(m.config).bfloat16()
    hub.load(folder, ours)
    same(ours.state_dict(), {name: x.bfloat16() for name, x in m.state_dict().items()})


def test_a_tied_model_stays_tied(tmp_path):
    m = model(tie_word_embeddings=True)
    with_head = folder_of(m, tmp_path / "a", **{HEAD: m.lm_head.weight.detach().clone()})
    for folder in (with_head, folder_of(m, tmp_path / "b")):
        ours = empty(m.config)
        hub.load(folder, ours)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        same(ours.state_dict(), m.state_dict())


def test_digest_sees_every_byte_of_config_and_weights(tmp_path):
    m = model()
    folder = folder_of(m, tmp_path / "a")
    first = hub.digest(folder)
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.model").write_text("another")
    assert hub.digest(tmp_path / "b") == first and len(first) == 64
    digests = {first}
    hub.save(m, tmp_path / "c", folder, shard_bytes=20_000)
    digests.add(hub.digest(tmp_path / "c"))
    for name in ("config.json", locate.SINGLE):
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(content)
        digests.add(hub.digest(folder))
    assert len(digests) == 4


def test_fresh_weights(tmp_path):
    m = model()
    folder = folder_of(m, tmp_path / "base")
    with pytest.raises(ValueError, match="base has weights already; choose another folder"):
        hub.fresh(folder, 5)
    (folder / locate.SINGLE).unlink()
    hub.fresh(folder, 5)
    assert (folder / locate.SINGLE).stat().st_mode & 0o777 == 0o644
    first = load_file(folder / locate.SINGLE)
    assert {x.dtype for x in first.values()} == {torch.float32}
    hub.load(folder, empty(m.config))
    (folder / locate.SINGLE).unlink()
    hub.fresh(folder, 5)
    same(first, load_file(folder / locate.SINGLE))
    assert len(list(folder.iterdir())) == 4


def test_three_ranks_equal_one(tmp_path):
    """101 rows are shared unevenly, and of 2 rows the third rank has none. An error on one rank
    leaves no other waiting."""
    ranks = 3
    m = model(num_key_value_heads=1, head_dim=2)
    base = folder_of(m, tmp_path / "base")
    head = m.lm_head.weight.detach().clone()
    head[100, 31] = torch.nan
    folder_of(m, tmp_path / "broken", **{HEAD: head})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKERS / "one_rank.py", str(tmp_path), str(rank), str(ranks)],
            cwd=Path(__file__).parent.parent,
            env=environment | {"PYTHONPATH": "."},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    hub.save(m, tmp_path / "one", base, shard_bytes=20_000)
    assert hub.digest(tmp_path / "out") == hub.digest(tmp_path / "one")
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")]


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
