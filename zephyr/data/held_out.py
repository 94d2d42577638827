"""The prompts of evaluation sets, which training must not see: else a figure is a memory."""

import csv
from collections.abc import Sequence
from pathlib import Path

from zephyr.data.readers import expand, read_rows
from zephyr.files import shown

# MT-Bench's turns, of which the first is the prompt; AlpacaEval's; TruthfulQA's, in two spellings
NAMES = ("turns", "instruction", "question", "Question", "prompt")


def normalized(prompt: str) -> str:
    """Return a prompt without what does not make it another: case, and how its words are spaced."""
    return " ".join(prompt.casefold().split())


def prompts(paths: Sequence[str]) -> frozenset[str]:
    """Return the normalized prompts in the files of evaluation sets: .jsonl, .json, .parquet, or
    .csv with a line of names, each row with one of NAMES.

    Raises ValueError for a row without any.
    """
    found = set()
    for path in expand(paths):
        for where, row in _csv(path) if path.suffix.lower() == ".csv" else read_rows(path):
            given = next((row[name] for name in NAMES if name in row), None)
            prompt = given[0] if isinstance(given, list) and given else given
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"{where}: it has no prompt under {', '.join(NAMES)}, only {shown(row, 60)}; "
                    "give a file of an evaluation set's questions"
                )
            found.add(normalized(prompt))
    return frozenset(found)


def _csv(path: Path):
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in (reader := csv.DictReader(file)):
                yield f"{path}:{reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV in UTF-8: {error}") from None
