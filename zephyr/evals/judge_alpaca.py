"""AlpacaEval's protocol: which of two outputs is better, the model's or a baseline's.

The judge answers with one letter, m for the output that it is shown first and M for the other. If
it gives log-probs, the preference is weighted by them, as AlpacaEval 2 has it:

    2 - P(m) / (P(m) + P(M))      1: the first is better, 2: the second is

else it is what the letter says, 1 or 2. It is asked in both orders, and the preference is the mean
of the two; or with `--order alpaca` in the one that AlpacaEval's coin gives, as its leaderboard is.
Requests and parser are those of alpaca_eval at cd543a1 (weighted_alpaca_eval_gpt4_turbo).
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from zephyr.client.exchange import Answer
from zephyr.data.readers import read_rows
from zephyr.endpoint import Failure, Request
from zephyr.evals import alpaca_prompt, length_control
from zephyr.evals.alpaca import ORDERS, model_is_first
from zephyr.evals.asking import Judge
from zephyr.files import atomic, home, plain, shown

NEW = 256  # tokens of a verdict by text, at most; one by log-probs is a single token
WRITTEN, ENDS, COLUMNS = "annotations", (".json",), ("instruction", "preference")
BY_TOKEN = {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
PROBES = 3  # requests at most that show if a judge gives log-probs, before all are asked


def read_outputs(path: str) -> tuple[str, dict[str, dict]]:
    """Return the model of a file of AlpacaEval's outputs, and its rows by their instructions. An
    empty output is one: without it a model that says nothing would have a better win rate."""
    model, found = "", {}
    for where, row in read_rows(Path(path)):
        if "choices" in row and "question_id" in row:
            raise ValueError(f"{where} is an answer to MT-Bench; ask with: judge mt-bench")
        texts = [row.get(name) for name in ("instruction", "output", "generator")]
        if not all(isinstance(text, str) for text in texts) or not texts[2]:
            raise ValueError(
                f"{where} is no output, with instruction, output and generator: {shown(row, 60)}"
            )
        instruction, output, name = texts
        if instruction in found:
            raise ValueError(
                f"{where}: {shown(instruction, 50)} is answered before; delete one of the two"
            )
        if name != (model := model or name):
            raise ValueError(
                f"{where}: it is {shown(name)}'s output in a file of {shown(model)}'s; split "
                "the file"
            )
        found[instruction] = row
    return model, found


def by_token(answer: Answer) -> float | None:
    """Return the preference, from 1 (first) to 2 (second), that the log-probs of an answer's first
    token give; None if neither letter is among them."""
    try:
        top = answer.logprobs[0]["top_logprobs"]
        found = {t["token"]: float(t["logprob"]) for t in top if t["token"] in ("m", "M")}
    except (TypeError, LookupError, ValueError):
        return None
    first, second = (found.get(letter, -math.inf) for letter in "mM")
    most = max(first, second)
    if not math.isfinite(most):
        return None
    first, second = math.exp(first - most), math.exp(second - most)
    preference = 2 - first / (first + second)
    return None if math.isnan(preference) else preference


def by_text(text: str) -> float | None:
    """Return the preference, 1 (first) or 2 (second), that an answer's last line names; None if it
    is neither letter."""
    letter = text.strip().rpartition("\n")[2].strip(" \t\r.*`\"'")
    return {"m": 1.0, "M": 2.0}.get(letter)


def has_logprobs(judge: Judge, messages: Sequence[list[dict]]) -> bool:
    """Return True if the judge's log-probs tell its preference, by one to PROBES of its answers.
    Raises ValueError if no answer comes: to ask for text instead would be another evaluation."""
    answer = None
    for asked in messages[:PROBES]:
        answer = judge.ask([Request(asked, BY_TOKEN)])[0]
        if isinstance(answer, Answer):
            if by_token(answer) is not None:
                return True
            if not answer.logprobs:
                return False
    if isinstance(answer, Failure):
        raise ValueError(f"{plain(judge.name)}: no request is answered, the last: {answer.why}")
    return False


def ask(
    judge: Judge, messages: Sequence[list[dict]], tokens: int
) -> tuple[list[Answer | Failure], list[float | None], str]:
    """Return the judge's answers, the preference in each from 1 (first) to 2 (second), and how it
    was read."""
    if has_logprobs(judge, messages):
        answers = judge.until(lambda text: True, [Request(m, BY_TOKEN) for m in messages])
        seen = [by_token(a) if isinstance(a, Answer) else None for a in answers]
        return answers, seen, "by the log-probs of its first token"
    parameters = {"temperature": 0, "max_tokens": tokens}
    requests = [Request(m, parameters) for m in messages]
    answers = judge.until(lambda text: by_text(text) is not None, requests)
    seen = [by_text(a.text) if isinstance(a, Answer) else None for a in answers]
    return answers, seen, "by its text, as it told no log-probs of m and M"


def completion(answer: Answer | Failure | None) -> dict | None:
    """Return an answer as alpaca_eval stores it, so that its parsers read it."""
    if not isinstance(answer, Answer):
        return None
    return {
        "finish_reason": answer.finish_reason,
        "index": 0,
        "logprobs": answer.logprobs and {"content": answer.logprobs},
        "message": {"content": answer.text, "role": "assistant"},
        "text": answer.text,
        "total_tokens": answer.usage.get("total_tokens"),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("outputs", metavar="OUTPUTS", help="a model's outputs, as AlpacaEval has them")
    add("--against", required=True, metavar="FILE", help="the baseline's outputs")
    add("--prompt", metavar="FILE", help="alpaca_eval's alpaca_eval_clf.txt [a prompt of our own]")
    add("--order", choices=("both", "alpaca"), default="both", help="or AlpacaEval's one [both]")
    add("--alpaca-data", metavar="DIR", help="for the length-controlled win rate, as in `show`")


def run(args: argparse.Namespace, judge: Judge, out: str) -> list[str]:
    """Have a model's outputs compared with a baseline's, write the annotations to `out`, and return
    what the page has to say besides the figures."""
    files = home(args.against), home(args.outputs)
    (baseline, theirs), (model, ours) = map(read_outputs, files)
    if model == baseline:
        raise ValueError(f"{files[1]}: both files are of {shown(model)}; change a generator")
    if args.alpaca_data:
        length_control.read(args.alpaca_data)  # what is wrong with it, before the judge is paid
    if odd := [text for text in {**theirs, **ours} if (text in theirs) != (text in ours)]:
        raise ValueError(
            f"{len(odd)} instructions stand in one of {' and '.join(files)} alone, the first is "
            f"{shown(odd[0], 60)}; a win rate over the others would be another figure; have them "
            "answered, or delete their rows"
        )
    prompt, blocks = alpaca_prompt.read(args.prompt and home(args.prompt))
    games = []  # an instruction, and if the model's output is shown first
    for text in theirs:
        if ours[text]["output"] != theirs[text]["output"]:
            orders = (True, False) if args.order == "both" else (model_is_first(text),)
            games += [(text, first) for first in orders]
    messages = []
    for text, first in games:
        outputs = [side[text]["output"] for side in ((ours, theirs) if first else (theirs, ours))]
        messages.append(alpaca_prompt.fill(blocks, text, *outputs))
    answers, seen, how = ask(judge, messages, args.max_new or NEW)
    found = dict(zip(games, zip(answers, seen, strict=True), strict=True))
    rows = []
    for text, row in theirs.items():
        about = {"instruction": text, "output_1": row["output"], "generator_1": baseline}
        about |= {name: row[name] for name in ("dataset",) if name in row}
        about |= {"output_2": ours[text]["output"], "generator_2": model}
        about |= {"annotator": judge.name, "prompt": prompt}
        rows.append(about | annotation(judge, text, found, args.order == "both"))
    with atomic(out) as file:
        file.write(json.dumps(rows, indent=2, ensure_ascii=False).encode())
    notes = [f"the judge was read {how}; its prompt was {prompt}"]
    both = [*ours.values(), *theirs.values()]
    if empty := [row["instruction"] for row in both if not row["output"].strip()]:
        notes.append(
            f"{len(empty)} outputs are empty, the first to {shown(empty[0], 50)}; the judge saw "
            "them as they are"
        )
    return notes


def annotation(judge: Judge, text: str, found: dict, both: bool) -> dict:
    """Return what the judge said of one instruction, on AlpacaEval's scale: 1 if the baseline is
    better, 2 if the model is. `found` has the answer and the preference of each game played.

    The preference is the mean of the games', and null if one has none, as the other alone would
    count the judge's habit of slot. Two equal outputs are a draw that no judge was asked about.
    """
    games = [game for game in ((text, True), (text, False)) if game in found]
    seen = {first: found[text, first][1] for text, first in games}
    # the first one shown is the model's: 1 says that it is better, which is 2 on the file's scale
    seen = {first: 3 - p if first and p is not None else p for first, p in seen.items()}
    preferences = list(seen.values()) or [1.5]
    row = {"preference": None if None in preferences else sum(preferences) / len(preferences)}
    if both:
        row |= {name: seen.get(first) for name, first in zip(ORDERS, (True, False), strict=True)}
    answers = {first: found[text, first][0] for text, first in games}
    prices = [judge.price(answer) for answer in answers.values()]
    row["price_per_example"] = None if None in prices else sum(prices)
    row["time_per_example"] = None  # an answer may come from the file of an earlier run
    # alpaca_eval has one, in the order of its coin
    coin = model_is_first(text)
    row["raw_completion"] = completion(answers.get(coin))
    if both:
        row["raw_completion_exchanged"] = completion(answers.get(not coin))
    return row
