"""Files to token arrays: rows are read, rendered, tokenized and truncated once, then memory-mapped.

The arrays live in $ZEPHYR_CACHE (default ~/.cache/zephyr) under a key that covers the files'
content, the tokenizer, the template and the lengths; a run that asks for the same ones opens them,
once their sums are checked, at a gigabyte or more a second. What is damaged is made again.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from zephyr.data import forms, readers
from zephyr.data.cache import cache_folder, scratch, sha256_of
from zephyr.data.forms import Spoken
from zephyr.data.readers import BadRow, BadRows
from zephyr.distributed import group
from zephyr.distributed.group import Ranks
from zephyr.packing import Pair
from zephyr.tokenizer import Tokenizer, Turn

TEMPLATE = "zephyr-3"  # part of the cache's key: change it when the rendering or cutting changes
CHUNK, CHARACTERS = 256, 1 << 22  # rows, or about as much text, tokenized at once
ARRAYS, SUMS = ("about.json", "ends.npy", "ids", "mask", "places.npy"), "SHA256SUMS"
Encoded = tuple[Sequence[list[int]], list[bool]] | None  # a row's parts and mask; None: dropped


@dataclass(frozen=True, eq=False)
class Tokens:
    """Conversations or pairs as token ids, in one flat array. Item k's parts end at ends[k] and
    start where the item before it stopped. `mask` marks the tokens that an assistant wrote
    (conversations only)."""

    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray  # [rows, parts]; parts are (whole,) or (prompt, chosen, rejected)
    digest: str  # of the cache's key, so of everything that went into it
    counts: dict[str, int]  # what was kept, cut and dropped
    skipped: str  # the bad rows that were skipped, one a line
    places: np.ndarray  # [rows, 2]: which of the files a row came from, and its line or row there
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def report(self) -> str:
        """Return a line that says what was kept, cut and dropped, and a line for each bad row that
        was skipped."""
        counts = {k: v for k, v in self.counts.items() if v and k not in ("kept", "rows")}
        rest = "".join(f"; {what} {count}" for what, count in counts.items())
        name = "pairs" if self.ends.shape[1] == 3 else "documents"
        head = f"{name}: {self.counts['kept']} of {self.counts['rows']} rows"
        return f"{head}, {len(self.ids)} tokens{rest}" + (f"\n{self.skipped}" * bool(self.skipped))

    def where(self, k: int) -> str:
        """Return the file and the line that item k came from, as "pairs.jsonl:17"."""
        file, line = self.places[k].tolist()
        return f"{self.sources[file]}:{line}"

    def parts(self, k: int) -> list[np.ndarray]:
        """Return the token ids of item k's parts."""
        start = self.ends[k - 1, -1] if k else 0
        edges = [int(start), *self.ends[k].tolist()]
        return [self.ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]

    def pair(self, k: int) -> Pair:
        return Pair(*self.parts(k))

    def pair_lengths(self) -> np.ndarray:
        """Return how many tokens each pair has in a pack. A response's last token predicts nothing,
        so it is no input."""
        starts = np.concatenate([[0], self.ends[:-1, -1]])
        return self.ends[:, -1] - starts - 2


def read(
    form: Callable, paths: tuple[str, ...], tokenizer: Tokenizer, c: Any, ranks: Ranks
) -> Tokens | None:
    """What `form`, which is `conversations` or `preferences`, makes of the files; None of no files.

    Each node's first rank makes the arrays, the others open them. Says what was kept and dropped.
    """
    if not paths:
        return None
    tokens = group.once_per_node(ranks, lambda: form(paths, tokenizer, c))
    ranks.say(tokens.report())
    return tokens


def conversations(paths: tuple[str, ...], tokenizer: Tokenizer, c: Any) -> Tokens:
    """Return the conversations in the files, in any form that `forms.talk` reads. None is cut."""

    def encode(rows: list[Spoken], counts: Counter) -> Iterator[Encoded]:
        flat = iter(tokenizer.turns([(k == 0, *t) for row in rows for k, t in enumerate(row)]))
        for row in rows:
            example = tokenizer.join(list(islice(flat, len(row))))
            counts["kept"] += 1
            yield [example.ids], example.mask

    system = c.empty_system is not False  # None: nobody has decided, so as Zephyr does
    parse = partial(forms.talk, system=system)
    parse.columns = forms.TALK
    return _cached(paths, tokenizer, c, ("sft", system), parse, encode)


def preferences(paths: tuple[str, ...], tokenizer: Tokenizer, c: Any) -> Tokens:
    """Return the pairs in the files, in any form that `forms.preference` reads, cut as `cut_pair`
    does. A pair with an empty response is dropped, and so is one whose responses are the same after
    the cut."""

    system = c.empty_system is not False  # None: nobody has decided, so as Zephyr does

    def parse(row: dict) -> tuple[Spoken, str, str, bool]:
        return *forms.preference(row, system), forms.below(row)

    parse.columns = forms.PAIR

    def encode(rows: list[tuple[Spoken, str, str, bool]], counts: Counter) -> Iterator[Encoded]:
        flat = []
        for prompt, *responses, _ in rows:
            flat += [(k == 0, *turn) for k, turn in enumerate(prompt)]
            flat += [(False, "assistant", response) for response in responses]
        turns = iter(tokenizer.turns(flat))
        for prompt, *responses, below in rows:
            context = list(islice(turns, len(prompt)))
            chosen, rejected = islice(turns, 2)
            if not all(response.strip() for response in responses):
                counts["dropped: a response is empty"] += 1
                yield None
                continue
            pair = cut_pair(context, chosen, rejected, tokenizer, c, counts)
            if pair[1] == pair[2]:
                counts["dropped: chosen and rejected are the same"] += 1
                yield None
                continue
            counts["kept"] += 1
            if below:
                counts["trained as they stand: score_chosen below score_rejected"] += 1
            yield pair, []

    key = ("dpo", system, c.max_length, c.max_prompt_length)
    return _cached(paths, tokenizer, c, key, parse, encode)


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
    systems = [turn for turn in context if turn.role == "system"]
    opening = [bos, *(i for turn in systems for i in _end(turn, limit // 2 - 1))]
    room = limit - len(opening) - len(header)
    kept: list[list[int]] = []
    for turn in reversed(context[len(systems) :]):
        kept.append(_end(turn, room))
        room -= len(kept[-1])
        if len(kept[-1]) < len(turn.ids):
            break
    if not kept[0] or len(opening) <= len(systems):
        raise ValueError(
            f"--max-prompt-length {limit} leaves no room for a prompt beside the template's "
            "headers; use a larger one"
        )
    return [*opening, *(i for ids in reversed(kept) for i in ids), *header]


def _end(turn: Turn, room: int) -> list[int]:
    """Return the turn's header and as much of the end of its content as fits into `room` tokens, or
    nothing if no content would fit."""
    if len(turn.ids) <= room:
        return turn.ids
    tail = room - turn.header
    return turn.ids[: turn.header] + turn.ids[-tail:] if tail > 1 else []


def _cached(
    paths: tuple[str, ...],
    tokenizer: Tokenizer,
    c: Any,
    key: tuple,
    parse: Callable,
    encode: Callable,
) -> Tokens:
    """Open the arrays that belong to this key, and make them first if they are not there."""
    sources = readers.expand(paths)
    sums = [sha256_of(path) for path in sources]
    whole = [TEMPLATE, tokenizer.digest, *key, c.on_bad_row, *sums]
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    folder = cache_folder() / f"{key[0]}-{digest[:20]}"
    damage = _damage(folder) if os.path.lexists(folder) else None
    if damage:
        with contextlib.suppress(OSError):  # nobody may be reading
            print(f"{folder} is damaged: {damage}; it is made again", file=sys.stderr)
    if damage or not folder.exists():
        with scratch() as temp:
            part = Path(temp) / folder.name
            part.mkdir()
            try:
                _write(part, sources, tokenizer, c, parse, encode)
            except BadRow as error:
                raise ValueError(f"{error}; --on-bad-row skip drops such rows") from None
            for path, before in zip(sources, sums, strict=True):
                if sha256_of(path) != before:
                    raise ValueError(
                        f"{path} changed while it was read; start again once it is complete"
                    )
            lines = [f"{sha256_of(part / name)}  {name}\n" for name in ARRAYS]
            (part / SUMS).write_text("".join(lines))
            for file in part.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if damage:
                with contextlib.suppress(FileNotFoundError):  # another process was first
                    folder.rename(Path(temp) / "damaged")
            try:
                part.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same arrays
                    raise
    about = json.loads((folder / "about.json").read_text())
    types = {"ids": about["dtype"], "mask": bool}
    ids, mask = (np.memmap(folder / name, dtype, "r") for name, dtype in types.items())
    ends, places = (np.load(folder / f"{name}.npy") for name in ("ends", "places"))
    names = tuple(map(str, sources))
    return Tokens(ids, mask, ends, digest, about["counts"], about["skipped"], places, names)


def _damage(folder: Path) -> str | None:
    """Say what is wrong with the files of a cache entry; None if each is as it was written."""
    try:
        lines = (folder / SUMS).read_bytes().decode("ascii").splitlines()
        sums = dict(line.split("  ", 1)[::-1] for line in lines)
        for name in ARRAYS:
            if sums.get(name) != sha256_of(folder / name):
                return f"{name} is not what {SUMS} says"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError:
        return f"{SUMS} is malformed"
    return None


def _write(
    part: Path, sources: list[Path], tokenizer: Tokenizer, c: Any, parse: Callable, encode: Callable
) -> None:
    """Parse, encode and write the rows of the sources into the arrays of the folder `part`, a list
    of rows at a time. `parse` makes of a row what `encode` takes a list of; `encode` yields for
    each its parts and mask, or None to drop it. Raises ValueError if no row is left."""
    counts, bad = Counter(), BadRows(c.on_bad_row)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    ends, places, end = [], [], 0
    with (part / "ids").open("wb") as ids_file, (part / "mask").open("wb") as mask_file:
        rows = _parsed(sources, parse, bad)
        for chunk in _chunks(rows):
            encoded = encode([row for _, row in chunk], counts)
            for (place, _), made in zip(chunk, encoded, strict=True):
                if made is None:
                    continue
                parts, mask = made
                places.append(place)
                edges = []
                for ids in parts:
                    ids_file.write(np.asarray(ids, dtype).tobytes())
                    edges.append(end := end + len(ids))
                ends.append(edges)
                mask_file.write(np.asarray(mask, bool).tobytes())
        bad.check()
        if not ends:
            why = "".join(f"; {what} {count}" for what, count in counts.items())
            raise ValueError(f"{sources[0]}: no row is left to train on{why}")
        if not mask_file.tell():
            mask_file.write(b"\0")  # an empty file cannot be mapped
    counts["rows"] = bad.rows
    counts["skipped: bad row"] = bad.skipped
    np.save(part / "ends.npy", np.asarray(ends, np.int64))
    np.save(part / "places.npy", np.asarray(places, np.int64))
    about = {"dtype": dtype, "counts": counts, "skipped": bad.report()}
    (part / "about.json").write_text(json.dumps(about))


def _chunks(rows: Iterator) -> Iterator[list]:
    """Yield the rows in lists of at most CHUNK rows or about CHARACTERS characters; a row that is
    longer is a list of its own."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += len(repr(row))
        if len(chunk) == CHUNK or size > CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _parsed(sources: list[Path], parse: Callable, bad: BadRows) -> Iterator:
    """Yield ((number of the file, line), parsed row) for every row that can be parsed."""
    for number, source in enumerate(sources):
        with tqdm(desc=f"tokenizing {source.name}", unit=" rows", delay=3, leave=False) as bar:
            for where, row in readers.read_rows(source, bad, parse.columns):
                bar.update()
                parsed = None
                with bad.guard():
                    try:
                        parsed = parse(row)
                    except ValueError as error:
                        raise BadRow(f"{where}: {error}") from None
                if parsed is not None:
                    yield (number, int(where.rpartition(":")[2])), parsed
