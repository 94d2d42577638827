"""The scripts end to end, on a two-layer Mistral whose window is shorter than its rows.

An independent plain implementation (transformers, textbook losses, torch's AdamW) gives the
trajectory; then everything that may change speed only must leave it as it is.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import MistralForCausalLM
from transformers.optimization import get_cosine_schedule_with_warmup

import train_dpo
import train_sft
from run_helpers import (
    DPO,
    EVALUATED,
    SFT,
    Theirs,
    in_the_textbook,
    launch,
    read,
    run,
    same,
    weights_of,
)
from zephyr import reference
from zephyr.run import checkpoint
from zephyr.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_dpo_equals_the_textbook(place, tmp_path, loss):
    rows = run(train_dpo, place, tmp_path / "run", *DPO, "--loss", loss)
    expected = in_the_textbook(place, loss, Theirs(place / "base"))
    same(rows, expected, rel=1e-4, abs=1e-4)
    assert [r["rewards/accuracies"] for r in rows] == [r["rewards/accuracies"] for r in expected]
    start = math.log(2) if loss == "dpo" else 25.0
    assert rows[0]["loss"] == pytest.approx(start, abs=1e-6)
    assert rows[0]["rewards/margins"] == 0 and rows[0]["rewards/accuracies"] == 0
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"], "nothing was learned, so nothing was compared"


def test_the_textbook_runs_by_itself(tmp_path):
    """From ln 2, on the village: the loss falls, and the chosen answers' reward rises above the
    rejected ones'."""
    assert len((ROOT / "zephyr" / "textbook.py").read_text().splitlines()) <= 100
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "zephyr.textbook"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    steps = [[float(line[k]) for k in (3, 5, 6, 8)] for line in lines]
    assert len(steps) == 20 and steps[0] == [0.6931, 0, 0, 0]
    assert sum(loss for loss, *_ in steps[-3:]) / 3 < 0.5  # one batch of eight may be a hard one
    for _, chosen, rejected, margin in steps[-3:]:
        assert margin == pytest.approx(chosen - rejected, abs=2e-4) and margin > 0.3


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_sft_equals_the_textbook(place, tmp_path, train_on):
    """One row holds the whole epoch, so that no document is cut and each can run alone."""
    rows = run(train_sft, place, tmp_path / "run", *SFT, "--train-on", train_on)
    tokenizer, steps = Tokenizer(place / "base"), 6
    chats = [json.loads(line) for line in (place / "chats.jsonl").read_text().splitlines()]
    model = MistralForCausalLM.from_pretrained(place / "base", attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.999), 1e-8, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, steps)
    for row in rows:
        terms = []
        for chat in chats:
            ids, mask = (torch.tensor(x) for x in tokenizer.render(chat["messages"]))
            trained = mask[1:] if train_on == "assistant" else torch.ones_like(mask[1:])
            logits = model(ids[None]).logits[0, :-1]
            terms.append(F.cross_entropy(logits, ids[1:], reduction="none")[trained])
        loss = torch.cat(terms).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4), row["step"]
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4), row["step"]
        assert row["learning_rate"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


@pytest.mark.parametrize(
    "change",
    ["--microbatch-tokens 200", "--microbatch-tokens 140", "--recompute full", "--reference live"],
)
def test_the_trajectory_is_the_same(place, tmp_path, baseline, change):
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    rows = run(train_dpo, place, tmp_path / "run", *DPO, *held_out, *change.split())
    same(rows, baseline[0])
    for name, weight in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, baseline[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
def test_the_trajectory_is_the_same_with_every_kernel(
    place, tmp_path, baseline, implementation, monkeypatch
):
    """Triton runs interpreted. There are two ranks, so the head's weight is gathered by FSDP, and
    either has all its pairs in one pack."""
    monkeypatch.setenv("ZEPHYR_KERNELS", implementation)
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    launch("train_dpo.py", place, tmp_path / "run", 2, *DPO, *held_out)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kernels"] == implementation
    same(read(tmp_path / "run"), baseline[0])
    for name, weight in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, baseline[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("loss, precision", [("dpo", "bf16"), ("ipo", "fp32"), ("robust", "fp32")])
def test_triton_and_reference_agree(place, tmp_path, loss, precision, monkeypatch):
    smoothing = "0" if loss == "ipo" else "0.1"
    flags = (*DPO, "--loss", loss, "--label-smoothing", smoothing, "--precision", precision)
    rows = []
    for implementation in ("reference", "triton"):
        monkeypatch.setenv("ZEPHYR_KERNELS", implementation)
        rows.append(run(train_dpo, place, tmp_path / implementation, *flags))
    same(rows[1], rows[0], *((1e-4, 1e-5) if precision == "fp32" else (0.05, 0.05)))
    assert rows[0][0]["loss"] != rows[0][-1]["loss"]


def test_two_ranks_equal_one_in_packs_so_small_that_some_are_empty(
    place, tmp_path, baseline, monkeypatch
):
    """The cache is empty, so the reference pass runs on both."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    flags = (*DPO, *held_out, "--microbatch-tokens", "150")
    launch("train_dpo.py", place, tmp_path / "run", 2, *flags)
    same(read(tmp_path / "run"), baseline[0])
    for name, weight in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, baseline[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_ranks_equal_one_in_sft(place, tmp_path):
    flags = (
        *SFT,
        "--batch",
        "4",
        "--max-length",
        "48",
        "--microbatch-tokens",
        "96",
        "--eval-data",
        str(place / "chats.jsonl"),
        "--train-on",
        "assistant",
    )
    expected = run(train_sft, place, tmp_path / "one", *flags)
    launch("train_sft.py", place, tmp_path / "two", 2, *flags)
    same(read(tmp_path / "two"), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_resumed_is_the_run_that_would_have_been(place, tmp_path, precision):
    """Each checkpoint follows an evaluation, after which FSDP (bf16) has parameters gathered."""
    flags = (
        *DPO,
        "--save-every",
        "2",
        "--keep",
        "0",
        "--eval-every",
        "2",
        "--precision",
        precision,
        "--eval-data",
        str(place / "test.jsonl"),
    )
    whole = run(train_dpo, place, tmp_path / "whole", *flags)
    expected = weights_of(tmp_path / "whole")
    checkpoint.export(tmp_path / "whole" / "checkpoints" / "latest", tmp_path / "latest" / "model")
    exported = weights_of(tmp_path / "latest")
    assert all(torch.equal(exported[name], expected[name]) for name in expected), "fp32 masters"
    for name in ("step-000004", "step-000006"):
        (tmp_path / "whole" / "checkpoints" / name).rename(tmp_path / name)
    (tmp_path / "whole" / "model").rename(tmp_path / "model")
    resumed = run(train_dpo, place, tmp_path / "whole", *flags)
    for a, b in zip(resumed, whole, strict=True):
        for key in EVALUATED:
            assert a.get(key) == b.get(key), f"step {a['step']}: {key} not bit for bit"
    got = weights_of(tmp_path / "whole")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_run_goes_on_on_any_number_of_ranks(place, tmp_path, baseline):
    """Two ranks to step 2, one to step 4, then two replicas of two shards each."""
    out = tmp_path / "run"
    flags = (
        *DPO,
        "--save-every",
        "2",
        "--keep",
        "0",
        "--eval-every",
        "3",
        "--eval-data",
        str(place / "test.jsonl"),
    )

    def forget(steps: int) -> None:
        """As if the run had been killed right after the checkpoint of that step."""
        (out / "model").rename(tmp_path / f"model {steps}")
        for folder in checkpoint.complete(out)[steps // 2 :]:
            folder.rename(tmp_path / f"{folder.name} of {steps}")

    launch("train_dpo.py", place, out, 2, *flags)
    forget(2)
    run(train_dpo, place, out, *flags)
    forget(4)
    launch("train_dpo.py", place, out, 4, *flags, "--replicas", "2")
    same(read(out), baseline[0])
    for name, weight in weights_of(out).items():
        torch.testing.assert_close(weight, baseline[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_bf16_starts_at_ln_2_and_learns(place, tmp_path):
    rows = run(train_dpo, place, tmp_path / "run", *DPO, "--precision", "bf16")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "cached in the same rows"
    assert rows[-1]["loss"] < 0.6


def test_a_poisoned_reference_stops_the_run(place, tmp_path, monkeypatch):
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    run(train_dpo, place, tmp_path / "one", *DPO)
    (path,) = (tmp_path / "cache").glob("reference-*.npy")
    reference._write(path, torch.from_numpy(np.load(path)) + torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="before the first update policy and reference must agree"):
        run(train_dpo, place, tmp_path / "two", *DPO)


def test_the_cached_reference_is_what_the_loss_sees(place, tmp_path, monkeypatch):
    """A poison too small for the check at the start still shows in the margin."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    clean = run(train_dpo, place, tmp_path / "one", *DPO)
    (path,) = (tmp_path / "cache").glob("reference-*.npy")
    reference._write(path, torch.from_numpy(np.load(path)) - torch.tensor([2e-4, 0.0]))
    rows = run(train_dpo, place, tmp_path / "two", *DPO)
    assert clean[0]["rewards/margins"] == 0
    assert rows[0]["rewards/margins"] == pytest.approx(2e-5, rel=0.1)


def test_a_finished_run_is_not_overwritten(place, tmp_path):
    one = (*DPO, "--steps", "1", "--warmup", "0")
    run(train_dpo, place, tmp_path / "run", *one)
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    run(train_dpo, place, tmp_path / "run", *one)
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="run holds another run: --steps was 1, is 2. Continue it"):
        run(train_dpo, place, tmp_path / "run", *one, "--steps", "2")
    run(train_dpo, place, tmp_path / "run", *one, "--resume", "fresh")
    assert (tmp_path / "run.1" / "model").exists() and (tmp_path / "run" / "model").exists()


def test_a_mistake_is_one_line_under_torchrun_and_the_exit_code_tells(place, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text((place / "pairs.jsonl").read_text() + '{"chosen": \n')
    done = launch(
        "train_dpo.py", place, tmp_path / "run", 2, *DPO, "--data", str(broken), check=False
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_dpo.py: ")]
    assert len(lines) == 1 and f"{broken.name}:9" in lines[0], done.stderr
    assert not (tmp_path / "run").exists(), "a mistake in the data leaves no run folder"
