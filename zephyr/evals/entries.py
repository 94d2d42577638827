"""A judge's files question by question, for the page to click through: what was asked, what the
models answered, what the judge said, and the tags by which the page finds it.

A prompt to MT-Bench's judge that `mt_bench_prompts.conversation` cannot take apart is shown as it
is.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from zephyr.evals import alpaca, mt_bench
from zephyr.evals.mt_bench_prompts import conversation
from zephyr.evals.page import is_alpaca, runs, span
from zephyr.files import shown

Rows = Sequence[tuple[str, dict]]
VERDICTS = ("win", "loss", "tie", "no verdict", "orders disagree")
WIN, LOSS, TIE, NONE, DISAGREE = VERDICTS
BY = "longer by {}"


@dataclass
class Entry:
    """One question, or one turn of it, with what was answered and judged.

    An answer has the model's `name`, the `texts` of its turns, or where they cannot be told the
    judge's `prompt`, and what was `judged` of it alone. A judgment has a `verdict`, `how` it came
    about, and the judge's `words`. The tags of a filter each have a rank among its options.
    """

    label: str
    questions: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)
    judged: list[dict] = field(default_factory=list)
    category: dict[str, int] = field(default_factory=dict)
    verdict: dict[str, float] = field(default_factory=dict)
    length: dict[str, int] = field(default_factory=dict)
    run: dict[str, int] = field(default_factory=dict)

    def compare(self, one: str, other: str, by: float) -> None:
        """Tag which model's answer is longer, `by` being how many characters the first is."""
        if math.isfinite(by):
            longer = f"{one if by > 0 else other}: the longer answer"
            self.length[longer if by else "equally long"] = 0

    def place(
        self, named: dict[str, dict], name: str, quarters: list[dict], length: float, how: str
    ) -> None:
        """Tag the quarter of the lengths, with the bounds that the page's table names."""
        before = 4 * list(named).index(name)
        for k, quarter in enumerate(quarters, 1):
            if quarter["shortest"] <= length <= quarter["longest"]:
                tag = how.format(span(quarter))
                self.length[f"{name}: {tag}" if len(named) > 1 else tag] = before + k


def answer(name: str, texts: list[str], prompt: object = None) -> dict:
    """Return a model's answer; the prompt is what is shown if it has no texts."""
    prompt = "" if texts or not isinstance(prompt, str) else prompt
    return {"name": name, "texts": texts, "prompt": prompt, "judged": []}


def judgment(verdict: str, how: str, words: object) -> dict:
    if isinstance(words, dict) and isinstance(words.get("message"), dict):
        words = words["message"].get("content")  # as OpenAI's API returns it
    if words is not None and not isinstance(words, str):
        try:
            words = json.dumps(words)
        except RecursionError:
            words = shown(words, 1000)
    return {"verdict": verdict, "how": how, "words": words or ""}


def read(files: dict[str, Rows], figures: dict, category: dict[int, str]) -> list[Entry]:
    """Return the entries of the rows that `show` has read, given the figures that it has made of
    them and the category of each of MT-Bench's questions."""
    named = runs(figures)
    if is_alpaca(named):
        return [entry for path, rows in files.items() for entry in _alpaca(path, rows, named)]
    return _mt_bench(files, named, category)


def name_in(named: dict[str, dict], model: str, judge: str) -> str:
    """Return the name under which a model is shown, with its judge's if it has several."""
    return model if model in named else f"{model} ({judge})"


def result(preference: float) -> str:
    """Return what a preference, from 1 to 2, is for the model."""
    if math.isnan(preference):
        return NONE
    return TIE if preference == 1.5 else WIN if preference > 1.5 else LOSS


def _alpaca(path: str, rows: Rows, named: dict[str, dict]) -> Iterator[Entry]:
    a = alpaca.read(path, rows)
    name = name_in(named, a.model, a.judge)
    for k, (instruction, output_1, output_2) in enumerate(a.key_N):
        row, preference, orders = rows[k][1], a.preference_N[k], a.orders_N2[k]
        entry = Entry(str(k + 1), [instruction], run={name: list(named).index(name)})
        entry.answers = [answer(a.model, [output_2]), answer(a.baseline, [output_1])]
        if isinstance(row.get("dataset"), str):
            entry.category[row["dataset"]] = 0
        for verdict in (result(preference), *[DISAGREE] * _disagree(orders)):
            entry.verdict[verdict] = VERDICTS.index(verdict)
        by = len(output_2) - len(output_1)
        entry.compare(a.model, a.baseline, by)
        if output_1 == output_2:
            said = [("the two answers are equal, and no judge is asked", preference, None)]
        elif np.isnan(orders).all():
            slot = "first" if alpaca.model_is_first(instruction) else "second"
            how = f"{a.model} shown {slot}, by AlpacaEval's rule"
            said = [(how, preference, row.get("raw_completion"))]
        else:
            words = [row.get("raw_completion_exchanged"), row.get("raw_completion")]
            words = words[:: -1 if alpaca.model_is_first(instruction) else 1]
            slots = zip(("first", "second"), orders, words, strict=True)
            said = [(f"{a.model} shown {slot}", p, said) for slot, p, said in slots]
        if output_1 != output_2 and not all(math.isnan(p) for _, p, _ in said):
            entry.place(named, name, named[name]["length_quarters"], by, BY)
        for how, p, words in said:
            verdict = result(p) if math.isnan(p) else f"{result(p)}, preference {p:.2f}"
            entry.judged.append(judgment(verdict, how, words))
        yield entry


def _disagree(orders: np.ndarray) -> bool:
    """Whether the judge named another answer, or a tie, when it saw the two in the other order."""
    return not np.isnan(orders).any() and len(set(map(result, orders))) > 1


def _mt_bench(
    files: dict[str, Rows], named: dict[str, dict], category: dict[int, str]
) -> list[Entry]:
    known = list(dict.fromkeys(category.values()))
    scored: dict[tuple[int, int], Entry] = {}
    played: list[tuple[tuple[int, int], Entry]] = []
    for rows in files.values():
        for (_, row), judged in zip(rows, mt_bench.read(rows), strict=True):
            place = judged.question, judged.turn
            entry = Entry(f"question {judged.question}, turn {judged.turn}")
            if name := category.get(judged.question):
                entry.category[name] = known.index(name)
            if isinstance(judged, mt_bench.Games):
                played.append((place, entry))
                _games(entry, row, judged, named)
            else:
                _score(scored.setdefault(place, entry), row, judged, named)
    for entry in scored.values():
        if len(entry.answers) == 2 and all(given["texts"] for given in entry.answers):
            one, other = entry.answers
            by = len(one["texts"][-1]) - len(other["texts"][-1])
            entry.compare(one["name"], other["name"], by)
    both = [*scored.items(), *played]
    return [entry for _, entry in sorted(both, key=lambda item: item[0])]


def _asked(entry: Entry, prompt: object) -> dict[str, list[str]]:
    """Set what a prompt asks, and return the answers in it."""
    held = conversation(prompt)
    if held and not entry.questions:
        entry.questions, entry.references = held.questions, held.references
    return held.answers if held else {}


def _score(entry: Entry, row: dict, j: mt_bench.Judgment, named: dict[str, dict]) -> None:
    prompt, name = row.get("user_prompt"), name_in(named, j.model, j.judge)
    texts = _asked(entry, prompt).get("a", [])
    given = answer(j.model, texts, prompt)
    for before in entry.answers:  # which may be judged again
        if given == before | {"judged": []}:
            given = before
            break
    else:
        entry.answers.append(given)
    failed = j.score == mt_bench.FAILED
    verdict = NONE if failed else f"score {j.score:g}"
    given["judged"].append(judgment(verdict, f"by {j.judge}", j.text))
    entry.verdict[verdict] = VERDICTS.index(NONE) if failed else -j.score
    entry.run[name] = list(named).index(name)
    if not failed:
        entry.place(named, name, named[name]["length_quarters"], j.length, "{} characters")


def _games(entry: Entry, row: dict, g: mt_bench.Games, named: dict[str, dict]) -> None:
    prompt = row.get("g1_user_prompt")
    answers = _asked(entry, prompt)
    for model, assistant in zip(g.models, "ab", strict=True):
        if answers or assistant == "a":
            texts = answers.get(assistant, [])
            entry.answers.append(answer(model if answers else "both", texts, prompt))
    names = [name_in(named, model, g.judge) for model in g.models]
    entry.run |= {name: list(named).index(name) for name in names}
    for k, (model, winner) in enumerate(zip(g.models, g.winners, strict=True), 1):
        won = {"tie": TIE, "error": NONE}.get(winner)
        won = won or f"{g.models[winner == 'model_2']} wins"
        how = f"{model} shown first, by {g.judge}"
        entry.judged.append(judgment(won, how, row.get(f"g{k}_judgment")))
    if "error" in g.winners:
        entry.verdict[NONE] = VERDICTS.index(NONE)
    else:
        side = mt_bench.outcome(g)
        entry.verdict[TIE if side < 0 else f"{g.models[side]} wins"] = 2 if side < 0 else side
        if g.winners[0] != g.winners[1]:
            entry.verdict[DISAGREE] = VERDICTS.index(DISAGREE)
    entry.compare(*g.models, g.longer)
    if g.winners != ("error", "error"):
        quarters = named[names[0]]["pairs"]["length_quarters"]
        entry.place(named, names[0], quarters, g.longer, BY)
