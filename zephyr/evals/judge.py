"""A model judges answers: MT-Bench's, alone or beside another model's, and AlpacaEval's.

    python -m zephyr.evals judge mt-bench ANSWERS --questions question.jsonl \\
        --references reference_answer/gpt-4.jsonl --prompts judge_prompts.jsonl \\
        --judge gpt-4@https://api.openai.com/v1 --out judgments.jsonl
    python -m zephyr.evals judge mt-bench ANSWERS --against ANSWERS2 ...
    python -m zephyr.evals judge alpaca OUTPUTS --against BASELINE_OUTPUTS \\
        --judge gpt-4.1@https://api.openai.com/v1 --out annotations.json

The judge is a model at an endpoint, NAME@URL, or one in a folder. Its answers are kept beside
`--out`, so the same command goes on where it was killed. What is judged and what is written are the
originals' files, see judge_mt_bench.py and judge_alpaca.py.
"""

import argparse
from types import ModuleType

from zephyr import source
from zephyr.client.exchange import Endpoint
from zephyr.data.readers import check_replaced
from zephyr.evals import html, judge_alpaca, judge_mt_bench, show
from zephyr.evals.asking import Judge
from zephyr.files import check_outputs, home, plain

BENCHMARKS = {
    "mt-bench": (judge_mt_bench, "grade answers to MT-Bench, or compare two models'"),
    "alpaca": (judge_alpaca, "compare outputs on AlpacaEval's instructions with a baseline's"),
}
# flags and arguments that name a file which is read, or a page which is written
FILES = "answers outputs against questions references prompts prompt json html".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK", dest="benchmark")
    for name, (module, about) in BENCHMARKS.items():
        command = benchmarks.add_parser(name, help=about, allow_abbrev=False)
        module.add_arguments(command)
        add = command.add_argument
        add("--judge", required=True, metavar="JUDGE", help="NAME@URL, or a model's folder")
        add("--out", required=True, metavar="FILE", help="what the judge says, in their format")
        add("--max-new", type=int, metavar="N", help=f"tokens of a verdict [{module.NEW}]")
        source.add_flags(command)
        add("--feedback", metavar="NAME", help="what labelled the model's training data")
        add("--json", metavar="FILE", help="the figures as a JSON object")
        add("--html", metavar="FILE", help="a page with the figures and the answers")


def check(args: argparse.Namespace, module: ModuleType, out: str) -> None:
    """Raise ValueError for what would else end the command after the judge was paid."""
    if args.max_new is not None and args.max_new < 1:
        raise ValueError(f"--max-new {args.max_new}: give 1 or more")
    if not out.endswith(module.ENDS):
        raise ValueError(f"--out {plain(out)}: {module.WRITTEN} are written as {module.ENDS[0]}")
    paths = {name: path and home(path) for name, path in vars(args).items() if name in FILES}
    written = {f"--{name}": paths.pop(name) for name in ("json", "html")}
    read = [*filter(None, paths.values()), f"{out}.answers"]
    check_outputs(read, {"--out": out, **written})
    check_replaced("--out", out, module.WRITTEN, module.COLUMNS, f"{out}.answers")
    if args.html:
        html.check_name(args.html)


def run(args: argparse.Namespace) -> str:
    """Have the answers judged, write what the judge says, and return the page that `show` makes."""
    module, out = BENCHMARKS[args.benchmark][0], home(args.out)
    check(args, module, out)
    (model,) = source.open_sources([args.judge], args.key_from)
    judge = Judge(model, f"{out}.answers", **source.how(args, [model]))
    notes = module.run(args, judge, out)
    if judge.unanswered:
        again = "; the same command asks them again" * isinstance(model, Endpoint)
        notes.append(f"{judge.unanswered} requests have no answer{again}")
    text = show.report(
        [out],
        getattr(args, "alpaca_data", None),
        getattr(args, "questions", None),
        args.feedback,
        args.json,
        args.html,
        notes,
    )
    cost = [f"cost: {judge.budget.told()}"] if isinstance(model, Endpoint) else []
    return "\n".join([text, *cost])
