"""Draw the figures of the pages from the objects of the code:   python docs/figures.py [--check]

Each function below returns the SVG text of docs/figures/<its name>.svg.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # wherever it is started from, and by whom

import include  # noqa: E402
from svg import Chart, Drawing  # noqa: E402

import kernels  # noqa: E402
from kernels import fused_logprob  # noqa: E402
from zephyr import feedback, generate, losses, optim  # noqa: E402
from zephyr.architecture import MistralConfig  # noqa: E402
from zephyr.attention import visible  # noqa: E402
from zephyr.evals import alpaca, belief  # noqa: E402
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
DEMO_OUTPUT = "README.md: judge's mean score ... dpo"

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
    prompt, *said = (line.strip() for line in include.code(DEMO_OUTPUT).splitlines()[-3:])
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
    rows = birds.rows(birds.ensure() / "ultrafeedback.held_out.jsonl.gz")
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


def mib(*shape: int, itemsize: int) -> str:
    """Return the size of a tensor in words."""
    size = float(np.prod(shape)) * itemsize
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"


def box(drawing, x, y, width, height, fill, *lines: str, radius=6) -> None:
    """Draw a box with lines of words in its middle, the first of them bold."""
    drawing.rect(x, y, width, height, fill, "grid", radius)
    top = y + height / 2 - 9 * len(lines) + 14
    for k, line in enumerate(lines):
        drawing.words(x + width / 2, top + 18 * k, line, 14, "middle", bold=k == 0)


def arrows(drawing, *ends: tuple[float, float, float, float]) -> None:
    for x1, y1, x2, y2 in ends:
        drawing.line(x1, y1, x2, y2, arrow=True)


@figure
def head() -> str:
    """What the head computes, and how much memory each tensor takes."""
    shape, N, bf16, fp32 = MODELS["mistral-7b"], 8192, 2, 4
    D, V, C = shape.hidden_size, shape.vocab_size, fused_logprob.ROWS["cuda"]
    assert fused_logprob.keeps(N, V, torch.bfloat16, 2**31), "else G is no box of its own"
    drawing = Drawing(640, 470, "The log-prob head: one matmul forward, two backward")
    hidden, weight = mib(N, D, itemsize=bf16), mib(V, D, itemsize=bf16)
    drawing.words(16, 28, "forward, a chunk of C tokens at a time", 14, bold=True)
    box(drawing, 16, 48, 104, 52, "pale blue", "h [N, D]", hidden)
    box(drawing, 16, 120, 104, 52, "pale blue", "w [V, D]", weight)
    box(drawing, 150, 84, 84, 52, "pale grey", "h wᵀ", "matmul 1", radius=24)
    logits = "z [C, V], fp32", mib(C, V, itemsize=fp32), "used again"
    box(drawing, 264, 74, 124, 72, "pale orange", *logits)
    box(drawing, 418, 84, 84, 52, "pale grey", "row step", "one read", radius=24)
    box(drawing, 522, 40, 108, 52, "pale blue", "logprob [N]", mib(N, itemsize=fp32))
    box(drawing, 524, 128, 104, 52, "pale orange", "G [N, V]", mib(N, V, itemsize=bf16))
    arrows(drawing, (120, 78, 150, 98), (120, 142, 150, 122), (234, 110, 264, 110))
    arrows(drawing, (388, 110, 418, 110), (496, 92, 524, 74), (496, 128, 524, 146))
    drawing.line(16, 208, 624, 208, "grid", 1, dashed=True)
    drawing.words(16, 238, "backward, when c = ∂loss/∂logprob is known", 14, bold=True)
    box(drawing, 524, 303, 104, 52, "pale orange", "G [N, V]", "as it is")
    box(drawing, 330, 262, 130, 52, "pale grey", "-c ∘ (G w)", "matmul 2", radius=24)
    box(drawing, 330, 344, 130, 52, "pale grey", "Gᵀ (-c ∘ h)", "matmul 3", radius=24)
    box(drawing, 180, 262, 104, 52, "pale blue", "dh [N, D]", hidden)
    box(drawing, 180, 344, 104, 52, "pale blue", "dw [V, D]", weight)
    box(drawing, 16, 303, 104, 52, "pale blue", "c [N]", mib(N, itemsize=fp32))
    drawing.line(576, 180, 576, 303, dashed=True, arrow=True)
    arrows(drawing, (524, 320, 460, 295), (524, 338, 460, 363))
    arrows(drawing, (330, 288, 284, 288), (330, 370, 284, 370))
    drawing.line(120, 329, 310, 329, "soft", dashed=True)
    for y in (308, 350):
        drawing.line(310, 329, 340, y, "soft", dashed=True)
    sizes = f"Mistral's D {D:,} and V {V:,}; N {N:,} tokens predict; C {C:,}"
    drawing.words(320, 432, sizes, 14, "middle", "soft")
    whole = f"all logits in fp32: {mib(N, V, itemsize=fp32)}, and autograd keeps three such tensors"
    drawing.words(320, 454, whole, 14, "middle", "soft")
    return drawing.text()


@figure
def narrow_logits() -> str:
    """What logits of fewer bits do to the log-probs of whole responses."""
    rng, V, D, responses, length = np.random.default_rng(0), 32000, 32, 6, 200
    # of bf16 numbers, whose products and sums float64 has exactly; the logits' spread is 4
    w_VD = torch.from_numpy(rng.standard_normal((V, D))).bfloat16().double()
    h_ND = torch.from_numpy(rng.standard_normal((responses * length, D)) * 4 / np.sqrt(D))
    z_NV = h_ND.bfloat16().double() @ w_VD.T
    # each target is drawn from the model's own distribution
    dice_N1 = torch.from_numpy(rng.random((len(z_NV), 1)))
    targets_N1 = torch.searchsorted(z_NV.softmax(1).cumsum_(1), dice_N1).clamp_(max=V - 1)

    def logprob(z_NV: torch.Tensor) -> torch.Tensor:
        return (z_NV.gather(1, targets_N1).squeeze(1) - z_NV.logsumexp(1)).view(responses, length)

    drawing = Drawing(640, 400, "The error of a response's log-prob, by the number of its tokens")
    box = (58, 34, 562, 310)
    chart = Chart(drawing, box, (0, length), (-1, 1), "tokens of the response", "error, nats")
    true = logprob(z_NV)
    for dtype, colour, label in (
        (torch.bfloat16, "orange", "logits in bf16"),
        (torch.float32, "blue", "logits in fp32"),
    ):
        error = (logprob(z_NV.to(dtype).double()) - true).cumsum(1)
        assert error.abs().max() < 1, "outside of the chart"
        for line in error.tolist():
            chart.curve(range(length + 1), [0.0, *line], colour)
        rms = f"{float((error.diff(dim=1) ** 2).mean().sqrt()):.0e}".replace("e-0", "e-")
        place = chart.at(4, 0.86 if colour == "orange" else 0.72)
        drawing.words(*place, f"{label}: {rms} nats a token", 14, fill=colour, bold=True)
    return drawing.text()


@cache
def sharded() -> list[dict]:
    """Return what docs/sharded.py saw, for one copy of the model and for two. It has a process of
    its own, as a process group is for a whole process."""
    command = [sys.executable, str(ROOT / "docs" / "sharded.py")]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


UNITS = {0: "pale blue", 1: "pale orange", 2: "pale green", "root": "pale grey"}


def slots(events: list[dict]) -> list[tuple[str, int, int | str]]:
    """Return (what, slot, unit) of each event. A slot is what one block computes in its forward or
    backward, or a gather that nothing hides. A gather ahead of its block hides behind the block
    that computes then, a scatter behind the next one."""
    passes = [(e["what"], e["unit"]) for e in events if e["what"] in ("forward", "backward")]
    found, slot, going_back = [], 0, False
    for what, unit in ((e["what"], e["unit"]) for e in events):
        # a forward is told of at its end, so that what it hides came before; a backward at its
        # beginning
        hidden = going_back or unit not in ("root", passes[0][1]) if what == "gather" else passes
        found.append((what, slot - (what == "gather" and going_back), unit))
        if what in ("forward", "backward"):
            passes.pop(0)
            going_back = what == "backward"
            slot += 1
        elif not hidden:
            slot += 1
    return found


@figure
def sharding() -> str:
    """When the weights and gradients of three blocks are gathered, used and scattered."""
    events = sharded()[0]["events"]
    assert all(e["freed"] for e in events if e["what"] == "forward"), "freed after its forward"
    drawing = Drawing(640, 352, "A forward and a backward of three blocks under FSDP2")
    left, cell, tops = 128, 46, {"gather": 62, "compute": 122, "scatter": 182}
    bits = {"bfloat16": "bf16", "float32": "fp32"}
    of_block = {e["what"]: e for e in events if e["unit"] == 0}
    sends = {
        what: f"{bits[e['dtype']]}, {e['bytes'] / 2**20:.0f} MiB"
        for what, e in of_block.items()
        if "bytes" in e
    }
    for lane, title, about in (
        ("gather", "gather weights", sends["gather"]),
        ("compute", "compute", "bf16, sums in fp32"),
        ("scatter", "scatter gradients", sends["scatter"]),
    ):
        drawing.words(12, tops[lane] + 16, title, 13, bold=True)
        drawing.words(12, tops[lane] + 33, about, 12, fill="soft")
    begun: dict[int | str, int] = {}
    for what, slot, unit in slots(events):
        lane = what if what in tops else "compute"
        x, name = left + cell * slot, "rest" if unit == "root" else str(unit)
        text = {"forward": f"{name} →", "backward": f"← {name}"}.get(what, name)
        drawing.rect(x + 1, tops[lane], cell - 2, 40, UNITS[unit], "grid", 4)
        drawing.words(x + cell / 2, tops[lane] + 25, text, 14, "middle")
        if what == "gather":
            begun[unit] = slot
        elif lane == "compute":
            width = cell * (slot + 1 - begun[unit]) - 2
            bar = left + cell * begun[unit] + 1, 242 + 15 * unit
            drawing.rect(*bar, width, 11, UNITS[unit], "grid", 3)
    drawing.words(left + cell * 3.5, 40, "forward →", 14, "middle", bold=True)
    drawing.words(left + cell * 7.5, 40, "← backward", 14, "middle", bold=True)
    drawing.words(12, 258, "whole in memory", 13, bold=True)
    drawing.words(12, 275, "bf16", 12, fill="soft")
    drawing.line(12, 302, 628, 302, "grid", 1)
    text = "on each of 8 ranks all the time: 1/8 of weights, gradients and moments, in fp32"
    drawing.words(320, 328, text, 14, "middle")
    return drawing.text()


@figure
def replicas() -> str:
    """Two copies of the model on eight ranks, and what goes which way."""
    mesh, events = sharded()[1]["mesh"], sharded()[1]["events"]
    size = {e["what"]: e["bytes"] / 2**20 for e in events if e["unit"] == 0 and "bytes" in e}
    drawing = Drawing(640, 264, "HSDP: two copies of the model, each sharded over four ranks")
    left, cell, tops = 132, 120, (44, 184)
    for row, (ranks, top) in enumerate(zip(mesh, tops, strict=True)):
        drawing.words(16, top + 26, f"copy {row}", 14, bold=True)
        drawing.words(16, top + 44, f"ranks {ranks[0]} to {ranks[-1]}", 13, fill="soft")
        for column, rank in enumerate(ranks):
            x = left + cell * column
            box(drawing, x, top, 96, 56, "pale blue", f"rank {rank}", f"quarter {column}")
            if column:
                drawing.line(x - 22, top + 28, x - 2, top + 28, "blue", 3)
    for column in range(len(mesh[0])):
        x = left + cell * column + 48
        drawing.line(x, tops[0] + 58, x, tops[1] - 2, "orange", 3)
    middle = left + cell * 2 - 12
    drawing.rect(middle - 230, 114, 460, 56, "paper")
    sent = f"gather {size['gather']:.0f} MiB in bf16, twice; scatter {size['scatter']:.0f} in fp32"
    drawing.words(middle, 134, f"in a row: {sent}", 13, "middle", "blue")
    text = f"then, between the rows: sum {size['sum']:.0f} MiB in fp32"
    drawing.words(middle, 156, text, 13, "middle", "orange")
    return drawing.text()


@figure
def master_bits() -> str:
    """One update of a split master, bit by bit, which a bf16 weight alone would lose."""
    rate, master = 5e-7, torch.tensor([0.02])
    halves, zero = list(kernels.split(master)), torch.zeros(())
    step = kernels.adamw_step(zero + 1, rate, optim.BETAS, optim.EPS, zero + 1, zero)
    drawing = Drawing(640, 312, "A weight in two halves of 16 bits, before and after an update")
    left, cell, gap = 26, 17.5, 28

    def bits(half: torch.Tensor) -> str:
        return f"{int(half.view(torch.int16)) & 0xFFFF:016b}"

    def row(top: float, title: str, now: list, before: list) -> None:
        drawing.words(left, top, title, 14, bold=True)
        for side, (half, old) in enumerate(zip(now, before, strict=True)):
            for k, (bit, was) in enumerate(zip(bits(half), bits(old), strict=True)):
                x = left + cell * (16 * side + k) + gap * side
                part = "pale orange" if k == 0 else "pale blue" if k < 9 else "pale green"
                fill = "orange" if bit != was else "pale grey" if side else part
                drawing.rect(x + 1, top + 10, cell - 2, 26, fill, "grid")
                ink = "paper" if bit != was else "ink"
                drawing.words(x + cell / 2, top + 28, bit, 13, "middle", ink, mono=True)

    before = [half.clone() for half in halves]
    row(50, f"the master {float(master):.10f}", before, before)
    drawing.words(left, 104, f"weight, bf16: {float(before[0]):.8f}", 13, fill="soft")
    right = left + 16 * cell + gap
    drawing.words(right, 104, f"low, int16: {int(before[1]):,}", 13, fill="soft")
    m, v, grad = torch.zeros(1), torch.zeros(1), torch.ones(1)
    kernels.reference.adamw_(*halves, m, v, grad, 0.0, step)
    now = f"after one AdamW update at a rate of 5e-7: {float(kernels.join(*halves)):.10f}"
    row(142, now, halves, before)
    drawing.words(left, 196, f"weight, bf16: {float(halves[0]):.8f}", 13, fill="soft")
    drawing.words(right, 196, f"low, int16: {int(halves[1]):,}", 13, fill="soft")
    alone = (before[0].float() - rate).bfloat16()
    row(234, "the same update of a weight that is bf16 alone: lost", [alone], before[:1])
    drawing.words(left, 288, f"{float(alone):.8f}, as before", 13, fill="soft")
    drawing.words(right, 262, "colours: sign, exponent, fraction", 13, fill="soft")
    return drawing.text()


@figure
def judge() -> str:
    """What the report shows of a made-up judge, to which length and the second slot are all."""
    rng, rows = random.Random(0), []
    for k in range(400):
        longer, instruction = rng.randrange(-400, 700), f"question {k}"
        liked = longer / 300 + (-0.7 if alpaca.model_is_first(instruction) else 0.7)
        answers = {"output_1": "y" * 800, "output_2": "x" * (800 + longer)}
        preference = 1 + 1 / (1 + np.exp(-liked))
        row = {"instruction": instruction, **answers, "preference": float(preference)}
        rows.append((f"line {k}", row))
    verdicts = alpaca.verdicts(alpaca.read("made up", rows))
    slots = belief.by_slot(verdicts)
    win_N, question_N = 100 * verdicts.win_N, verdicts.question_N
    quarters = belief.by_length(win_N, verdicts.longer_N, question_N)
    drawing = Drawing(640, 330, "The win rate by slot, and by how much longer the answer is")
    bars = [(slots[slot], f"shown {slot}", "orange") for slot in ("first", "second")]
    for quarter in quarters:
        ends = f"{quarter['shortest']} to {quarter['longest']}"
        bars.append((quarter, ends.replace("-", "−"), "blue"))
    chart = Chart(drawing, (46, 54, 580, 210), (0, 6.6), (0, 100), "", "win rate, %", [], None)
    for k, (group, name, colour) in enumerate(bars):
        place = k + 0.5 + 0.6 * (colour == "blue")
        x, y = chart.at(place, group["mean"])
        _, bottom = chart.at(place, 0)
        drawing.rect(x - 34, y, 68, bottom - y, f"pale {colour}", colour)
        drawing.words(x, y - 8, f"{group['mean']:.0f}", 15, "middle", bold=True)
        drawing.words(x, bottom + 20, name, 12, "middle")
    for at, text in ((1, "by slot"), (4.1, "by length: characters longer than the other answer")):
        drawing.words(chart.at(at, 0)[0], 306, text, 14, "middle", bold=True)
    mean = float(win_N.mean())
    (left, y), (right, _) = chart.at(0, mean), chart.at(6.6, mean)
    drawing.line(left, y, right, y, "ink", dashed=True)
    text = f"win rate {mean:.0f} %, dashed; both models are equally good"
    drawing.words(right, 28, text, 14, "end")
    return drawing.text()


def main(check: bool) -> int:
    """Write the figures, or count those that are not what they would be."""
    folder = ROOT / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    made = ((folder / f"{name}.svg", draw()) for name, draw in FIGURES.items())
    return include.settle(made, check)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
