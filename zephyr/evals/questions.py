"""The questions of MT-Bench and AlpacaEval, as their own files have them, and the temperatures at
which they are answered.

The temperatures are FastChat's at 0e6d3e4 (`llm_judge/common.py`), and that of zephyr-7b-beta in
AlpacaEval at cd543a1 (`models_configs/zephyr-7b-beta/configs.yaml`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zephyr.data.readers import read_rows
from zephyr.files import blank, shown

TEMPERATURE = {  # by category, FastChat's `temperature_config`
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER = 0.7  # of a category that is none of these, and of AlpacaEval
GREEDY = 1e-4  # a lower temperature is 0


class Question(NamedTuple):
    name: int | str  # MT-Bench's number, AlpacaEval's instruction
    group: str | None  # category, or the data set that it is from
    turns: Sequence[str]
    temperature: float


def read_questions(path: str, temperature: float | None = None) -> list[Question]:
    """Return MT-Bench's questions by number, with FastChat's temperatures or the one given."""
    found, places = [], {}
    for where, row in read_rows(Path(path)):
        number, category, turns = (row.get(x) for x in ("question_id", "category", "turns"))
        if type(number) is not int or not isinstance(turns, list) or not turns:
            raise ValueError(
                f"{where} is no question of MT-Bench, with question_id and turns: {shown(row, 60)}"
            )
        for turn in turns:
            if not isinstance(turn, str) or not turn.strip():
                raise ValueError(f"{where}: a turn of question {number} is {shown(turn)}, no text")
        if not isinstance(category, str) or not category.strip():
            raise ValueError(
                f"{where}: question {number} has no category, by which its temperature and its "
                "judge's prompt are chosen"
            )
        if first := places.get(number):
            raise ValueError(f"{where}: question {number} is at {first} already; delete one")
        places[number] = where
        own = row.get("required_temperature")
        if own is not None:
            if type(own) not in (int, float) or not 0 <= own < math.inf:
                raise ValueError(f"{where}: required_temperature {shown(own)} is no temperature")
            if temperature is not None:
                raise ValueError(
                    f"{where}: question {number} requires temperature {own}; leave --temperature "
                    "out"
                )
        chosen = (temperature, own, TEMPERATURE.get(category, OTHER))
        heat = float(next(x for x in chosen if x is not None))
        found.append(Question(number, category, turns, heat * (heat >= GREEDY)))
    return sorted(found)


def read_instructions(path: str, temperature: float | None) -> list[Question]:
    """Return the instructions in a file of AlpacaEval's, each once: its evaluation set, outputs or
    annotations."""
    found: dict[str, Question] = {}
    heat = OTHER if temperature is None else temperature
    for where, row in read_rows(Path(path)):
        text = row.get("instruction")
        if not isinstance(text, str):
            raise ValueError(f"{where} has no instruction, as AlpacaEval's rows: {shown(row, 60)}")
        if not text.strip():
            raise ValueError(f"{where}: the instruction is empty")
        if not blank(row.get("input")):
            raise ValueError(
                f"{where} has an input, {shown(row['input'], 40)}, which would be lost; put it "
                "into the instruction"
            )
        question = Question(text, row.get("dataset"), [text], heat * (heat >= GREEDY))
        if found.setdefault(text, question) != question:
            raise ValueError(f"{where}: this instruction is from another dataset above; keep one")
    return list(found.values())
