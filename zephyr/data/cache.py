"""The cache folder: token arrays and reference log-probs that a later run need not make again."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from zephyr import files
from zephyr.errors import Storage

CHOOSE = "set ZEPHYR_CACHE to a folder that can be written"
DAY = 24 * 3600  # seconds without a write, after which what is being made has no maker


def scratch() -> tempfile.TemporaryDirectory:
    """Return a temporary folder in the cache in which to make an entry. Removes what killed
    processes have left there."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep()
        return tempfile.TemporaryDirectory(prefix="part-", dir=cache)
    except OSError as error:
        raise Storage(f"{cache}: cannot write: {error.strerror}; {CHOOSE}") from None


def _sweep() -> None:
    """Remove what killed processes have left in the cache."""
    for part in (*cache_folder().glob("part-*"), *cache_folder().glob(".reference-*")):
        with contextlib.suppress(OSError):  # its maker lives, and has just renamed it
            if time.time() - max(p.lstat().st_mtime for p in (part, *part.rglob("*"))) > DAY:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def cache_folder() -> Path:
    """Return the cache folder: $ZEPHYR_CACHE, or else ~/.cache/zephyr. Raises ValueError if there
    is no home folder."""
    given = os.environ.get("ZEPHYR_CACHE")
    try:
        return Path(files.home(given or "~/.cache/zephyr"))
    except ValueError as error:
        raise error if given else ValueError(f"there is no home folder; {CHOOSE}") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
