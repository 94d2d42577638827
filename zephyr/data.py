"""Files to token arrays: rows are read, rendered, tokenized and truncated once, then memory-mapped.

The arrays live in $ZEPHYR_CACHE (default ~/.cache/zephyr) under a key that covers the files'
content, the tokenizer, the template and the lengths; a run that asks for the same ones opens them
at once.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from zephyr import files
from zephyr.files import BadRow, BadRows
from zephyr.tokenizer import Tokenizer, Turn, conversation

TEMPLATE = "zephyr-1"  # part of the cache's key: change it when the rendering or cutting changes
CHUNK = 1024  # rows tokenized at once

Spoken = list[tuple[str, str]]  # (role, content) of each message


class Pair(NamedTuple):
    """Token ids. Both responses continue the same prompt, which ends in the assistant's header."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows of token ids in one flat array: row k's parts end at ends[k], starting where the row
    before it stopped. `mask` marks the tokens an assistant wrote (conversations only)."""

    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray  # [rows, parts]; parts are (whole,) or (prompt, chosen, rejected)
    digest: str  # of the cache's key, so of everything that went into it
    counts: dict[str, int]  # what was kept, cut and dropped
    skipped: str  # the bad rows that were skipped, one a line

    def __len__(self) -> int:
        return len(self.ends)

    def report(self, name: str) -> str:
        """One line of what was kept, cut and dropped; a line for each bad row that was skipped."""
        counts = {k: v for k, v in self.counts.items() if v and k not in ("kept", "rows")}
        rest = "".join(f"; {what} {count}" for what, count in counts.items())
        head = f"{name}: {self.counts['kept']} of {self.counts['rows']} rows"
        return f"{head}, {len(self.ids)} tokens{rest}" + (f"\n{self.skipped}" * bool(self.skipped))

    def parts(self, k: int) -> list[np.ndarray]:
        start = self.ends[k - 1, -1] if k else 0
        edges = [int(start), *self.ends[k].tolist()]
        return [self.ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]

    def pair(self, k: int) -> Pair:
        return Pair(*self.parts(k))

    def pair_lengths(self) -> np.ndarray:
        """Packed rows of each pair: a response's last token predicts nothing, so is no input."""
        starts = np.concatenate([[0], self.ends[:-1, -1]])
        return self.ends[:, -1] - starts - 2


def conversations(paths: tuple[str, ...], tokenizer: Tokenizer, c: Any) -> Tokens:
    """UltraChat-200k rows, `messages`, as whole conversations."""

    def parse(where: str, row: dict) -> Spoken:
        spoken = _in_form(where, lambda: conversation(row.get("messages"), c.empty_system))
        if not any(role == "assistant" for role, _ in spoken):
            raise BadRow(f"{where}: no message is the assistant's; there is nothing to learn")
        _no_blanks(where, spoken)
        return spoken

    def encode(rows: list[Spoken], counts: Counter) -> Iterator[tuple[list, list[bool]]]:
        flat = iter(tokenizer.turns([(k == 0, *t) for row in rows for k, t in enumerate(row)]))
        for row in rows:
            example = tokenizer.join(list(islice(flat, len(row))))
            counts["kept"] += 1
            yield [example.ids], example.mask

    return _cached(paths, tokenizer, c, ("sft", c.empty_system), parse, encode)


def preferences(paths: tuple[str, ...], tokenizer: Tokenizer, c: Any) -> Tokens:
    """Preference rows in any of the forms that `preference` reads, truncated as `cut_pair` does."""

    def parse(where: str, row: dict) -> tuple[Spoken, str, str]:
        prompt, chosen, rejected = preference(where, row)
        messages = [{"role": role, "content": text} for role, text in prompt]
        spoken = _in_form(where, lambda: conversation(messages, c.empty_system))
        if spoken[-1][0] != "user":
            raise BadRow(f"{where}: the prompt must end with a user's message")
        _no_blanks(where, spoken)
        return spoken, chosen, rejected

    def encode(rows: list[tuple[Spoken, str, str]], counts: Counter) -> Iterator[tuple]:
        flat = []
        for prompt, *responses in rows:
            flat += [(k == 0, *turn) for k, turn in enumerate(prompt)]
            flat += [(False, "assistant", response) for response in responses]
        turns = iter(tokenizer.turns(flat))
        for prompt, *responses in rows:
            context = list(islice(turns, len(prompt)))
            chosen, rejected = islice(turns, 2)
            if not all(response.strip() for response in responses):
                counts["dropped: a response is empty"] += 1
                continue
            pair = cut_pair(context, chosen, rejected, tokenizer, c, counts)
            if pair[1] == pair[2]:
                counts["dropped: chosen and rejected are the same"] += 1
                continue
            counts["kept"] += 1
            yield pair, []

    key = ("dpo", c.empty_system, c.max_length, c.max_prompt_length)
    return _cached(paths, tokenizer, c, key, parse, encode)


def preference(where: str, row: dict) -> tuple[Spoken, str, str]:
    """The prompt's messages and both responses of one row. Three forms are read:

    messages     chosen, rejected: whole conversations that differ in their last message; or, beside
                 a `prompt` (text or messages), only the responses
    text         prompt, chosen, rejected
    transcripts  chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." up to the response

    Raises BadRow if a side is missing or the two prompts differ.
    """
    sides, prompt = [row.get("chosen"), row.get("rejected")], row.get("prompt")
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if name not in row:
            raise BadRow(f"{where}: has no field {name!r}; it has {', '.join(row)[:80]}")
        if not isinstance(side, str | list) or (isinstance(side, list) and not side):
            raise BadRow(f"{where}: {name} must be text or messages, got {str(side)[:60]!r}")
    if type(sides[0]) is not type(sides[1]):
        raise BadRow(f"{where}: chosen and rejected must both be text or both be messages")
    if isinstance(sides[0], str):
        if prompt is None:
            dialogues = [transcript(where, side) for side in sides]
        elif isinstance(prompt, str | list):
            dialogues = [_lead(prompt) + [("assistant", side)] for side in sides]
        else:
            raise BadRow(f"{where}: prompt must be text or messages, got {str(prompt)[:60]!r}")
    else:
        dialogues = [_in_form(where, lambda s=side: _messages(s)) for side in sides]
        if prompt is not None and dialogues[0][0][0] == "assistant":
            dialogues = [_lead(prompt) + dialogue for dialogue in dialogues]
    (chosen_prompt, chosen), (rejected_prompt, rejected) = ((d[:-1], d[-1]) for d in dialogues)
    if chosen[0] != "assistant" or rejected[0] != "assistant" or not chosen_prompt:
        raise BadRow(f"{where}: chosen and rejected must end with an assistant's message")
    if chosen_prompt != rejected_prompt:
        raise BadRow(f"{where}: the prompts of chosen and rejected differ")
    return chosen_prompt, chosen[1], rejected[1]


def _lead(prompt: str | list) -> Spoken:
    return [("user", prompt)] if isinstance(prompt, str) else _messages(prompt)


def _messages(messages: list) -> Spoken:
    if not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
        raise ValueError(f"messages must have role and content, got {str(messages)[:60]!r}")
    return [(m["role"], m["content"]) for m in messages]


def transcript(where: str, text: str) -> Spoken:
    """hh-rlhf's flat text as messages: "\\n\\nHuman: Hi\\n\\nAssistant: Yo" -> Hi, Yo."""
    marks = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
    if not text.startswith("\n\nHuman:"):
        raise BadRow(
            f"{where}: text without a prompt must be a transcript that opens with "
            f"'\\n\\nHuman:', got {text[:40]!r}"
        )
    spoken, rest = [], text
    while rest:
        mark = next(m for m in marks if rest.startswith(m))
        rest = rest[len(mark) :]
        end = min((k for m in marks if (k := rest.find(m)) >= 0), default=len(rest))
        spoken.append((marks[mark], rest[:end].strip()))
        rest = rest[end:]
    return spoken


def cut_pair(
    context: list[Turn], chosen: Turn, rejected: Turn, tokenizer: Tokenizer, c: Any, counts: Counter
) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected ids, truncated as the alignment handbook's recipe B does:

    if prompt + longer response exceed max_length, the prompt keeps its last max_prompt_length
    tokens; if they still do, each response keeps its first max_length - max_prompt_length.
    """
    header = chosen.ids[: chosen.header]
    prompt = [tokenizer.bos, *(i for turn in context for i in turn.ids), *header]
    responses = [turn.ids[turn.header :] for turn in (chosen, rejected)]
    longer = max(map(len, responses))
    if len(prompt) + longer > c.max_length:
        if len(prompt) > c.max_prompt_length:
            prompt = cut_prompt(context, header, tokenizer.bos, c.max_prompt_length)
            counts["cut: prompt"] += 1
        if len(prompt) + longer > c.max_length:
            responses = [r[: c.max_length - c.max_prompt_length] for r in responses]
            counts["cut: responses"] += 1
    return prompt, *responses


def cut_prompt(context: list[Turn], header: list[int], bos: int, limit: int) -> list[int]:
    """The end of a prompt in at most `limit` tokens, still a well-formed one.

    BOS, the system message (the end of a long one: at most half of `limit`) and the assistant's
    header stay; whole turns are kept from the last one backwards, and the turn where that stops
    keeps its own header and its content's end. [s] system, u1 a1 u2 turns, limit reached in a1:
        BOS [s] u1 a1 u2 header  ->  BOS [s] (header of a1, end of a1) u2 header
    """
    opening, turns = [bos], list(context)
    if turns[0].role == "system":
        opening += _end(turns.pop(0), limit // 2 - 1)
    room = limit - len(opening) - len(header)
    kept: list[list[int]] = []
    for turn in reversed(turns):
        kept.append(_end(turn, room))
        room -= len(kept[-1])
        if len(kept[-1]) < len(turn.ids):
            break
    if not kept[0]:
        raise ValueError(
            f"--max-prompt-length {limit} leaves no room for a prompt beside the template's "
            f"opening and headers of {limit - room} tokens; use a larger one"
        )
    return [*opening, *(i for ids in reversed(kept) for i in ids), *header]


def _end(turn: Turn, room: int) -> list[int]:
    """The turn's header and as much of its end as fits, or nothing if no content would."""
    if len(turn.ids) <= room:
        return turn.ids
    tail = room - turn.header
    return turn.ids[: turn.header] + turn.ids[-tail:] if tail > 1 else []


def _no_blanks(where: str, spoken: Spoken) -> None:
    for k, (role, text) in enumerate(spoken):
        if role != "system" and not text.strip():
            raise BadRow(f"{where}: message {k}, the {role}'s, is empty")


def _in_form(where: str, parse: Callable[[], Spoken]) -> Spoken:
    """Messages out of form are a bad row, and the line says which."""
    try:
        return parse()
    except ValueError as error:
        raise BadRow(f"{where}: {error}") from None


def _cached(
    paths: tuple[str, ...], tokenizer: Tokenizer, c: Any, key: tuple, parse: Callable,
    encode: Callable,
) -> Tokens:  # fmt: skip
    """Open the arrays of this key, first making them if they are not there."""
    sources = files.expand(paths)
    whole = [TEMPLATE, tokenizer.digest, *key, c.on_bad_row, *(_sha256(p) for p in sources)]
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    folder = cache_folder() / f"{key[0]}-{digest[:20]}"
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        part.mkdir(parents=True)
        try:
            _write(part, sources, tokenizer, c, parse, encode)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    about = json.loads((folder / "about.json").read_text())
    ids, mask = (np.memmap(folder / f, t) for f, t in (("ids", about["dtype"]), ("mask", bool)))
    ends = np.load(folder / "ends.npy")
    return Tokens(ids, mask, ends, digest, about["counts"], about["skipped"])


def _write(
    part: Path, sources: list[Path], tokenizer: Tokenizer, c: Any, parse: Callable, encode: Callable
) -> None:
    """Stream rows into flat files, a chunk at a time; raises ValueError if no row is left."""
    counts, bad = Counter(), BadRows(c.on_bad_row)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    ends, end = [], 0
    with (part / "ids").open("wb") as ids_file, (part / "mask").open("wb") as mask_file:
        rows = _parsed(sources, parse, bad)
        while chunk := list(islice(rows, CHUNK)):
            for parts, mask in encode(chunk, counts):
                edges = []
                for ids in parts:
                    ids_file.write(np.asarray(ids, dtype).tobytes())
                    edges.append(end := end + len(ids))
                ends.append(edges)
                mask_file.write(np.asarray(mask, bool).tobytes())
        bad.check()
        if not ends:
            raise ValueError(f"{sources[0]}: no row is left to train on; {dict(counts) or 'empty'}")
        if not mask_file.tell():
            mask_file.write(b"\0")  # an empty file cannot be mapped
    counts["rows"] = bad.rows
    counts["skipped: bad row"] = bad.skipped
    np.save(part / "ends.npy", np.asarray(ends, np.int64))
    about = {"dtype": dtype, "counts": counts, "skipped": bad.report()}
    (part / "about.json").write_text(json.dumps(about))


def _parsed(sources: list[Path], parse: Callable, bad: BadRows) -> Iterator:
    for source in sources:
        with tqdm(desc=f"tokenizing {source.name}", unit=" rows", delay=3, leave=False) as bar:
            for where, row in files.read_rows(source, bad):
                bar.update()
                parsed = None
                with bad.guard():
                    parsed = parse(where, row)
                if parsed is not None:
                    yield parsed


def cache_folder() -> Path:
    return Path(os.environ.get("ZEPHYR_CACHE") or Path.home() / ".cache" / "zephyr")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
