"""The page to click through: one file that shows the figures of an evaluation, the answers and the
judgments, and that a browser opens without a network.

An answer is data. It stands in a block of JSON, where no character of it can end the block, and the
page's script shows it as text. The page's own policy forbids everything that it does not hold.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from zephyr.evals import entries, mt_bench, page
from zephyr.evals.entries import Entry, Rows
from zephyr.files import atomic, plain

TEMPLATE = Path(__file__).with_name("report.html")
FILTERS = {"verdict": "Verdict", "length": "Length", "category": "Category", "run": "Run"}
Z = 1.96  # standard errors on either side of a mean in a 95 % interval


def check_name(path: str) -> None:
    """Raise ValueError unless a browser would take the file for a page."""
    if not path.lower().endswith((".html", ".htm")):
        raise ValueError(f"--html {plain(path)}: the page's name ends in .html")


def write(
    path: str,
    figures: dict,
    blocks: Sequence[page.Block],
    files: dict[str, Rows],
    questions: str | None,
) -> None:
    """Write the page of the figures, the blocks that say what they mean, and the rows that `show`
    has read. The same ones give the same bytes."""
    found = entries.read(files, figures, mt_bench.categories(questions))
    template = TEMPLATE.read_text(encoding="utf-8")
    values = {
        "title": escape(title(figures)),
        "figures": shown(blocks),
        "data": data(found),
        **{name: digest(template, name) for name in ("style", "script")},
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], template)
    with atomic(path) as file:
        file.write(text.encode())


def title(figures: dict) -> str:
    runs = page.runs(figures)
    benchmark = "AlpacaEval" if page.is_alpaca(runs) else "MT-Bench"
    return f"{benchmark}: {', '.join(plain(name, 60) for name in runs)}"


def data(found: Sequence[Entry]) -> str:
    """Return the entries and the options of each filter, with their counts, as JSON in which no
    character has a meaning in HTML."""
    filters = []
    for name, label in FILTERS.items():
        ranks: dict[str, float] = {}
        for entry in found:
            for tag, rank in getattr(entry, name).items():
                ranks[tag] = min(rank, ranks.get(tag, rank))
        tags = sorted(ranks, key=ranks.__getitem__)
        options = [[tag, sum(tag in getattr(entry, name) for entry in found)] for tag in tags]
        filters.append({"name": name, "label": label, "options": options})
    rows = [vars(entry) | {name: list(getattr(entry, name)) for name in FILTERS} for entry in found]
    text = json.dumps({"filters": filters, "entries": rows}, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def digest(template: str, tag: str) -> str:
    """Return the name by which the page's policy admits the template's one style or script."""
    inside = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()


def shown(blocks: Sequence[page.Block]) -> str:
    """Return the blocks as HTML: a section for each title, with a division for each part of it."""
    parts: list[list[list[str]]] = []
    for before, block in zip([None, *blocks], blocks, strict=False):
        title = isinstance(block, page.Title)
        if not parts or title and not block.part:
            parts.append([[]])
        elif title:
            parts[-1].append([])
        lines = parts[-1][-1]
        match block:
            case page.Title():
                level = "h3" if block.part else "h2"
                under = f"<p>{escape(block.under)}</p>" * bool(block.under)
                lines.append(f"<{level}>{escape(block.text)}</{level}>{under}")
            case page.Table():
                lines.append(table(block))
            case page.Said():
                kind = f'<strong class="{block.kind}">{block.kind}</strong> ' * bool(block.kind)
                said = f"<li>{kind}{escape(block.text)}</li></ul>"
                if isinstance(before, page.Said) and lines:
                    lines[-1] = lines[-1].removesuffix("</ul>")
                else:
                    said = f"<ul>{said}"
                lines.append(said)
    sections = ["".join("<div>" + "\n".join(lines) + "</div>" for lines in s) for s in parts]
    return "\n".join(f"<section>{inside}</section>" for inside in sections)


def table(block: page.Table) -> str:
    head, *rows = block.rows
    means = max(sum(isinstance(cell, page.Mean) for cell in row) for row in rows)
    names = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in head)
    lines = []
    for name, *cells in rows:
        line = f'<tr><th scope="row">{escape(plain(str(name)))}</th>'
        for cell in cells:
            if isinstance(cell, page.Mean) and cell.value is not None:
                kind = "only mean" if means == 1 else "mean"
                inside = f"{bar(cell, block.most)}<span>{cell}</span>"
                line += f'<td class="{kind}"><div>{inside}</div></td>'
            else:
                line += f"<td>{escape(str(cell))}</td>"
        lines.append(f"{line}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def bar(mean: page.Mean, most: float) -> str:
    """Return a bar from 0 to the mean on a scale that ends at `most`, with the 95 % interval."""

    def at(value: float) -> str:
        return f"{100 * min(max(value / most, 0), 1):.2f}%"

    said, line = f"{mean} of {most:g}", ""
    if mean.error is not None:
        low, high = mean.value - Z * mean.error, mean.value + Z * mean.error
        said += f", 95 % interval {low:.2f} to {high:.2f}"
        line = f'<line x1="{at(low)}" x2="{at(high)}" y1="50%" y2="50%"/>'
    return (
        f'<svg role="img" aria-label="{said}"><title>{said}</title><rect class="scale" '
        f'width="100%" height="100%"/><rect width="{at(mean.value)}" height="100%"/>{line}</svg>'
    )
