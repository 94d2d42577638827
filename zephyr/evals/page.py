"""The figures of an evaluation as titles, tables and sentences, and these as plain text.

`blocks` says what the figures mean, once for the terminal and for the page to click through.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from zephyr.files import plain

WIDTH = 100  # no line of the plain text is longer


class Title(NamedTuple):
    text: str
    under: str = ""
    part: bool = False  # of what the title before is of


class Mean(NamedTuple):
    """A cell with a mean, as which it is written, and its standard error."""

    value: float | None
    error: float | None = None
    digits: int = 2

    def __str__(self) -> str:
        return number(self.value, self.digits)


class Table(NamedTuple):
    rows: list[list[str | Mean]]  # the first has the names of the columns
    most: float  # the largest value that a mean of it can have


class Said(NamedTuple):
    text: str
    kind: str = ""  # warning, note or neither


Block = Title | Table | Said

OWN_PROMPTS = Said(
    "the judge's prompts are our own: compare these figures with each other alone", "note"
)
NO_FEEDBACK = Said(
    "--feedback NAME tells what labelled or wrote the model's training data; a judge of that "
    "family would favour it, as GPT-4 may Zephyr, which GPT-4 labelled",
    "note",
)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def text(blocks: Sequence[Block]) -> str:
    """Return blocks as plain text."""
    lines: list[str] = []
    for before, block in zip([None, *blocks], blocks, strict=False):
        apart = isinstance(block, Title) or isinstance(block, Table) and type(before) is not Title
        lines += [""] * (apart and bool(lines))
        match block:
            case Title():
                under = [*_wrapped(f"  {block.under}"), ""] if block.under else []
                lines += [block.text, *under]
            case Table():
                lines += table([list(map(str, row)) for row in block.rows])
            case Said():
                lines += _wrapped(f"{block.kind}: {block.text}" if block.kind else block.text)
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Return the lines of a table: the first column flush left, the others flush right, and the
    first so narrow that the line fits."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rest = indent + sum(width + 3 for width in widths[1:])
    widths[0] = max(10, min(widths[0], WIDTH - rest))
    return [
        (
            " " * indent
            + plain(row[0], widths[0]).ljust(widths[0])
            + "".join(f"   {cell:>{k}}" for cell, k in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    ]


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def runs(figures: dict) -> dict[str, dict]:
    """Return the figures of each run by the name under which it is shown."""
    if isinstance(figures.get("model"), str):
        return {figures["model"]: figures}
    return {name: f for name, f in figures.items() if isinstance(f, dict)}


def is_alpaca(shown: dict[str, dict]) -> bool:
    """Return True if the figures of the runs are AlpacaEval's, else they are MT-Bench's."""
    return all("baseline" in f for f in shown.values())


def blocks(figures: dict) -> list[Block]:
    """Return what the figures of `show`, as its --json has them, say."""
    shown = runs(figures)
    if is_alpaca(shown):
        out = [block for f in shown.values() for block in alpaca(f)]
    else:
        out = mt_bench(shown)
    agreements = figures.get("agreement")
    if isinstance(agreements, list):  # else a model has that name
        out += [Title("Agreement"), *map(agreement, agreements)]
    return out


def _mean(group: dict, name: str) -> list[str | Mean]:
    mean = Mean(group["mean"], group["standard_error"])
    return [name, str(group["n"]), mean, number(mean.error)]


def judge(figures: dict, what: str = "win rate") -> list[Block]:
    """Return what is known of the judge: its slots, its lengths, its consistency, its warnings."""
    out: list[Block] = [Title("The judge", part=True)]
    if slots := figures.get("slots"):
        rows = [["the model's answer is", "n", what, "s.e."]]
        rows += [_mean(slots["first"], "shown first"), _mean(slots["second"], "shown second")]
        if "second_minus_first" in slots:
            gap, error = slots["second_minus_first"], slots["standard_error"]
            rows.append(["second less first", "", f"{gap:+.2f}", number(error)])
        out.append(Table(rows, 100))
        if "second_minus_first" in slots and error is not None and abs(gap) > 2 * error:
            side = "second" if gap > 0 else "first"
            out.append(Said(f"the judge favours what it is shown {side}", "warning"))
    if quarters := figures.get("length_quarters"):
        about = "longer by (characters)" if what == "win rate" else "answer's characters"
        rows = [[about, "n", what, "s.e."]]
        rows += [_mean(q, span(q)) for q in quarters]
        out.append(Table(rows, 100 if what == "win rate" else 10))
    else:
        out.append(Said("the lengths of the answers cannot be told from this file"))
    if "consistency" in figures:
        if same := figures["consistency"]:
            out.append(
                Said(
                    f"consistency {same['consistent']:.1f} % of {same['pairs']} pairs judged in "
                    f"both orders; where not, the first slot won {same['first_slot_preferred']} "
                    f"times and the second {same['second_slot_preferred']} times"
                )
            )
        else:
            out.append(Said("consistency is unknown: no pair was judged in both orders"))
    return out


def span(quarter: dict) -> str:
    """Return the lengths that a quarter of them has, as the page names it."""
    return f"{quarter['shortest']} to {quarter['longest']}"


def alpaca(f: dict) -> list[Block]:
    """Return what the figures of one AlpacaEval run say."""
    name, baseline, by = (plain(f[key], 60) for key in ("model", "baseline", "judge"))
    rate = Mean(f["win_rate"], f["standard_error"])
    rows = [["", "%", "s.e."], ["win rate", rate, number(rate.error)]]
    if "length_controlled_win_rate" in f:
        rate = Mean(f["length_controlled_win_rate"], f["lc_standard_error"])
        rows.append(["length-controlled win rate", rate, number(rate.error)])
    rows.append(["discrete win rate", Mean(f["discrete_win_rate"]), ""])
    out = [
        Title(f"AlpacaEval: {name}", f"against {baseline}, judged by {by}"),
        Table(rows, 100),
        Said(f"standard error by bootstrap over questions {number(f['bootstrap_standard_error'])}"),
        Said(
            f"{f['n_total']} judged: {f['n_wins']} wins, {f['n_wins_base']} losses, "
            f"{f['n_draws']} draws; {f['n_dropped']} without a verdict, in no figure"
        ),
        Said(
            f"average length {f['avg_length']} characters, the baseline's "
            f"{f['avg_length_baseline']}"
        ),
        *judge(f),
    ]
    if not f["consistency"]:
        out.append(
            Said("which answer was shown first is told by AlpacaEval's rule, with its seed 0")
        )
    out.append(
        Said(
            f"{f['ties']} ties; {f['equal_answers']} times the two answers are equal, and no judge "
            f"is asked; {f['parse_failures']} verdicts could not be read"
        )
    )
    return out + _notes(f)


def mt_bench(models: dict[str, dict]) -> list[Block]:
    """Return what the figures of the models that MT-Bench has judged say, the best model first."""
    scored = {name: f for name, f in models.items() if "average" in f}
    out: list[Block] = []
    if scored:
        best = sorted(scored, key=lambda name: scored[name]["average"] or 0, reverse=True)
        rows = [["MT-Bench, single answers", "turn 1", "turn 2", "average", "s.e.", "judgments"]]
        for name in best:
            f = scored[name]
            turns = [Mean(f[key], digits=5) for key in ("turn_1", "turn_2")]
            average = Mean(f["average"], f["standard_error"], digits=5)
            rows.append([name, *turns, average, number(average.error), str(f["n_judgments"])])
        out.append(Table(rows, 10))
        for name in best:
            out += _single(name, scored[name])
    for name, f in models.items():
        if "pairs" in f:
            out += _pairs(name, f["pairs"])
    return out


def _single(name: str, f: dict) -> list[Block]:
    rows = [["category", "n", "turn 1", "turn 2", "average"]]
    for category, c in f["categories"].items():
        means = [Mean(c[key]) for key in ("turn_1", "turn_2", "average")]
        rows.append([category, str(c["n"]), *means])
    out = [
        Title(f"{plain(name, 60)}, judged by {plain(f['judge'], 30)}"),
        Table(rows, 10),
        *judge(f, "score"),
        Said(
            f"{f['n_failures']} judgments have no score and are in no mean; to "
            f"{f['n_unanswered']} of them the judge did not answer"
        ),
    ]
    out += _missing(f)
    if f["n_misread"]:
        out.append(
            Said(
                f"{f['n_misread']} scores are not what the judge's words say by FastChat's rule",
                "warning",
            )
        )
    if f["n_duplicates"]:
        some = ", ".join(f["duplicates"][:3]) + ", ..." * (len(f["duplicates"]) > 3)
        out.append(
            Said(
                f"{f['n_duplicates']} judgments are of a question and turn judged before (question "
                f"{some}); they count again, as in FastChat's show_result",
                "warning",
            )
        )
    if wrong := f["wrong_references"]:
        out.append(
            Said(
                f"the reference answers of {len(wrong)} questions are known to be wrong "
                f"({', '.join(map(str, wrong))}); without them the average is "
                f"{number(f['without_wrong_references'])}",
                "note",
            )
        )
    return out + _notes(f)


def _pairs(name: str, f: dict) -> list[Block]:
    others = ", ".join(plain(other, 30) for other in f["opponents"][:3])
    others += f" and {len(f['opponents']) - 3} more" * (len(f["opponents"]) > 3)
    rate = Mean(f["win_rate"], f["standard_error"])
    out = [
        Title(
            f"MT-Bench, pairs: {plain(name, 60)}",
            f"against {others}, judged by {plain(f['judge'], 30)}",
        ),
        Table([["", "%", "s.e."], ["win rate, ties as half", rate, number(rate.error)]], 100),
        Said(f"{f['wins']} wins, {f['losses']} losses, {f['ties']} ties in {f['n_pairs']} pairs"),
        *judge(f),
        Said(
            f"{f['game_ties']} games were called a tie, {f['n_failures']} have no verdict; a pair "
            "whose games disagree is a tie, and one that lacks a verdict is in no win rate"
        ),
        *_missing(f),
    ]
    if f["n_duplicates"]:
        out.append(
            Said(
                f"{f['n_duplicates']} pairs are of a question and turn judged before; they count "
                "again",
                "warning",
            )
        )
    return out + _notes(f)


def agreement(a: dict) -> Said:
    one, other = (plain(name, 40) for name in a["judges"])
    model = plain(a["model"], 60)
    if not a["n"]:
        return Said(f"{one} and {other} judged no answer of {model} both", "warning")
    return Said(
        f"{one} and {other} agree on {a['same']:.1f} % of {a['n']} verdicts on {model}, Cohen's "
        f"kappa {number(a['kappa'], 3)}"
    )


def _missing(f: dict) -> list[Said]:
    judged, in_all = f["n_questions"], f["n_questions_in_all"]
    said = f"{judged} of {in_all} questions were judged: the figures are not those of all"
    return [Said(said, "warning")] * (judged < in_all)


def _notes(figures: dict) -> list[Said]:
    warnings = [Said(plain(warning, 300), "warning") for warning in figures["warnings"]]
    return warnings + [Said(plain(note, 400), "note") for note in figures.get("notes", ())]
