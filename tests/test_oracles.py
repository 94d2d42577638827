"""FastChat and alpaca_eval themselves: the same prompts, verdicts, files and figures as ours."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from judge_helpers import judging

from helpers import shared
from zephyr.data.readers import write_rows
from zephyr.evals import __main__ as evals_command
from zephyr.evals import mt_bench, mt_bench_prompts

WORKER = Path(__file__).parent / "workers" / "oracles.py"
CLF = "alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Both originals, installed beside what the other tests use; torch is the same."""
    place = tmp_path_factory.mktemp("originals")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place)]
    # alpaca_eval asks setuptools for its own version
    needs = ["alpaca-eval==0.6.6", "setuptools<80", "anthropic", "shortuuid", "psutil"]
    subprocess.run([*pip, *needs], check=True)
    # without what its model server needs
    subprocess.run([*pip, "--no-deps", "fschat==0.2.36", "accelerate"], check=True)
    return place


def draw(*parts: object, below: int) -> int:
    """A number that depends on the parts alone."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest(), 16) % below


def text(*parts: object) -> str:
    """An answer, with what a template could take for its own. Not {output_2}: of an answer with it,
    alpaca_eval asks something else than it was given."""
    words = ["{answer_b}", "{}", "{", "}}", "[[A]]", "naïve", "word", "\n", "%s", "\\n"]
    return "It " + " ".join(words[draw(*parts, k, below=10)] for k in range(draw(*parts, below=40)))


def says(body: dict) -> str:
    """A judge's words: all that can be read, in one bracket or two, and what cannot."""
    kinds = ["[[A]]", "So [[B]]", "[[C]]", "[[7.5]]", "Rating: [8]", "no idea", "[[A]] [[3]]"]
    return kinds[draw(body["messages"], body.get("seed"), below=len(kinds))]


def knows(body: dict) -> dict:
    """Its log-probs: of both letters, of one, and now and then of none."""
    both = {"m": -draw(body["messages"], below=999) / 100, "M": -draw(body, below=999) / 100}
    none = {"Both": -0.1}
    return [both, both, both, {"m": -0.3, "The": -2}, {"M": -9.0}, none][draw(body, "k", below=6)]


def judged(server, folder: Path, *argv) -> dict:
    named = ["--judge", f"gpt-4@{server.url}", "--json", folder / "figures.json"]
    evals_command.main([*map(str, ["judge", *argv, *named])])
    return json.loads((folder / "figures.json").read_text())


def mt_bench_files(folder: Path, prompts: str) -> None:
    """80 questions, two models' answers, references, and the eight prompts."""
    categories = mt_bench.categories(None)
    questions = [
        {"question_id": n, "category": c, "turns": [text("q", n, k) for k in (1, 2)]}
        for n, c in categories.items()
    ]
    write_rows(folder / "question.jsonl", questions)
    for part, name in (("answers", "ours"), ("answers", "theirs"), ("references", "gpt-4")):
        lines = [
            {
                "question_id": n,
                "answer_id": f"{name}{n}",
                "model_id": name,
                "choices": [{"index": 0, "turns": [text(name, n, k) for k in (1, 2)]}],
                "tstamp": 0.0,
            }
            for n in categories
        ]
        write_rows(folder / part / f"{name}.jsonl", lines)
    if prompts == "own":
        lines = [
            {
                "name": name,
                "type": "pairwise" if "pair" in name else "single",
                "system_prompt": prompt.system,
                "prompt_template": prompt.template,
                "output_format": "[[A]]" if "pair" in name else "[[rating]]",
            }
            for name, prompt in mt_bench_prompts.read(None).items()
        ]
        write_rows(folder / "judge_prompts.jsonl", lines)
    else:
        fastchats = shared("mt_bench/judge_prompts.jsonl").read_bytes()
        (folder / "judge_prompts.jsonl").write_bytes(fastchats)


def alpaca_files(folder: Path) -> None:
    for name in ("ours", "base"):
        outputs = [
            {
                "dataset": "d",
                "instruction": f"{k} {text('i', k)}",
                "output": text(name if k % 20 else "equal", k),
                "generator": name,
            }
            for k in range(120)
        ]
        (folder / f"{name}.json").write_text(json.dumps(outputs))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["own", "FastChat's"])
def test_the_originals_agree(prompts, place, tmp_path):
    """They ask what we ask, and make the same verdicts, files and figures of the replies."""
    mt_bench_files(tmp_path, prompts)
    alpaca_files(tmp_path)
    common = ["mt-bench", tmp_path / "answers/ours.jsonl"]
    common += ["--questions", tmp_path / "question.jsonl"]
    common += ["--references", tmp_path / "references/gpt-4.jsonl"]
    common += ["--prompts", tmp_path / "judge_prompts.jsonl"]
    against = ["--against", tmp_path / "answers/theirs.jsonl"]
    outputs = ["alpaca", tmp_path / "ours.json", "--against", tmp_path / "base.json"]
    outputs += ["--prompt", place / CLF]
    with judging() as server:
        server.says, server.knows = says, knows
        single = judged(server, tmp_path, *common, "--out", tmp_path / "single.jsonl")
        pair = judged(server, tmp_path, *common, *against, "--out", tmp_path / "pair.jsonl")
        one = judged(
            server, tmp_path, *outputs, "--order", "alpaca", "--out", tmp_path / "alpaca.json"
        )
        both = judged(server, tmp_path, *outputs, "--out", tmp_path / "both.json")
        # of what was asked again, the last reply counts
        write_rows(tmp_path / "replies.jsonl", server.replies)
    done = subprocess.run(
        [sys.executable, WORKER, str(place), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    for kind in ("single", "pair"):
        ours = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        theirs = {(row["question_id"], row["turn"]): row for row in found["fastchat"][kind]}
        assert len(ours) == len(theirs) == 160
        for row in ours:
            other = theirs[row["question_id"], row["turn"]]
            del row["tstamp"], other["tstamp"]
            if prompts == "own":
                assert row["judge"][1] == other["judge"][1]
            assert row == other
    assert found["fastchat"]["read"] == [160, 160]
    shown = found["fastchat"]["single shown"]
    assert [float(line.split()[-1]) for _, line in shown] == pytest.approx(
        [single["ours"][name] for name in ("turn_1", "turn_2", "average")], abs=1e-9
    )
    for name, line in found["fastchat"]["pair shown"]:
        win, loss, tie, _, _, adjusted = map(float, line.split())
        figures = pair[name]["pairs"]
        assert (win, loss, tie) == (figures["wins"], figures["losses"], figures["ties"])
        assert 100 * adjusted == pytest.approx(figures["win_rate"], abs=1e-9)
    assert single["ours"]["n_failures"] > 0 and pair["ours"]["pairs"]["n_failures"] > 0

    ours = json.loads((tmp_path / "alpaca.json").read_text())
    theirs = {row["instruction"]: row for row in found["alpaca"]["annotations"]}
    assert len(ours) == len(theirs) == 120
    for row in ours:
        other = theirs[row["instruction"]]["preference"]
        other = math.nan if other is None else other
        mine = math.nan if row["preference"] is None else row["preference"]
        assert mine == pytest.approx(other, abs=1e-12, nan_ok=True)
    assert any(row["preference"] is None for row in ours)
    rows = {row["instruction"]: row for row in json.loads((tmp_path / "both.json").read_text())}
    assert len(found["alpaca"]["parsed"]) > 100
    for instruction, exchanged, preference in found["alpaca"]["parsed"]:
        ours = rows[instruction][f"preference_model_{'first' if exchanged else 'second'}"]
        ours = math.nan if ours is None else ours
        assert ours == pytest.approx(preference, abs=1e-12, nan_ok=True)
    for figures, other in ((one, found["alpaca"]["win rate"]), (both, found["alpaca"]["both"])):
        for name, value in other.items():
            assert figures[name] == pytest.approx(value, abs=1e-9), name
