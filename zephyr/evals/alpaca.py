"""AlpacaEval's annotations read: the win rate of a model against a baseline, and its error.

One row is one question with two answers and the judge's preference between them:

    {"instruction": "...", "output_1": "the baseline's", "generator_1": "gpt4_1106_preview",
     "output_2": "the model's", "generator_2": "zephyr-7b", "annotator": "...", "preference": 1.02}

A preference is 1 if the baseline's answer is better, 2 if the model's is, and between the two if
the judge was unsure: 1 + P(model). 1.5 is a draw, and so is 0, which older files have. Null or NaN
is no verdict: it is dropped and counted. This is alpaca_eval at cd543a1, `metrics/helpers.py`.

A judge asked in both orders leaves two more columns, `preference_model_first` and
`preference_model_second`, on the same scale; `preference` is their mean, so that a reader who does
not know the two gets the right win rate from as many rows as there are questions.

Letters of shapes: N annotated questions.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zephyr.evals import belief
from zephyr.evals.belief import Verdicts
from zephyr.files import shown

COLUMNS = ("instruction", "output_1", "output_2", "preference")
ORDERS = ("preference_model_first", "preference_model_second")


@dataclass(frozen=True)
class Annotations:
    """One judge's annotations of one model's answers beside a baseline's."""

    path: str
    model: str
    baseline: str
    judge: str
    key_N: list[tuple[str, str, str]]  # instruction, the baseline's answer, the model's
    preference_N: np.ndarray  # 1 to 2; NaN: no verdict
    orders_N2: np.ndarray  # the same with the model shown first, and second; NaN: not asked
    length_1_N: np.ndarray  # characters of the baseline's answer
    length_2_N: np.ndarray  # characters of the model's answer

    @property
    def instructions(self) -> list[str]:
        return [instruction for instruction, _, _ in self.key_N]


def model_is_first(instruction: str, seed: int = 0) -> bool:
    """Return True if AlpacaEval shows the judge the model's answer before the baseline's.

    It exchanges the two by a coin that is a function of the instruction alone, so the order can be
    told from any file (alpaca_eval `processors.py`, SwitchTwoColumnsProcessor).
    """
    coin = random.Random("is_switched_outputs" + instruction + str(seed))
    return coin.choices([False, True], k=1)[0]


def read(path: str, rows: Sequence[tuple[str, dict]]) -> Annotations:
    """Return the annotations in the rows of a file, each given with its place.

    Raises ValueError for a row that is none, for two models in one file, and for a question that is
    there twice: it would count double, and which of the two verdicts holds nobody can say.
    """
    places: dict[str, str] = {}
    names: dict[str, dict[str, None]] = {"generator_2": {}, "generator_1": {}, "annotator": {}}
    keys, preferences, orders = [], [], []
    for where, row in rows:
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"{where}: no {missing[0]}; an annotation has {', '.join(COLUMNS)}")
        for name in COLUMNS[:3]:
            if not isinstance(row[name], str):
                raise ValueError(f"{where}: {name} is text, not {shown(row[name])}")
        instruction = row["instruction"]
        if first := places.get(instruction):
            raise ValueError(
                f"{where}: the question of {first} again, {shown(instruction, 50)}; keep one"
            )
        places[instruction] = where
        for name, seen in names.items():
            seen[str(row.get(name) or f"(no {name})")] = None
            if len(seen) > 1:
                one, other = map(shown, seen)
                raise ValueError(f"{where}: {name} is {other}, above it is {one}; split the file")
        keys.append((instruction, row["output_1"], row["output_2"]))
        preferences.append(_preference(where, "preference", row["preference"]))
        orders.append([_preference(where, name, row.get(name)) for name in ORDERS])
    preference_N = np.array(preferences)
    if np.isnan(preference_N).all():
        raise ValueError(f"{path}: none of its {len(keys)} annotations has a preference")
    model, baseline, judge = (next(iter(seen)) for seen in names.values())
    return Annotations(
        path=path,
        model=model,
        baseline=baseline,
        judge=judge,
        key_N=keys,
        preference_N=preference_N,
        orders_N2=np.array(orders),
        length_1_N=np.array([len(output) for _, output, _ in keys]),
        length_2_N=np.array([len(output) for _, _, output in keys]),
    )


def _preference(where: str, name: str, value: object) -> float:
    """Return a preference as a number from 1 to 2; NaN for none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {name} is a number or null, not {shown(value)}")
    if value == 0:
        return 1.5
    if value == value and not 1 <= value <= 2:  # NaN does not equal itself
        raise ValueError(f"{where}: {name} {shown(value)} is not from 1 (baseline) to 2 (model)")
    return float(value)


def win_rates(a: Annotations) -> dict:
    """Return what AlpacaEval's leaderboard has for a model, rates and errors in percent.

        win_rate       = 100 · mean(preference - 1)
        standard_error = 100 · sd(preference - 1) / sqrt(n)      with n - 1 under the sd

    over the n annotations that have a preference. The discrete win rate rounds each preference to a
    win or a loss first, and counts a draw as half a win. The average length is in characters,
    without its fraction, as the leaderboard has it.
    """
    win_N = a.preference_N[~np.isnan(a.preference_N)] - 1
    n, wins, losses = len(win_N), int((win_N > 0.5).sum()), int((win_N < 0.5).sum())
    member_N1 = np.ones((n, 1), bool)
    return {
        "win_rate": float(100 * win_N.mean()),
        "standard_error": float(100 * win_N.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "bootstrap_standard_error": belief.groups(100 * win_N, member_N1, range(n))[0][
            "standard_error"
        ],
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": n - wins - losses,
        "n_total": n,
        "n_dropped": len(a.preference_N) - n,
        "discrete_win_rate": 100 * (wins + (n - wins - losses) / 2) / n,
        "avg_length": int(a.length_2_N.mean()),
        "avg_length_baseline": int(a.length_1_N.mean()),
    }


def verdicts(a: Annotations) -> Verdicts:
    """Return the judge's verdicts with the slot in which it saw the model's answer.

    Two equal answers are a draw that no judge was asked about, so they are not in it. A row without
    both orders was judged in AlpacaEval's own order, which `model_is_first` tells.

    Worked example: row 0 has preference 1.5 from the orders (2, 1); row 1 has 1.2 and no orders,
    and its instruction shows the model second.

        pair   0 0 1
        slot   1 2 2
        win    1 0 0.2
    """
    pairs, slots, wins = [], [], []
    for k, (instruction, output_1, output_2) in enumerate(a.key_N):
        if output_1 == output_2:
            continue
        seen = {slot: a.orders_N2[k, slot - 1] for slot in (1, 2)}
        if np.isnan(a.orders_N2[k]).all():
            seen = {1 if model_is_first(instruction) else 2: a.preference_N[k]}
        for slot, preference in seen.items():
            if not np.isnan(preference):
                pairs.append(k)
                slots.append(slot)
                wins.append(preference - 1)
    return Verdicts(
        question_N=pairs,
        pair_N=pairs,
        slot_N=np.array(slots, int),
        win_N=np.array(wins, float),
        longer_N=(a.length_2_N - a.length_1_N)[pairs].astype(float),
    )


def about_the_judge(a: Annotations, feedback: str | None = None) -> dict:
    """Return what the annotations show of the judge; `feedback` names the model that labelled or
    wrote what this model was trained on."""
    v = verdicts(a)
    parts = {"model": a.model, "baseline": a.baseline, "feedback model": feedback}
    judged = len(v.win_N) > 0  # else all its answers are equal to the baseline's
    return {
        "ties": int((a.preference_N == 1.5).sum()),
        "equal_answers": sum(output_1 == output_2 for _, output_1, output_2 in a.key_N),
        "parse_failures": int(np.isnan(a.preference_N).sum()),
        "slots": belief.by_slot(v) if judged else None,
        "consistency": belief.consistency(v) if judged else None,
        "length_quarters": (
            belief.by_length(100 * v.win_N, v.longer_N, v.question_N) if judged else []
        ),
        "warnings": belief.leakage(a.judge, parts),
    }


def agreement(one: Annotations, other: Annotations) -> dict:
    """Return how two judges of the same answers agree on win, draw and loss."""
    at = {key: k for k, key in enumerate(other.key_N)}
    pairs = [(k, at[key]) for k, key in enumerate(one.key_N) if key in at]
    verdict_2N = np.array(
        [
            [np.sign(one.preference_N[k] - 1.5), np.sign(other.preference_N[j] - 1.5)]
            for k, j in pairs
        ]
    ).T.reshape(2, -1)
    verdict_2N = verdict_2N[:, np.isfinite(verdict_2N).all(axis=0)]
    n = verdict_2N.shape[1]
    return {
        "model": one.model,
        "judges": [one.judge, other.judge],
        "n": n,
        "same": float(100 * (verdict_2N[0] == verdict_2N[1]).mean()) if n else None,
        "kappa": belief.kappa(*verdict_2N) if n else None,
    }
