"""The prompts by which MT-Bench asks a judge, taken apart into questions, references and answers.

FastChat's judgments hold the answers nowhere else. The forms are FastChat's, of single answers and
of pairs; those of our own, in mt_bench_prompts.py, have the same layout.
"""

from typing import NamedTuple


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
