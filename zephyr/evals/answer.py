"""A model's answers to MT-Bench or AlpacaEval, in the file that a judge reads.

    python -m zephyr.evals answer mt-bench MODEL --questions question.jsonl --out answers.jsonl
    python -m zephyr.evals answer alpaca MODEL --instructions alpaca_eval.json --out outputs.json

MODEL is NAME@URL or a folder. It is asked as FastChat does at 0e6d3e4 (`llm_judge`), and AlpacaEval
at cd543a1 for zephyr-7b-beta, and the files are theirs. Every answer is kept in OUT.answers as it
comes: killed at any moment, the same command goes on from there.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256

from zephyr.data.readers import check_replaced, writing
from zephyr.endpoint import Answer, Endpoint, Request
from zephyr.evals import answer_page
from zephyr.evals.converse import Said, converse, missing
from zephyr.evals.questions import Question, read_instructions, read_questions
from zephyr.files import atomic, check_outputs, home, plain, shown
from zephyr.source import Folder, add_flags, ask, how, open_sources, title

NEW = {"mt-bench": 1024, "alpaca": 2048}  # tokens of an answer, at most
ENDS = {"mt-bench": (".jsonl", ".jsonl.gz"), "alpaca": (".json",)}  # of the files written
COLUMNS = {"mt-bench": ("question_id", "choices"), "alpaca": ("instruction", "output")}
FILES = {"mt-bench": "questions", "alpaca": "instructions"}  # the flags that name them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("benchmark", choices=FILES, help="what is asked")
    add("model", metavar="MODEL", help="who answers: NAME@URL or a folder")
    add("--questions", metavar="FILE", help="MT-Bench's question.jsonl")
    add("--instructions", metavar="FILE", help="AlpacaEval's set; outputs or annotations serve too")
    add("--out", required=True, metavar="FILE", help="FastChat's answer file, AlpacaEval's outputs")
    add("--name", help="what it calls the model [its own name, or that of its run's folder]")
    add("--system", metavar="TEXT", help="a system message [none, or as the template has it]")
    add("--max-new", type=int, metavar="N", help="tokens of an answer [1024; of alpaca 2048]")
    add("--temperature", type=float, metavar="T", help="[by FastChat's category; of alpaca 0.7]")
    add("--seed", type=int, default=0, help="of the sampling; another gives other answers [0]")
    add("--best-of", type=int, metavar="N", help="keep the one that a folder's reward likes best")
    add("--reference", metavar="REF", help="the folder that the training of MODEL began from")
    add_flags(parser)


def check(args: argparse.Namespace, source: Endpoint | Folder) -> None:
    """Raise ValueError for what the command line cannot mean."""
    own = FILES[args.benchmark]
    for flag in FILES.values():
        if (getattr(args, flag) is None) == (flag == own):
            raise ValueError(f"{args.benchmark} takes its questions from --{own} FILE alone")
    if not args.out.endswith(ends := ENDS[args.benchmark]):
        raise ValueError(
            f"--out {shown(args.out)}: answers to {args.benchmark} are a {ends[0]} file"
        )
    for flag, value, rule, fits in (
        ("--max-new", args.max_new, "1 or more", args.max_new is None or args.max_new > 0),
        ("--temperature", args.temperature, "0 or more", 0 <= (args.temperature or 0) < math.inf),
        ("--seed", args.seed, "0 to 4294967295", 0 <= args.seed < 1 << 32),
        ("--best-of", args.best_of, "1 or more", args.best_of is None or args.best_of > 0),
        ("--name", shown(args.name), "a name", args.name is None or args.name.strip()),
    ):
        if not fits:
            raise ValueError(f"{flag} {value}: give {rule}")
    for flag, text in (("--name", args.name), ("--system", args.system)):
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise ValueError(f"{flag} {shown(text)}: its bytes are not UTF-8") from None
    if (args.best_of is None) != (args.reference is None):
        raise ValueError("--best-of N and --reference REF go together: a reward is log π/π_ref")
    if args.best_of and isinstance(source, Endpoint):
        raise ValueError("--best-of needs all log-probs, so MODEL is a folder, not NAME@URL")


@contextmanager
def outputs(path: str) -> Iterator[Callable[[dict], object]]:
    """Give a function that appends a row to AlpacaEval's outputs, one list of JSON. The file
    appears when the block ends."""
    with atomic(path) as file:
        rows: list[dict] = []
        yield rows.append
        file.write(json.dumps(rows, indent=2).encode() + b"\n")


def row_of(benchmark: str, model: str, question: Question, turns: list[str]) -> dict:
    """Return FastChat's line, or AlpacaEval's row, with the answers to one question."""
    if benchmark == "alpaca":
        source = {"dataset": question.group} if question.group is not None else {}
        return source | {"instruction": question.name, "output": turns[0], "generator": model}
    return {
        "question_id": question.name,
        "answer_id": sha256(json.dumps([model, question.name, turns]).encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def run(args: argparse.Namespace) -> str:
    """Ask a model a benchmark's questions, write the answers, and return the page about them."""
    (source,), best = open_sources([args.model], args.key_from), None
    check(args, source)
    given = how(args, [source])
    alpaca, out, name = args.benchmark == "alpaca", home(args.out), args.name or title(source)
    path = home(getattr(args, FILES[args.benchmark]))
    questions = (read_instructions if alpaca else read_questions)(path, args.temperature)
    check_outputs([path], {"--out": out})
    check_replaced("--out", out, "answers", COLUMNS[args.benchmark], f"{out}.answers")
    if args.best_of:
        from zephyr.evals.best_of import BestOf  # here, as it needs torch

        best = BestOf(source, home(args.reference), args.best_of)
        name = args.name or f"{name}-best-of-{args.best_of}"

    def answers(requests: list[Request]) -> Said:
        found = ask(source, requests, f"{out}.answers", **given)
        return [replace(a, text=a.text.strip()) if isinstance(a, Answer) else a for a in found]

    parameters = {"max_tokens": args.max_new or NEW[args.benchmark], "seed": args.seed}
    parameters |= {"top_p": 1.0} if alpaca else {}
    pick = (lambda requests: best.answers(requests, answers)) if best else answers
    said = converse(questions, pick, args.system, parameters)
    if all(map(missing, said)):
        raise ValueError(f"no question has an answer, the first: {said[0][-1].why}")
    with (outputs if alpaca else writing)(out) as write:
        for question, turns in zip(questions, said, strict=True):
            if not missing(turns):
                write(row_of(args.benchmark, name, question, [answer.text for answer in turns]))
    lines = [f"{plain(name)} answers to {args.benchmark}, in {plain(out, 200)}"]
    lines += answer_page.report(questions, said, again=isinstance(source, Endpoint))
    lines += best.report() if best else []
    if isinstance(source, Endpoint):
        lines.append(f"cost: {given['budget'].told()}")
    return "\n".join(lines)
