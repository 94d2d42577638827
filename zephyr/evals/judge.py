"""MT-Bench, judged: a model at an endpoint grades each answer from 1 to 10, turn by turn.

    python -m zephyr.evals judge mt-bench ANSWERS --questions question.jsonl \\
        --references reference_answer/gpt-4.jsonl --prompts judge_prompts.jsonl \\
        --url https://api.openai.com/v1 --judge gpt-4 --out judgments.jsonl

ANSWERS is FastChat's answer file, and `--out` its judgment file. Prompts and references are those
of a clone of FastChat (fastchat/llm_judge/data), unchanged, so that figures compare with published
ones. Without `--prompts` they are our own, and figures compare with each other alone.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from zephyr.data.readers import read_rows, writing
from zephyr.endpoint import Answer, Budget, Endpoint, Failure, Request, ask
from zephyr.evals import mt_bench, show
from zephyr.files import home, shown

BY_REFERENCE = ("math", "reasoning", "coding")  # categories whose prompts have a reference answer
PARAMETERS = {"temperature": 0, "max_tokens": 2048}
GRADINGS = 3  # of one answer, until there is a grade to be read in one
GRADE = (
    "Grade the assistant's {what} from 1 to 10 for being helpful, relevant, correct and "
    "complete{by}. "
    "First say in a few sentences why. Then end with the grade in double brackets, as in [[5]]."
)
QUESTION, SECOND = "[Question]\n{question}\n\n", "[Second question]\n{question_2}\n\n"
OWN = {  # by FastChat's names: the system message, and the template
    "single-v1": (
        "You grade answers fairly.",
        GRADE.format(what="answer", by="") + f"\n\n{QUESTION}[Answer]\n{{answer}}",
    ),
    "single-math-v1": (
        "You grade answers fairly.",
        GRADE.format(what="answer", by=", comparing it with the reference answer")
        + f"\n\n{QUESTION}[Reference answer]\n{{ref_answer_1}}\n\n[Answer]\n{{answer}}",
    ),
    "single-v1-multi-turn": (
        GRADE.format(what="answer to the second question", by=""),
        "[First question]\n{question_1}\n\n[Answer]\n{answer_1}\n\n"
        f"{SECOND}[Answer to be graded]\n{{answer_2}}",
    ),
    "single-math-v1-multi-turn": (
        GRADE.format(
            what="answer to the second question", by=", comparing it with the reference answer"
        ),
        "[First question]\n{question_1}\n\n[Reference answer]\n{ref_answer_1}\n\n"
        f"[Answer]\n{{answer_1}}\n\n{SECOND}[Reference answer]\n{{ref_answer_2}}\n\n"
        "[Answer to be graded]\n{answer_2}",
    ),
}


class Grading(NamedTuple):
    """One answer to be graded: what the judge is asked, and what FastChat's file says of it."""

    question: int
    model: str
    turn: int
    prompt: str  # its name
    system: str
    user: str

    def request(self, attempt: int) -> Request:
        """Return what is asked for the `attempt`-th time; another seed makes it another request."""
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
        ]
        return Request(messages, PARAMETERS | ({"seed": attempt} if attempt else {}))


def read_questions(path: str) -> dict[int, dict]:
    """Return MT-Bench's questions by their number."""
    found = {}
    for where, row in read_rows(Path(path)):
        turns = row.get("turns")
        if not isinstance(row.get("question_id"), int) or not _texts(turns):
            raise ValueError(f"{where} is no question with question_id and turns: {shown(row, 60)}")
        found[row["question_id"]] = row
    return found


def read_answers(path: str) -> tuple[str, dict[int, list[str]]]:
    """Return the model and its answers' turns by question, from FastChat's answer file. An empty
    answer is one, to be graded: without it a model that says nothing would have a better mean."""
    model, found = "", {}
    for where, row in read_rows(Path(path)):
        try:
            number, name, turns = row["question_id"], row["model_id"], row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"{where} is no line of an answer file, with question_id, model_id and choices: "
                f"{shown(row, 60)}"
            ) from None
        if number in found:
            raise ValueError(f"{where}: question {number} is answered before; delete one of them")
        if name != (model := model or name):
            raise ValueError(f"{where}: it is {shown(name)}'s answer in a file of {shown(model)}'s")
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(
                f"{where}: an answer to question {number} is no text: {shown(turns, 60)}"
            )
        found[number] = turns
    return model, found


def _texts(turns: object) -> bool:
    return bool(
        isinstance(turns, list) and turns and all(isinstance(t, str) and t.strip() for t in turns)
    )


def read_prompts(path: str | None) -> dict[str, tuple[str, str]]:
    """Return the judge's prompts by name: FastChat's from its file, or without one our own."""
    if path is None:
        return OWN
    rows = [row for _, row in read_rows(Path(path))]
    found = {r.get("name"): (r.get("system_prompt"), r.get("prompt_template")) for r in rows}
    if missing := [name for name in OWN if not all(found.get(name, ("",)))]:
        raise ValueError(f"{path} has no prompt {missing[0]}; give FastChat's judge_prompts.jsonl")
    return found


def gradings(
    questions: dict[int, dict],
    model: str,
    answers: dict[int, list[str]],
    references: dict[int, list[str]],
    prompts: dict[str, tuple[str, str]],
) -> Iterator[Grading]:
    """Yield what a model's answers are graded by, question by question and turn by turn.

    The first turn's prompt has the first question and its answer, the second's the whole
    conversation. In BY_REFERENCE categories the reference answers stand beside them.
    """
    for number, turns in answers.items():
        if number not in questions:
            raise ValueError(f"question {number} is answered and is none of --questions")
        asked = questions[number]["turns"]
        if len(turns) != len(asked):
            raise ValueError(f"question {number} has {len(asked)} turns and {len(turns)} answers")
        kind = "single-v1"
        values = {"question": asked[0], "answer": turns[0]}
        values |= {f"question_{k}": text for k, text in enumerate(asked, start=1)}
        values |= {f"answer_{k}": text for k, text in enumerate(turns, start=1)}
        if questions[number].get("category") in BY_REFERENCE:
            if len(references.get(number, ())) != len(asked):
                raise ValueError(
                    f"question {number} is graded beside a reference answer, and --references has "
                    "none for it; give FastChat's reference_answer/gpt-4.jsonl"
                )
            kind = "single-math-v1"
            both = enumerate(references[number], start=1)
            values |= {f"ref_answer_{k}": text for k, text in both}
        for turn in range(1, len(asked) + 1):
            name = kind + "-multi-turn" * (turn > 1)
            system, template = prompts[name]
            yield Grading(number, model, turn, name, system, template.format(**values))


def grade(
    todo: Sequence[Grading], judge: Endpoint, path: str, **how
) -> Iterator[tuple[Grading, Answer | Failure]]:
    """Yield every grading with the judge's answer. One in which no grade can be read is asked for
    again, GRADINGS times in all; `path` keeps all answers, and `how` goes to `endpoint.ask`."""
    found, left = {}, list(todo)
    for attempt in range(GRADINGS):
        answers = ask(judge, [grading.request(attempt) for grading in left], path, **how)
        found |= zip(left, answers, strict=True)
        left = [
            grading
            for grading in left
            if isinstance(found[grading], Answer)
            and mt_bench.score_in(found[grading].text) == mt_bench.FAILED
        ]
        if not left:
            break
    return ((grading, found[grading]) for grading in todo)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("benchmark", choices=("mt-bench",), help="what the answers are to")
    add("answers", metavar="ANSWERS", help="FastChat's answer file of a model")
    add("--questions", required=True, metavar="FILE", help="MT-Bench's question.jsonl")
    add("--references", metavar="FILE", help="its reference_answer/gpt-4.jsonl")
    add("--prompts", metavar="FILE", help="its judge_prompts.jsonl [prompts of our own]")
    add("--url", required=True, help="an OpenAI-compatible endpoint, such as http://host:8000/v1")
    add("--judge", required=True, metavar="NAME", help="the judge's name at the endpoint")
    add("--key-from", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key")
    add("--out", required=True, metavar="FILE", help="the judgments, as FastChat has them")
    add("--concurrency", type=int, default=8, help="requests at a time [8]")
    add("--budget-tokens", type=int, metavar="N", help="stop before so many tokens")
    add("--budget-money", type=float, metavar="X", help="or before so much, by --prices")
    add("--prices", metavar="FILE", help="a price table, see zephyr/client/budget.py")
    add("--feedback", metavar="NAME", help="what labelled the model's training data")


def run(args: argparse.Namespace) -> str:
    """Grade a model's answers, write the judgments, and return the page that `show` makes."""
    questions = read_questions(home(args.questions))
    model, answers = read_answers(home(args.answers))
    references = read_answers(home(args.references))[1] if args.references else {}
    prompts = read_prompts(args.prompts and home(args.prompts))
    todo = list(gradings(questions, model, answers, references, prompts))
    judge, out = Endpoint(args.url, args.judge, args.key_from), home(args.out)
    budget = Budget(args.budget_tokens, args.budget_money, args.prices)
    how = {"concurrency": args.concurrency, "budget": budget}
    own, missing = "" if args.prompts else "zephyr-", 0
    with writing(out) as write:
        for grading, answer in grade(todo, judge, f"{out}.answers", **how):
            if isinstance(answer, Failure):
                missing += 1
                continue
            write(
                {
                    "question_id": grading.question,
                    "model": grading.model,
                    "judge": [args.judge, own + grading.prompt],
                    "user_prompt": grading.user,
                    "judgment": answer.text,
                    "score": mt_bench.score_in(answer.text),
                    "turn": grading.turn,
                    "tstamp": time.time(),
                }
            )
        if missing == len(todo):
            raise ValueError(f"{args.url}: none of {missing} gradings was answered")
    page = argparse.ArgumentParser()
    show.add_arguments(page)
    more = ["--feedback", args.feedback] if args.feedback else []
    lines = [show.run(page.parse_args([out, "--questions", home(args.questions), *more]))]
    if missing:
        lines.append(f"{missing} gradings have no answer; the same command asks for them again")
    if own:
        lines.append("The prompts are our own: compare these figures with each other alone.")
    return "\n".join(lines)
