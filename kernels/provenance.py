"""What code made a number: the commit and the versions."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this code, with -dirty if files differ from it; None without git or a
    checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
