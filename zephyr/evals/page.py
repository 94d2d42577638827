"""The figures of an evaluation as plain text. Every line fits 100 columns."""

import textwrap
from collections.abc import Sequence

from zephyr.files import plain

WIDTH = 100


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


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


def said(text: str, head: str = "") -> list[str]:
    """Return a sentence as lines, after a word such as `warning: `."""
    return textwrap.wrap(head + text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _mean(group: dict, name: str) -> list[str]:
    return [name, str(group["n"]), number(group["mean"]), number(group["standard_error"])]


def judge(figures: dict, what: str = "win rate") -> list[str]:
    """Return what is known of the judge: its slots, its lengths, its consistency, its warnings."""
    lines = []
    if slots := figures.get("slots"):
        rows = [["the model's answer is", "n", what, "s.e."]]
        rows += [_mean(slots["first"], "shown first"), _mean(slots["second"], "shown second")]
        if "second_minus_first" in slots:
            gap, error = slots["second_minus_first"], slots["standard_error"]
            rows.append(["second less first", "", f"{gap:+.2f}", number(error)])
        lines += table(rows)
        if "second_minus_first" in slots and error is not None and abs(gap) > 2 * error:
            side = "second" if gap > 0 else "first"
            lines += said(f"the judge favours what it is shown {side}", "warning: ")
    if quarters := figures.get("length_quarters"):
        about = "longer by (characters)" if what == "win rate" else "answer's characters"
        rows = [[about, "n", what, "s.e."]]
        rows += [_mean(q, f"{q['shortest']} to {q['longest']}") for q in quarters]
        lines += [*[""] * bool(lines), *table(rows)]
    else:
        lines += said("the lengths of the answers cannot be told from this file")
    if "consistency" in figures:
        if same := figures["consistency"]:
            lines += said(
                f"consistency {same['consistent']:.1f} % of {same['pairs']} pairs judged in both "
                f"orders; where not, the first slot won {same['first_slot_preferred']} times and "
                f"the second {same['second_slot_preferred']} times"
            )
        else:
            lines += said("consistency is unknown: no pair was judged in both orders")
    return lines


def alpaca(f: dict) -> str:
    """Return the page of one AlpacaEval run."""
    name, baseline, by = (plain(f[key], 60) for key in ("model", "baseline", "judge"))
    lines = [f"AlpacaEval: {name}", f"  against {baseline}, judged by {by}", ""]
    rows = [["", "%", "s.e."]]
    rows.append(["win rate", number(f["win_rate"]), number(f["standard_error"])])
    if "length_controlled_win_rate" in f:
        controlled = number(f["length_controlled_win_rate"]), number(f["lc_standard_error"])
        rows.append(["length-controlled win rate", *controlled])
    rows.append(["discrete win rate", number(f["discrete_win_rate"]), ""])
    lines += table(rows)
    lines += said(
        f"standard error by bootstrap over questions {number(f['bootstrap_standard_error'])}"
    )
    lines += said(
        f"{f['n_total']} judged: {f['n_wins']} wins, {f['n_wins_base']} losses, "
        f"{f['n_draws']} draws; {f['n_dropped']} without a verdict, in no figure"
    )
    lines += said(
        f"average length {f['avg_length']} characters, the baseline's {f['avg_length_baseline']}"
    )
    lines += ["", "The judge", *judge(f)]
    if not f["consistency"]:
        lines += said("which answer was shown first is told by AlpacaEval's rule, with its seed 0")
    lines += said(
        f"{f['ties']} ties; {f['equal_answers']} times the two answers are equal, and no judge is "
        f"asked; {f['parse_failures']} verdicts could not be read"
    )
    return _end(lines, f)


def mt_bench(models: dict[str, dict]) -> str:
    """Return the page of the models that MT-Bench has judged, the best first."""
    scored = {name: f for name, f in models.items() if "average" in f}
    lines = []
    if scored:
        best = sorted(scored, key=lambda name: scored[name]["average"] or 0, reverse=True)
        rows = [["MT-Bench, single answers", "turn 1", "turn 2", "average", "s.e.", "judgments"]]
        for name in best:
            f = scored[name]
            means = [number(f[key], 5) for key in ("turn_1", "turn_2", "average")]
            error = number(f["standard_error"])
            rows.append([name, *means, error, str(f["n_judgments"])])
        lines += table(rows)
        for name in best:
            lines += _single(name, scored[name])
    for name, f in models.items():
        if "pairs" in f:
            lines += _pairs(name, f["pairs"])
    return "\n".join(lines)


def _single(name: str, f: dict) -> list[str]:
    lines = ["", f"{plain(name, 60)}, judged by {plain(f['judge'], 30)}"]
    rows = [["category", "n", "turn 1", "turn 2", "average"]]
    for category, c in f["categories"].items():
        means = [number(c[key]) for key in ("turn_1", "turn_2", "average")]
        rows.append([category, str(c["n"]), *means])
    lines += [*table(rows), "", "The judge", *judge(f, "score")]
    lines += said(
        f"{f['n_failures']} judgments have no score and are in no mean; to {f['n_unanswered']} of "
        "them the judge did not answer"
    )
    if f["n_misread"]:
        lines += said(
            f"{f['n_misread']} scores are not what the judge's words say by FastChat's rule",
            "warning: ",
        )
    if f["n_duplicates"]:
        some = ", ".join(f["duplicates"][:3]) + ", ..." * (len(f["duplicates"]) > 3)
        lines += said(
            f"{f['n_duplicates']} judgments are of a question and turn judged before (question "
            f"{some}); they count again, as in FastChat's show_result",
            "warning: ",
        )
    if wrong := f["wrong_references"]:
        lines += said(
            f"the reference answers of {len(wrong)} questions are known to be wrong "
            f"({', '.join(map(str, wrong))}); without them the average is "
            f"{number(f['without_wrong_references'])}",
            "note: ",
        )
    return _end(lines, f).split("\n")


def _pairs(name: str, f: dict) -> list[str]:
    others = ", ".join(plain(other, 30) for other in f["opponents"][:3])
    others += f" and {len(f['opponents']) - 3} more" * (len(f["opponents"]) > 3)
    lines = ["", f"MT-Bench, pairs: {plain(name, 60)}"]
    lines += [*said(f"  against {others}, judged by {plain(f['judge'], 30)}"), ""]
    lines += table(
        [
            ["", "%", "s.e."],
            ["win rate, ties as half", number(f["win_rate"]), number(f["standard_error"])],
        ]
    )
    lines += said(
        f"{f['wins']} wins, {f['losses']} losses, {f['ties']} ties in {f['n_pairs']} pairs"
    )
    lines += ["", "The judge", *judge(f)]
    lines += said(
        f"{f['game_ties']} games were called a tie, {f['n_failures']} have no verdict; a pair "
        "whose games disagree is a tie, and one that lacks a verdict is in no win rate"
    )
    if f["n_duplicates"]:
        lines += said(
            f"{f['n_duplicates']} pairs are of a question and turn judged before; they count again",
            "warning: ",
        )
    return _end(lines, f).split("\n")


def agreement(a: dict) -> str:
    one, other = (plain(name, 40) for name in a["judges"])
    if not a["n"]:
        return "\n".join(
            said(f"{one} and {other} judged no answer of {plain(a['model'], 60)} both", "warning: ")
        )
    return "\n".join(
        said(
            f"{one} and {other} agree on {a['same']:.1f} % of {a['n']} verdicts on "
            f"{plain(a['model'], 60)}, Cohen's kappa {number(a['kappa'], 3)}"
        )
    )


def _end(lines: list[str], figures: dict) -> str:
    for warning in figures["warnings"]:
        lines += said(plain(warning, 300), "warning: ")
    for note in figures.get("notes", ()):
        lines += said(plain(note, 400), "note: ")
    return "\n".join(lines)
