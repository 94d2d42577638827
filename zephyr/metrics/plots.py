"""Curves of runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zephyr.files import atomic

PANELS = (
    ("loss",),
    ("rewards/accuracies",),
    ("rewards/margins",),
    ("rewards/chosen", "rewards/rejected"),
    ("logps/chosen", "logps/rejected"),
    ("learning_rate",),
    ("grad_norm",),
    ("tokens_per_second",),
    ("pairs_per_second",),
)
COLOURS = ("#2f6690", "#c8553d", "#5b8e7d", "#8e6c8a", "#c9a227", "#4a4e69")
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#ececec",
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Return the debiased exponential moving average over about `span` values; NaN is passed
    over."""
    keep, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total = keep * total + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        out.append(total / weight if weight else math.nan)
    return out


def _curve(axis: Any, rows: list[dict], name: str, colour: str, dotted: bool) -> None:
    train, points = (
        [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
        for key in (name, f"eval_{name}")
    )
    if train:
        steps, values = zip(*train, strict=True)
        # the schedule is exact, and an average would lag behind it
        if len(steps) > 60 and name != "learning_rate":
            axis.plot(steps, values, color=colour, lw=0.7, alpha=0.22)
            values = smooth(values, len(values) / 40)
        axis.plot(
            steps,
            values,
            color=colour,
            lw=1.5,
            ls=":" if dotted else "-",
            marker="." if len(steps) == 1 else "",
        )
    if points:
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            lw=0.9,
            ls="--",
            marker="o",
            ms=4,
            mfc="white" if dotted else colour,
        )


def _key(axis: Any, colours: Mapping[str, str], found: set[str]) -> list:
    grey = {"color": "#777777"}
    styles = {"eval": {"lw": 0.9, "ls": "--", "marker": "o", "ms": 4}, "rejected": {"ls": ":"}}
    entries = [(name, {"color": colour, "lw": 3}) for name, colour in colours.items()]
    entries += [
        ("train", grey),
        *(
            (name, grey | style)
            for name, style in styles.items()
            if any(name in metric for metric in found)
        ),
    ]
    return [axis.plot([], [], label=label, **style)[0] for label, style in entries]


def draw(runs: Mapping[str, list[dict]], out: Path) -> None:
    """Draw the runs over each other into the file `out`, one panel for each metric that any of them
    has.

    Solid lines are training, dashed lines with markers evaluation; the rejected side is dotted, and
    its evaluation markers are hollow.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install zephyr-dpo[plot]") from None
    found = {
        name
        for rows in runs.values()
        for row in rows
        for name, value in row.items()
        if value is not None
    }
    panels = [p for p in PANELS if any(name in found or f"eval_{name}" in found for name in p)]
    if not panels:
        raise ValueError(f"{', '.join(runs)}: nothing to draw yet")
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(runs)}
    columns = math.ceil(math.sqrt(len(panels)))
    height = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.7 * columns, 2.5 * height + 0.5), layout="constrained")
        for i, panel in enumerate(panels):
            axis = figure.add_subplot(height, columns, i + 1, title=", ".join(panel))
            for run, rows in runs.items():
                for name in panel:
                    _curve(axis, rows, name, colours[run], dotted=name.endswith("rejected"))
            axis.yaxis.set_major_formatter(lambda y, _: f"{y:,g}".replace("e-0", "e-"))
            axis.set_xlabel("step" if i + columns >= len(panels) else "")
            axis.set_ylim(bottom=0 if panel[0].endswith("_per_second") else None)
        figure.legend(
            handles=_key(axis, colours, found),
            loc="outside upper left",
            ncols=2 * columns,
            frameon=False,
        )
        with atomic(out) as file:
            figure.savefig(file, format="png", dpi=150)
