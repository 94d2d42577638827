"""The small models, batches and folders that the tests are made with."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import pieces
from zephyr import losses, packing
from zephyr.architecture import MistralConfig
from zephyr.attention import Layout
from zephyr.data.arrays import Tokens
from zephyr.model import Mistral
from zephyr.packing import Pair
from zephyr.weights import base, config_json, hub, locate

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}


NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 8,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 101,
    "sliding_window": 5,
}


def interleaved(w, heads):
    """Row by row: where Hugging Face has x0 x1 x2 x3 y0 y1 y2 y3, Mistral has x0 y0 x1 y1 ..."""
    rows = []
    for head in range(heads):
        for i in range(4):
            rows += [head * 8 + i, head * 8 + 4 + i]
    return w[rows]


def published(folder, m: Mistral, dtype=torch.float32, **changes):
    """A folder as Mistral would publish the model."""
    folder.mkdir()
    tensors = {
        "tok_embeddings.weight": m.model.embed_tokens.weight,
        "norm.weight": m.model.norm.weight,
        "output.weight": m.lm_head.weight,
    }
    for i in range(2):
        for ours, theirs in NAMES.items():
            w = m.get_parameter(f"model.layers.{i}.{ours}.weight")
            w = interleaved(w, {"q_proj": 4, "k_proj": 2}[ours[-6:]]) if ours[-6] in "qk" else w
            tensors[f"layers.{i}.{theirs}.weight"] = w
    tensors = {name: w.detach().to(dtype).contiguous() for name, w in tensors.items()}
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))
    (folder / "tokenizer.model.v1").write_bytes(pieces(101))
    return folder


SMALL = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=5,
)


def model(seed: int = 0, **changes) -> Mistral:
    """Weights large enough that attention is far from uniform and every part matters."""
    m = Mistral(MistralConfig(**SMALL | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 1.5 / p.shape[1] ** 0.5 if p.dim() == 2 else 1 + 0.3 * noise)
        m.model.embed_tokens.weight.mul_(m.config.hidden_size**0.5 / 4)
    return m


def tokens(n: int, seed: int = 1) -> Tensor:
    return torch.randint(101, (n,), generator=torch.Generator().manual_seed(seed))


def packed(*lengths: int) -> Layout:
    """Documents one after the other."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    position_T = torch.cat([torch.arange(n) for n in lengths])
    return Layout(position_T, ends, ends, None, None, max(lengths), max(lengths))


def batch(tokens_T, layout, predict_N, targets_N) -> SimpleNamespace:
    predict_N, targets_N = (torch.tensor(x, dtype=torch.long) for x in (predict_N, targets_N))
    return SimpleNamespace(
        tokens_T=tokens_T, layout=layout, predict_N=predict_N, targets_N=targets_N
    )


def token_arrays(rows: list[list[int]], mask: list[int] | None = None) -> Tokens:
    """Rows as documents; lists of three as pairs."""
    parts = [row if isinstance(row[0], list) else [row] for row in rows]
    ids = np.array([i for row in parts for part in row for i in part])
    sizes = np.array([[len(part) for part in row] for row in parts])
    ends = np.cumsum(sizes.ravel()).reshape(sizes.shape)
    mask = np.ones(len(ids), bool) if mask is None else np.array(mask, bool)
    places = np.stack([np.zeros(len(ends), np.int64), np.arange(len(ends)) + 1], 1)
    return Tokens(ids, mask, ends, "digest", {}, "", places, ("rows.jsonl",))


def folder_of(m: Mistral, folder: Path, **changes: torch.Tensor) -> Path:
    """A folder with the model's config and tensors; `changes` of None leave a tensor out."""
    folder.mkdir()
    config_json.write_config(folder, m.config, "float32", {})
    (folder / "tokenizer.model").write_bytes(pieces(101))
    tensors = {name: p.detach() for name, p in m.named_parameters()} | changes
    tensors = {name: x for name, x in tensors.items() if x is not None}
    save_file(tensors, folder / locate.SINGLE, metadata={"format": "pt"})
    return folder


def pairs(rank: int) -> packing.Batch:
    """A micro-batch of three pairs that differs between the ranks."""
    rng = np.random.default_rng(rank)
    sizes = rng.integers(1, 12, (3, 3))
    return packing.pack_pairs(
        [Pair(*(rng.integers(0, 101, n) for n in row)) for row in sizes],
        [3 * rank, 3 * rank + 1, 3 * rank + 2],
    )


def gradients(m: Mistral, batches: list[packing.Batch]) -> dict[str, torch.Tensor]:
    """Of the mean over all targets, one batch after the other."""
    for batch in batches:
        (losses.sft(m(batch)) / sum(len(b.targets_N) for b in batches)).backward()
    return {name: p.grad.clone() for name, p in m.named_parameters()}


def close(ours: dict, expected: dict, tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name in ours:
        difference = (ours[name] - expected[name]).abs().max()
        assert difference <= tolerance, f"{name}: {difference}"


def flash(q, k, v, *rest):
    """What the CUDA op returns, without its values: output, lse, state of a generator."""
    return torch.zeros_like(q), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def flash_backward(g, q, k, v, *rest):
    return tuple(map(torch.empty_like, (q, k, v)))


def put(folder: Path, **contents: bytes | str | dict) -> Path:
    """Write files, `__` in a name for a point, and make what folders they need."""
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def refused(folder: Path) -> str:
    """Return the line that a run from this folder ends with."""
    with pytest.raises(ValueError) as raised:
        shape = base.open_folder(folder).shape
        hub.load(folder, Mistral(shape))
    assert str(raised.value).isprintable()
    return str(raised.value)
