"""The figures in files of annotations or judgments, with what they show of the judge.

Which kind a file is, its first row tells: AlpacaEval's annotations, or FastChat's judgments of
MT-Bench, of single answers or of pairs. Several files are of one benchmark; two judges of the same
answers give kappa.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations

from zephyr.data.readers import expand, read_rows
from zephyr.evals import (
    alpaca,
    alpaca_prompt,
    html,
    length_control,
    mt_bench,
    mt_bench_prompts,
    page,
)
from zephyr.files import atomic, check_outputs, home, plain, shown

ALPACA, MT_BENCH = "AlpacaEval's annotations", "MT-Bench's judgments"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", metavar="FILE", help=f"{ALPACA} or {MT_BENCH}")
    command.add_argument(
        "--alpaca-data",
        metavar="DIR",
        help="instruction_difficulty.csv and the gamed runs, for the length-controlled win rate",
    )
    command.add_argument("--questions", metavar="FILE", help="MT-Bench's, for other categories")
    command.add_argument(
        "--feedback", metavar="NAME", help="what labelled or wrote the models' training data"
    )
    command.add_argument("--json", metavar="OUT", help="the figures as a JSON object")
    command.add_argument("--html", metavar="OUT", help="a page with the figures and the answers")


def run(args: argparse.Namespace) -> str:
    return report(args.files, args.alpaca_data, args.questions, args.feedback, args.json, args.html)


def report(
    paths: Sequence[str],
    alpaca_data: str | None = None,
    questions: str | None = None,
    feedback: str | None = None,
    json_out: str | None = None,
    html_out: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return the page of files of one benchmark, with the notes at its end, and write their figures
    as JSON, and the page to click through, if there are paths to write them to."""
    json_out, html_out = (path and home(path) for path in (json_out, html_out))
    found = expand(paths)
    check_outputs([*found, *filter(None, [questions])], {"--json": json_out, "--html": html_out})
    if html_out:
        html.check_name(html_out)
    files = {str(path): list(read_rows(path)) for path in found}
    kinds = {path: kind(path, rows[0][1]) for path, rows in files.items()}
    first = next(iter(kinds))
    for path, name in kinds.items():
        if name != kinds[first]:
            raise ValueError(
                f"{path} has {name}, {first} has {kinds[first]}; show one benchmark at a time"
            )
    if kinds[first] == ALPACA:
        if questions:
            raise ValueError(f"--questions is for {MT_BENCH}, and {first} has {ALPACA}")
        figures = _alpaca(files, alpaca_data, feedback)
    else:
        if alpaca_data:
            raise ValueError(f"--alpaca-data is for {ALPACA}, and {first} has {MT_BENCH}")
        figures = _mt_bench(files, questions, feedback)
    said = [page.Said(note, "note") for note in notes]
    if any(is_own(row) for rows in files.values() for _, row in rows):
        said.append(page.OWN_PROMPTS)
    if not feedback:
        said.append(page.NO_FEEDBACK)
    blocks = page.blocks(figures) + said
    if json_out:
        with atomic(json_out) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())
    if html_out:
        html.write(html_out, figures, blocks, files, questions)
    return page.text(blocks)


def is_own(row: dict) -> bool:
    """Return True if the judge was asked by a prompt of our own."""
    judge = row.get("judge")
    names = [row.get("prompt"), *(judge[1:2] if isinstance(judge, list) else [])]
    own = alpaca_prompt.OWN_NAME, mt_bench_prompts.OWN
    return any(isinstance(name, str) and name.startswith(own) for name in names)


def kind(path: str, row: dict) -> str:
    """Return what the file with this first row holds."""
    if {"instruction", "preference"} <= row.keys():
        return ALPACA
    if "question_id" in row and ({"model", "score"} <= row.keys() or mt_bench.is_pair(row)):
        return MT_BENCH
    known = {"turns", "category"} <= row.keys() and "MT-Bench's questions"
    known = known or ("choices" in row and "FastChat's answers, which no judge has scored")
    known = known or ({"instruction", "output"} <= row.keys() and "outputs that no judge has seen")
    names = ", ".join(plain(name, 20) for name in list(row)[:4])
    what = known or f"a row with {names or 'nothing'}"
    raise ValueError(f"{path} starts with {what}; it is neither {ALPACA} nor {MT_BENCH}")


def _alpaca(files: dict[str, list], data: str | None, feedback: str | None) -> dict:
    runs = [alpaca.read(path, rows) for path, rows in files.items()]
    control = length_control.read(data) if data else None
    figures: dict[str, dict] = {}
    names = _names((a.model, a.judge) for a in runs)
    for a in runs:
        name = names[a.model, a.judge]
        if name in figures:
            raise ValueError(f"{a.path}: {plain(name)} was in an earlier file; show one of the two")
        rates = {"model": a.model, "baseline": a.baseline, "judge": a.judge}
        rates |= alpaca.win_rates(a)
        notes = ["no length-controlled win rate: it needs --alpaca-data DIR"]
        if control:
            controlled, notes = length_control.rate(a, control)
            rates |= controlled
        figures[name] = rates | alpaca.about_the_judge(a, feedback) | {"notes": notes}
    agreements = [
        alpaca.agreement(one, other)
        for one, other in combinations(runs, 2)
        if (one.model, one.baseline) == (other.model, other.baseline)
    ]
    figures = figures if len(runs) > 1 else next(iter(figures.values()))
    return _with(agreements, figures)


def _mt_bench(files: dict[str, list], questions: str | None, feedback: str | None) -> dict:
    category = mt_bench.categories(questions)
    judgments = [j for rows in files.values() for j in mt_bench.read(rows)]
    singles = [j for j in judgments if isinstance(j, mt_bench.Judgment)]
    games = [g for g in judgments if isinstance(g, mt_bench.Games)]
    by_model = _grouped(singles, lambda j: [(j.model, j.judge)])
    by_pair = _grouped(games, lambda g: [(model, g.judge) for model in g.models])
    names = _names([*by_model, *by_pair])
    figures: dict[str, dict] = {}
    for key, those in by_model.items():
        figures[names[key]] = mt_bench.scores(those, category, feedback)
    for key, those in by_pair.items():
        pairs = mt_bench.pairs(those, key[0], feedback) | {"n_questions_in_all": len(category)}
        figures[names[key]] = figures.get(names[key], {}) | {"pairs": pairs}
    agreements = [
        mt_bench.agreement(by_model[one], by_model[other])
        for one, other in combinations(by_model, 2)
        if one[0] == other[0]
    ]
    by_judge = _grouped(games, lambda g: [(frozenset(g.models), g.judge)])
    agreements += [
        mt_bench.agreement_on_games(by_judge[one], by_judge[other])
        for one, other in combinations(by_judge, 2)
        if one[0] == other[0]
    ]
    return _with(agreements, figures)


def _grouped(items: Iterable, keys: Callable) -> dict:
    out: dict[Hashable, list] = {}
    for item in items:
        for key in keys(item):
            out.setdefault(key, []).append(item)
    return out


def _names(runs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the name under which each (model, judge) is shown: the model's, and the judge's behind
    it if several have judged that model."""
    runs = list(dict.fromkeys(runs))
    judged = Counter(model for model, _ in runs)
    names = {
        (model, judge): model if judged[model] == 1 else f"{model} ({judge})"
        for model, judge in runs
    }
    for name, times in Counter(names.values()).items():
        if times > 1:
            raise ValueError(f"two runs are both shown as {shown(name)}; show one of the two")
    return names


def _with(agreements: list[dict], figures: dict) -> dict:
    """Return the figures with how judges agree, where there are two of them."""
    if agreements:
        if "agreement" in figures:
            raise ValueError(
                "a model has the name 'agreement', under which it stands how judges agree; show "
                "one judge's files at a time"
            )
        figures = figures | {"agreement": agreements}
    return figures
