"""Mistral's own layout against a model permuted by hand, and against interleaved RoPE itself."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import pieces
from model_helpers import folder_of, model, packed, published, tokens
from zephyr import files
from zephyr.model import Mistral, rope, rotate
from zephyr.weights import __main__ as weights_command
from zephyr.weights import config_json, hub, mistral


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_logits(tmp_path, capsys, monkeypatch, dtype):
    monkeypatch.setattr(hub, "SHARD_BYTES", 20_000)
    m = model()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(p.to(dtype))
    source = published(tmp_path / "source", m, dtype)
    weights_command.main([str(source), str(tmp_path / "target")])
    told = capsys.readouterr().out
    assert "params.json has no rope_theta: 10000.0, as in Mistral-7B-v0.1" in told
    assert "params.json has no max_position_embeddings: 32768" in told
    assert len(list((tmp_path / "target").glob("model-*.safetensors"))) > 1
    converted = Mistral(config_json.read(tmp_path / "target"))
    assert converted.config.sliding_window == 5
    hub.load(tmp_path / "target", converted)
    x = tokens(23)
    torch.testing.assert_close(
        converted.logits(x, packed(23)), m.logits(x, packed(23)), rtol=0, atol=0
    )
    config = files.read_json(tmp_path / "target" / "config.json")
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "target" / "tokenizer.model").read_bytes() == pieces(101)
    assert not (tmp_path / "target" / "params.json").exists()


def test_attention_scores_are_those_of_interleaved_rope(tmp_path):
    """Mistral multiplies complex numbers x0 + i y0; ours turns halves. q·k must not notice."""
    m = model(sliding_window=None)
    published(tmp_path / "source", m, sliding_window=None, rope_theta=500.0)
    mistral.convert(tmp_path / "source", tmp_path / "target")
    converted = Mistral(config_json.read(tmp_path / "target"))
    hub.load(tmp_path / "target", converted)
    h, position = torch.randn(9, 32), torch.arange(9) * 3
    cos, sin = rope(position, converted.config, torch.float32)
    attention = converted.model.layers[1].self_attn
    q, k = (rotate(p(h).view(9, -1, 8), cos, sin) for p in (attention.q_proj, attention.k_proj))
    turn = torch.polar(torch.ones(9, 4), torch.outer(position, 500.0 ** (-torch.arange(4) / 4)))
    theirs = load_file(tmp_path / "source" / "consolidated.safetensors")

    def turned(name):
        x = h @ theirs[f"layers.1.attention.{name}.weight"].T
        x = torch.view_as_complex(x.view(9, -1, 4, 2)) * turn[:, None]
        return torch.view_as_real(x).flatten(2)

    wq, wk = turned("wq"), turned("wk")
    for head in range(4):
        expected = wq[:, head] @ wk[:, head // 2].T
        scores = q[:, head] @ k[:, head // 2].T
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_several_files_and_any_tokenizer(tmp_path):
    source = published(tmp_path / "source", model(), rope_theta=1e6)
    whole = load_file(source / "consolidated.safetensors")
    (source / "consolidated.safetensors").unlink()
    for i in range(2):
        part = {name: whole[name] for name in sorted(whole)[i::2]}
        save_file(part, source / f"consolidated.{i:02}.safetensors")
    (source / "tokenizer.model").write_bytes(pieces(100))
    mistral.convert(source, tmp_path / "target")
    assert config_json.read(tmp_path / "target").rope_theta == 1e6
    assert (tmp_path / "target" / "tokenizer.model").read_bytes() == pieces(100)
    hub.load(tmp_path / "target", Mistral(config_json.read(tmp_path / "target")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"num_experts": 8}}, "params.json: moe: only a dense Mistral can be converted"),
        ({"n_kv_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"n_layers": 3}, "source lacks model.layers.2.input_layernorm.weight, .* and 6 more"),
        ({"n_layers": 1}, r"source has layers.1.attention.wk.weight, .* unknown to its config"),
        ({"hidden_dim": 49}, r"feed_forward.w1.weight is \[48, 32\]; its config says \[49, 32\]"),
    ],
    ids=str,
)
def test_refused(tmp_path, changes, message):
    published(tmp_path / "source", model(), **changes)
    with pytest.raises(ValueError, match=message):
        mistral.convert(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_what_the_saved_folder_could_not_hold(tmp_path):
    source = published(tmp_path / "source", model())
    path = source / "consolidated.safetensors"
    save_file({name: x.double() for name, x in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=f"{path}: torch_dtype is 'float64'; use float32"):
        mistral.convert(source, tmp_path / "target")
    save_file({name: x.float() for name, x in load_file(path).items()}, path)
    (source / "tokenizer.model.v1").rename(tmp_path / "secret")
    (source / "tokenizer.model.v1").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.model\.v1 links out of the folder"):
        mistral.convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_what_is_missing(tmp_path, capsys):
    source = published(tmp_path / "source", model())
    (source / "tokenizer.model.v1").unlink()
    with pytest.raises(ValueError, match="source/tokenizer.model: no such file; a model folder"):
        mistral.convert(source, tmp_path / "target")
    (source / "consolidated.safetensors").rename(source / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"has no consolidated\*\.safetensors; of a \.pth, a pick"):
        mistral.convert(source, tmp_path / "target")
    with pytest.raises(SystemExit) as ended:
        weights_command.main([str(tmp_path / "none"), str(tmp_path / "target")])
    assert ended.value.code == 2
    assert "weights: " in (told := capsys.readouterr().err) and "none: no such folder" in told
    hub.save(model(), tmp_path / "whole", folder_of(model(), tmp_path / "good"))
    with pytest.raises(ValueError, match="whole is a Hugging Face folder already: it has a conf"):
        mistral.convert(tmp_path / "whole", tmp_path / "target")
    (tmp_path / "whole" / "config.json").rename(tmp_path / "whole" / "adapter_config.json")
    with pytest.raises(ValueError, match="whole is a LoRA adapter"):
        mistral.convert(tmp_path / "whole", tmp_path / "target")
    assert not (tmp_path / "target").exists()
