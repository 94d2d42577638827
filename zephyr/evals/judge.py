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
from collections.abc import Callable, Sequence

from zephyr import source
from zephyr.client.budget import Budget
from zephyr.client.exchange import Answer
from zephyr.endpoint import Failure, Request
from zephyr.evals import judge_alpaca, judge_mt_bench, page, show
from zephyr.files import home, plain, shown

TIMES = 3  # that one verdict is asked for, until it can be read
BENCHMARKS = {
    "mt-bench": (judge_mt_bench, "grade answers to MT-Bench, or compare two models'"),
    "alpaca": (judge_alpaca, "compare outputs on AlpacaEval's instructions with a baseline's"),
}


class Judge:
    """The model that is asked, and what was spent on it.

    `unanswered` counts the requests to which no answer came.
    """

    def __init__(self, name: str, key_from: str, path: str, concurrency: int, budget: Budget):
        self.source = source.open_source(name, key_from)
        self.name = source.title(self.source)
        self.path, self.budget, self.unanswered = path, budget, 0
        self.how = {"concurrency": concurrency, "budget": budget}

    def ask(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Return the judge's answer to each request, from the file of answers if it is there."""
        return list(source.ask(self.source, requests, self.path, **self.how))

    def until(
        self, readable: Callable[[str], bool], requests: Sequence[Request]
    ) -> list[Answer | Failure]:
        """Return the judge's answer to each request. One whose text is not readable is asked for
        again, TIMES in all, at temperature 1 and with another seed: a model that is deterministic
        at 0 would say the same again. Raises ValueError if there is not one readable answer."""
        found: list = [None] * len(requests)
        left = list(range(len(requests)))
        for attempt in range(TIMES if left else 0):
            more = {"temperature": 1, "seed": attempt} if attempt else {}
            again = [Request(requests[k].messages, requests[k].parameters | more) for k in left]
            for k, answer in zip(left, self.ask(again), strict=True):
                found[k] = answer
            left = [k for k in left if isinstance(found[k], Answer) and not readable(found[k].text)]
            if not left:
                break
        failures = [answer.why for answer in found if isinstance(answer, Failure)]
        self.unanswered += len(failures)
        if found and len(failures) == len(found):
            raise ValueError(
                f"{plain(self.name)}: none of {len(found)} requests was answered, the last: "
                f"{failures[-1]}"
            )
        if found and len(left) + len(failures) == len(found):
            raise ValueError(
                f"{plain(self.name)}: none of its {len(left)} verdicts can be read, the first is "
                f"{shown(found[left[0]].text)}; a judge that thinks first needs a larger "
                "--max-tokens"
            )
        return found

    def price(self, answer: Answer | Failure) -> float | None:
        """Return what an answer cost by the price table; None without one, or without usage."""
        if self.budget.prices is None or isinstance(answer, Failure):
            return None
        return self.budget.cost(self.source.model, answer.usage, None)


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


def run(args: argparse.Namespace) -> str:
    """Have the answers judged, write what the judge says, and return the page that `show` makes."""
    out = home(args.out)
    for name in ("concurrency", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it is 1 or more")
    budget = Budget(args.budget_tokens, args.budget_money, args.prices)
    judge = Judge(args.judge, args.key_from, f"{out}.answers", args.concurrency, budget)
    notes = BENCHMARKS[args.benchmark][0].run(args, judge, out)
    data = {name: getattr(args, name, None) for name in ("alpaca_data", "questions", "feedback")}
    figures, text = show.page_of([out], **data)
    show.save(args.json, figures)
    if judge.unanswered:
        notes.append(
            f"{judge.unanswered} requests have no answer; the same command asks them again"
        )
    return "\n".join([text, *(line for note in notes for line in page.said(note, "note: "))])
