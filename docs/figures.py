"""Draw the figures of the pages from the objects of the code:   python docs/figures.py [--check]

Each function below returns the SVG text of docs/figures/<its name>.svg.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # wherever it is started from, and by whom

from svg import Chart, Drawing  # noqa: E402

from zephyr import losses  # noqa: E402
from zephyr.packing import Pair, pack_pairs  # noqa: E402

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


@figure
def visibility() -> str:
    """Which tokens of a packed pair see which."""
    batch = pack_pairs([Pair(*map(np.array, ([0, 1, 2], [3, 4], [5, 6, 7])))], [0])
    names, layout = "abcpqxyz", batch.layout
    drawing = Drawing(640, 330, "The six queries of a packed pair and the nine keys they see")
    cell, left, top = 36, 150, 74
    ends_q, ends_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    keys = [names[batch.tokens_T[place]] for place in layout.kv_rows_G]
    drawing.words(left, 24, "keys, gathered: the rejected branch sees the prompt's again", 13)
    for column, name in enumerate(keys):
        x = left + cell * column + 10 * (column >= ends_k[1])
        drawing.words(x + cell / 2, top - 12, name, 15, "middle", mono=True, bold=True)
    for segment, (start, end) in enumerate(zip(ends_q, ends_q[1:], strict=False)):
        first, last = ends_k[segment], ends_k[segment + 1]
        for row in range(start, end):
            y = top + cell * row + 10 * segment
            name = names[batch.tokens_T[row]]
            position = int(layout.position_T[row])
            drawing.words(left - 14, y + 24, name, 15, "end", mono=True, bold=True)
            drawing.words(left - 44, y + 24, f"position {position}", 12, "end", "soft")
            for column in range(len(keys)):
                x = left + cell * column + 10 * (column >= ends_k[1])
                # masks are aligned at the bottom right: the last query sees the last key
                seen = first <= column <= last - end + row
                ours = "pale blue" if segment == 0 else "pale orange"
                drawing.rect(x + 1, y + 1, cell - 2, cell - 2, ours if seen else "pale grey")
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
