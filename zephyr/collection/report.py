"""What came of collecting feedback, as text."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from zephyr.collection.completion import Completion, usable
from zephyr.endpoint import Answer
from zephyr.evals.belief import leakage
from zephyr.files import plain


def page(drawn: Sequence[list[Completion]], dropped: Counter, spent: str) -> list[str]:
    """Return the lines of the report: prompts, completions, what is missing, and each model."""
    rows = [row for row in map(usable, drawn) if row]
    lines, scores, first = [], defaultdict(list), Counter()
    for row in rows:
        best = max(c.score for c in row)
        share = 1 / sum(c.score == best for c in row)
        for c in row:
            scores[c.model].append(c.score)
            first[c.model] += share * (c.score == best)
    asked = [c for row in drawn for c in row]
    ratings = [r for c in asked for r in c.ratings.values()]

    def add(label: str, *cells: object) -> None:
        cells = (f"{c:,}" if isinstance(c, int) else c for c in cells)
        lines.append((f"{label:<42}" + "".join(f"{c:>11}" for c in cells)).rstrip())

    add("prompts in", len(drawn) + dropped.total())
    for what, n in dropped.items():
        add(f"  {what}: dropped", n)
    add("rows out", len(rows))
    if fewer := len(drawn) - len(rows):
        add("  fewer than two rated completions: no row", fewer)
    if ties := sum(len({c.score for c in row}) == 1 for row in rows):
        add("  tie, all scores equal: a row, no pair", ties)
    add("completions", len(asked))
    for why, n in sorted(Counter(c.missing() for c in asked if c.missing()).items()):
        add(f"  {why}: kept apart", n)
    cut = sum(isinstance(c.answer, Answer) and c.answer.finish_reason == "length" for c in asked)
    add("  cut off at --max-new", cut)
    add("ratings", len(ratings))
    add("  asked for more than once", sum(r.asked > 1 for r in ratings))
    add("spent at endpoints", spent)
    # a tie for the first place is shared; with four completions a model of the middle has 25 %
    add("\nmodel".ljust(43), "rated", "mean", "first")
    for name, of in sorted(scores.items(), key=lambda item: (-fmean(item[1]), item[0])):
        add(f"  {plain(name, 38)}", len(of), f"{fmean(of):.2f}", f"{first[name] / len(of):.1%}")
    return lines


def warnings(judge: str, pool: Iterable[str]) -> list[str]:
    """Return what can make the judge favour models of the pool."""
    found = [leakage(judge, {"pool's model": name}) for name in pool]
    return [plain(line, 300) for lines in found for line in lines]
