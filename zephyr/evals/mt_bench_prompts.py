"""What MT-Bench's judge is asked, FastChat's prompts from its file or our own, and what such a
prompt holds once it is filled.

There are eight, under FastChat's names: for one answer (`single-v1`) and for two (`pair-v2`); of
either kind one with a reference answer (`single-math-v1`, `pair-math-v1`); each of these for the
first turn, and with `-multi-turn` for the second. Our own have FastChat's layout and words of ours.
FastChat's judgments hold the answers in these prompts alone, so `conversation` takes them apart.
"""

from pathlib import Path
from typing import NamedTuple

from zephyr.data.readers import read_rows

OWN = "zephyr-"  # before the name of a prompt of our own, in the file of judgments
GRADE = (
    "Grade the assistant's answer{turn} from 1 to 10 for being helpful, relevant, correct and "
    "complete{by}. "
    "First say in a few sentences why. Then end with the grade in double brackets, as in [[5]]."
)
COMPARE = (
    "Which assistant's answer{turn} is better: more helpful, relevant, correct and complete{by}? "
    "Neither their order nor their length counts. First say in a few sentences why. Then end with "
    "the verdict in double brackets: [[A]] if assistant A is better, [[B]] if assistant B is, "
    "[[C]] if they are equally good."
)
NAMES = [
    kind + turn
    for kind in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
    for turn in ("", "-multi-turn")
]


class Prompt(NamedTuple):
    name: str
    system: str
    template: str

    def fill(self, values: dict[str, str]) -> list[dict]:
        """Return the messages with the values in their places. A value is data: braces in it are
        left as they are."""
        try:
            user = self.template.format(**values)
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the prompt {self.name} has a place that nothing fills: {error}; give FastChat's "
                "judge_prompts.jsonl as it is"
            ) from None
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


def read(path: str | None) -> dict[str, Prompt]:
    """Return the eight prompts by FastChat's names: from its file, or without one our own."""
    if path is None:
        return {name: _own(name) for name in NAMES}
    rows = {row.get("name"): row for _, row in read_rows(Path(path))}
    found = {}
    for name in NAMES:
        texts = [rows.get(name, {}).get(part) for part in ("system_prompt", "prompt_template")]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{path} has no prompt {name}; give FastChat's judge_prompts.jsonl")
        found[name] = Prompt(name, *texts)
    return found


def _own(name: str) -> Prompt:
    second, math, pair = (part in name for part in ("multi-turn", "math", "pair"))
    system = (COMPARE if pair else GRADE).format(
        turn=" to the second question" if second else "",
        by=", beside the reference answer" if math else "",
    )
    parts = [] if second else [f"[{'User ' * pair}Question]\n{{question}}"]
    if math:
        parts.append(_part("Reference", "ref_answer", second))
    for letter in "AB" if pair else "":
        parts.append(_part(f"Assistant {letter}'s", f"answer_{letter.lower()}", second))
    if not pair:
        parts.append(_part("Assistant A's" if second else "Assistant's", "answer", second))
    return Prompt(OWN + name, system, ("\n\n\n" if second else "\n\n").join(parts))


def _part(whose: str, answer: str, second: bool) -> str:
    """Return the part of a template that holds one side's answer, or both with their questions."""
    if not second:
        answer = "ref_answer_1" if answer == "ref_answer" else answer
        return f"[The Start of {whose} Answer]\n{{{answer}}}\n[The End of {whose} Answer]"
    says, what = whose.removesuffix("'s"), " Conversation with User"
    if whose == "Reference":
        says, what = "Reference answer", " Answer"
    turns = "".join(
        f"### User:\n{{question_{k}}}\n\n### {says}:\n{{{answer}_{k}}}\n\n" for k in (1, 2)
    )
    return f"<|The Start of {whose}{what}|>\n\n{turns}<|The End of {whose}{what}|>"


class Conversation(NamedTuple):
    questions: list[str]
    references: list[str]
    answers: dict[str, list[str]]  # of assistant a, and in a pair of b, one for each question


def _chat(name: str) -> list[str]:
    return [
        f"<|The Start of Assistant {name}'s Conversation with User|>\n\n### User:\n",
        f"\n\n### Assistant {name}:\n",
        "\n\n### User:\n",
        f"\n\n### Assistant {name}:\n",
    ]


_A, _B = "\n\n<|The End of Assistant A's Conversation with User|>", _chat("B")
# what stands before the first mark and behind each (q question, a and b the assistants' answers, -
# the judge's instructions), the marks in their order, and the prompt's end
FORMS = (
    (
        "-qa",
        ["[Question]\n", "\n\n[The Start of Assistant's Answer]\n"],
        "\n[The End of Assistant's Answer]",
    ),
    ("-qaqa", _chat("A"), _A),
    (
        "-qab",
        [
            "[User Question]\n",
            "\n\n[The Start of Assistant A's Answer]\n",
            "\n[The End of Assistant A's Answer]\n\n[The Start of Assistant B's Answer]\n",
        ],
        "\n[The End of Assistant B's Answer]",
    ),
    (
        "-qaqaqbqb",
        [*_chat("A"), f"{_A}\n\n\n{_B[0]}", *_B[1:]],
        "\n\n<|The End of Assistant B's Conversation with User|>",
    ),
)
REFERENCES = (  # where a reference answer starts in what is asked, and where it ends
    ("\n\n[The Start of Reference Answer]\n", "\n[The End of Reference Answer]"),
    ("<|The Start of Reference Answer|>\n\n", "\n\n<|The End of Reference Answer|>\n\n\n"),
)


def conversation(prompt: object) -> Conversation | None:
    """Return what a judge's prompt holds, None if it is of no form that is known.

    Marks are looked for from the front, each once, so that one which an answer repeats stays a part
    of some answer, and the time is linear in the prompt.
    """
    for fields, marks, end in FORMS if isinstance(prompt, str) else ():
        parts, rest = [], prompt if prompt.endswith(end) else ""
        rest = rest[: len(rest) - len(end)]
        for mark in marks:
            part, found, rest = rest.partition(mark)
            parts += [part] * bool(found)
        if len(parts) < len(marks):
            continue
        asked, references = [], []
        answers: dict[str, list[str]] = {}
        for what, part in zip(fields, [*parts, rest], strict=True):
            if what in "ab":
                answers.setdefault(what, []).append(part)
                continue
            for start, stop in REFERENCES:
                before, found, reference = part.partition(start)
                if found and reference.endswith(stop):
                    part = before
                    references.append(reference.removesuffix(stop))
            if what == "q":
                asked.append(part)
        questions = asked[: len(answers["a"])]
        if asked in (questions, questions * 2):  # else B was asked something else than A
            return Conversation(questions, references, answers)
    return None
