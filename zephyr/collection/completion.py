"""One answer to a prompt, and which models are asked for one, after which principle."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import fmean

from zephyr.collection.rating import OVERALL, Rating, Unrated
from zephyr.data.prompts import Prompt
from zephyr.endpoint import Answer, Failure, Request
from zephyr.files import home, read_json, shown

# One text is drawn for each completion, any of them as often as another. By the rules in
# UltraFeedback's main_vllm.py 70, 12, 11 and 8 % of all completions had principles of these names.
PRINCIPLES = {
    "helpfulness": [
        "Help the user as well as you can: answer what was asked, completely and clearly.",
        "Think about what the user needs the answer for, and make it useful for that.",
        "Give an answer that the user can act on at once, with the details that it takes.",
        "Explain so that the user learns something and could do it alone the next time.",
        "Be an expert who takes time: be thorough, and give examples where they help.",
        "Get to the point. Say what matters to the user, and leave out what does not.",
        "Be friendly and encouraging, and make the answer a pleasure to read.",
    ],
    "truthfulness": [
        "Say only what is true, by the facts and by what the user tells you. Invent nothing."
    ],
    "honesty": [
        "Say how sure you are. Where you do not know, say so instead of guessing as if you knew."
    ],
    "verbalized_calibration": [
        "Answer, and then tell on a last line, as in Confidence: 80%, how sure you are to be right."
    ],
}


def read_principles(path: str) -> dict[str, list[str]]:
    """Return a JSON object of principles as PRINCIPLES is one. Raises ValueError for another."""
    table = read_json(Path(home(path)))
    if not table:
        raise ValueError(f"{path} has no principle; --no-principles does without")
    for name, texts in table.items():
        good = isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)
        if not (good and texts):
            what = f"{shown(name, 40)} is {shown(texts, 60)}"
            raise ValueError(f"{path}: {what}; a principle has a list of system prompts")
    return table


@dataclass(eq=False)
class Completion:
    """One answer to a prompt: who is asked for it, and what came of it."""

    prompt: Prompt
    model: str
    turn: int  # how often the model was drawn for this prompt before
    principle: str
    system: str
    answer: Answer | Failure | None = None
    ratings: dict[str, Rating | Unrated] = field(default_factory=dict)

    def request(self, sampling: Mapping, seed: int) -> Request:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return Request([*system, *self.prompt.messages], sampling | {"seed": seed + self.turn})

    @property
    def score(self) -> float:
        return self.ratings[OVERALL].value

    def missing(self) -> str:
        """Return why this cannot be a completion of a row; "" if it can."""
        if not isinstance(self.answer, Answer):
            return "no answer"
        if not self.answer.text.strip():
            return "empty answer"
        rated = all(isinstance(rating, Rating) for rating in self.ratings.values())
        return "" if rated else "no rating"

    def row(self) -> dict:
        aspects = {kind: rating for kind, rating in self.ratings.items() if kind != OVERALL}
        numbers = [rating.value for rating in aspects.values() if rating.value is not None]
        return {
            "model": self.model,
            "principle": self.principle,
            "custom_system_prompt": self.system,
            "response": self.answer.text,
            "annotations": {
                kind: {"Rating": "N/A" if r.value is None else f"{r.value:g}", "Rationale": r.why}
                for kind, r in aspects.items()
            },
            "critique": self.ratings[OVERALL].why,
            "overall_score": self.score,
            "fine-grained_score": fmean(numbers) if numbers else None,
        }

    def failed(self) -> dict:
        """Return what is kept apart of a completion that is missing."""
        whose = {"instruction": self.prompt.text, "model": self.model, "why": self.missing()}
        if not isinstance(self.answer, Answer):
            return whose | {"error": self.answer.why}
        unrated = {kind: r._asdict() for kind, r in self.ratings.items() if isinstance(r, Unrated)}
        return whose | {"response": self.answer.text, "judge": unrated}


def draw(
    prompts: Sequence[Prompt], models: Sequence[str], principles: Mapping, count: int, seed: int
) -> Iterator[list[Completion]]:
    """Yield for each prompt `count` completions to be asked for, of different models while there
    are any. What is drawn for a prompt depends neither on the others nor on any order."""
    texts = sorted((name, text) for name in principles for text in principles[name]) or [("", "")]

    def number(*key: object) -> int:
        return int.from_bytes(sha256(repr((seed, *key)).encode()).digest())

    for prompt in prompts:
        row, name = [], sha256(prompt.text.encode()).hexdigest()
        for turn in range(-(-count // len(models))):
            for model in sorted(models, key=lambda model: number(name, turn, model)):
                principle, system = texts[number(name, turn, model, "text") % len(texts)]
                row.append(Completion(prompt, model, turn, principle, system))
        yield row[:count]


def usable(row: Sequence[Completion]) -> list[Completion]:
    """Return the completions of a prompt that are rated; none if that leaves fewer than two."""
    rated = [c for c in row if not c.missing()]
    return rated if len(rated) > 1 else []


def raw_row(row: Sequence[Completion]) -> dict:
    """Return a prompt and its usable completions in UltraFeedback's raw schema."""
    completions = [c.row() for c in usable(row)]
    return {
        "source": row[0].prompt.source,
        "instruction": row[0].prompt.text,
        "models": [c["model"] for c in completions],
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }
