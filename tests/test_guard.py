"""Steps that are not finite are not taken and name their rows; spikes are reported."""

import json
import math
import random

import numpy as np
import pytest
import torch

import train_dpo
import train_sft
from run_helpers import DPO, SFT, launch, run, weights_of
from zephyr import errors, reference
from zephyr.distributed import group
from zephyr.run import checkpoint
from zephyr.run.guard import Guard

FLAGS = (*DPO, "--batch", "4", "--epochs", "2")


@pytest.fixture
def ranks():
    yield group.start()
    group.finish()


def guard(ranks, policy: str = "stop", kept=()) -> Guard:
    return Guard(policy, lambda row: f"pairs.jsonl:{row + 1}", ranks, kept)


def step(g: Guard, number: int, losses: list[float], norm: float) -> bool:
    g.saw(torch.arange(len(losses)), torch.tensor(losses))
    g.saw([], torch.zeros(0))  # a rank that has nothing left
    return g.report(number, torch.tensor(norm), g.broken())


def test_a_finite_step_is_taken_in_silence(ranks, capsys):
    assert step(guard(ranks), 1, [0.1, 0.2], 3.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_rows(ranks, value):
    message = (
        r"^step 7: the loss is not finite in pairs.jsonl:2, pairs.jsonl:3; the step is not "
        "taken. Look at these rows, lower --lr, or"
    )
    with pytest.raises(errors.NonFinite, match=message):
        step(guard(ranks), 7, [0.1, value, value], 3.0)


def test_a_gradient_that_is_not_finite_names_the_largest_losses(ranks):
    message = (
        "step 7: the gradient norm is inf; every loss is finite, the largest are of "
        "pairs.jsonl:3, pairs.jsonl:1, pairs.jsonl:2; the step"
    )
    with pytest.raises(errors.NonFinite, match=message):
        step(guard(ranks), 7, [0.3, 0.2, 0.4, 0.1], math.inf)


def test_skipping_stops_at_the_third_in_a_row_and_the_count_is_kept(ranks, capsys):
    g = guard(ranks, "skip")
    answers = [step(g, k, [0.1], norm) for k, norm in enumerate([math.nan, math.nan, 1, math.nan])]
    assert answers == [False, False, True, False]
    assert capsys.readouterr().err.count("the step is not taken\n") == 3
    g = guard(ranks, "skip", [json.loads(json.dumps(g.state()))])
    assert not step(g, 5, [math.nan], 1.0)
    with pytest.raises(errors.NonFinite, match="step 6: .*, the third in a row: lower --lr"):
        step(g, 6, [0.1], math.nan)


def test_a_spike_is_reported_and_taken(ranks, capsys):
    g, rng = guard(ranks), random.Random(0)
    for k in range(60):
        assert step(g, k, [0.1], 1 + 0.1 * rng.random())
    assert capsys.readouterr().err == "", "no alarm without a cause"
    g = guard(ranks, kept=[json.loads(json.dumps(g.state()))])
    assert step(g, 60, [0.1, 9.0], 1.5)
    err = capsys.readouterr().err
    assert "step 60: the gradient norm 1.5 is far above the last 60 steps', 1.0" in err
    assert err.endswith("largest losses: pairs.jsonl:2, pairs.jsonl:1\n")
    few = guard(ranks)
    assert all(step(few, k, [0.1], 10.0**k) for k in range(20)), "too few to judge by"
    assert capsys.readouterr().err == ""


@pytest.fixture
def poison(place, tmp_path, monkeypatch):
    """Makes the losses of the first run's second step infinite, through the cached reference;
    returns the lines of those pairs in the file."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    run(train_dpo, place, tmp_path / "clean", *FLAGS)
    (path,) = (tmp_path / "cache").glob("reference-*.npy")
    table = np.load(path)
    second = np.random.default_rng([42, 0]).permutation(8)[4:]

    def poison(count: int) -> list[int]:
        table[second[:count], 0] = np.inf
        reference._write(path, torch.from_numpy(table))
        return sorted(int(k) + 1 for k in second[:count])

    return poison


def test_a_run_stops_before_the_step_and_its_last_checkpoint_stands(place, tmp_path, poison):
    (line,) = poison(1)
    message = f"step 2: the loss is not finite in .*/pairs.jsonl:{line}; the step is not taken"
    with pytest.raises(errors.NonFinite, match=message):
        run(train_dpo, place, tmp_path / "run", *FLAGS, "--save-every", "1", "--no-save-async")
    (last,) = checkpoint.complete(tmp_path / "run")
    assert last.name == "step-000001" and checkpoint.verified(last)["step"] == 1
    done = launch("train_dpo.py", place, tmp_path / "two", 2, *FLAGS, check=False)
    ours = ("train_dpo.py:", "train_dpo.py (")
    said = [text for text in done.stderr.splitlines() if text.startswith(ours)]
    assert len(said) == 1 and f"not finite in {place}/pairs.jsonl:{line}; the" in said[0]
    assert "exitcode  : 4" in done.stderr


def test_a_run_that_skips_goes_on_without_the_step(place, tmp_path, poison, capsys):
    poison(1)
    rows = run(train_dpo, place, tmp_path / "run", *FLAGS, "--on-nonfinite", "skip")
    broken = [row["step"] for row in rows if row["loss"] is None]
    assert len(rows) == 4 and len(broken) == 2 and broken[0] == 2
    assert capsys.readouterr().err.count("; the step is not taken") == 2
    assert all(x.isfinite().all() for x in weights_of(tmp_path / "run").values())


def test_three_in_a_row_stop_even_a_run_that_skips(place, tmp_path, poison):
    poison(4)
    with pytest.raises(
        errors.NonFinite, match="step 4: the loss is not finite in .*third in a row"
    ):
        run(train_dpo, place, tmp_path / "run", *FLAGS, "--on-nonfinite", "skip")


def test_sft_names_the_documents_of_the_micro_batch(place, tmp_path, monkeypatch):
    real = train_sft.losses.sft
    monkeypatch.setattr(train_sft.losses, "sft", lambda logprob_N: real(logprob_N) * math.nan)
    flags = (*SFT, "--max-length", "48", "--microbatch-tokens", "48")
    with pytest.raises(errors.NonFinite, match=r"1: the loss is not finite in .*chats.jsonl:\d"):
        run(train_sft, place, tmp_path / "run", *flags)
