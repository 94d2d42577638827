"""AI feedback: UltraFeedback's raw rows, prompts with scored completions, -> preference pairs.

    python -m zephyr.feedback raw/*.jsonl --out pairs.jsonl --test-out test.jsonl --test-size 2000

A pair has the columns of ultrafeedback_binarized. chosen is the completion with the best score,
the first in the row among equals; rejected is one of those with a lower score and another text:

    score 7.0 8.5 8.5 3.0  ->  chosen is the second, rejected the first or the fourth

A random rejected depends on the row and the seed only, so neither the order of the rows nor
leaving some out changes the pairs. custom_system_prompt is not part of a pair. Of a row the columns
source, instruction and completions are read; one whose prompt has more to it is a bad row.

    python -m zephyr.feedback collect --help     makes raw rows, with models and a judge of yours
"""

import argparse
import heapq
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from hashlib import sha256
from statistics import fmean, median
from typing import Literal, NamedTuple

from tqdm import tqdm

from zephyr.data import forms, held_out
from zephyr.data.held_out import normalized
from zephyr.data.readers import (
    BadRow,
    BadRows,
    check_replaced,
    expand,
    read_rows,
    write_rows,
    writing,
)
from zephyr.files import check_outputs, home, shown
from zephyr.run import exits
from zephyr.tokenizer import conversation

# parts of a prompt that a pair has no place for
MORE = ("input", "prompt", "question", "conversations", *forms.SYSTEMS, *forms.UNUSABLE)
COLUMNS = {"source", "instruction", "completions", *MORE}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a row becomes a pair. Defaults are those of the published pairs, with scores repaired."""

    score: Literal["overall", "mean"] = "overall"  # overall_score or the mean aspect rating
    rejected: Literal["random", "worst"] = "random"  # of the completions scored below chosen
    label_bug: Literal["repair", "drop", "keep"] = "repair"  # a 10 whose ratings say 1
    keep_truthful_qa: bool = False  # keep the rows of that evaluation set
    exclude: frozenset[str] = frozenset()  # normalized prompts of evaluation sets: their rows go
    seed: int = 42  # of the random rejected and the test split


class Completion(NamedTuple):
    text: str
    score: float
    model: str


@dataclass
class Counts:
    """How many rows, completions and pairs there were: the numbers of the table."""

    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    noted: Counter = field(default_factory=Counter)  # what was done -> completions
    models: dict = field(default_factory=lambda: defaultdict(Counter))
    pairs: list = field(default_factory=list)  # (score, words, characters) of chosen and rejected

    def add(self, chosen: Completion, rejected: Completion) -> None:
        self.models[chosen.model]["chosen"] += 1
        self.models[rejected.model]["rejected"] += 1
        self.pairs.append([(c.score, len(c.text.split()), len(c.text)) for c in (chosen, rejected)])


def binarize(
    rows: Iterable[tuple[str, dict]],
    rules: Rules = Rules(),
    counts: Counts | None = None,
    bad: BadRows | None = None,
) -> Iterator[dict]:
    """Yield the pairs of (where, row) rows, in the order of the rows; `counts` says what became of
    the other rows.

    Of rows with the same prompt the first is taken; only hashes of the prompts are kept. Raises
    BadRow, unless `bad` skips it, for a missing field, a wrong type, a score that is not a finite
    number, and fewer than two completions.
    """
    counts, bad = counts or Counts(), bad or BadRows()
    prompts: set[bytes] = set()
    for where, row in rows:
        result = None
        with bad.guard():
            result = _pair(where, row, rules, counts, prompts)
        if isinstance(result, str):
            counts.dropped[result] += 1
        elif result:
            yield result
    counts.dropped += Counter({"bad row": bad.skipped})


def _pair(where: str, row: dict, rules: Rules, counts: Counts, prompts: set) -> dict | str:
    """Return the row's pair, or the reason why there is none. `counts` is updated, and the prompt's
    hash is added to `prompts`, by which a prompt that came before is dropped."""
    if row.get("source") == "truthful_qa" and not rules.keep_truthful_qa:
        return "truthful_qa"
    if not {"instruction", "completions"} & row.keys():
        raise BadRow(f"{where}: no raw row, with instruction and completions{forms.it_has(row)}")
    prompt = row.get("instruction")
    _need(isinstance(prompt, str) and prompt.strip(), f"{where}: instruction must be text", prompt)
    try:
        forms.refuse(row, MORE)
        asked = conversation(forms.turns("instruction", prompt), system=False)
        forms.no_blanks(asked)
        forms.plain_text(asked)
        if asked[-1][0] != "user":
            raise ValueError(f"instruction must end with what the user says, not {shown(prompt)}")
    except ValueError as error:
        raise BadRow(f"{where}: {error}") from None
    if normalized(prompt) in rules.exclude:
        return "in an evaluation set"
    digest = sha256(prompt.encode()).digest()
    if digest in prompts:
        return "duplicate prompt"
    usable, notes = _completions(where, row, rules)
    prompts.add(digest)
    counts.noted.update(notes)
    for c in usable:
        counts.models[c.model].update(scored=1, score=c.score)
    choice = _choose(prompt, usable, rules)
    if isinstance(choice, str):
        return choice
    counts.add(*choice)
    talk = [{"role": role, "content": text} for role, text in asked]
    chosen, rejected = ([*talk, {"role": "assistant", "content": c.text}] for c in choice)
    return {
        "prompt": prompt,
        "prompt_id": digest.hex(),
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": choice[0].score,
        "score_rejected": choice[1].score,
    }


def _choose(prompt: str, usable: list[Completion], rules: Rules) -> tuple | str:
    """Return (chosen, rejected), or the reason why they cannot be told apart."""
    if len(usable) < 2:
        return "fewer than two usable completions"
    chosen = max(usable, key=lambda c: c.score)
    lower = [c for c in usable if c.score < chosen.score and c.text != chosen.text]
    if not lower:
        tie = all(c.score == chosen.score for c in usable)
        return "tie: all scores equal" if tie else "identical texts"
    if rules.rejected == "worst":
        return chosen, min(lower, key=lambda c: c.score)
    return chosen, lower[_hash(rules.seed, "rejected", prompt) % len(lower)]


def _completions(where: str, row: dict, rules: Rules) -> tuple[list[Completion], list[str]]:
    """Return the completions that may enter a pair, in the order of the row, and what was
    repaired."""
    raw, usable, notes = row.get("completions"), [], []
    fits = isinstance(raw, list) and len(raw) > 1
    _need(fits, f"{where}: completions must be a list of two or more", raw)
    for i, completion in enumerate(raw):
        place = f"{where}: completions[{i}]"
        text = completion.get("response") if isinstance(completion, dict) else None
        _need(isinstance(text, str), f"{place} must have a text as response", completion)
        score, note = _score(place, completion, rules)
        if not text.strip():
            score, note = None, "empty response: dropped"
        elif forms.rendered(text):
            score, note = None, "a chat template's mark at an end: dropped"
        if score is not None:
            usable.append(Completion(text, score, _name(completion.get("model"))))
        notes.append(note)
    return usable, notes


def _score(place: str, completion: dict, rules: Rules) -> tuple[float | None, str]:
    """(score, what was done to it); without a score the completion cannot enter a pair.

    UltraFeedback's first release took critiques that said 1 for an overall_score of 10. Its
    authors' repair: 10 becomes 1 where the mean of the aspect ratings is 2 or less; up to 4 they
    asked the critic again, so here the completion is dropped. A 10 without ratings is left alone.
    """
    annotations = completion.get("annotations") or {}
    _need(isinstance(annotations, dict), f"{place}.annotations must be an object", annotations)
    ratings = [_number(a.get("Rating")) for a in annotations.values() if isinstance(a, dict)]
    ratings = [rating for rating in ratings if rating is not None]
    mean = fmean(ratings) if ratings else None
    if rules.score == "mean":
        return mean, "as scored" if ratings else "no numeric rating: dropped"
    score = _number(value := completion.get("overall_score"))
    _need(score is not None, f"{place}.overall_score must be a finite number", value)
    if score != 10 or mean is None or mean > 4 or rules.label_bug == "keep":
        return score, "as scored"
    if mean <= 2 and rules.label_bug == "repair":
        return 1.0, "score 10, ratings of 2 or less: made 1"
    return None, "score 10, ratings of 4 or less: dropped"


def _name(model: object) -> str:
    return model[:40] if isinstance(model, str) else shown(model, 40)


def _number(value: object) -> float | None:
    """Return the value as a finite number, small enough that sums stay finite; None for "N/A", null
    and true."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < 1e100 else None


def _need(fits: object, rule: str, value: object) -> None:
    if not fits:
        raise BadRow(f"{rule}, not {'null or missing' if value is None else shown(value)}")


def _hash(*parts: object) -> int:
    return int.from_bytes(sha256("\n".join(map(str, parts)).encode()).digest())


def hold_out(pairs: Iterable[dict], size: int, seed: int, test: list[dict]) -> Iterator[dict]:
    """Yield the training pairs. The `size` pairs whose prompts have the lowest hashes go to the
    list `test` instead.

    Which pairs these are, and their order in `test`, depends on the set of pairs and not on their
    order.
    """
    heap: list[tuple[int, dict]] = []
    for pair in pairs:
        entry = -_hash(seed, "test", pair["prompt"]), pair
        if len(heap) < size:
            heapq.heappush(heap, entry)
        else:
            yield heapq.heappushpop(heap, entry)[1]
    test += [pair for _, pair in sorted(heap, key=lambda entry: -entry[0])]


def table(counts: Counts, test: int) -> str:
    """Return what the command prints: rows, completions, the two sides of the pairs, models."""
    pairs, lines = len(counts.pairs), []
    rows, read = pairs + counts.dropped.total(), counts.noted.total()

    def add(label: str, *cells: object) -> None:
        cells = (f"{c:,}" if isinstance(c, int) else c for c in cells)
        lines.append((f"{label:<42}" + "".join(f"{c:>11}" for c in cells)).rstrip())

    def parts(counter: Counter, total: int) -> None:
        for what, n in counter.most_common():
            add(f"  {what}", n, f"{n / total:.1%}")

    add("rows in", rows)
    parts(counts.dropped, rows)
    add("pairs out", pairs, f"{pairs / rows:.1%}")
    parts(Counter(training=pairs - test, test=test) if test else Counter(), pairs)
    add("completions", read)
    parts(counts.noted, read)
    add("\nmean of".ljust(43), "chosen", "rejected")
    for i, name in enumerate(("score", "words", "characters")):
        add(f"  {name}", *(f"{fmean(p[side][i] for p in counts.pairs):,.2f}" for side in (0, 1)))
    gaps = [chosen[0] - rejected[0] for chosen, rejected in counts.pairs]
    longer = sum(chosen[2] > rejected[2] for chosen, rejected in counts.pairs)
    add("mean score gap", f"{fmean(gaps):.2f}")
    add("median score gap", f"{median(gaps):.2f}")
    add("pairs whose chosen is longer", longer, f"{longer / pairs:.1%}")
    add("\nmodel".ljust(43), "scored", "mean", "chosen", "rejected")
    means = {name: c["score"] / c["scored"] for name, c in counts.models.items()}
    for name, mean in sorted(means.items(), key=lambda item: (-item[1], item[0]))[:20]:
        c, shown = counts.models[name], name if name.isprintable() else ascii(name)
        add(f"  {shown}", c["scored"], f"{mean:.2f}", c["chosen"], c["rejected"])
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line. Raises ValueError for what is wrong with it."""
    parser = exits.Parser("zephyr.feedback", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("raw", nargs="+", help="UltraFeedback's files: .jsonl .json (.gz) .parquet, or globs")
    add("--out", required=True, help="the pairs, .jsonl or .jsonl.gz")
    add("--test-out", help="pairs held out of --out, for evaluation")
    add("--test-size", type=int, default=0, help="how many; picked by a hash of the prompt")
    add(
        "--on-bad-row",
        choices=("stop", "skip"),
        default="stop",
        help="skip: drop and list them, up to 1 %% of the rows [stop]",
    )
    add(
        "--score",
        choices=("overall", "mean"),
        default="overall",
        help="overall_score, as the published pairs [overall], or the mean of the aspect ratings",
    )
    add(
        "--rejected",
        choices=("random", "worst"),
        default="random",
        help="which of the completions scored below chosen [random]",
    )
    add(
        "--label-bug",
        choices=("repair", "drop", "keep"),
        default="repair",
        help="overall_score 10 where the ratings say 1: make it 1 [repair], drop or keep it",
    )
    add("--keep-truthful-qa", action="store_true", help="keep the rows of that evaluation set")
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="questions of evaluation sets (MT-Bench's, AlpacaEval's, TruthfulQA's): rows whose "
        "prompt is one of them, but for case and spaces, are dropped",
    )
    add("--seed", type=int, default=42, help="of the random rejected and the test split [42]")

    args = parser.parse_args(argv)
    exits.refuse_empty(args, sys.argv[1:] if argv is None else argv)
    args.out, args.test_out = home(args.out), args.test_out and home(args.test_out)
    if args.test_size < 0 or bool(args.test_size) != bool(args.test_out):
        raise ValueError("--test-out and --test-size, 1 or more, go together; give both or neither")
    return args


def run(args: argparse.Namespace) -> str:
    """Write the pairs and return the table. Raises ValueError before any file is in place."""
    paths = expand(args.raw)
    outputs = {"--out": args.out, "--test-out": args.test_out}
    check_outputs([*paths, *expand(args.exclude)], outputs)
    for flag, path in outputs.items():
        if path:
            check_replaced(flag, path, "pairs", ("chosen", "rejected"))
    given = {f.name: getattr(args, f.name) for f in fields(Rules)}
    rules = Rules(**given | {"exclude": held_out.prompts(args.exclude)})
    counts, bad, test = Counts(), BadRows(args.on_bad_row), []
    rows = (row for path in paths for row in read_rows(path, bad, COLUMNS))
    rows = tqdm(rows, unit=" rows", delay=2, leave=False, disable=None)
    with writing(args.out) as write:
        for pair in hold_out(binarize(rows, rules, counts, bad), args.test_size, args.seed, test):
            write(pair)
        bad.check()
        if not bad.rows:
            others = ", nor in the others" * (len(paths) > 1)
            raise ValueError(f"{paths[0]}: no row is in it{others}")
        if len(counts.pairs) == len(test):
            why = ", ".join(f"{n} {what}" for what, n in (counts.dropped + counts.noted).items())
            left = f"no pair is left to train on: {len(test)} for the test, {why}"
            raise ValueError(f"{paths[0]}: {left}")
        if test:
            write_rows(args.test_out, test)
    return "\n\n".join(filter(None, [table(counts, len(test)), bad.report()]))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["collect"]:
        from zephyr import collect  # here, as pairs need no judge

        return collect.main(argv[1:])
    try:
        print(run(parse(argv)))
    except ValueError as error:
        fix = "; --on-bad-row skip drops such rows" if isinstance(error, BadRow) else ""
        print(f"zephyr.feedback: {error}{fix}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    exits.call(main)
