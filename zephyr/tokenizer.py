"""sentencepiece and the Zephyr chat template: messages to ids and mask.

The template, with roles as plain text and an empty system message when none is given:

    <s><|system|>\\n</s>\\n<|user|>\\nHi</s>\\n<|assistant|>\\nYo</s>

`<s>` and `</s>` above are ids, never text: each turn is encoded on its own as a fresh piece
(sentencepiece puts its dummy prefix before it) and EOS is appended as an id. No text in a message
can become a control id.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from zephyr import files
from zephyr.files import blank, plain, shown
from zephyr.weights import locate

ROLES = ("system", "user", "assistant")
MODEL_BYTES = 64 << 20  # Mistral's tokenizer.model has half a megabyte, a large one five


class Example(NamedTuple):
    ids: list[int]
    mask: list[bool]  # True on each assistant's content and its EOS


class Turn(NamedTuple):
    """One rendered message: ids[:header] is `<|role|>\\n`, the rest its content and EOS."""

    role: str
    ids: list[int]
    header: int


def conversation(messages: object, system: bool = True) -> list[tuple[str, str]]:
    """Return (role, content) of each message. If `system` is true and there is no system message,
    an empty one comes first.

    Raises ValueError unless messages are {role, content} strings: at most one system message, at
    the start, then user and assistant in turn. Other keys may be there if they are blank.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list that is not empty, got {shown(messages)}")
    turns = []
    for k, message in enumerate(messages):
        if isinstance(message, dict):  # null is as good as absent
            message = {key: x for key, x in message.items() if x is not None}
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {k} must have role and content, got {shown(message)}")
        for key in sorted(key for key, x in message.items() if not blank(x)):
            if key not in ("role", "content"):
                raise ValueError(
                    f"message {k} has {shown(key, 40)}: {shown(message[key], 40)}, "
                    "which would be lost: only role and content are read; remove it"
                )
        role, content = message["role"], message["content"]
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(f"message {k} has role {shown(role, 40)}; known roles are {known}")
        if not isinstance(content, str):
            raise ValueError(f"message {k} has content of type {type(content).__name__}, not text")
        turns.append((role, content))
    if turns[0][0] != "system" and system:
        turns.insert(0, ("system", ""))
    spoken = turns[1:] if turns[0][0] == "system" else turns
    for k, (role, _) in enumerate(spoken):
        if role != ROLES[1 + k % 2]:
            raise ValueError(
                f"turn {k} is the {role}'s where the {ROLES[1 + k % 2]} should speak: "
                "system first if at all, then user and assistant in turn"
            )
    return turns


class Tokenizer:
    """A sentencepiece model with the chat template.

    `path` is a tokenizer.model or the folder that holds it. Raises ValueError if it is missing,
    damaged, or has no <s> and </s>.
    """

    def __init__(self, path: str | Path):
        self.path = locate.tokenizer_file(Path(path))
        if (size := self.path.stat().st_size) > MODEL_BYTES:
            raise ValueError(f"{self.path}: {size:,} bytes, so not a sentencepiece model")
        data = self.path.read_bytes()
        self.digest = hashlib.sha256(data).hexdigest()
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.load_from_serialized_proto(data)
        except (RuntimeError, UnicodeDecodeError) as error:  # it may quote a damaged piece
            files.recognise_weights(self.path, data[:500])
            if re.match(rb"[\w+/=]+ \d+\n", data):
                raise ValueError(
                    f"{self.path} is a tiktoken file, as Llama 3's; sentencepiece "
                    "alone is implemented"
                ) from None
            why = plain(" ".join(str(error).split()), 200)
            raise ValueError(f"{self.path}: not a sentencepiece model ({why})") from None
        self.vocab_size = self.sp.vocab_size()
        # sentencepiece would load NaN and merge pieces in an order that means nothing
        if not all(map(math.isfinite, self.sp.get_score(list(range(self.vocab_size))))):
            raise ValueError(f"{self.path}: damaged: a piece's score is not a finite number")
        self.bos, self.eos = self.sp.bos_id(), self.sp.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise ValueError(f"{self.path}: has no <s> or no </s>; the chat template needs both")
        if self.bos == self.eos:
            raise ValueError(f"{self.path}: damaged: <s> and </s> are one piece, id {self.bos}")
        self._newline = self.sp.encode("\n")

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids that follow a newline, as every message does; control ids give
        none."""
        text = [i for i in ids if not self.sp.is_control(i)]
        return self.sp.decode(self._newline + text)[1:]

    def turns(self, messages: list[tuple[bool, str, str]]) -> list[Turn]:
        """Encode many (opens the conversation, role, content) at once, on all cores. Raises
        ValueError if a piece spans the end of a header: prompt and response would then disagree."""
        headers = [f"<|{role}|>\n" if first else f"\n<|{role}|>\n" for first, role, _ in messages]
        contents = [content for _, _, content in messages]
        known = {text: self.sp.encode(text) for text in set(headers)}
        encoded = self.sp.encode([h + c for h, c in zip(headers, contents, strict=True)])
        turns = []
        for (_, role, content), header, ids in zip(messages, headers, encoded, strict=True):
            split = len(known[header])
            if ids[:split] != known[header]:
                raise ValueError(
                    f"{self.path}: a piece spans the end of {header!r} and the start of "
                    f"{content[:40]!r}; this tokenizer cannot separate prompt and response"
                )
            turns.append(Turn(role, [*ids, self.eos], split))
        return turns

    def join(self, turns: list[Turn]) -> Example:
        """Return a whole conversation: BOS once, then every turn."""
        ids, mask = [self.bos], [False]
        for role, turn, header in turns:
            ids += turn
            mask += [False] * header + [role == "assistant"] * (len(turn) - header)
        return Example(ids, mask)

    def header(self, role: str) -> list[int]:
        """Return the ids of `\n<|role|>\n`, as it stands after an EOS."""
        return self.sp.encode(f"\n<|{role}|>\n")

    def render(self, messages: list[dict[str, str]], system: bool = True) -> Example:
        """Ids and mask of a conversation. Raises ValueError for messages out of form.

        With Mistral's tokenizer, [user "Hi", assistant "Yo"]:
            ids  1 523 28766 6574 28766 28767 13 2 28705 13 28789 28766 1838 28766 28767 13 23809 2
                 28705 13 28789 28766 489 11143 28766 28767 13 28802 28709 2
            mask is True on the last three, `Yo</s>`.
        """
        spoken = conversation(messages, system)
        return self.join(self.turns([(k == 0, *turn) for k, turn in enumerate(spoken)]))

    def prompt(self, messages: list[dict[str, str]], system: bool = True) -> list[int]:
        """Return the ids that generation starts from: the conversation, then the assistant's
        header."""
        return self.render(messages, system).ids + self.header("assistant")
