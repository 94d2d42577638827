"""MT-Bench's judgments read: the scores of each model by turn and category, and games of two.

FastChat's judge leaves one of two kinds of rows, here as it writes them (FastChat at 0e6d3e4,
`llm_judge/common.py`), one for each question and turn:

    {"question_id": 81, "turn": 1, "model": "zephyr-7b", "judge": ["gpt-4", "single-v1"],
     "score": 8, "judgment": "... [[8]]", "user_prompt": "..."}
    {"question_id": 81, "turn": 1, "model_1": "zephyr-7b", "model_2": "gpt-4", "judge": [...],
     "g1_winner": "model_1", "g2_winner": "tie", "g1_judgment": "... [[A]]", "g1_user_prompt": ...}

A score of -1 is a judgment from which no score could be read, or which never came ("$ERROR$"): a
failure, counted and in no mean. In game 1 of a pair, model_1 is the assistant A that is shown
first; in game 2, model_2 is.

Letters of shapes: N judgments.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zephyr.data.readers import read_rows
from zephyr.evals import belief
from zephyr.evals.belief import Verdicts
from zephyr.evals.mt_bench_prompts import conversation
from zephyr.files import home, shown

CATEGORIES = "writing roleplay reasoning math coding extraction stem humanities".split()
# of 30 reference answers by gpt-4, those that are wrong (FastChat pull request 3158)
WRONG_REFERENCES = frozenset((104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130))
SCORE = re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]")
FAILED = -1
NO_ANSWER = "$ERROR$"  # what FastChat stores after 16 attempts without an answer
SINGLE = ("question_id", "model", "score", "turn")
PAIR = ("question_id", "model_1", "model_2", "g1_winner", "g2_winner")
WINNERS = ("model_1", "model_2", "tie", "error")


@dataclass(frozen=True)
class Judgment:
    """One score that a judge gave."""

    question: int
    turn: int
    model: str
    judge: str
    score: float  # FAILED if there is none
    length: float  # characters of the answer that was scored; NaN if the prompt does not show it
    text: str | None  # the judge's words


@dataclass(frozen=True)
class Games:
    """One pair of answers that a judge compared in both orders."""

    question: int
    turn: int
    models: tuple[str, str]
    judge: str
    winners: tuple[str, str]  # of game 1 and of game 2, each one of WINNERS
    longer: float  # by how many characters the first model's answer is longer; NaN if unknown


def score_in(judgment: str) -> float:
    """Return the score in a judge's words, FAILED if there is none: the first number that stands in
    two brackets, as [[7.5]], or if there is none, the first in one."""
    for pattern in SCORE:
        if match := pattern.search(judgment):
            return float(match[1])
    return FAILED


def verdict_in(judgment: str) -> str:
    """Return which assistant a judge's words prefer: A, B, tie or error. [[A]] is looked for first,
    wherever it stands, then [[B]], then [[C]]."""
    marks = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
    return next((verdict for mark, verdict in marks.items() if mark in judgment), "error")


def answer_length(user_prompt: object) -> float:
    """Return the number of characters of the answer that a prompt asks a score for: the only one,
    or of two turns the second. NaN if the prompt is of another form than FastChat's."""
    held = conversation(user_prompt)
    return float(len(held.answers["a"][-1])) if held else math.nan


def longer(user_prompt: object) -> float:
    """Return by how many characters assistant A's answers in a pair's prompt are longer than B's.
    NaN if the prompt is of another form than FastChat's."""
    held = conversation(user_prompt)
    if held is None or "b" not in held.answers:
        return math.nan
    a, b = (sum(map(len, held.answers[name])) for name in "ab")
    return float(a - b)


def read(rows: Sequence[tuple[str, dict]]) -> list[Judgment] | list[Games]:
    """Return the judgments in the rows of a file, each given with its place; of which kind, the
    first row tells. Raises ValueError for a row that is not of that kind."""
    pairs = is_pair(rows[0][1])
    needed = PAIR if pairs else SINGLE
    out = []
    for where, row in rows:
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"{where}: no {missing[0]}; a judgment has {', '.join(needed)}")
        question, turn = row["question_id"], row.get("turn", 1)
        if type(question) is not int:
            raise ValueError(f"{where}: question_id is a whole number, not {shown(question)}")
        if turn not in (1, 2) or type(turn) is not int:
            raise ValueError(f"{where}: turn is 1 or 2, not {shown(turn)}")
        judge = row.get("judge")
        judge = judge[0] if isinstance(judge, list) and judge else judge or "(no judge)"
        names = [row[name] for name in needed if name.startswith("model")] + [judge]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where}: the names of models and judge are text, not {shown(names)}")
        if pairs:
            out.append(_games(where, row, question, turn, judge))
        else:
            out.append(_judgment(where, row, question, turn, judge))
    return out


def is_pair(row: dict) -> bool:
    return "g1_winner" in row and "model_1" in row


def _judgment(where: str, row: dict, question: int, turn: int, judge: str) -> Judgment:
    score = row["score"]
    # NaN is not below anything, and a number of any size can be written in JSON
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 1e6:
        raise ValueError(f"{where}: score is a number, {FAILED} for a failure, not {shown(score)}")
    text = row.get("judgment")
    return Judgment(
        question=question,
        turn=turn,
        model=row["model"],
        judge=judge,
        score=score,
        length=answer_length(row.get("user_prompt")),
        text=text if isinstance(text, str) else None,
    )


def _games(where: str, row: dict, question: int, turn: int, judge: str) -> Games:
    winners = row["g1_winner"], row["g2_winner"]
    for winner in winners:
        if winner not in WINNERS:
            raise ValueError(f"{where}: a winner is {', '.join(WINNERS)}, not {shown(winner)}")
    if row["model_1"] == row["model_2"]:
        raise ValueError(f"{where}: model_1 and model_2 are both {shown(row['model_1'])}")
    return Games(
        question=question,
        turn=turn,
        models=(row["model_1"], row["model_2"]),
        judge=judge,
        winners=winners,
        longer=longer(row.get("g1_user_prompt")),
    )


def categories(path: str | Path | None) -> dict[int, str]:
    """Return each question's category: from a file of questions, or without one those of the 80
    that MT-Bench has, ten by ten from 81 on."""
    if path is None:
        return {81 + k: CATEGORIES[k // 10] for k in range(80)}
    out: dict[int, str] = {}
    for where, row in read_rows(Path(home(path))):
        number, category = row.get("question_id"), row.get("category")
        if type(number) is not int or not isinstance(category, str):
            raise ValueError(f"{where}: a question has a question_id and a category")
        if number in out:
            raise ValueError(f"{where}: question {number} is there twice; keep one of them")
        out[number] = category
    return out


def mean(judgments: Sequence[Judgment], turn: int | None = None) -> float | None:
    """Return the mean score as FastChat's show_result has it: of the rows that are left without the
    failures, whichever turn they are of and however often a question is among them.

    The average over both turns is thus the mean of all rows, not of the two turns' means. Worked
    example: 8 and 6 in turn 1, 4 and a failure in turn 2: 7.0, 4.0, and together 6.0, not 5.5.
    """
    scores = [j.score for j in judgments if j.score != FAILED and turn in (None, j.turn)]
    return float(np.mean(scores)) if scores else None


def scores(
    judgments: Sequence[Judgment], category: dict[int, str], feedback: str | None = None
) -> dict:
    """Return the figures of one model's judgments by one judge.

    A question that is judged again counts again, as in show_result: the duplicates are counted and
    some are named. `without_wrong_references` is the average without the 13 questions to which the
    reference answer is known to be wrong.
    """
    if unknown := sorted({j.question for j in judgments} - category.keys()):
        raise ValueError(
            f"question {unknown[0]} is not among the {len(category)} questions; give the right "
            "file with --questions"
        )
    kept = [j for j in judgments if j.score != FAILED]
    score_N = np.array([j.score for j in kept], float)
    question_N = [j.question for j in kept]
    times = Counter((j.question, j.turn) for j in judgments)
    again = [f"{question} turn {turn}" for (question, turn), n in times.items() if n > 1]
    judge = judgments[0].judge
    parts = {"model": judgments[0].model, "feedback model": feedback}
    return {
        "judge": judge,
        "turn_1": mean(judgments, 1),
        "turn_2": mean(judgments, 2),
        "average": mean(judgments),
        "standard_error": (
            belief.groups(score_N, np.ones((len(kept), 1), bool), question_N)[0]["standard_error"]
            if kept
            else None
        ),
        "without_wrong_references": mean(
            [j for j in judgments if j.question not in WRONG_REFERENCES]
        ),
        "wrong_references": sorted({j.question for j in judgments} & WRONG_REFERENCES),
        "n_judgments": len(judgments),
        "n_questions": len({j.question for j in judgments}),
        "n_questions_in_all": len(category),
        "n_failures": len(judgments) - len(kept),
        "n_unanswered": sum(j.text == NO_ANSWER for j in judgments),
        # the score that FastChat's rule reads from the stored words is another one
        "n_misread": sum(j.text is not None and score_in(j.text) != j.score for j in judgments),
        "n_duplicates": sum(times.values()) - len(times),
        "duplicates": again,
        "categories": {
            name: {
                "n": len(those),
                "turn_1": mean(those, 1),
                "turn_2": mean(those, 2),
                "average": mean(those),
            }
            for name in dict.fromkeys(category.values())
            if (those := [j for j in judgments if category[j.question] == name])
        },
        "length_quarters": belief.by_length(
            score_N, np.array([j.length for j in kept]), question_N
        ),
        "warnings": belief.leakage(judge, parts),
    }


def outcome(games: Games) -> int:
    """Return 0 if the first of the two models wins, 1 if the second, -1 for a tie: the same model
    must win both games, and else it is a tie (FastChat's show_result)."""
    one, two = games.winners
    return {"model_1": 0, "model_2": 1}[one] if one == two and one != "tie" else -1


def tally(games: Sequence[Games], model: str) -> dict:
    """Return wins, losses and ties of a model over pairs in which neither game failed, and its win
    rate in percent with a tie as half a win (show_result's win_rate_adjusted)."""
    whole = [g for g in games if model in g.models and "error" not in g.winners]
    won = [outcome(g) for g in whole]
    win_N = np.array(
        [
            50.0 if side < 0 else 100.0 * (g.models[side] == model)
            for g, side in zip(whole, won, strict=True)
        ]
    )
    all_N1 = np.ones((len(whole), 1), bool)
    rate = belief.groups(win_N, all_N1, [g.question for g in whole])[0] if whole else {}
    return {
        "win_rate": rate.get("mean"),
        "standard_error": rate.get("standard_error"),
        "wins": int((win_N == 100).sum()),
        "losses": int((win_N == 0).sum()),
        "ties": int((win_N == 50).sum()),
    }


def verdicts(games: Sequence[Games], model: str) -> Verdicts:
    """Return every game of a model that did not fail, with the slot in which it was shown."""
    questions, pairs, slots, wins, lengths = [], [], [], [], []
    for k, g in enumerate(games):
        if model not in g.models:
            continue
        own = g.models.index(model)  # 0: it is model_1, which game 1 shows first
        for game, winner in enumerate(g.winners):
            if winner != "error":
                questions.append(g.question)
                pairs.append(k)
                slots.append(1 + (own + game) % 2)
                wins.append(0.5 if winner == "tie" else float(winner == f"model_{own + 1}"))
                lengths.append(g.longer * (-1) ** own)
    return Verdicts(questions, pairs, np.array(slots, int), np.array(wins), np.array(lengths))


def pairs(games: Sequence[Games], model: str, feedback: str | None = None) -> dict:
    """Return the figures of a model's games before one judge, and what they show of the judge."""
    games = [g for g in games if model in g.models]
    v = verdicts(games, model)
    others = sorted({name for g in games for name in g.models} - {model})
    warnings = belief.leakage(games[0].judge, {"model": model, "feedback model": feedback})
    for name in others:
        warnings += belief.leakage(games[0].judge, {"opponent": name})
    different = {(g.question, g.turn, frozenset(g.models)) for g in games}
    judged = len(v.win_N) > 0
    return {
        "judge": games[0].judge,
        "opponents": others,
        **tally(games, model),
        "n_pairs": len(games),
        "n_questions": len({g.question for g in games}),
        "n_duplicates": len(games) - len(different),
        "n_failures": sum(g.winners.count("error") for g in games),
        "game_ties": int((v.win_N == 0.5).sum()),
        "slots": belief.by_slot(v) if judged else None,
        "consistency": belief.consistency(v) if judged else None,
        "length_quarters": (
            belief.by_length(100 * v.win_N, v.longer_N, v.question_N) if judged else []
        ),
        "warnings": warnings,
    }


def agreement(one: Sequence[Judgment], other: Sequence[Judgment]) -> dict:
    """Return how two judges of one model agree: Cohen's kappa with squared differences of the
    scores. Of a question that a judge judged again, its last score counts."""
    first, second = (
        {(j.question, j.turn): j.score for j in judgments if j.score != FAILED}
        for judgments in (one, other)
    )
    return _agreement(one[0].model, (one[0].judge, other[0].judge), first, second, squared=True)


def agreement_on_games(one: Sequence[Games], other: Sequence[Games]) -> dict:
    """Return how two judges agree on who of the same two models wins each question."""
    names = sorted({name for g in one for name in g.models})
    first, second = (
        {
            (g.question, g.turn, *sorted(g.models)): (
                -1 if (won := outcome(g)) < 0 else names.index(g.models[won])
            )
            for g in games
            if "error" not in g.winners
        }
        for games in (one, other)
    )
    return _agreement(" and ".join(names), (one[0].judge, other[0].judge), first, second)


def _agreement(
    model: str, judges: tuple[str, str], first: dict, second: dict, squared: bool = False
) -> dict:
    both = [key for key in first if key in second]
    a_N, b_N = (np.array([verdict[key] for key in both]) for verdict in (first, second))
    return {
        "model": model,
        "judges": list(judges),
        "n": len(both),
        "same": float(100 * (a_N == b_N).mean()) if both else None,
        "kappa": belief.kappa(a_N, b_N, squared) if both else None,
    }
