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

from zephyr.client.budget import Budget
from zephyr.evals import judge_alpaca, judge_mt_bench, page, show
from zephyr.evals.asking import Judge
from zephyr.files import home

BENCHMARKS = {
    "mt-bench": (judge_mt_bench, "grade answers to MT-Bench, or compare two models'"),
    "alpaca": (judge_alpaca, "compare outputs on AlpacaEval's instructions with a baseline's"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK", dest="benchmark")
    for name, (module, about) in BENCHMARKS.items():
        command = benchmarks.add_parser(name, help=about, allow_abbrev=False)
        module.add_arguments(command)
        add = command.add_argument
        add("--judge", required=True, metavar="NAME@URL", help="the judge, or a model's folder")
        add("--out", required=True, metavar="FILE", help="what the judge says, in their format")
        add("--key-from", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key")
        add("--concurrency", type=int, default=8, metavar="N", help="requests at a time [8]")
        add("--max-tokens", type=int, metavar="N", help=f"of a verdict [{module.TOKENS}]")
        add("--budget-tokens", type=int, metavar="N", help="stop before so many tokens")
        add("--budget-money", type=float, metavar="X", help="or before so much, by --prices")
        add("--prices", metavar="FILE", help="a price table, see zephyr/client/budget.py")
        add("--feedback", metavar="NAME", help="what labelled the model's training data")
        add("--json", metavar="FILE", help="the figures as a JSON object")
        add("--html", metavar="FILE", help="a page with the figures and the answers")


def run(args: argparse.Namespace) -> str:
    """Have the answers judged, write what the judge says, and return the page that `show` makes."""
    out = home(args.out)
    for name in ("concurrency", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it is 1 or more")
    budget = Budget(args.budget_tokens, args.budget_money, args.prices)
    judge = Judge(args.judge, args.key_from, f"{out}.answers", args.concurrency, budget)
    notes = BENCHMARKS[args.benchmark][0].run(args, judge, out)
    text = show.report(
        [out],
        getattr(args, "alpaca_data", None),
        getattr(args, "questions", None),
        args.feedback,
        args.json,
        args.html,
    )
    if judge.unanswered:
        notes.append(
            f"{judge.unanswered} requests have no answer; the same command asks them again"
        )
    return "\n".join([text, page.text([page.Said(note, "note") for note in notes])]).rstrip()
