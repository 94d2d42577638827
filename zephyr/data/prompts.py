"""Prompts that nobody has answered yet, from files of any form that has a prompt."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from zephyr.data import forms
from zephyr.data.held_out import normalized
from zephyr.data.readers import BadRow, BadRows, expand, read_rows
from zephyr.files import shown
from zephyr.tokenizer import conversation

WHO = {"user": "Human", "assistant": "Assistant"}


class Prompt(NamedTuple):
    text: str  # UltraFeedback's `instruction`; of several turns a transcript, as hh-rlhf's
    messages: list[dict]
    source: str  # the row's own, or the name of its file


def read_prompts(
    paths: Sequence[str], exclude: frozenset[str], dropped: Counter, bad: BadRows
) -> list[Prompt]:
    """Return the prompts in the order of the rows; of those that are equal but for case and spaces
    the first, and none whose normalized text is in `exclude`. `dropped` counts the others.

    Other columns, answers among them, are not read. Raises BadRow, unless `bad` skips it, for a row
    without a prompt, or with more to it than a text can say.
    """
    found: dict[str, Prompt] = {}
    for path in expand(paths):
        for where, row in read_rows(path, bad, {"source", *forms.ALWAYS}):
            with bad.guard():
                prompt = _prompt(where, row, path.name)
                if (name := normalized(prompt.text)) in exclude:
                    dropped["in an evaluation set"] += 1
                elif found.setdefault(name, prompt) is not prompt:
                    dropped["duplicate prompt"] += 1
    bad.check()
    dropped += Counter({"bad row": bad.skipped})
    if not found:
        why = ", ".join(f"{n} {what}" for what, n in dropped.items()) or "no row is in it"
        raise ValueError(f"{paths[0]}: no prompt is left: {why}")
    return list(found.values())


def _prompt(where: str, row: dict, file: str) -> Prompt:
    try:
        forms.refuse(row, (*forms.SYSTEMS, *forms.UNUSABLE))
        if (asked := forms.asked(row)) is None:
            raise ValueError(f"has no field {', '.join(forms.PROMPTS)}{forms.it_has(row)}")
        spoken = conversation(asked, system=False)
        if spoken[0][0] == "system" or spoken[-1][0] != "user":
            raise ValueError(
                f"a prompt begins and ends with what the user says, not {shown(spoken, 60)}"
            )
        forms.no_blanks(spoken)
        forms.plain_text(spoken)
        text = spoken[0][1]
        if len(spoken) > 1:
            text = "".join(f"\n\n{WHO[role]}: {said}" for role, said in spoken)
        messages = [{"role": role, "content": said} for role, said in spoken]
        if forms.turns("instruction", text) != messages:
            raise ValueError(f"{shown(text, 60)} would be read as other turns; change its text")
    except ValueError as error:
        raise BadRow(f"{where}: {error}") from None
    source = row.get("source")
    return Prompt(text, messages, source if isinstance(source, str) and source.strip() else file)
