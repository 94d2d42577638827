"""Rows in and out: .jsonl, .json, either gzipped, .parquet; streamed, errors with their place."""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from glob import escape, glob
from pathlib import Path

from zephyr.files import atomic, home, plain, recognise

UNREAD = object()  # the value of a column that is there but is not read


def _bare(row: dict) -> dict:
    """Return the row without the nulls in its objects, and with parquet's maps as objects."""
    stack: list[dict | list] = [row]
    while stack:
        part = stack.pop()
        for key, x in list(part.items() if isinstance(part, dict) else enumerate(part)):
            if x is None and isinstance(part, dict):
                del part[key]
            elif isinstance(x, list) and x and all(isinstance(pair, tuple) for pair in x):
                part[key] = x = dict(x)
            if isinstance(x, dict | list):
                stack.append(x)
    return row


class BadRow(ValueError):
    """A row the user may choose to skip; the message starts with its place, "pairs.jsonl:17: "."""


class BadRows:
    """What happens to bad rows: "stop" raises at the first; "skip" drops, counts and remembers 20.

    Skipping is for the odd broken row: `check`, called once all rows are read, raises when more
    than 1 % of them were bad. The share is taken literally in small files too: one bad row in 50
    is 2 % and stops, so of fewer than 100 rows none may be bad.
    """

    def __init__(self, policy: str = "stop"):
        if policy not in ("stop", "skip"):
            raise ValueError(f"on-bad-row {policy!r} is neither stop nor skip")
        self.policy, self.rows, self.skipped, self.messages = policy, 0, 0, []
        self.empty: list[str] = []  # files without a row

    def seen(self, n: int = 1) -> None:
        """Count n rows. read_rows does so for every row it reads with `bad`: do not count again."""
        self.rows += n

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run a block that works on one row. If it raises BadRow, the block ends, and with the
        policy "skip" the error is only noted."""
        try:
            yield
        except BadRow as error:
            if self.policy == "stop":
                raise
            self.skipped += 1
            if len(self.messages) < 20:
                self.messages.append(str(error))

    def check(self) -> None:
        """Raise ValueError if more than 1 % of the rows seen were skipped."""
        if self.skipped * 100 > self.rows:
            raise ValueError(
                f"{self.skipped} of {self.rows} rows are bad, more than the 1 % that "
                f"may be skipped; the first: {self.messages[0]}"
            )

    def report(self) -> str:
        """Return a line for each empty file, the count of skipped rows, and a line for each of the
        first 20; "" if there is nothing to tell."""
        lines = [f"{path} is empty: no row comes from it" for path in self.empty]
        if self.skipped:
            lines.append(
                f"skipped {self.skipped} bad rows of {self.rows}; the first {len(self.messages)}:"
            )
        return "\n".join([*lines, *(f"  {message}" for message in self.messages)])


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files that paths and globs name, in the order given, and sorted within a glob.

    What exists is taken by its name, whatever brackets and stars are in it; so are the folders that
    a glob begins with. Raises ValueError for a folder, for what names no file, and for one file
    named twice, under whatever names.
    """
    files: dict[tuple[int, int], str] = {}
    for path in map(home, paths):
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder; name its files, as {path.rstrip('/')}/*.jsonl")
        found = (
            [path]
            if os.path.exists(path)
            else sorted(p for p in glob(_escaped(path), recursive=True) if not os.path.isdir(p))
        )
        if not found:
            hub = re.fullmatch(r"\w[\w.-]*/\w[\w-]*", path)  # a data set's name has no ending
            fetch = f"; from the Hub: hf download {path} --repo-type dataset --local-dir {path}"
            raise ValueError(f"{path}: no such file{fetch if hub else ''}")
        for name in found:
            if os.path.exists(name) and not os.path.isfile(name):
                raise ValueError(
                    f"{name} is a pipe or a device; data is read twice, so give a file"
                )
            try:
                about = os.stat(name)
            except OSError as error:
                raise ValueError(f"{name}: cannot read: {error.strerror or error}") from error
            if first := files.get(file := (about.st_dev, about.st_ino)):
                also = "" if first == name else f", also as {first}"
                raise ValueError(
                    f"{name} is given twice{also}; its rows would count double, so name it once"
                )
            files[file] = name
    return list(map(Path, files.values()))


def _escaped(path: str) -> str:
    """Return the glob with the longest part of it that is an existing folder taken literally."""
    parts = path.split("/")
    for k in range(len(parts) - 1, 0, -1):
        if os.path.isdir(folder := "/".join(parts[:k])):
            return "/".join([escape(folder), *parts[k:]])
    return path


def read_rows(
    path: Path, bad: BadRows | None = None, columns: Collection[str] | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every row. `where` is "pairs.jsonl:17": the line, or in .json and
    .parquet the row.

    Lines and rows count from 1; blank lines count too, but give no row. With `columns`, only the
    values of those columns are read, without nulls. The values of the others are UNREAD, so no
    value in them can stop a row that JSON can read.

    A row that is no JSON object, or whose text is malformed, is a BadRow, which `bad` may skip.
    `bad` also counts the rows and notes a file without rows, which is a ValueError if there is no
    `bad`. Any other trouble with the file is a ValueError.
    """
    path, told, bad = Path(path), bad is not None, bad or BadRows()
    before = bad.rows
    parquet = path.suffix.lower() == ".parquet"
    rows = _parquet(path, columns) if parquet else _json(path)
    for number, data in rows:
        bad.seen()
        where, row = f"{path}:{number}", None
        with bad.guard():
            read = _row(where, data, columns)
            if not parquet:
                _no_lone_surrogate(where, read, data)
            row = read
        if row is not None:
            yield where, row
    if bad.rows == before:
        if not told:
            raise ValueError(f"{path} is empty")
        bad.empty.append(str(path))


def check_replaced(
    flag: str, path: str, what: str, columns: Collection[str], beside: str = ""
) -> None:
    """Raise ValueError if `flag` names a file that would be overwritten and that is no earlier
    output: its first row lacks some of `columns`, or the file `beside` it, in which its command
    keeps answers, is not there."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    why = f"which holds no {what}"
    try:
        _, row = next(read_rows(Path(path)))
    except ValueError:
        row = {}
    if set(columns) <= row.keys():
        if not beside or os.path.exists(beside):
            return
        why = f"which this command has not written, as {plain(beside, 200)} is not there"
    told = plain(path, 200)
    raise ValueError(f"{flag} would overwrite {told}, {why}; name another, or move it away")


def write_rows(path: Path | str, rows: Iterable[dict]) -> None:
    """Write rows as .jsonl or .jsonl.gz: the whole file or nothing. Equal rows give equal bytes."""
    with writing(path) as write:
        for row in rows:
            write(row)


@contextmanager
def writing(path: Path | str) -> Iterator[Callable[[dict], object]]:
    """Give a function that appends a row to a .jsonl or .jsonl.gz file, which appears when the
    block ends."""
    if not str(path).endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: rows are written as .jsonl or .jsonl.gz")
    zipped = str(path).endswith(".gz")
    dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    with atomic(path) as file:
        # no name and no time in the gzip header: the bytes depend on the rows alone
        with gzip.GzipFile("", "wb", 6, file, mtime=0) if zipped else nullcontext(file) as out:
            yield lambda row: out.write(f"{dump(row)}\n".encode())


def _json(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line or row number, row) of a .jsonl or .json file, plain or gzipped. A row of .jsonl
    comes as bytes, one of .json as it was parsed."""
    name = path.name.lower()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if not name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        raise ValueError(f"{path} is none of .jsonl, .json, .jsonl.gz, .json.gz, .parquet")
    line = 0
    try:
        with open(path, "rb") as stream:
            if name.endswith(".gz") and stream.peek(1):
                if not stream.peek(2).startswith(b"\x1f\x8b"):
                    recognise(path, stream.peek(512))
                    raise ValueError(f"{path} is not gzip-compressed; take .gz off its name")
                stream = gzip.GzipFile(fileobj=stream)
            if not recognise(path, stream.peek(512)).startswith(b"["):
                for line, text in enumerate(stream, 1):
                    if text.strip():
                        yield line, text
            elif ".jsonl" in name:
                raise ValueError(f"{path} is a JSON list, not an object per line; name it .json")
            else:
                yield from enumerate(_list(path, stream.read()), 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: gzip data damaged after line {line}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error


def _list(path: Path, data: bytes) -> list:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_not_utf8(error, data)} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed JSON: {_why(error)}") from error


def _row(where: str, data: object, columns: Collection[str] | None) -> dict:
    """Return the object that a row is, or that its bytes spell, without columns other than
    `columns`. Raises BadRow for what JSON or UTF-8 does not allow.

    NaN and Infinity are numbers, as Python writes them and as parquet has them. Code that needs a
    finite number, or text, checks for it.
    """
    try:
        row = json.loads(data.decode("utf-8-sig")) if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: {_not_utf8(error, data)} of it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        # a .jsonl row is always its own line 1, which would read as the file's
        why = _why(error).replace(" line 1 ", " ")
        raise BadRow(f"{where}: malformed JSON: {why}") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where}: a row is a JSON object, this is a {type(row).__name__}")
    if columns is not None:
        row = _bare({name: x if name in columns else UNREAD for name, x in row.items()})
    return row


def _no_lone_surrogate(where: str, row: dict, data: object) -> None:
    """Raise BadRow if half a character, which JSON can spell, is in the row: it is no text."""
    if isinstance(data, bytes) and not re.search(rb"\\u[dD][89a-fA-F]", data):
        return
    try:
        json.dumps(row, ensure_ascii=False, default=lambda unread: None).encode()
    except UnicodeEncodeError as error:
        lone = ord(error.object[error.start])
        raise BadRow(f"{where}: the lone surrogate \\u{lone:04x} is not text") from error


def _not_utf8(error: UnicodeDecodeError, data: bytes) -> str:
    # the decoder counts from behind a byte-order mark
    at = error.start + 3 * data.startswith(codecs.BOM_UTF8)
    return f"byte 0x{data[at]:02x} at offset {at}"


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _parquet(path: Path, columns: Collection[str] | None) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of a parquet file, with 256 rows in memory at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: needs pyarrow; pip install zephyr-dpo[parquet]") from error
    number = 0
    try:
        with open(path, "rb") as stream:
            head = stream.peek(512)
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error
    if not head:
        return
    if not head.startswith(b"PAR1"):
        recognise(path, head)
        raise ValueError(f"{path} is not a parquet file; name it for what it is")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            used = [name for name in names if columns is None or name in columns]
            unread = dict.fromkeys(set(names).difference(used), UNREAD)
            for batch in file.iter_batches(batch_size=256, columns=used):
                for row in batch.to_pylist() if used else [{}] * batch.num_rows:
                    number += 1
                    yield number, row | unread
    # a date that Python cannot hold is a ValueError or an OverflowError
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        why = plain(" ".join(str(error).split()), 200)
        raise ValueError(f"{path}: cannot read past row {number}: {why}") from error
