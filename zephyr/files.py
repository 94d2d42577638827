"""Files read and written as a whole, JSON, paths, and how the messages of this program show
what a file holds."""

from __future__ import annotations  # so that reading a config.json need not import torch

import codecs
import json
import os
import reprlib
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from zephyr.errors import Storage

# first bytes: what the file is; what to do (JSON text starts with none of them)
SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; run git lfs pull",
    b"<": "an HTML or XML page, not data; download the raw file",
    b"PAR1": "a parquet file; rename it to .parquet",
    b"\x1f\x8b": "gzip-compressed; add .gz to its name",
    codecs.BOM_UTF16_LE: "UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text; save it as UTF-8",
}


def shown(value: object, limit: int = 80) -> str:
    """Return the repr of a value for a message: one printable line of at most `limit` characters.

    The value may come from any file: no escape sequence in it reaches the terminal, and neither its
    size nor its depth makes the message long.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, limit, limit
    try:
        text = short.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a huge integer"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def plain(text: str, limit: int = 80) -> str:
    """Return a name or a message from outside as it is, cut to `limit` characters; if it is not one
    printable line, as `shown` does."""
    if not text.isprintable():
        return shown(text, limit)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def home(path: str | Path) -> str:
    """Return a path with `~` and `~user` at its start replaced by the home folder.

    Raises ValueError if there is no such home folder, and for a path whose bytes are not text: no
    recipe and no log could name it.
    """
    path = str(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{shown(path)}: its bytes are not the text of this locale; rename it, or "
            "set PYTHONUTF8=1 if it is UTF-8"
        ) from None
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        user = whole.split("/")[0]
        raise ValueError(
            f"{path}: nobody knows the home folder {user}; write it out, or ./{path} "
            f"for what is called {user} here"
        )
    return whole


@contextmanager
def atomic(path: Path | str) -> Iterator[BinaryIO]:
    """Give a file to write beside `path`. It replaces `path` if the block ends well, else it is
    removed."""
    path, temp = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temp = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.chmod(temp, 0o644)
        os.replace(temp, path)
    except OSError as error:
        raise Storage(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        if temp:
            Path(temp).unlink(missing_ok=True)


def unused(path: Path, first: int = 0) -> Path:
    """Return the first of path, path.1, path.2, ... that does not exist, counted from `first`."""
    names = (path.with_name(f"{path.name}.{k}") if k else path for k in count(first))
    return next(name for name in names if not os.path.lexists(name))


def check_outputs(read: Iterable[str | Path], written: Mapping[str, str | None]) -> None:
    """Raise ValueError if a path that a flag of `written` names, and is not None, is a folder, one
    of the files read, or what another flag names: one of the two would be lost."""
    taken = {os.path.realpath(path): "it is read" for path in read}
    for flag, path in written.items():
        if path is None:
            continue
        if os.path.isdir(path):
            raise ValueError(f"{flag} {plain(path, 200)} is a folder; name a file in it")
        if why := taken.get(real := os.path.realpath(path)):
            told = plain(path, 200)
            raise ValueError(f"{flag} {told} would overwrite this file: {why}; name another")
        taken[real] = f"{flag} writes it"


def recognise(path: Path, head: bytes) -> bytes:
    """Return the first bytes of a file, `head`, without byte-order mark and white space. Raises
    ValueError if they show another kind of file."""
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for signature, what in SIGNATURES.items():
        if head.startswith(signature):
            raise ValueError(f"{path} is {what}")
    return head


def size_of(path: Path) -> int:
    """Return the size of a file in bytes. Raises ValueError unless it is a plain file, which can be
    read without waiting for another process."""
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path}: cannot read: it is not a file")
    return about.st_size


def read_json(path: Path) -> dict:
    """Return the JSON object in a file. Raises ValueError if the file cannot be read or holds
    something else."""
    try:
        size_of(path)
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        recognise_weights(path, text)
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: malformed JSON: {plain(why, 200)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def recognise_weights(path: Path, head: bytes) -> None:
    """Raise ValueError if the first bytes of a file that could not be read show that it is a
    pickle, a GGUF file, or another kind that `recognise` knows."""
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise ValueError(
            f"{path} is a pickle of torch.save, which can run code as it is "
            "read; save it as safetensors"
        )
    if head.startswith(b"GGUF"):
        raise ValueError(f"{path} is a GGUF file, for llama.cpp; take what it was made from")
    recognise(path, head)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def inside(path: Path) -> bool:
    """Return True if a file lies in its folder, and is no link that leads out of it. A link into
    the blobs of Hugging Face's cache counts as inside, as that cache's snapshots are made of such
    links."""
    # of a loop of links, realpath makes no error as Path.resolve does
    real = Path(os.path.realpath(path))
    blob = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return blob or str(real.parent) == os.path.realpath(path.parent)


def some(names: Iterable[str]) -> str:
    """Return up to three of the names, and how many more there are, as text."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(plain, names[:3])) + more


def settle(path: Path, mode: int | None = None) -> None:
    """Give a file or a folder its mode, if one is given, and wait until it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """Give a block a temporary folder beside `target`. If the block ends well, the folder becomes
    `target`, safe on the disk; else it is removed. `size` is how many bytes will be written: Raises
    Storage if the disk has less room, and ValueError if `target` exists."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already; choose another name or move it away")
    temp = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target.parent).free) < 1.2 * size:
            raise Storage(f"{target} takes {size:,} bytes and the disk has {free:,} left")
        temp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temp
        for path in temp.iterdir():
            settle(path, 0o644)
        settle(temp, 0o755)
        temp.rename(target)
        settle(target.parent)
    except (OSError, SafetensorError) as error:
        raise Storage(f"{target}: cannot write: {error}") from error
    finally:
        if temp:
            shutil.rmtree(temp, ignore_errors=True)


def blank(value: object) -> bool:
    """Return True if a value carries nothing: null, white space, "[]" as text, or a list or an
    object of such values.

    Arrow fills with nulls what one row has and another lacks, so null means absent.
    """
    stack = [value]
    while stack:
        match stack.pop():
            case None:
                pass
            case str(text) if text.strip() in ("", "[]", "{}"):
                pass
            case list(parts):
                stack += parts
            case dict(parts):
                stack += parts.values()
            case _:
                return False
    return True
