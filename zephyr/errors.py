"""What ends a run, as types: exits.py turns each into one line and an exit code."""

import errno
from typing import TypeVar


class BadCheckpoint(ValueError):
    code = 3


class NonFinite(ValueError):
    code = 4


class Storage(ValueError):
    code = 5


class Preempted(RuntimeError):
    code = 143


REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
E = TypeVar("E", bound=Exception)


def kind(error: Exception) -> type[Exception]:
    """What an error is for the exit code: storage that refuses is Storage however it shows, and
    what has no code of its own is a mistake in the input."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return Storage
    return type(error) if hasattr(error, "code") else ValueError


def shared(error: E) -> E:
    """An error that every rank raises at the same place: the first rank speaks for all."""
    error.shared = True
    return error
