"""What code made a number: the commit and the versions."""

import subprocess
from hashlib import sha256
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


def code() -> str:
    """Return the commit or, where there is none, as on a machine that got the files alone, `files`
    and their digest."""
    return commit() or f"files {digest()}"


def digest() -> str:
    """Return what tells this code from other code: the start of the SHA-256 of all Python files of
    kernels, zephyr and benchmarks, and of the two scripts. A checkout of the same commit gives the
    same: python -c "from kernels import provenance; print(provenance.digest())"."""
    root, found = Path(__file__).resolve().parent.parent, sha256()
    paths = list(root.glob("train_*.py"))
    for wing in ("kernels", "zephyr", "benchmarks"):
        paths += (root / wing).rglob("*.py")
    for path in sorted(paths):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]
