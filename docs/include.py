"""Fill the marked blocks of the pages: code from its source, output from its command.

    python docs/include.py            write them anew
    python docs/include.py --check    say which are stale, and write nothing

A marker is an HTML comment on the line before a fenced block:

    <!-- code: zephyr/losses.py dpo -->                           a function or a class
    <!-- code: train_dpo.py main: if step == 0 ... norm = -->     of it, one line to another
    <!-- output: python -m zephyr.textbook -->                    what the command prints

The lines of a part are named by what they contain, and both are in it. Docstrings and the
indentation go.
"""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (code|output): (.*?) -->\n+```\w*\n)(.*?)(?=^```)", re.DOTALL | re.M)


def pages() -> list[Path]:
    """Return every page that may have marked blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code(what: str) -> str:
    """Return the source that a marker names. Raises ValueError if there is no such thing."""
    place, _, part = what.partition(": ")
    file, _, name = place.partition(" ")
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    if name:
        lines = _definition(source, lines, name, what)
    if part:
        first, _, last = part.partition(" ... ")
        start = next((k for k, line in enumerate(lines) if first in line), None)
        rest = range(start or 0, len(lines))
        end = next((k for k in rest if (last or first) in lines[k]), None)
        if start is None or end is None:
            raise ValueError(f"{what}: no such lines")
        lines = lines[start : end + 1]
    return textwrap.dedent("".join(lines)).strip("\n") + "\n"


def _definition(source: str, lines: list[str], name: str, what: str) -> list[str]:
    """Return the lines of a function, class or method, without those of its docstring."""
    node = ast.parse(source)
    for part in name.split("."):
        known = {getattr(n, "name", None): n for n in node.body}
        if part not in known:
            raise ValueError(f"{what}: no such name")
        node = known[part]
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    about = node.body[0] if ast.get_docstring(node) else None
    skipped = range(about.lineno - 1, about.end_lineno) if about else ()
    return [lines[k] for k in range(start, node.end_lineno) if k not in skipped]


def output(command: str) -> str:
    """Return what a command prints; `python` is this one."""
    words = [sys.executable if word == "python" else word for word in command.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command}: {done.stderr.strip()}")
    return done.stdout.strip("\n") + "\n"


def filled(text: str) -> str:
    """Return a page with each marked block made anew."""
    make = {"code": code, "output": output}
    return BLOCK.sub(lambda match: match[1] + make[match[2]](match[3]), text)


def settle(made: Iterable[tuple[Path, str]], check: bool) -> int:
    """Write each file that is not as it is made now, and return 0; or to `check` write nothing, and
    return how many such files there are."""
    stale = 0
    for path, text in made:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'stale: make docs' if check else 'written'}")
            if not check:
                path.write_text(text, encoding="utf-8")
    return stale * check


def main(check: bool) -> int:
    return settle(((page, filled(page.read_text(encoding="utf-8"))) for page in pages()), check)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
