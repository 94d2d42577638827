"""The file of answers: a line for each, under the hash of its request."""

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Collection
from pathlib import Path

from zephyr.client.exchange import Answer
from zephyr.errors import Storage
from zephyr.files import home

HEAD = b'{"key": "'  # what every line of a file of answers begins with


class AnswerFile:
    """The file of answers, to which this process alone appends. `found` has those `wanted`."""

    def __init__(self, path: str | Path, wanted: Collection[str]):
        self.path, self.found, self.lock, self.end = Path(home(path)), {}, threading.Lock(), 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise ValueError(f"{path}: cannot write: {error.strerror or error}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(wanted)
        except BlockingIOError:
            self.close()
            raise ValueError(f"{path}: another process is writing it; wait for its end") from None
        except BaseException:
            self.close()
            raise

    def _read(self, wanted: Collection[str]) -> None:
        """Find the answers, and end the file where its last whole line ends: what a kill left of
        one is cut off, so that the next line is not glued to it."""
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    answer = Answer(*(row[name] for name in Answer.__dataclass_fields__))
                    if row["key"] in wanted:
                        self.found[row["key"]] = answer
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    if line.endswith(b"\n") or not line.startswith(HEAD[: len(line)]):
                        where = f"{self.path}:{number}"
                        why = f"{where} is no answer of an endpoint; name another file"
                        raise ValueError(why) from error
                    break
                self.end += len(line)
                whole = line.endswith(b"\n")
        self.file.truncate(self.end)
        if self.end and not whole:
            self.end += self.file.write(b"\n")

    def add(self, row: dict) -> None:
        """Append a line. Raises Storage if the disk refuses it, and leaves no part of it."""
        line = json.dumps(row).encode() + b"\n"
        with self.lock:
            try:
                if self.file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.end += len(line)
            except OSError as error:
                with contextlib.suppress(OSError):
                    self.file.truncate(self.end)
                why = f"{self.path}: cannot write: {error.strerror or error}"
                raise Storage(f"{why}; the same command goes on from there") from error

    def close(self) -> None:
        self.file.close()
