"""Global means, metrics.jsonl, progress bar, throughput and MFU, plots.

Draw runs, each a line in every panel:   python -m zephyr.metrics RUN... [--out PNG]
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from zephyr import exits
from zephyr.costs import CARDS, model_flops
from zephyr.files import atomic, home
from zephyr.phases import Phases, Trace

FILE = "metrics.jsonl"
BAR = ("loss", "rewards/accuracies", "rewards/margins", "pairs_per_second")
SHORT = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "learning_rate": "lr",
    "pairs_per_second": "pairs/s",
    "tokens_per_second": "tokens/s",
}
PLAIN_SECONDS = 5.0

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


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device of this name; None when unknown, a MIG slice or a laptop."""
    fits = (
        card.flops
        for key, card in CARDS.items()
        if re.search(rf"\b{key}\b(?!.*(MIG|Laptop))", name)
    )
    return next(fits, None)


def work(config: Any, batch: Any) -> dict[str, float]:
    """The host counts of a packed batch that `Log.add` takes beside its sums."""
    layout, tokens, predicted = batch.layout, len(batch.tokens_T), len(batch.targets_N)
    flops = model_flops(config, tokens, predicted, layout.attended(config.sliding_window))
    # each response beside a prompt of its own has as many rows as keys are gathered here
    unshared = tokens if layout.kv_rows_G is None else len(layout.kv_rows_G)
    return {"tokens": tokens, "unshared": unshared, "pairs": len(batch.pairs), "flops": flops}


class Means:
    """(sum over micro-batches and ranks) / (count over micro-batches and ranks), key by key.

    The keys and their order are given up front, so that ranks which add different keys, or none,
    still reduce the same vector. Nothing waits for the device before `mean`.
    """

    def __init__(self, keys: Sequence[str], device: torch.device | str = "cpu"):
        self.keys, self.device = tuple(keys), device
        self.sums: dict[str, Any] = dict.fromkeys(self.keys, 0.0)
        self.counts = dict.fromkeys(self.keys, 0.0)

    def add(self, count: float, values: Mapping[str, float | Tensor]) -> None:
        """Adds values that belong to `count` pairs or tokens, a tensor's elements summed in fp64;
        a key that is absent gets sum and count 0."""
        for key, value in values.items():
            assert key in self.sums, f"{key} is not among the registered keys {self.keys}"
            self.sums[key] += value.detach().double().sum() if isinstance(value, Tensor) else value
            self.counts[key] += count

    def mean(self, **totals: float) -> dict[str, float]:
        """Global mean of every key (NaN where the count is 0) and global sum of `totals`.

        Every rank calls it: one all_reduce of one fp64 vector, sums | counts | totals.
        """
        values = [*self.sums.values(), *self.counts.values(), *totals.values()]
        # what the host knows goes there in one copy; of what the device knows nothing comes back
        known = [0.0 if isinstance(v, Tensor) else v for v in values]
        flat = torch.tensor(known, dtype=torch.float64).to(self.device)
        for k, value in enumerate(values):
            if isinstance(value, Tensor):
                flat[k] = value
        if dist.is_initialized():
            dist.all_reduce(flat)
        sums, counts, rest = flat.split([len(self.keys), len(self.keys), len(totals)])
        values = torch.cat([sums / counts, rest]).tolist()
        return dict(zip((*self.keys, *totals), values, strict=True))

    def reduce(self, **totals: float) -> dict[str, float]:
        """`mean`, then start anew."""
        means = self.mean(**totals)
        self.sums = dict.fromkeys(self.keys, 0.0)
        self.counts = dict.fromkeys(self.keys, 0.0)
        return means


class Log:
    """One line of metrics.jsonl per `every` optimizer steps, the progress bar, TensorBoard.

    Build it on every rank, right before the loop: the clock of the throughput starts here.
    start_step > 0 resumes: lines after that step are dropped, so that a step stands there once,
    and `kept`, what `state` gave on each rank when that step was saved, has what had no line yet.
    """

    def __init__(
        self,
        folder: Path | str,
        total_steps: int,
        keys: Sequence[str],
        *,
        start_step: int = 0,
        every: int = 1,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        bar: Sequence[str] = BAR,
        kept: Sequence[Mapping] = (),
        profile: int | None = None,
    ):
        self.folder, self.total_steps, self.start_step = Path(folder), total_steps, start_step
        self.every, self.rank, self.world, self.shown = every, rank, world, tuple(bar)
        self.device, self.means = torch.device(device), Means(keys, device)
        cuda = self.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(self.device)) if cuda else None
        self.totals = dict.fromkeys(("tokens", "unshared", "pairs", "flops"), 0.0)
        self.phase, self.written = Phases(self.device), start_step
        self.trace = Trace(profile, self.folder, rank, cuda)
        self.last: dict[str, float] = {}
        self.bar = self.writer = self.file = None
        self.short = False  # of memory, as has been said
        if rank == 0:
            self._open()
        self.said, self.began = -math.inf, time.perf_counter()
        self.since = self.began
        # a rank's own share, or, of another number of ranks, the first takes all
        for state in [kept[rank]] if len(kept) == world else kept if rank == 0 else []:
            for name in self.means.sums:
                self.means.sums[name] += state["sums"][name]
                self.means.counts[name] += state["counts"][name]
            for name in self.totals:
                self.totals[name] += state["totals"][name]
            self.since = self.began - state["seconds"]

    def state(self) -> dict[str, Any]:
        """This rank's share of the line under way, as JSON; the lines before it reach the disk."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {
            "sums": {name: float(x) for name, x in self.means.sums.items()},
            "counts": self.means.counts,
            "totals": self.totals,
            "seconds": time.perf_counter() - self.since,
        }

    def _open(self) -> None:
        path = self.folder / FILE
        old = read(self.folder) if self.start_step and path.exists() else []
        kept = [row for row in old if row["step"] <= self.start_step]
        for row in kept:
            self.last |= {name: math.nan if x is None else x for name, x in row.items()}
        with atomic(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(path, "a", buffering=1, encoding="ascii")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.start_step + 1)
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total_steps,
                initial=self.start_step,
                file=sys.stderr,
                desc=self.folder.name,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
            )

    def add(self, count: float, sums: Mapping[str, float | Tensor], **work: float) -> None:
        """Adds one micro-batch of this rank: sums over `count`, and its `work`, see there."""
        self.means.add(count, sums)
        for name, value in work.items():
            self.totals[name] += value

    def step(self, step: int, **scalars: float | Tensor) -> None:
        """Ends optimizer step `step` on every rank; writes a line when it is due.

        The means are over everything added since the last line. `scalars` are this step's own and
        already global (grad_norm, learning_rate, epoch); a 0-d tensor is read only for a line.
        tokens_per_second and pairs_per_second are over all ranks, mfu a fraction of their peak.
        What `self.phase` timed follows, see zephyr/phases.py.
        """
        self.trace.end(step, self._say)
        if step % self.every == 0 or step == self.total_steps:
            row = self.means.reduce(**self.totals)
            total = {name: row.pop(name) for name in self.totals}
            row |= {name: float(value) for name, value in scalars.items()}
            now = time.perf_counter()
            seconds, self.since = now - self.since, now
            shared = total["tokens"] < total["unshared"]
            names = ["tokens", *["unshared"] * shared, "pairs"]
            row |= {f"{name}_per_second": total[name] / seconds for name in names if total[name]}
            if self.peak and total["flops"]:
                row["mfu"] = total["flops"] / seconds / (self.peak * self.world)
            self.totals = dict.fromkeys(self.totals, 0.0)
            row |= self.phase.read(step - self.written)
            if row.get("memory/retries") and not self.short:
                self.short = True
                self._say(
                    f"step {step}: the GPU's memory is short: room was made by giving all "
                    "that was free back, and the GPU waits for that (memory/retries); lower "
                    "--microbatch-tokens"
                )
            self.written = step
            self._write(step, row)
            self._show(step, row, always=step == self.total_steps)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def begin(self, step: int) -> None:
        """Before optimizer step `step`, counted from 1: starts the trace if it is the one."""
        self.trace.begin(step)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a reader that went away must not end the run
                tqdm.write(text, file=sys.stderr)

    def evaluation(self, step: int, means: Mapping[str, float]) -> None:
        """Writes one line of global means (see Means) under their names with eval_ in front."""
        self._write(step, {f"eval_{name}": float(value) for name, value in means.items()})
        self._show(step, means, always=True, kind="eval  ")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time inside (evaluation, checkpoints) out of the throughput."""
        since, began = self.since, self._clock()
        yield
        self.since = since + self._clock() - began

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _write(self, step: int, row: dict[str, float]) -> None:
        self.last |= {"step": step, **row}
        if self.rank:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
        for name, value in row.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def _show(self, step: int, row: Mapping[str, float], always: bool, kind: str = "") -> None:
        now = time.perf_counter()
        text = kind + "  ".join(
            f"{SHORT.get(name, name.split('/')[-1])} {row[name]:.4g}"
            for name in self.shown
            if name in row
        )
        if self.bar is not None and kind:
            self._say(f"step {step}  {text}")
        elif self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        elif self.rank == 0 and (always or now - self.said >= PLAIN_SECONDS):
            self.said = now
            pace = (now - self.began) / max(step - self.start_step, 1)
            left = tqdm.format_interval(pace * (self.total_steps - step))
            self._say(f"step {step}/{self.total_steps}  {text}  {left} left")

    def summary(self) -> str:
        """What a finished run ends with: the last value of everything logged, and where it lies."""
        width = max(map(len, self.last), default=0)
        values = [f"  {name:{width}}  {value:.6g}" for name, value in self.last.items()]
        places = [
            f"  {'model':{width}}  {self.folder / 'model'}",
            f"  {'curves':{width}}  python -m zephyr.metrics {self.folder}",
        ]
        return "\n".join([f"{self.folder}:", *values, *places])

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the bar and the files."""
        for part in (self.bar, self.writer, self.file):
            if part is not None:
                part.close()


def read(folder: Path | str) -> list[dict]:
    """The rows of a run's metrics.jsonl, less a last line that a killed run left unfinished."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {FILE} in it; give the folder of a run")
    *lines, torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, torn], start=1):
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            if number <= len(lines):
                raise ValueError(
                    f"{path}:{number} is not a JSON object with a `step`; delete the line"
                ) from None
    return rows


def trajectory(rows: Sequence[Mapping]) -> list[dict]:
    """The rows less what clock and memory say: what two runs that are the same have in common."""
    of_the_machine = re.compile(r"seconds/|memory/|mfu$|\w+_per_second$")
    return [{k: x for k, x in row.items() if not of_the_machine.match(k)} for row in rows]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Debiased exponential moving average over about `span` values; NaN is passed over."""
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
    """Draws the runs over each other into `out`, one panel per metric that any of them has.

    Solid: train; dashed with markers: eval; the rejected side dotted, its eval markers hollow.
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m zephyr.metrics", description="draw runs")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", metavar="PNG", help="default: RUN/metrics.png")
    args = parser.parse_args(argv)
    try:
        runs = [Path(home(run)) for run in args.runs]
        out = Path(home(args.out)) if args.out else runs[0] / "metrics.png"
        names = [run.resolve().name for run in runs]
        labels = names if len(set(names)) == len(names) else map(str, runs)
        draw(dict(zip(labels, map(read, runs), strict=True)), out)
    except ValueError as error:
        print(f"metrics: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))
    print(out)


if __name__ == "__main__":
    exits.call(main)
