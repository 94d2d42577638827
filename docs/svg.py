"""Small drawings as SVG text: shapes, words, and a chart with two axes.

The same calls give the same bytes. Colours follow the reader's: a style in the file changes them in
dark mode. Lengths are in pixels, which a narrow page scales down.
"""

import math
from collections.abc import Sequence
from html import escape

# by name: in light mode, in dark mode; chosen to be told apart by most colour-blind readers
COLOURS = {
    "ink": ("#1c2733", "#e4e9ee"),
    "soft": ("#6b7a8a", "#93a1b0"),
    "grid": ("#d9dfe5", "#3a4653"),
    "paper": ("#ffffff", "#14191f"),
    "blue": ("#1f6fb2", "#6db3f2"),
    "orange": ("#c8600c", "#f4a259"),
    "green": ("#2a8248", "#6cc78b"),
    "red": ("#b3313f", "#f08a93"),
    "violet": ("#6f4fb0", "#b69cf0"),
    "pale blue": ("#cfe3f5", "#1f4a70"),
    "pale orange": ("#fbe0c6", "#6b3d12"),
    "pale green": ("#d0ecd8", "#1f5233"),
    "pale grey": ("#eceff2", "#262f38"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0L8 4L0 8z" class="f-ink"/></marker></defs>'
)


def number(x: float) -> str:
    """Return a coordinate, to a hundredth and without zeros that say nothing."""
    return f"{x:.2f}".rstrip("0").rstrip(".").replace("-0", "0" if abs(x) < 0.005 else "-0")


class Drawing:
    """Shapes in the order they were drawn; `text()` is the file."""

    def __init__(self, width: float, height: float, title: str):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def add(self, tag: str, body: str = "", **attributes: object) -> None:
        given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
        words = " ".join(
            f'{k}="{number(v) if isinstance(v, int | float) else escape(str(v))}"'
            for k, v in given.items()
        )
        self.parts.append(f"<{tag} {words}>{body}</{tag}>" if body else f"<{tag} {words}/>")

    def rect(self, x, y, width, height, fill="pale grey", stroke=None, radius=2) -> None:
        self.add(
            "rect", x=x, y=y, width=width, height=height, rx=radius, class_=_classes(fill, stroke)
        )

    def line(self, x1, y1, x2, y2, stroke="ink", width=1.5, dashed=False, arrow=False) -> None:
        self.add(
            "line",
            x1=x1,
            y1=y1,
            x2=x2,
            y2=y2,
            class_=_classes(None, stroke),
            stroke_width=width,
            stroke_dasharray="4 3" if dashed else None,
            marker_end="url(#tip)" if arrow else None,
        )

    def path(self, points: Sequence[tuple[float, float]], stroke="blue", width=2, dashed=False):
        d = "M" + " L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.add(
            "path",
            d=d,
            class_=_classes(None, stroke),
            stroke_width=width,
            fill="none",
            stroke_linejoin="round",
            stroke_dasharray="5 4" if dashed else None,
        )

    def dot(self, x, y, fill="blue", radius=3) -> None:
        self.add("circle", cx=x, cy=y, r=radius, class_=_classes(fill, None))

    def words(self, x, y, text, size=13, anchor="start", fill="ink", bold=False, mono=False):
        text = str(text).replace(" ", "\u00a0") if mono else str(text)
        self.add(
            "text",
            escape(text),
            x=x,
            y=y,
            font_size=size,
            text_anchor=anchor,
            class_=_classes(fill, None) + " mono" * mono,
            font_weight=600 if bold else None,
        )

    def text(self) -> str:
        """Return the drawing as an SVG file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{number(self.width)}" '
                f'height="{number(self.height)}" '
                f'viewBox="0 0 {number(self.width)} {number(self.height)}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{_style()}</style>",
                TIP,
                f'<rect width="{number(self.width)}" height="{number(self.height)}" '
                'class="f-paper" rx="6"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def _classes(fill: str | None, stroke: str | None) -> str:
    names = [f"{kind}-{c}" for kind, c in (("f", fill), ("s", stroke)) if c]
    assert all(name[2:] in COLOURS for name in names), names
    return " ".join(name.replace(" ", "-") for name in names)


def _style() -> str:
    rules = [f"text{{font-family:{FONT}}}.mono{{font-family:{MONO}}}"]
    for mode, wrap in enumerate(("{}", "@media(prefers-color-scheme:dark){{{}}}")):
        both = "".join(
            f".f-{name.replace(' ', '-')}{{fill:{c[mode]}}}"
            f".s-{name.replace(' ', '-')}{{stroke:{c[mode]}}}"
            for name, c in COLOURS.items()
        )
        rules.append(wrap.format(both))
    return "".join(rules)


class Chart:
    """A chart inside a drawing: `x` and `y` are the ranges of its axes, in the data's units."""

    def __init__(self, drawing, box, x, y, x_label="", y_label="", x_ticks=None, y_ticks=None):
        self.drawing, self.box, self.x, self.y = drawing, box, x, y
        left, top, width, height = box
        for value in ticks(*x) if x_ticks is None else x_ticks:
            place = self.at(value, y[0])[0]
            drawing.line(place, top, place, top + height, "grid", 1)
            drawing.words(place, top + height + 17, f"{value:g}", 12, "middle", "soft")
        for value in ticks(*y) if y_ticks is None else y_ticks:
            place = self.at(x[0], value)[1]
            drawing.line(left, place, left + width, place, "grid", 1)
            drawing.words(left - 6, place + 4, f"{value:g}", 12, "end", "soft")
        drawing.words(left + width / 2, top + height + 36, x_label, 13, "middle")
        drawing.words(left, top - 9, y_label, 13)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point of the data is in the drawing."""
        left, top, width, height = self.box
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * width, top + (1 - up) * height

    def curve(
        self, xs, ys, stroke="blue", label="", dashed=False, label_at=-1, dy=-6, anchor="end"
    ):
        """Draw a curve where it is inside the y axis' range, with its label beside a point."""
        inside = [(x, y) for x, y in zip(xs, ys, strict=True) if self.y[0] <= y <= self.y[1]]
        self.drawing.path([self.at(x, y) for x, y in inside], stroke, dashed=dashed)
        if label:
            x, y = self.at(*inside[label_at])
            self.drawing.words(x, y + dy, label, 13, anchor, stroke, bold=True)

    def dot(self, x, y, fill="blue", radius=3):
        self.drawing.dot(*self.at(x, y), fill, radius)


def ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers in a range."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(f for f in (1, 0.5, 0.2, 0.1) if (high - low) / (step * f) >= 4)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
