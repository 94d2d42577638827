"""Draw the figures of the pages from the objects of the code:   python docs/figures.py [--check]

Each function below returns the SVG text of docs/figures/<its name>.svg.
"""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # wherever it is started from, and by whom

import include  # noqa: E402
from svg import Chart, Drawing  # noqa: E402

from zephyr import feedback, generate, losses  # noqa: E402
from zephyr.architecture import MistralConfig  # noqa: E402
from zephyr.attention import visible  # noqa: E402
from zephyr.model import Mistral  # noqa: E402
from zephyr.packing import Pair, pack_pairs  # noqa: E402
from zephyr.plan import costs  # noqa: E402
from zephyr.plan.__main__ import MODELS  # noqa: E402
from zephyr.toy import birds, village  # noqa: E402

MISTRAL = MODELS["mistral-7b"]
SMALL = dict(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=4,
)
# the lines of the README that the demo printed, up to the first question's two answers
DEMO_OUTPUT = "README.md: held-out preference accuracy ... dpo"

FIGURES: dict[str, Callable[[], str]] = {}


def figure(draw: Callable[[], str]) -> Callable[[], str]:
    FIGURES[draw.__name__.replace("_", "-")] = draw
    return draw


@figure
def objectives() -> str:
    """What each objective makes of a pair's margin."""
    drawing = Drawing(640, 400, "The loss of a pair against its margin, for each objective")
    chart = Chart(
        drawing, (52, 34, 568, 310), (-5, 5), (0, 5), "margin βh", "loss of the pair, nats"
    )
    margin = torch.linspace(-5, 5, 201)
    for name, smoothing, colour, label, at, dy, anchor in (
        ("dpo", 0.0, "blue", "DPO", 14, 16, "start"),
        ("dpo", 0.2, "green", "cDPO, ε = 0.2", -1, -8, "end"),
        ("hinge", 0.0, "orange", "hinge", 22, -6, "start"),
    ):
        loss = losses.OBJECTIVES[name](margin, 1.0, smoothing)
        chart.curve(margin.tolist(), loss.tolist(), colour, label, False, at, dy, anchor)
    x, y = chart.at(0, float(np.log(2)))
    drawing.dot(x, y, "ink", 4)
    drawing.words(x + 8, y - 8, "ln 2 = 0.693: where every run starts", 13)
    return drawing.text()


def boxed(drawing, top, title, lines, fill) -> float:
    """Draw a titled box of lines, each (text, colour); returns where it ends."""
    left, width, step = 34, drawing.width - 50, 20
    height = 12 + step * (len(lines) + 1)
    drawing.rect(left, top, width, height, fill, radius=6)
    drawing.words(left + 12, top + 22, title, 14, bold=True)
    for k, (text, colour) in enumerate(lines):
        drawing.words(left + 12, top + 22 + step * (k + 1), text, 14, fill=colour)
    return top + height


def wrapped(head: str, text: str, colour: str, width: int = 47) -> list[tuple[str, str]]:
    """Return a text as lines of a box, those after the first one indented."""
    indent = "\u2003" * 2
    return [(x, colour) for x in wrap(head + text, width, subsequent_indent=indent)]


def demo_answers() -> tuple[str, tuple[str, str], tuple[str, str]]:
    """Return a held-out question, and (score, answer) of the SFT and of the chat model, as the demo
    printed them."""
    prompt, *said = include.code(DEMO_OUTPUT).splitlines()[-3:]
    sft, dpo = (tuple(line.split(maxsplit=2)[1:]) for line in said)
    return prompt, sft, dpo


def conversations(kind: str) -> list[list[str]]:
    """Return the worst and the best of the first ten conversations about a kind of question."""
    alike = (
        [message["content"] for message in talk["messages"][:2]]
        for talk in birds.rows(birds.FOLDER / "ultrachat.train.jsonl.gz")
        if village.question(talk["prompt"]).kind == kind
    )
    first = sorted(islice(alike, 10), key=lambda talk: village.judge(*talk).score)
    return [first[0], first[-1]]


@figure
def recipe() -> str:
    """One question of the village through all stages: the file's lines, and the demo's answers."""
    prompt, sft, dpo = demo_answers()
    rows = birds.rows(birds.ensure() / "ultrafeedback.test.jsonl.gz")
    row = next(row for row in rows if row["instruction"] == prompt)
    (pair,) = feedback.binarize([("the row", row)])
    chosen, rejected = (pair[side][-1]["content"] for side in ("chosen", "rejected"))

    drawing = Drawing(480, 700, "The recipe: one question of the village through all stages")
    end = 0.0

    def stage(label: str) -> float:
        nonlocal end
        drawing.line(70, end + 4, 70, end + 34, arrow=True)
        drawing.words(84, end + 24, label, 14, fill="blue", bold=True)
        end += 38
        return end

    lines = [
        line
        for asked, answer in conversations(village.question(prompt).kind)
        for line in [*wrapped("user: ", asked, "soft"), *wrapped("bird: ", answer, "ink")]
    ]
    end = boxed(drawing, 12, "Conversations with teachers, good ones and bad", lines, "pale grey")
    top = stage("dSFT: imitate them, token by token")
    lines = [*wrapped("asked: ", prompt, "ink"), *wrapped("says: ", sft[1], "ink")]
    end = boxed(drawing, top, f"SFT model (the judge gives {sft[0]})", lines, "pale blue")
    reference = top + 20
    end += 14
    lines = []
    for c in row["completions"]:
        text = c["response"]
        colour = {chosen: "green", rejected: "red"}.get(text, "soft")
        lines += wrapped(f"{c['overall_score']:.1f}  ", text, colour)
    end = boxed(drawing, end, "Four answers to the question, scored", lines, "pale grey")
    top = stage("AI feedback: the best, and one of the others")
    lines = [*wrapped("chosen: ", chosen, "green"), *wrapped("rejected: ", rejected, "red")]
    end = boxed(drawing, top, "A pair", lines, "pale grey")
    top = stage("dDPO: prefer the chosen one")
    lines = wrapped("says: ", dpo[1], "ink")
    end = boxed(drawing, top, f"Chat model (the judge gives {dpo[0]})", lines, "pale blue")
    drawing.path([(34, reference), (16, reference), (16, top + 20), (32, top + 20)], "blue")
    drawing.line(24, top + 20, 33, top + 20, "blue", arrow=True)
    drawing.height = end + 14
    return drawing.text()


@figure
def visibility() -> str:
    """Which tokens of a packed pair see which."""
    batch = pack_pairs([Pair(*map(np.array, ([0, 1, 2], [3, 4], [5, 6, 7])))], [0])
    names, layout = "abcpqxyz", batch.layout
    drawing = Drawing(480, 356, "The six queries of a packed pair and the nine keys they see")
    cell, gap, left, top = 34, 12, 104, 84
    ends_q, ends_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    keys = [names[batch.tokens_T[place]] for place in layout.kv_rows_G]
    for k, words in enumerate(("prompt, chosen", "prompt, rejected")):
        x = left + cell * ends_k[k] + gap * k
        drawing.words(x, 44, words, 14, fill=("blue", "orange")[k])
    drawing.words(left, 22, "the keys, gathered: the prompt's are there twice", 14)
    for column, name in enumerate(keys):
        x = left + cell * column + gap * (column >= ends_k[1])
        drawing.words(x + cell / 2, top - 10, name, 16, "middle", mono=True, bold=True)
    drawing.words(left - 46, top - 10, "position", 13, "middle", "soft")
    for segment, (start, end) in enumerate(zip(ends_q, ends_q[1:], strict=False)):
        first, last = ends_k[segment], ends_k[segment + 1]
        for row in range(start, end):
            y = top + cell * row + gap * segment
            drawing.words(left - 12, y + 23, names[batch.tokens_T[row]], 16, "end", mono=True)
            drawing.words(left - 46, y + 23, int(layout.position_T[row]), 14, "middle", "soft")
            for column in range(len(keys)):
                x = left + cell * column + gap * (column >= ends_k[1])
                # masks are aligned at the bottom right: the last query sees the last key
                seen = first <= column <= last - end + row
                ours = ("pale blue", "pale orange")[segment]
                drawing.rect(x + 1, y + 1, cell - 2, cell - 2, ours if seen else "pale grey")
                if seen:
                    drawing.dot(x + cell / 2, y + cell / 2, ("blue", "orange")[segment], 4)
    y = top + cell * ends_q[-1] + gap + 24
    for name, values in (
        ("cu_seqlens_q", ends_q),
        ("cu_seqlens_k", ends_k),
        ("kv_rows", layout.kv_rows_G.tolist()),
    ):
        drawing.words(left - 60, y, f"{name:13}{' '.join(map(str, values))}", 14, mono=True)
        y += 20
    drawing.height = y
    return drawing.text()


@figure
def window() -> str:
    """The keys that a window of 4 shows, and how far a stack of layers hears."""
    n, size, cell, left, top = 12, 4, 28, 100, 54
    drawing = Drawing(480, 600, "A window of 4 keys, and what three layers of it hear")
    i = torch.arange(n)
    seen = visible(i[:, None], i, size)
    drawing.words(left, 24, f"W = {size}: a row is a query, a column a key", 14)
    for k in range(n):
        drawing.words(left + cell * (k + 0.5), top - 8, k, 13, "middle", "soft")
        drawing.words(left - 10, top + cell * k + 19, k, 13, "end", "soft")
        drawing.words(
            left + cell * n + 8, top + cell * k + 19, f"{int(seen[k].sum())}", 13, "start", "blue"
        )
        for j in range(n):
            ours = "blue" if k == j else "pale blue" if seen[k, j] else "pale grey"
            drawing.rect(left + cell * j + 1, top + cell * k + 1, cell - 2, cell - 2, ours)
    drawing.words(left + cell * n + 8, top - 8, "keys", 13, "start", "blue")
    top += cell * n + 50
    drawing.words(left, top - 16, "what has reached the last token", 14)
    heard = torch.zeros(n, dtype=torch.bool)
    heard[-1] = True
    for layer in range(4):
        y = top + 32 * layer
        drawing.words(left - 10, y + 19, f"{layer} layers" if layer != 1 else "1 layer", 13, "end")
        for j in range(n):
            fill = "pale orange" if heard[j] else "pale grey"
            drawing.rect(left + cell * j + 1, y + 1, cell - 2, cell - 2, fill)
        drawing.words(left + cell * n + 8, y + 19, int(heard.sum()), 13, "start", "orange")
        heard = (seen & heard[:, None]).any(0)  # the keys of whoever had been heard
    drawing.height = top + 32 * 4 + 6
    return drawing.text()


@figure
def rolling_cache() -> str:
    """Which position each slot of a cache holds, while a sequence grows beyond the window."""
    model = Mistral(MistralConfig(**SMALL))
    with torch.inference_mode():
        cache, _ = generate.prefill(model, [[1, 2, 3, 4, 5, 6]], 6)
        slots, last = cache.slots, int(cache.position_T)
        held = dict(zip(cache.place_T.tolist(), range(last + 1 - slots, last + 1), strict=True))
        steps = [("prompt of 6", dict(held), set(held))]
        for _ in range(5):
            cache.advance()
            position, place = int(cache.position_T), int(cache.place_T)
            held[place] = position
            steps.append((f"position {position}", dict(held), {place}))
    drawing = Drawing(480, 330, "The slots of a rolling cache, step by step")
    left, top, wide, high = 130, 62, 60, 34
    drawing.words(left, 24, f"the position that each of S = {slots} slots holds", 14)
    for slot in range(slots):
        drawing.words(left + wide * (slot + 0.5), top - 10, f"slot {slot}", 13, "middle", "soft")
    for k, (name, now, written) in enumerate(steps):
        y = top + (high + 6) * k
        drawing.words(left - 12, y + 22, name, 14, "end")
        for slot in range(slots):
            fill = "pale orange" if slot in written else "pale grey"
            drawing.rect(left + wide * slot + 2, y, wide - 4, high, fill)
            bold = slot in written
            drawing.words(left + wide * (slot + 0.5), y + 22, now[slot], 15, "middle", bold=bold)
        told = f"seen: {min(now.values())} to {max(now.values())}"
        drawing.words(left + wide * slots + 6, y + 22, told, 13, "start", "soft")
    drawing.height = top + (high + 6) * len(steps) + 10
    return drawing.text()


@figure
def reference() -> str:
    """What the reference costs a pair, over epochs, in FLOPs."""
    pair = costs.pair(170, 320, 290, MISTRAL.sliding_window)
    once = sum(costs.forward(MISTRAL, pair).values()) / 1e12
    drawing = Drawing(480, 330, "The cost of the reference, cached and live")
    chart = Chart(
        drawing,
        (50, 46, 400, 226),
        (0, 4),
        (0, 50),
        "epochs",
        "TFLOP for the reference of one pair, Mistral-7B",
        x_ticks=range(5),
    )
    for name, colour, spent in (
        ("live: a forward in every step", "orange", [once * k for k in range(5)]),
        ("cached: one pass before step 0", "blue", [once] * 5),
    ):
        chart.curve(range(5), spent, colour, name, dy=-14)
        for k, x in enumerate(spent):
            chart.dot(k, x, colour, 4)
    return drawing.text()


def main(check: bool) -> int:
    """Write the figures, or count those that are not what they would be."""
    folder, stale = ROOT / "docs" / "figures", 0
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        path, text = folder / f"{name}.svg", draw()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"docs/figures/{path.name}: {'stale: make docs' if check else 'written'}")
            if not check:
                path.write_text(text, encoding="utf-8")
    return stale * check


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
