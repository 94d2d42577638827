"""What AlpacaEval's judge is asked: a template of alpaca_eval's own form, or our own.

Such a template has messages between <|im_start|>ROLE and <|im_end|>, and in them the three places
{instruction}, {output_1} and {output_2}: which output is the first, the caller decides.
"""

import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from zephyr.files import plain

PLACES = re.compile(r"\{(instruction|output_1|output_2)\}")
BLOCK = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)
OWN_NAME = "zephyr's own"
OWN = """<|im_start|>user
[Instruction]
{instruction}

[Answer m]
{output_1}

[Answer M]
{output_2}

Which of the two answers is better? Reply with one letter, m or M, and nothing else.
<|im_end|>"""


def read(path: str | None) -> tuple[str, list[dict]]:
    """Return the name of a prompt, with its hash, and its messages: alpaca_eval's own form of text
    in <|im_start|> blocks, from a file, or our own."""
    try:
        text = OWN if path is None else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8; give alpaca_eval's alpaca_eval_clf.txt"
        ) from error
    blocks = [{"role": role, "content": content.strip()} for role, content in BLOCK.findall(text)]
    places = sorted(place for block in blocks for place in PLACES.findall(block["content"]))
    if places != ["instruction", "output_1", "output_2"]:
        raise ValueError(
            f"{path} has no <|im_start|> blocks in which {{instruction}}, {{output_1}} and "
            "{output_2} stand once each; give alpaca_eval's alpaca_eval_clf.txt"
        )
    name = OWN_NAME if path is None else Path(path).name
    return f"{plain(name)} (sha256 {sha256(text.encode()).hexdigest()[:12]})", blocks


def fill(blocks: Sequence[dict], instruction: str, first: str, second: str) -> list[dict]:
    """Return the messages with three texts in their places. They are data: a text in which
    {output_2} stands keeps it."""
    values = {"instruction": instruction, "output_1": first, "output_2": second}
    return [
        block | {"content": PLACES.sub(lambda place: values[place[1]], block["content"])}
        for block in blocks
    ]
