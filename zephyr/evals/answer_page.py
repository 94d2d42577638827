"""What is to be known of a model's answers before a judge sees them: how many there are, how long,
and what is wrong with them."""

import textwrap
from collections.abc import Sequence

from zephyr.endpoint import Answer
from zephyr.evals import page
from zephyr.evals.converse import Said, missing
from zephyr.evals.questions import Question
from zephyr.files import plain, shown


def report(questions: Sequence[Question], said: Sequence[Said], again: bool) -> list[str]:
    """Return the lines about the answers to each question's turns. `again`: what has no answer may
    get one if it is asked again."""
    lines, both = table(questions, said), list(zip(questions, said, strict=True))
    if left := [(q, turns) for q, turns in both if missing(turns)]:
        why = f"{shown(left[0][0].name, 40)}: {plain(left[0][1][-1].why, 200)}"
        lines += wrapped(
            f"{len(left)} of {len(said)} questions are not in the file, the first, {why}"
            + "; the same command asks them again" * again
        )
    if empty := [q for q, turns in both if not missing(turns) and not all(a.text for a in turns)]:
        lines += wrapped(
            f"{len(empty)} of {len(said)} questions have an empty answer, the first "
            f"{shown(empty[0].name, 40)}; it is in the file, and a judge grades it as any other"
        )
    return lines


def wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, page.WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def table(questions: Sequence[Question], said: Sequence[Said]) -> list[str]:
    """Return a table of the questions by category or data set, and of the answers to them."""
    groups: dict[str, list[int]] = {}
    for k, question in enumerate(questions):
        groups.setdefault(str(question.group or "-"), []).append(k)
    rows = [["", "temperature", "questions", "missing", "mean characters", "empty", "cut off"]]
    everything = [("all", list(range(len(questions))))] if len(groups) > 1 else []
    for name, those in [*groups.items(), *everything]:
        whole = [k for k in those if not missing(said[k])]
        answers = [answer for k in whole for answer in said[k]]
        heats = [f"{x:g}" for x in sorted({questions[k].temperature for k in those})]
        empty = sum(not a.text for a in answers)
        cut = sum(a.finish_reason == "length" for a in answers)
        counts = [len(whole), len(those) - len(whole), mean_length(answers), empty, cut]
        rows.append([name, " to ".join(dict.fromkeys((heats[0], heats[-1]))), *map(str, counts)])
    return page.table(rows)


def mean_length(answers: Sequence[Answer]) -> str:
    """Return the mean length of answers, in characters."""
    return f"{sum(len(a.text) for a in answers) / len(answers):.0f}" if answers else "-"
