"""What a judge's verdicts tell about the judge: shown beside every figure that rests on them.

A judge prefers what it sees first, or second, and what is longer, and what its own family wrote
(Zheng et al. 2306.05685; "Judging the Judges" 2406.07791; "Preference Leakage" 2502.01534). None
of it can be read from a win rate, and all of it from the verdicts behind one.

Letters of shapes: N verdicts, Q questions, K groups of verdicts, B bootstrap draws.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

DRAWS = 1000
# Beginnings of the words in a model's name, and who made it. The `alpaca` of `alpaca_eval` is a
# benchmark's name, so it is not here.
FAMILIES = {
    "gpt": "gpt chatgpt davinci o1 o3 o4",
    "claude": "claude",
    "gemini": "gemini gemma palm bard",
    "llama": "llama",
    "mistral": "mistral mixtral ministral magistral zephyr",
    "qwen": "qwen qwq",
    "deepseek": "deepseek",
    "command": "command cohere",
    "grok": "grok",
}


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of one model against another, one entry for each time it was asked.

    A pair is one question, at one turn, with its two answers: a judge that was asked in both orders
    has two verdicts on it. A question is what is drawn in the bootstrap, and may have many pairs.
    """

    question_N: Sequence[Hashable]
    pair_N: Sequence[Hashable]
    slot_N: np.ndarray  # 1 if the model's answer was shown first, 2 if second
    win_N: np.ndarray  # 1 if the model won, 0 if it lost, between them if the judge was unsure
    longer_N: np.ndarray  # by how many characters the model's answer is longer; NaN: unknown


def resampled(
    value_N: np.ndarray, member_NK: np.ndarray, question_N: Sequence[Hashable], seed: int = 0
) -> np.ndarray:
    """Return the means of K groups of values, [B, K], each over questions drawn with replacement.

    The questions are drawn, not the values (Efron's bootstrap by cluster), as two verdicts on one
    question are not independent. A draw may miss a small group, whose mean is then NaN.

    Worked example: the values 1 and 0 of question a and 1 of question b, in one group. A draw takes
    two questions: a and b give 2/3, a twice gives 2/4, b twice gives 2/2.
    """
    number = {question: k for k, question in enumerate(dict.fromkeys(question_N))}
    place_N = np.array([number[question] for question in question_N])
    count_QK = np.zeros((len(number), member_NK.shape[1]))
    sum_QK = np.zeros_like(count_QK)
    np.add.at(count_QK, place_N, member_NK)
    np.add.at(sum_QK, place_N, member_NK * value_N[:, None])
    equal_Q = np.full(len(number), 1 / len(number))
    times_BQ = np.random.default_rng(seed).multinomial(len(number), equal_Q, size=DRAWS)
    with np.errstate(invalid="ignore"):
        return (times_BQ @ sum_QK) / (times_BQ @ count_QK)


def error(draws_B: np.ndarray) -> float | None:
    """Return the standard error that the means of the draws show, None if there are too few."""
    draws_B = draws_B[np.isfinite(draws_B)]
    return float(draws_B.std(ddof=1)) if len(draws_B) > 1 else None


def groups(
    value_N: np.ndarray, member_NK: np.ndarray, question_N: Sequence[Hashable]
) -> list[dict]:
    """Return for each of K groups its number of values, their mean, and its standard error, which
    one question alone does not show."""
    draws_BK = resampled(value_N, member_NK, question_N)
    return [
        {
            "n": int(member_N.sum()),
            "mean": float(value_N[member_N].mean()) if member_N.any() else None,
            "standard_error": error(draws_B)
            if len({*compress(question_N, member_N)}) > 1
            else None,
        }
        for member_N, draws_B in zip(member_NK.T, draws_BK.T, strict=True)
    ]


def by_slot(v: Verdicts) -> dict:
    """Return the model's win rate where it was shown first and where second, and the difference.

    A judge without a habit has the difference 0, to its standard error.
    """
    member_NK = np.stack([v.slot_N == 1, v.slot_N == 2], axis=1)
    first, second = groups(100 * v.win_N, member_NK, v.question_N)
    out = {"first": first, "second": second}
    if first["n"] and second["n"]:
        draws_BK = resampled(100 * v.win_N, member_NK, v.question_N)
        out["second_minus_first"] = second["mean"] - first["mean"]
        out["standard_error"] = error(draws_BK[:, 1] - draws_BK[:, 0])
    return out


def consistency(v: Verdicts) -> dict | None:
    """Return in how many of the pairs that were judged in both orders the verdict was the same, and
    which slot won where it was not; None if no pair was.

    A judge that always names the first answer has the win rate 50 % and the consistency 0 %.
    """
    seen: dict[Hashable, dict[int, float]] = {}
    for pair, slot, win in zip(v.pair_N, v.slot_N, np.sign(v.win_N - 0.5), strict=True):
        seen.setdefault(pair, {})[int(slot)] = win
    both = [(wins[1], wins[2]) for wins in seen.values() if len(wins) == 2]
    if not both:
        return None
    same = sum(bool(first == second) for first, second in both)
    return {
        "pairs": len(both),
        "consistent": 100 * same / len(both),
        # the model won only where it was shown first, or the other one only where that one was
        "first_slot_preferred": sum(bool(first > second) for first, second in both),
        "second_slot_preferred": sum(bool(first < second) for first, second in both),
    }


def by_length(
    value_N: np.ndarray, length_N: np.ndarray, question_N: Sequence[Hashable]
) -> list[dict]:
    """Return the mean value in each quarter of the lengths, from the shortest to the longest.

    Equal lengths share a quarter, so that the quarters may differ in size. What has no length
    (NaN) is in none. A judge that prefers length shows means that rise from quarter to quarter.
    """
    known_N = np.isfinite(length_N)
    if known_N.sum() < 4:
        return []
    border = np.quantile(length_N[known_N], (0.25, 0.5, 0.75))
    quarter_N = np.where(known_N, np.searchsorted(border, length_N), -1)
    member_NK = quarter_N[:, None] == np.arange(4)
    out = groups(value_N, member_NK, question_N)
    for quarter, member_N in zip(out, member_NK.T, strict=True):
        if member_N.any():
            ends = length_N[member_N].min(), length_N[member_N].max()
            quarter["shortest"], quarter["longest"] = map(int, ends)
    return [quarter for quarter in out if quarter["n"]]


def kappa(
    first_N: Sequence[float], second_N: Sequence[float], squared: bool = False
) -> float | None:
    """Return Cohen's kappa of two judges: 1 if they always agree, 0 if as often as by chance.

        kappa = 1 - observed disagreement / disagreement expected by chance

    The chance is that of each judge's own verdicts, paired at random. Two verdicts disagree by 0 or
    1 (Cohen 1960) or, if `squared`, by the square of their difference, as suits scores (Cohen
    1968). Worked example: verdicts 1 1 0 0 and 1 0 0 0 disagree in 1/4; by chance they would in
    2/4 · 3/4 + 2/4 · 1/4 = 1/2; kappa is 1/2. None if chance leaves no disagreement.
    """
    a_N, b_N = np.asarray(first_N, float), np.asarray(second_N, float)

    def disagreement(x, y):
        return (x - y) ** 2 if squared else x != y

    chance = disagreement(a_N[:, None], b_N[None, :]).mean()
    return float(1 - disagreement(a_N, b_N).mean() / chance) if chance else None


def families(name: str) -> set[str]:
    """Return the families that the words in a model's name tell: {"gpt"} of
    weighted_alpaca_eval_gpt4_turbo, {"mistral"} of OpenHermes-2.5-Mistral-7B."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return {
        family
        for family, starts in FAMILIES.items()
        if any(word.startswith(tuple(starts.split())) for word in words)
    }


def leakage(judge: str, named: dict[str, str | None]) -> list[str]:
    """Return a warning for each of the models, by the part it has, that is the judge itself or of
    its family.

    Labels of a judge's relative raise a model in that judge's eyes (preference leakage, 2502.01534:
    up to 28.7 points), and a judge prefers its own family's answers (self-preference, 2404.13076).
    """
    warnings = []
    for part, name in named.items():
        effect = "preference leakage" if part.startswith("feedback") else "self-preference"
        same = [f"the judge and the {part} are both {name}"] if name == judge else []
        for what in same or [
            f"the judge {judge} and the {part} {name} are both of the family {family}"
            for family in sorted(families(judge) & families(name or ""))
        ]:
            warnings.append(f"{what}: {effect} can favour that side")
    return warnings
