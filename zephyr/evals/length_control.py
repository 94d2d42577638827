"""AlpacaEval 2's length-controlled win rate: what a judge would say at equal lengths.

The judge's preference y for the model is explained by three features of a question (Dubois et al.
2404.04475; alpaca_eval at cd543a1, `metrics/glm_winrate.py`):

    P(y = 1) = sigmoid(w_t t + w_d d + w_b b)

    t = tanh((len_1 - len_2) / sd)   lengths in characters, sd that of this model's differences
    d = the question's difficulty    fitted once by AlpacaEval's authors over many models
    b = 1 for the model's rows

and the rate is the mean of sigmoid(w_d d + w_b) over the questions: the same model with t = 0. So
that a model cannot hide its quality in w_t, the fit also has the baseline itself told to be concise
and verbose, two "gamed" runs with b = 0, whose 1,610 rows have the weight 0.2 / 2 each.

The weights minimise  ||w||_1 + C Σ weight · CE(y, P).  **C is fixed here.** The original takes the
best of ten from 1e-4 to 1e4 by five-fold cross-validation, whose folds depend on how a platform
sorts ties; it chose 2.78, 21.5, 166.8, 1291 or 1e4 for the 50 models known. Beyond C = 1 the rate
moves by (1 / C) · a constant of the model. So a fixed C errs least, over that range, where 1 / C is
in its middle: C = 2 · 2.78 = 5.57. In points, ours less the published:

    C =                          2.78       5.57       1e4
    OpenHermes-2.5-Mistral-7B    -0.00      -0.03      -0.06
    vicuna-7b-v1.5               +0.07      +0.03      -0.01
    claude-2.1                   -0.00      -0.03      -0.06

On the 50 models C = 1e4 errs by up to 0.155 and C = 0.36 by up to 1.1, so the constant is at most
1.1 / (1 / 0.36 - 1 / 2.78) = 0.46, and 5.57 errs by at most 0.46 / 5.57 = 0.08: an inference, as
only three models' annotations were at hand.

Letters of shapes: N annotated questions, G gamed rows, R = N + G rows of a fit, F = 3 features.
"""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zephyr.data.readers import read_rows
from zephyr.evals.alpaca import Annotations
from zephyr.files import home, shown

C = 2 * 10 ** (4 / 9)  # 10 ** (4 / 9) is 2.78, of np.logspace(-4, 4, 10)
GAMED_WEIGHT = 0.2 / 2
BASELINE = "gpt4_1106_preview"  # whose difficulties and gamed runs the published files are
# The labels of the gamed rows are published in df_gamed.csv alone, but the fit needs no more of
# them than these sums over all 1,610, which 29 models' published weights give away: at a minimum
# the gradient of the objective is zero.
SUM_Y_T, SUM_Y_D = -182.702, 412.880
GAMED_RUNS = {"concise": 1137.0, "verbose": 2402.6}  # and the mean lengths that go with the sums
OFFICIAL = ("alpaca_eval.json", "alpaca_eval_gpt4_baseline.json")


@dataclass(frozen=True)
class Control:
    """What the fit needs besides a model's annotations.

    The gamed runs are there as `gamed_length`, the length of each answer by run and instruction, or
    as `gamed_GF` with `sum_y_F`, their features and Σ y · features.
    """

    folder: Path
    difficulty: dict[str, float]
    gamed_length: list[dict[str, int]]
    gamed_GF: np.ndarray | None
    sum_y_F: np.ndarray


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def l1_logistic(
    x_RF: np.ndarray, weight_R: np.ndarray, sum_y_F: np.ndarray, C: float = C
) -> np.ndarray:
    """Return the w that minimises  ||w||_1 + C (Σ weight · log(1 + exp(x w)) - sum_y · w).

    With sum_y = Σ weight · y · x this is ||w||_1 + C Σ weight · CE(y, sigmoid(x w)), as the labels
    y, hard or soft, enter the cross-entropy through that sum alone.

    It is solved by Newton's method with a soft threshold (Friedman, Hastie and Tibshirani 2010):
    each step minimises ||w||_1 plus the quadratic with the gradient and curvature at w, one
    coordinate after the other, and is halved while the objective rises by more than its sum's
    rounding. At the minimum the gradient of the smooth part is -sign(w) where w is not 0, and
    within -1 and 1 where it is.
    """

    def objective(w_F):
        z_R = x_RF @ w_F
        return np.abs(w_F).sum() + C * (weight_R @ np.logaddexp(0, z_R) - sum_y_F @ w_F)

    w_F = np.zeros(x_RF.shape[1])
    for _ in range(200):
        p_R = sigmoid(x_RF @ w_F)
        gradient_F = C * (x_RF.T @ (weight_R * p_R) - sum_y_F)
        curvature_FF = C * (x_RF.T * (weight_R * p_R * (1 - p_R))) @ x_RF
        curvature_FF += 1e-9 * np.eye(len(w_F))  # of a feature that is 0 in every row
        step_F = np.zeros_like(w_F)
        for _ in range(500):
            before_F = step_F.copy()
            for f in range(len(w_F)):
                bend = curvature_FF[f, f]
                slope = gradient_F[f] + curvature_FF[f] @ step_F - bend * step_F[f]
                target = bend * w_F[f] - slope
                step_F[f] = math.copysign(max(abs(target) - 1, 0), target) / bend - w_F[f]
            if np.abs(step_F - before_F).max() < 1e-13:
                break
        most = objective(w_F) * (1 + 1e-12)
        while objective(w_F + step_F) > most and np.abs(step_F).max() > 1e-12:
            step_F = step_F / 2
        w_F = w_F + step_F
        if np.abs(step_F).max() < 1e-10:
            break
    return w_F


def lengths_apart(length_1_N: np.ndarray, length_2_N: np.ndarray) -> np.ndarray:
    """Return t = tanh((len_1 - len_2) / sd), all zero where the differences do not vary."""
    apart_N = (length_1_N - length_2_N).astype(float)
    sd = apart_N.std(ddof=1) if len(apart_N) > 1 else 0.0
    return np.tanh(apart_N / sd) if sd > 0 else np.zeros_like(apart_N)


def rate(a: Annotations, control: Control) -> tuple[dict, list[str]]:
    """Return the length-controlled win rate and its standard error in percent, and notes on how
    they were come by. The figures are {} where they would mean nothing, with a note that says why.

    Difficulties are matched by the instruction's text. The original takes them by position, and a
    file with an order of its own then gets another figure.
    """
    for instruction in a.instructions:
        if instruction not in control.difficulty:
            raise ValueError(
                f"{a.path}: no difficulty in {control.folder} for the question "
                f"{shown(instruction, 60)}; is it one of AlpacaEval's 805?"
            )
    if a.baseline != BASELINE:
        return {}, [
            f"no length-controlled win rate: its difficulties and gamed runs are of the baseline "
            f"{BASELINE}, and this is {shown(a.baseline)}"
        ]
    notes = [
        f"length-controlled with C = {C:.2f} for every model; the original cross-validates C, and "
        "gave rates about 0.03 points away on the three models compared"
    ]
    d_N = np.array([control.difficulty[instruction] for instruction in a.instructions])
    x_NF = np.stack([lengths_apart(a.length_1_N, a.length_2_N), d_N, np.ones_like(d_N)], axis=1)
    if control.gamed_GF is None:
        gamed_GF, whole = _gamed(a, control)
        if len(gamed_GF) < 4:
            return {}, ["no length-controlled win rate: too few questions have a gamed answer"]
    else:
        gamed_GF, whole = control.gamed_GF, len(control.gamed_GF)
    if len(gamed_GF) < whole:
        notes.append(
            f"{len(gamed_GF)} of the {whole} gamed rows are of questions in this file; they stand "
            "for the others too"
        )
    judged_N = ~np.isnan(a.preference_N)
    y_N = a.preference_N[judged_N] - 1
    x_RF = np.concatenate([x_NF[judged_N], gamed_GF])
    gamed_weight_G = np.full(len(gamed_GF), GAMED_WEIGHT * whole / len(gamed_GF))
    w_F = l1_logistic(
        x_RF,
        np.concatenate([np.ones(len(y_N)), gamed_weight_G]),
        y_N @ x_NF[judged_N] + GAMED_WEIGHT * control.sum_y_F,
    )
    percent_N = 100 * sigmoid(x_NF[:, 1:] @ w_F[1:])  # of every question, judged or not: as there
    figures = {
        "length_controlled_win_rate": float(percent_N.mean()),
        "lc_standard_error": (
            float(percent_N.std(ddof=1) / math.sqrt(len(percent_N))) if len(percent_N) > 1 else None
        ),
        "lc_weights": {
            "length": float(w_F[0]),
            "difficulty": float(w_F[1]),
            "model": float(w_F[2]),
        },
    }
    return figures, notes


def _gamed(a: Annotations, control: Control) -> tuple[np.ndarray, int]:
    """Return the features of the gamed rows whose baseline answer is in the annotations, and how
    many rows the runs have in all."""
    baseline = dict(zip(a.instructions, a.length_1_N, strict=True))
    parts = []
    for run in control.gamed_length:
        known = [instruction for instruction in run if instruction in baseline]
        length_1_G = np.array([baseline[instruction] for instruction in known], float)
        t_G = lengths_apart(length_1_G, np.array([run[instruction] for instruction in known]))
        d_G = np.array([control.difficulty[instruction] for instruction in known], float)
        parts.append(np.stack([t_G, d_G, np.zeros_like(d_G)], axis=1))
    return np.concatenate(parts), sum(map(len, control.gamed_length))


def read(folder: str | Path) -> Control:
    """Return what is in a folder of one of two kinds.

    instruction_difficulty.csv by instruction, and gamed_{concise,verbose}_lengths.json or .json.gz:
    the labels of the gamed rows are then SUM_Y_T and SUM_Y_D, so the runs must be the published
    ones. Or the official data set's own instruction_difficulty.csv, by number, with df_gamed.csv
    and alpaca_eval.json or alpaca_eval_gpt4_baseline.json, whose order tells which number is which.
    """
    folder = Path(home(folder))
    if not folder.is_dir():
        why = "a file; give the folder that it is in" if folder.exists() else "no such folder"
        raise ValueError(f"--alpaca-data {folder}: {why}")
    difficulty = _difficulty(folder)
    if (folder / "df_gamed.csv").exists():
        gamed_GF, y_G = _official_gamed(folder / "df_gamed.csv")
        return Control(folder, difficulty, [], gamed_GF, y_G @ gamed_GF)
    runs = []
    for name, mean in GAMED_RUNS.items():
        run = _lengths(folder, name)
        if len(run) != 805 or abs(np.mean(list(run.values())) - mean) > 0.1:
            raise ValueError(
                f"{folder}: the {name} lengths are not those of the published gamed run "
                f"(805 answers of {mean} characters on average); give df_gamed.csv, with its labels"
            )
        if strange := run.keys() - difficulty.keys():
            raise ValueError(
                f"{folder}: a {name} answer's question has no difficulty: {shown(min(strange), 60)}"
            )
        runs.append(run)
    return Control(folder, difficulty, runs, None, np.array([SUM_Y_T, SUM_Y_D, 0]))


def _csv(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    """Return the rows of a table that has the columns needed."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV table in UTF-8: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    if missing := [name for name in needed if name not in rows[0]]:
        raise ValueError(f"{path}: no column {missing[0]}")
    return rows


def _number(path: Path, row: int, name: str, text: object) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{path}: row {row}: {name} is a number, not {shown(text)}")
    return number


def _difficulty(folder: Path) -> dict[str, float]:
    path = folder / "instruction_difficulty.csv"
    rows = _csv(path, ["instruction_difficulty"])
    order = None if "instruction" in rows[0] else _questions(folder)
    out: dict[str, float] = {}
    for number, row in enumerate(rows, 1):
        value = _number(path, number, "instruction_difficulty", row["instruction_difficulty"])
        if order is None:
            instruction = row["instruction"]
        else:
            place = int(_number(path, number, "the index", next(iter(row.values()))))
            if not 0 <= place < len(order):
                raise ValueError(f"{path}: row {number}: there is no question number {place}")
            instruction = order[place]
        if out.setdefault(instruction, value) != value:
            raise ValueError(
                f"{path}: row {number}: another difficulty for {shown(instruction, 60)}"
            )
    return out


def _questions(folder: Path) -> list[str]:
    """Return the instructions in the official order."""
    for name in OFFICIAL:
        if (path := folder / name).exists():
            texts = [row.get("instruction") for _, row in read_rows(path)]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path}: a row has no instruction")
            return texts
    raise ValueError(
        f"{folder}/instruction_difficulty.csv numbers its questions; put {' or '.join(OFFICIAL)} "
        "beside it, which tells the text of each"
    )


def _official_gamed(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of the rows of df_gamed.csv and their labels."""
    columns = ("std_delta_len", "instruction_difficulty", "not_gamed_baseline", "preference")
    features, labels = [], []
    for number, row in enumerate(_csv(path, columns), 1):
        if row["not_gamed_baseline"].strip().lower() not in ("false", "0", "0.0"):
            raise ValueError(f"{path}: row {number}: not_gamed_baseline is not False")
        if not row["preference"].strip():
            continue  # no verdict: the original drops it too
        apart, d, y = (
            _number(path, number, name, row[name]) for name in (*columns[:2], "preference")
        )
        if not 0 <= y <= 1:
            raise ValueError(f"{path}: row {number}: preference {y} is not a label from 0 to 1")
        features.append((math.tanh(apart), d, 0.0))
        labels.append(y)
    if not labels:
        raise ValueError(f"{path}: no row has a preference")
    return np.array(features), np.array(labels)


def _lengths(folder: Path, run: str) -> dict[str, int]:
    for suffix in (".json", ".json.gz"):
        path = folder / f"gamed_{run}_lengths{suffix}"
        if path.exists():
            out = {}
            for where, row in read_rows(path):
                instruction, length = row.get("instruction"), row.get("length")
                if not isinstance(instruction, str) or type(length) is not int:
                    raise ValueError(f"{where}: a row has an instruction and a length")
                out[instruction] = length
            return out
    raise ValueError(f"{folder}: neither gamed_{run}_lengths.json nor df_gamed.csv is in it")
