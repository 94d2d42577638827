"""Which held-out pairs a model ranks rightly: against a run's evaluation and against logits."""

import argparse
import json
import math
import re

import numpy as np
import pytest
import torch

import train_dpo
from run_helpers import DPO, run
from zephyr import config, generate
from zephyr.data.readers import read_rows, write_rows
from zephyr.evals import __main__ as evals_command
from zephyr.evals import pairs
from zephyr.evals.pairs import Ranked


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A run's folder, and its last evaluation on test.jsonl."""
    out = tmp_path_factory.mktemp("aligned") / "run"
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    rows = run(train_dpo, place, out, *DPO, *held_out)
    return out, [row for row in rows if "eval_loss" in row][-1]


def command(*argv) -> str:
    parser = argparse.ArgumentParser()
    pairs.add_arguments(parser)
    lengths = "--max-length", "160", "--max-prompt-length", "96"
    return pairs.run(parser.parse_args([*map(str, argv), *lengths]))


def test_the_share_and_the_margin_are_those_of_the_runs_evaluation(trained, place, tmp_path):
    out, last = trained
    model, data = out / "model", place / "test.jsonl"
    said = command(model, "--reference", place / "base", "--data", data, "--json", tmp_path / "o")
    found = json.loads((tmp_path / "o").read_text())["all"]
    assert found["pairs"] == 5
    assert found["accuracy"] == pytest.approx(last["eval_rewards/accuracies"], abs=1e-6)
    assert 0.1 * found["margin"] == pytest.approx(last["eval_rewards/margins"], rel=1e-3)
    assert re.search(r"^all +5 +\d+\.0% ", said, re.M)
    assert said.endswith("at β = 0.1."), "the run's own"
    with_another = command(model, "--reference", model, "--data", data, "--beta", "0.3")
    assert with_another.endswith("at β = 0.3.") and " 0.000\n" in with_another


@torch.inference_mode()
def log_probs(folder, row) -> list[float]:
    """Of both responses, each alone behind its prompt."""
    model, tokenizer = generate.load(folder)
    found = []
    for side in ("chosen", "rejected"):
        prompt = tokenizer.prompt(row[side][:-1])
        ids = tokenizer.render(row[side]).ids
        logits = model.logits(torch.tensor(ids[:-1]), generate.Layout.alone(len(ids) - 1))
        each = logits.double().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        found.append(float(each[len(prompt) - 1 :].sum()))
    return found


def test_the_command(trained, place, capsys):
    argv = [trained[0] / "model", "--reference", place / "base", "--data", place / "test.jsonl"]
    evals_command.main(["pairs", *map(str, argv)])
    assert capsys.readouterr().out.splitlines()[1].startswith("all ")


def test_margins_are_those_of_each_response_alone(trained, place, tmp_path):
    """And each pair has the source and the scores of its own line, if that has any."""
    rows = [row for _, row in read_rows(place / "test.jsonl")]
    more = {"source": "a", "score_chosen": 9, "score_rejected": 2.5}
    data = tmp_path / "pairs.jsonl"
    write_rows(data, [rows[0] | more, rows[1], rows[2] | more | {"source": "b"}])
    c = config.DPOConfig(
        model=str(trained[0] / "model"),
        data=(str(data),),
        out="-",
        max_length=160,
        max_prompt_length=96,
        microbatch_tokens=200,
    )
    ranked = pairs.rank(c.model, str(place / "base"), c)
    for margin, row in zip(ranked.margin_P, rows, strict=False):
        (a, b), (c_, d) = (log_probs(f, row) for f in (trained[0] / "model", place / "base"))
        assert margin == pytest.approx((a - c_) - (b - d), abs=1e-3)
    assert ranked.source_P == ["a", None, "b"]
    np.testing.assert_array_equal(ranked.gap_P, [6.5, math.nan, 6.5])


def made(margin, chosen, rejected, source=None, gap=None) -> Ranked:
    n = len(margin)
    return Ranked(
        np.array(margin, float),
        np.array([chosen, rejected]).T,
        source or [None] * n,
        np.array([math.nan] * n if gap is None else gap, float),
    )


def test_a_model_that_learned_length_alone_is_exposed():
    """Its share of all pairs is 70 %, as chosen is longer in as many."""
    rng = np.random.default_rng(0)
    longer = np.arange(200) < 140
    chosen, rejected = np.where(longer, 30, 10), np.where(longer, 10, 30)
    rows = pairs.summary(made((chosen - rejected) * rng.random(200), chosen, rejected))
    shares = {title: row["accuracy"] for title, row in rows.items()}
    assert shares == {"all": 0.7, "chosen is longer": 1.0, "chosen is shorter": 0.0}
    assert "it has learned length" in pairs.table(rows, 0.1)
    rows = pairs.summary(made(rng.random(200), chosen, rejected))
    assert "it has learned length" not in pairs.table(rows, 0.1)


def test_a_source_reaches_the_terminal_as_text():
    ranked = Ranked(np.ones(2), np.ones((2, 2)), ["\x1b[31mred", "y" * 90], np.full(2, math.nan))
    said = pairs.table(pairs.summary(ranked), 0.1)
    assert "\x1b" not in said and len(set(map(len, said.splitlines()[:4]))) == 1


def test_no_figures_are_written_over_the_pairs(trained, place):
    data = place / "test.jsonl"
    before = data.read_bytes()
    with pytest.raises(ValueError, match="would overwrite this file: it is read"):
        command(trained[0] / "model", "--reference", place / "base", "--data", data, "--json", data)
    assert data.read_bytes() == before


def test_groups_and_their_shares():
    """Every pair with scores is in one group of gaps; a margin of 0 is no right one."""
    ranked = made(
        [1, -1, 0, 2, 3, -2],
        [5, 5, 5, 1, 2, 9],
        [4, 5, 6, 2, 2, 1],
        ["x", "x", None, "y", "y", "y"],
        [1, 2, 3, 4, 5, math.nan],
    )
    rows = pairs.summary(ranked)
    assert {title: (row["pairs"], row["accuracy"]) for title, row in rows.items()} == {
        "all": (6, 0.5),
        "chosen is longer": (2, 0.5),
        "chosen is shorter": (2, 0.5),
        "equally long": (2, 0.5),
        "score gap up to 2.33333": (2, 0.5),
        "score gap above 2.33333, up to 3.66667": (1, 0.0),
        "score gap above 3.66667": (2, 1.0),
        "source x": (2, 0.5),
        "source y": (3, 2 / 3),
    }
    assert rows["all"]["margin"] == 0.5


def test_no_score_gap_is_cut_short():
    ranked = made([1] * 6, [4] * 6, [3] * 6, [None] * 6, [1.23456789 + k / 7 for k in range(6)])
    text = pairs.table(pairs.summary(ranked), beta=0.1)
    assert "score gap above 1.47266, up to 1.71076  " in text and "..." not in text
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1, "columns stay in line"


@pytest.mark.parametrize("right, count", [(0, 1), (1, 1), (9, 10), (0, 50), (128, 200)])
def test_intervals_hold_the_shares_that_would_not_be_odd(right, count):
    """A bound b solves (p - b)² = z² b (1 - b) / n."""
    p, bounds = right / count, pairs.interval(right, count)
    for b in bounds:
        assert (p - b) ** 2 == pytest.approx(1.959964**2 * b * (1 - b) / count, abs=1e-12)
    assert -1e-12 <= bounds[0] <= p <= bounds[1] <= 1 + 1e-12 and bounds[0] < bounds[1]


def test_mistakes_cost_one_line(trained, place, tmp_path, folder):
    model, data = trained[0] / "model", place / "test.jsonl"
    other = [model, "--reference", folder, "--data", data]
    with pytest.raises(ValueError, match="has another tokenizer than .*; give the model that tra"):
        command(*other)
    same = [model, "--reference", place / "base", "--data"]
    with pytest.raises(ValueError, match="^--beta 0.0 must be finite and above 0"):
        command(*same, data, "--beta", "0")
    with pytest.raises(ValueError, match=r"nothing\.jsonl"):
        command(*same, tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="no-model"):
        command(tmp_path / "no-model", "--reference", place / "base", "--data", data)
