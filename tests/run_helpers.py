"""How the tests run the scripts, alone and on many ranks, and compare what they log."""

import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import MistralForCausalLM
from transformers.optimization import get_cosine_schedule_with_warmup

import train_dpo
from benchmarks import tiny
from helpers import ROOT, WORKERS
from zephyr import generate, textbook
from zephyr.data import arrays
from zephyr.run import exits
from zephyr.tokenizer import Tokenizer


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


SHAPE = {k: v for k, v in tiny.SHAPE.items() if k != "rope_theta"} | {
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


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


def paths(place: Path, data: str, out: Path) -> list[str]:
    """The flags that say where a run's model and data are, and where it goes."""
    where = {"--model": place / "base", "--data": place / data, "--out": out}
    return [str(x) for pair in where.items() for x in pair]


def run(script, place: Path, out: Path, *flags: str) -> list[dict]:
    """The script's main in this process; returns its metrics."""
    data = "pairs.jsonl" if script is train_dpo else "chats.jsonl"
    old = sys.argv
    sys.argv = ["train", *paths(place, data, out), *flags]
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
        *paths(place, data, out),
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


class Theirs(torch.nn.Module):
    """transformers' Mistral as zephyr/textbook.py calls a model."""

    def __init__(self, folder: Path):
        super().__init__()
        self.model = MistralForCausalLM.from_pretrained(folder, attn_implementation="eager")

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self.model(ids_T[None]).logits[0]


def ipo(chosen, rejected, beta: float, lengths: tuple[int, int]):
    """Eq. 17 of arXiv:2310.12036, on means over the tokens."""
    return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2


def in_the_textbook(
    place: Path, loss: str, policy: torch.nn.Module, steps: int = 6, lr: float = 1e-3
) -> list[dict]:
    """zephyr/textbook.py with transformers' learning rates."""
    tokenizer = Tokenizer(place / "base")
    pairs = []
    for line in (place / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.prompt(row["chosen"][:-1])
        whole = [tokenizer.render(row[side]).ids for side in ("chosen", "rejected")]
        assert all(ids[: len(prompt)] == prompt for ids in whole)
        pairs.append((prompt, *(ids[len(prompt) :] for ids in whole)))
    idle = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr)
    factor = get_cosine_schedule_with_warmup(idle, math.ceil(0.2 * steps), steps).lr_lambdas[0]
    rates = [lr * factor(step) for step in range(steps)]
    objective = textbook.dpo if loss == "dpo" else ipo
    rows = textbook.train(policy, [pairs] * steps, rates, 0.1, objective)
    return [row | {"step": k + 1, "learning_rate": rates[k]} for k, row in enumerate(rows)]


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(out: Path) -> dict[str, torch.Tensor]:

    return load_file(out / "model" / "model.safetensors")


def same(rows: list[dict], expected: list[dict], rel: float = 1e-4, abs: float = 1e-5) -> None:
    assert [r["step"] for r in rows] == [r["step"] for r in expected]
    for row, right in zip(rows, expected, strict=True):
        for key in right.keys() & set(EVALUATED):
            assert row[key] == pytest.approx(right[key], rel=rel, abs=abs), (row["step"], key)


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


def speak(monkeypatch, *flags, said: str = "") -> None:
    """`python -m zephyr.generate` with the flags, hearing `said`."""
    monkeypatch.setattr(sys, "argv", ["zephyr/generate.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    exits.call(generate.main)
