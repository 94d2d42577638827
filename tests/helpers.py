"""What the tests build their small models, batches and runs with."""

import functools
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_dpo
from benchmarks import tiny
from zephyr import generate, losses, packing
from zephyr.architecture import MistralConfig
from zephyr.attention import Layout
from zephyr.data import arrays
from zephyr.data.arrays import Tokens
from zephyr.model import Mistral
from zephyr.packing import Pair
from zephyr.run import exits
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json, locate

ROOT = Path(__file__).parent.parent
WORKERS = Path(__file__).parent / "workers"


@dataclass
class Limits:
    """What of a config `zephyr.data` reads; the lengths are recipe B's."""

    max_length: int = 1024
    max_prompt_length: int = 512
    empty_system: bool = True
    on_bad_row: str = "stop"


LETTERS = " ".join(map(chr, range(0xA1, 0xE8)))


LINES = (LETTERS, "<|user|> <|system|> <|assistant|>", "the cat sat on the mat")


@functools.cache
def pieces(size: int, lines: tuple[str, ...] = LINES, **options) -> bytes:
    """A tokenizer.model of `size` pieces in the manner of Mistral's, trained here."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "minloglevel": 2,
        "num_threads": 1,
        "byte_fallback": size > 256,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, **settings | options
    )
    return model.getvalue()


SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def shared(name: str) -> Path:
    """A file of real data that lies beside the checkout; where it is absent the test is skipped."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def gpt(*contents, system=None):
    head = [] if system is None else [{"from": "system", "value": system}]
    return head + [{"from": ("human", "gpt")[k % 2], "value": c} for k, c in enumerate(contents)]


def human(*contents):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[k % 2]}: {text}" for k, text in enumerate(contents))


def scored(prompt="Why?", **more):
    return {
        "source": "flan",
        "instruction": prompt,
        "completions": [
            {"model": "m", "response": "a", "overall_score": 9, "annotations": None},
            {"model": "n", "response": "b", "overall_score": 2, "annotations": None},
        ],
    } | more


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
    return Layout(position_T, ends, ends, None, max(lengths), max(lengths))


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


def torchrun(script: Path, where: Path, ranks: int = 2) -> list[dict]:
    """Run the script on the ranks with `where` as its argument; what each saved as RANK.pt."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        script,
        where,
    ]
    here = {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    process = subprocess.Popen(
        command, env=os.environ | here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.terminate()
    assert process.returncode == 0, said
    return [torch.load(where / f"{rank}.pt") for rank in range(ranks)]


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


SHAPE = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=24,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attn_implementation="eager",
)


DPO = (
    "--epochs 6 --batch 8 --lr 1e-3 --warmup 0.2 --beta 0.1 --precision fp32 "
    "--max-length 160 --max-prompt-length 96 --microbatch-tokens 4096"
).split()


SFT = "--epochs 6 --batch 1 --lr 1e-3 --max-length 2048 --precision fp32".split()


KEYS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
    "learning_rate",
)


EVALUATED = (*KEYS, *(f"eval_{key}" for key in KEYS))


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(tiny.WORDS) for _ in range(rng.randint(low, high)))


def run(script, place: Path, out: Path, *flags: str) -> list[dict]:
    """The script's main in this process; returns its metrics."""
    data = "pairs.jsonl" if script is train_dpo else "chats.jsonl"
    old = sys.argv
    sys.argv = [
        "train",
        "--model",
        str(place / "base"),
        "--data",
        str(place / data),
        "--out",
        str(out),
        *flags,
    ]
    try:
        script.main()
    finally:
        sys.argv = old
        if dist.is_initialized():
            dist.destroy_process_group()
    return read(out)


def launch(script: str, place: Path, out: Path, ranks: int, *flags: str, check: bool = True):
    """The script under torchrun, as a user starts it."""
    data = "pairs.jsonl" if script == "train_dpo.py" else "chats.jsonl"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        script,
        "--model",
        str(place / "base"),
        "--data",
        str(place / data),
        "--out",
        str(out),
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(out: Path) -> dict[str, torch.Tensor]:

    return load_file(out / "model" / "model.safetensors")


def same(rows: list[dict], expected: list[dict], rel: float = 1e-4, abs: float = 1e-5) -> None:
    assert [r["step"] for r in rows] == [r["step"] for r in expected]
    for row, right in zip(rows, expected, strict=True):
        for key in right.keys() & set(EVALUATED):
            assert row[key] == pytest.approx(right[key], rel=rel, abs=abs), (row["step"], key)


GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def chat(*contents, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[k % 2], "content": c} for k, c in enumerate(contents)]


def save(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def both_at_once(small, path, tmp_path) -> list[tuple[str, str]]:
    """What two processes print that build the same arrays, each done before either may go on."""
    both = [
        subprocess.Popen(
            [sys.executable, WORKERS / "together.py", small.path, path, tmp_path, name],
            cwd=Path(arrays.__file__).parent.parent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in "ab"
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return outputs


def trained_tokenizer(path: Path, text: str) -> Tokenizer:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 3),
            model_writer=file,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
            num_threads=1,
        )
    return Tokenizer(path)


def flash(q, k, v, *rest):
    """What the CUDA op returns, without its values: output, lse, state of a generator."""
    return torch.zeros_like(q), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def flash_backward(g, q, k, v, *rest):
    return tuple(map(torch.empty_like, (q, k, v)))


def speak(monkeypatch, *flags, said: str = "") -> None:
    """`python -m zephyr.generate` with the flags, hearing `said`."""
    monkeypatch.setattr(sys, "argv", ["zephyr/generate.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    exits.call(generate.main)
