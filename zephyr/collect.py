"""AI feedback from prompts alone: models of a pool answer each prompt, and a judge rates them.

    python -m zephyr.feedback collect prompts.jsonl --models a@URL b@URL runs/tiny/sft/model \\
        --judge judge@URL --out raw.jsonl

OUT has UltraFeedback's raw schema, of which `python -m zephyr.feedback OUT` makes pairs. Which
models answer a prompt, and after which system prompt, the seed and the prompt alone decide.
Every answer is in OUT.completions.NAME or OUT.ratings as it comes: killed at any moment, the same
command pays for nothing twice and writes the same rows.
"""

import argparse
import contextlib
import itertools
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zephyr.client import interrupt
from zephyr.collection import report
from zephyr.collection.completion import (
    PRINCIPLES,
    Completion,
    draw,
    raw_row,
    read_principles,
    usable,
)
from zephyr.collection.rating import KINDS, OVERALL, rate
from zephyr.data import held_out
from zephyr.data.prompts import read_prompts
from zephyr.data.readers import BadRow, BadRows, check_replaced, expand, write_rows
from zephyr.endpoint import Answer, Endpoint, Failure
from zephyr.files import home, plain
from zephyr.run import exits
from zephyr.source import Folder, add_flags, ask, how, open_sources, title

# what is kept beside OUT: all answers of each model and of the judge, and what is in no row
COMPLETIONS, RATINGS, FAILED = ".completions.", ".ratings", ".failed.jsonl"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ValueError for what is wrong with it."""
    parser = exits.Parser("zephyr.feedback collect", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("prompts", nargs="+", help="files whose rows have a prompt: .jsonl .json (.gz) .parquet")
    add("--models", nargs="+", required=True, metavar="M", help="NAME@URL, or a model's folder")
    add("--judge", required=True, metavar="M", help="who rates, likewise")
    add("--out", required=True, help="the rows, .jsonl or .jsonl.gz")
    add("--completions", type=int, default=4, help="to each prompt [4, as UltraFeedback]")
    add("--aspects", action="store_true", help="also rate UltraFeedback's four, a call for each")
    add("--temperature", type=float, default=1.0, help="of completions [1, as UltraFeedback]")
    add("--top-p", type=float, default=1.0, help="of completions [1, as UltraFeedback]")
    add("--max-new", type=int, default=1024, help="tokens of a completion [1024, likewise]")
    add("--judge-max-new", type=int, default=1024, help="of a judge's answer [1024, likewise]")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--principles", metavar="FILE", help='others, {"name": ["text", ...]}')
    which.add_argument("--no-principles", action="store_true", help="no system prompts")
    add("--exclude", nargs="+", default=[], metavar="FILE", help="questions of evaluation sets")
    add("--on-bad-row", choices=("stop", "skip"), default="stop", help="skip: up to 1 %% [stop]")
    add("--seed", type=int, default=0, help="of the drawing and of the sampling [0]")
    add_flags(parser)
    add("--judge-key-from", metavar="NAME", help="variable with the judge's key [--key-from]")

    args = parser.parse_args(argv)
    exits.refuse_empty(args, argv)
    for name, least in (("completions", 2), ("max_new", 1), ("judge_max_new", 1)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if not (0 <= args.temperature < math.inf and 0 < args.top_p <= 1):
        raise ValueError("--temperature is 0 or more, and --top-p above 0 and at most 1")
    args.out = home(args.out)
    given = args.prompts, args.exclude, filter(None, [args.principles])
    if not args.out.endswith((".jsonl", ".jsonl.gz")) or Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: rows are written to a file, .jsonl or .jsonl.gz")
    made = str(Path(args.out).resolve())
    for path in itertools.chain(*map(expand, map(list, given))):
        beside = str(path.resolve()).removeprefix(made)
        if not beside or beside.startswith((COMPLETIONS, RATINGS, FAILED)):
            raise ValueError(f"{path} is read, and --out {args.out} would write it; name another")
    columns = ("instruction", "completions")
    check_replaced("--out", args.out, "raw rows", columns, args.out + RATINGS)
    return args


def run(args: argparse.Namespace) -> str:
    """Ask the models and the judge, write the rows, and return the report."""
    if own := args.judge_key_from:
        (judge,) = open_sources([args.judge], [own], "--judge-key-from")
        models = open_sources(args.models, args.key_from)
    else:
        judge, *models = open_sources([args.judge, *args.models], args.key_from)
    given, pool = how(args, [judge, *models]), {}
    budget = given["budget"]
    for model in models:
        called = title(model)
        if kept_in(called) in map(kept_in, pool):
            raise ValueError(
                f"--models has two that are called {plain(called)}; rows, or the files of their "
                "answers, could not tell them apart, so rename one"
            )
        pool[called] = model
    for model in [*models, judge]:
        if isinstance(model, Endpoint):
            budget.price(title(model), 0, 0)  # before anything is paid for, it has a price
    principles = {} if args.no_principles else PRINCIPLES
    if args.principles:
        principles = read_principles(args.principles)
    dropped, bad = Counter(), BadRows(args.on_bad_row)
    prompts = read_prompts(args.prompts, held_out.prompts(args.exclude), dropped, bad)
    drawn = list(draw(prompts, list(pool), principles, args.completions, args.seed))
    kinds = list(KINDS) if args.aspects else [OVERALL]
    asked, each = len(prompts) * args.completions, len(kinds)
    print(
        f"{len(prompts):,} prompts, {args.completions} completions of each by {len(pool)} models, "
        f"{each} rating{'s' * (each > 1)} of each by {plain(title(judge))}: "
        f"{asked * (1 + each):,} calls",
        file=sys.stderr,
    )
    complete([c for row in drawn for c in row], pool, args, given)
    answered = [c for row in drawn for c in row if not c.missing()]
    texts = [(c.prompt.text, c.answer.text) for c in answered]
    found = rate(texts, kinds, judge, args.out + RATINGS, args.judge_max_new, **given)
    for c, ratings in zip(answered, found, strict=True):
        c.ratings = ratings
    failed = [c.failed() for row in drawn for c in row if c.missing()]
    Path(kept := args.out + FAILED).unlink(missing_ok=True)
    if failed:
        write_rows(kept, failed)
    if not any(map(usable, drawn)):
        raise ValueError(f"no prompt has two rated completions; {kept} says why")
    write_rows(args.out, map(raw_row, filter(usable, drawn)))
    lines = report.page(drawn, dropped, budget.told())
    if failed:
        lines.append(f"\nWhat is kept apart is in {kept}, with the judge's words.")
    lines += report.warnings(title(judge), pool)
    # UltraFeedback's first release scored some of the worst 10, which the repair looks for
    flags = " --label-bug keep" * args.aspects
    lines.append(f"\npython -m zephyr.feedback {shlex.quote(args.out)} --out pairs.jsonl{flags}")
    return "\n".join(filter(None, [*lines, bad.report()]))


def kept_in(model: str) -> str:
    """Return what the file of a model's answers ends with."""
    return COMPLETIONS + re.sub(r"[^\w.-]+", "-", model)[-60:]


def complete(
    todo: Sequence[Completion],
    pool: Mapping[str, Endpoint | Folder],
    args: argparse.Namespace,
    given: Mapping,
) -> None:
    """Ask the models for their completions: all endpoints at once, and folders one by one, so that
    one model at a time is loaded."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_new}
    with contextlib.ExitStack() as stack:
        endpoints, folders = [], []
        for called, model in pool.items():
            mine = [c for c in todo if c.model == called]
            requests = [c.request(sampling, args.seed) for c in mine]
            path = args.out + kept_in(called)
            if isinstance(model, Folder):  # the pool would keep one that is loaded
                model = Folder(model.path)
            answers = ask(model, requests, path, **given)
            if isinstance(model, Endpoint) and mine:
                endpoints.append((mine, stack.enter_context(contextlib.closing(answers))))
            else:
                folders.append((mine, answers))
            del model  # the answers alone keep a folder's model, until the last of them
        with ThreadPoolExecutor(len(pool)) as threads:
            # who is asked for the first answer is asked for all of them
            firsts = list(threads.map(next, [answers for _, answers in endpoints]))
        while folders:
            _fill(*folders.pop())
        for (mine, answers), first in zip(endpoints, firsts, strict=True):
            _fill(mine, itertools.chain([first], answers))


def _fill(todo: Sequence[Completion], answers: Iterable[Answer | Failure]) -> None:
    for c, answer in zip(todo, answers, strict=True):
        c.answer = answer


def main(argv: Sequence[str]) -> None:
    interrupt.heed()
    try:
        print(run(parse(argv)))
    except ValueError as error:
        fix = "; --on-bad-row skip drops such rows" if isinstance(error, BadRow) else ""
        print(f"zephyr.feedback collect: {error}{fix}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))
