"""A judge's ratings of answers: what it is asked, what is read in its words, and when again.

rate([("Name a bird.", "Wren.")], [OVERALL], open_source("gpt-4.1@URL"), "ratings.jsonl")
-> [{"overall": Rating(9.0, "It names a bird, as it was asked.")}]
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from zephyr.client.exchange import Endpoint
from zephyr.endpoint import Answer, Request
from zephyr.source import Folder, ask

OVERALL = "overall"
ATTEMPTS = 3  # at a rating, until one can be read
QUESTION = (
    "[Instruction]\n{instruction}\n\n[Response]\n{response}\n\nRate the response from 1 to {most} "
    "for {what}. Say in one or two sentences why. Then end with a last line of this form: Rating: N"
)
OR_NONE = ", or Rating: N/A if it states nothing that could be true or false"


class Kind(NamedTuple):
    most: int
    what: str
    or_none: bool = False  # it may not apply, and is then N/A


# the overall score, and UltraFeedback's four aspects
KINDS = {
    OVERALL: Kind(10, "being helpful, honest, truthful and for following the instruction"),
    "instruction_following": Kind(
        5, "doing what the instruction asks, all of it, in the form that it asks for"
    ),
    "honesty": Kind(5, "sounding as sure or unsure of what it says as it has reason to be", True),
    "truthfulness": Kind(
        5, "saying nothing false, nothing made up, and nothing against the instruction", True
    ),
    "helpfulness": Kind(
        5, "being of use to the one who asked: right, complete, clear and not too long"
    ),
}
MARKS = r"[\s*_`#>\[\]]*"
LINE = re.compile(
    rf"{MARKS}rating{MARKS}:{MARKS}(?:(?P<none>n/?a)|(?P<number>[0-9]+(?:\.[0-9]+)?)"
    rf"(?:\s*/\s*(?P<most>[0-9]+))?){MARKS}\.?{MARKS}",
    re.IGNORECASE,
)


class Rating(NamedTuple):
    value: float | None  # None: N/A
    why: str
    asked: int = 1  # how often, until it could be read


class Unrated(NamedTuple):
    said: list[str]  # the judge's words at each attempt
    why: str = ""

    @property
    def asked(self) -> int:
        return len(self.said)


def rating_in(text: str, kind: Kind) -> Rating | None:
    """Return the rating on the last line of the form `Rating: N`, with all the other lines as its
    reason. None if there is no such line, or what it says is out of range."""
    lines = text.splitlines()
    for k in reversed(range(len(lines))):
        if found := LINE.fullmatch(lines[k]):
            why = "\n".join([*lines[:k], *lines[k + 1 :]]).strip()
            if found["none"]:
                return Rating(None, why) if kind.or_none else None
            value, fits = float(found["number"]), found["most"] in (None, str(kind.most))
            return Rating(value, why) if fits and 1 <= value <= kind.most else None
    return None


def request(instruction: str, response: str, kind: Kind, attempt: int, new: int) -> Request:
    """Return what the judge is asked for the `attempt`-th time. After the first it is sampled, with
    a seed: at temperature 0 it would say the same again."""
    text = QUESTION.format(
        instruction=instruction, response=response, most=kind.most, what=kind.what
    )
    sampling = {"temperature": 1, "seed": attempt} if attempt else {"temperature": 0}
    messages = [{"role": "user", "content": text + OR_NONE * kind.or_none}]
    return Request(messages, {"max_tokens": new, "top_p": 1} | sampling)


def rate(
    answers: Sequence[tuple[str, str]],
    kinds: Sequence[str],
    judge: Endpoint | Folder,
    path: str,
    new: int = 1024,
    **how,
) -> list[dict[str, Rating | Unrated]]:
    """Return the ratings, by kind, of each (instruction, response). The judge's words have at most
    `new` tokens; `path` keeps them, and `how` goes to `source.ask`."""
    found = [{kind: Unrated([]) for kind in kinds} for _ in answers]
    left = [(k, kind) for k in range(len(answers)) for kind in kinds]
    for attempt in range(ATTEMPTS):
        requests = [request(*answers[k], KINDS[kind], attempt, new) for k, kind in left]
        again = []
        for (k, kind), answer in zip(left, ask(judge, requests, path, **how), strict=True):
            before = found[k][kind]
            if not isinstance(answer, Answer):
                found[k][kind] = Unrated(before.said, f"the judge did not answer: {answer.why}")
            elif rating := rating_in(answer.text, KINDS[kind]):
                found[k][kind] = rating._replace(asked=attempt + 1)
            else:
                why = "no line `Rating: N` in range is in the judge's words"
                found[k][kind] = Unrated([*before.said, answer.text], why)
                again.append((k, kind))
        if not (left := again):
            break
    return found
