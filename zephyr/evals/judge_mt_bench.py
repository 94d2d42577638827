"""MT-Bench's two protocols: each answer graded from 1 to 10, or two models' answers compared.

Both go turn by turn. The first turn's prompt has the first question and its answers, the second's
the whole conversations; in BY_REFERENCE categories the reference answers stand beside them. Of two
models, each pair of answers is one match of two games: in game 1 the first model is the assistant A
that is shown first, in game 2 the other one is.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from zephyr.data.readers import read_rows, writing
from zephyr.endpoint import Answer, Request
from zephyr.evals import mt_bench, mt_bench_prompts
from zephyr.evals.asking import Judge
from zephyr.evals.mt_bench_prompts import Prompt
from zephyr.evals.questions import Question, read_questions
from zephyr.files import home, shown

BY_REFERENCE = ("math", "reasoning", "coding")  # categories whose prompts have a reference answer
# of one side and of two: without a reference answer, and with it
PROMPTS = ("single-v1", "single-math-v1"), ("pair-v2", "pair-math-v1")
NEW = 2048  # tokens of a judgment, at most
WRITTEN, ENDS, COLUMNS = "judgments", (".jsonl", ".jsonl.gz"), ("question_id", "judge")


class Match(NamedTuple):
    """One answer to be graded, or one model's and another's to be compared."""

    question: int
    turn: int
    prompt: str  # its name
    games: list[list[dict]]  # the messages: one game, or two


def read_answers(path: str) -> tuple[str, dict[int, list[str]]]:
    """Return the model and its answers' turns by question, from FastChat's answer file. An empty
    answer is one: without it a model that says nothing would have a better mean."""
    model, found = "", {}
    for where, row in read_rows(Path(path)):
        if {"instruction", "output"} <= row.keys():
            raise ValueError(f"{where} is an answer to AlpacaEval; ask with: judge alpaca")
        try:
            number, name, turns = row["question_id"], row["model_id"], row["choices"][0]["turns"]
            if type(number) is not int or not isinstance(name, str) or not name:
                raise TypeError
        except (LookupError, TypeError):
            raise ValueError(
                f"{where} is no line of an answer file, with question_id, model_id and choices: "
                f"{shown(row, 60)}"
            ) from None
        if number in found:
            raise ValueError(f"{where}: question {number} is answered before; delete one of them")
        if name != (model := model or name):
            raise ValueError(
                f"{where}: it is {shown(name)}'s answer in a file of {shown(model)}'s; split "
                "the file"
            )
        if len(row["choices"]) > 1:
            raise ValueError(
                f"{where}: question {number} has {len(row['choices'])} choices, of which one is "
                "judged; delete the others"
            )
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(
                f"{where}: an answer to question {number} is no text: {shown(turns, 60)}"
            )
        found[number] = turns
    return model, found


def matches(
    questions: dict[int, Question],
    sides: list[dict[int, list[str]]],
    references: dict[int, list[str]],
    prompts: dict[str, Prompt],
) -> Iterator[Match]:
    """Yield what one model's answers are graded by, or two models' compared, question by question
    and turn by turn. `sides` has each model's answers; two have answered the same questions."""
    orders = [sides] if len(sides) == 1 else [sides, sides[::-1]]
    names = PROMPTS[len(sides) - 1]
    for number in sides[0]:
        if number not in questions:
            raise ValueError(
                f"question {number} is answered and is none of --questions; give the file that was "
                "answered, or delete the line"
            )
        asked = questions[number].turns
        if len(asked) > 2:
            raise ValueError(
                f"question {number} has {len(asked)} turns; MT-Bench's judge has prompts for two"
            )
        for turns in (side[number] for side in sides):
            if len(turns) != len(asked):
                raise ValueError(
                    f"question {number} has {len(asked)} turns and {len(turns)} answers; give the "
                    "file that was answered, or delete the line"
                )
        values = {"question": asked[0], **_numbered("question", asked)}
        by_reference = questions[number].group in BY_REFERENCE
        if by_reference:
            if len(references.get(number, ())) != len(asked):
                raise ValueError(
                    f"question {number} is graded beside a reference answer, and --references has "
                    "none for it; give FastChat's reference_answer/gpt-4.jsonl"
                )
            values |= _numbered("ref_answer", references[number])
        for turn in range(1, len(asked) + 1):
            prompt = prompts[names[by_reference] + "-multi-turn" * (turn > 1)]
            games = [
                prompt.fill(values | _answers([side[number] for side in order])) for order in orders
            ]
            yield Match(number, turn, prompt.name, games)


def _numbered(name: str, texts: list[str]) -> dict[str, str]:
    return {f"{name}_{k}": text for k, text in enumerate(texts, start=1)}


def _answers(sides: list[list[str]]) -> dict[str, str]:
    """Return the answers under the names that the templates have for them: `answer_1`, or of two
    models `answer_a_1` and `answer_b_1`; `answer` or `answer_a` is the first turn's."""
    names = ["answer"] if len(sides) == 1 else ["answer_a", "answer_b"]
    found = {}
    for name, turns in zip(names, sides, strict=True):
        found |= {name: turns[0], **_numbered(name, turns)}
    return found


def single(match: Match, model: str, judge: str, answer: Answer) -> dict:
    """Return the line of FastChat's file on one graded answer."""
    return {
        "question_id": match.question,
        "model": model,
        "judge": [judge, match.prompt],
        "user_prompt": match.games[0][-1]["content"],
        "judgment": answer.text,
        "score": mt_bench.score_in(answer.text),
        "turn": match.turn,
        "tstamp": time.time(),
    }


def pair(match: Match, models: list[str], judge: str, texts: list[str]) -> dict:
    """Return the line of FastChat's file on two games. A is who is shown first: model_1 in game 1,
    model_2 in game 2."""
    row = {"question_id": match.question, "model_1": models[0], "model_2": models[1]}
    shown_as = {"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"}
    for game, (text, names) in enumerate(zip(texts, shown_as, strict=True), start=1):
        verdict = mt_bench.verdict_in(text)
        row[f"g{game}_winner"] = names.get(verdict, verdict)
    row["judge"] = [judge, match.prompt]
    for game, (text, messages) in enumerate(zip(texts, match.games, strict=True), start=1):
        row[f"g{game}_user_prompt"] = messages[-1]["content"]
        row[f"g{game}_judgment"] = text
    return row | {"turn": match.turn, "tstamp": time.time()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("answers", metavar="ANSWERS", help="FastChat's answer file of a model")
    add("--against", metavar="ANSWERS2", help="another model's: compare the two [grade the one]")
    add("--questions", required=True, metavar="FILE", help="MT-Bench's question.jsonl")
    add("--references", metavar="FILE", help="its reference_answer/gpt-4.jsonl")
    add("--prompts", metavar="FILE", help="its judge_prompts.jsonl [prompts of our own]")


def run(args: argparse.Namespace, judge: Judge, out: str) -> list[str]:
    """Have a model's answers graded or compared, write the judgments to `out`, and return what the
    page has to say besides the figures."""
    questions = {q.name: q for q in read_questions(home(args.questions))}
    files = [home(path) for path in (args.answers, args.against) if path]
    models, sides = map(list, zip(*map(read_answers, files), strict=True))
    if len(set(models)) < len(models):
        raise ValueError(f"{files[1]}: both files are of {shown(models[0])}; change a model_id")
    if odd := sorted(set(sides[0]) ^ set(sides[-1])):
        raise ValueError(
            f"{len(odd)} questions are answered in one of {' and '.join(files)} alone, the first "
            f"is {odd[0]}; have them answered, or delete their lines"
        )
    references = {}
    if args.references:
        theirs = home(args.references)
        if os.path.realpath(theirs) in map(os.path.realpath, files):
            raise ValueError(
                f"--references {theirs} has the answers that are judged; give FastChat's "
                "reference_answer/gpt-4.jsonl"
            )
        references = read_answers(theirs)[1]
    prompts = mt_bench_prompts.read(args.prompts and home(args.prompts))
    try:
        todo = list(matches(questions, sides, references, prompts))
    except ValueError as error:
        raise ValueError(f"{' and '.join(files)}: {error}") from error
    parameters = {"temperature": 0, "max_tokens": args.max_new or NEW}
    requests = [Request(messages, parameters) for match in todo for messages in match.games]
    found = iter(judge.until(_readable_pair if args.against else _readable, requests))
    with writing(out) as write:
        for match in todo:
            answers = [next(found) for _ in match.games]
            if args.against:  # a game without an answer has no winner, as in FastChat
                texts = [a.text if isinstance(a, Answer) else mt_bench.NO_ANSWER for a in answers]
                write(pair(match, models, judge.name, texts))
            elif isinstance(answers[0], Answer):
                write(single(match, models[0], judge.name, answers[0]))
    empty = [n for side in sides for n, turns in side.items() if not all(t.strip() for t in turns)]
    if not empty:
        return []
    return [
        f"{len(empty)} answers are empty, the first to question {empty[0]}; the judge saw them as "
        "they are"
    ]


def _readable(text: str) -> bool:
    return mt_bench.score_in(text) != mt_bench.FAILED


def _readable_pair(text: str) -> bool:
    return mt_bench.verdict_in(text) != "error"
