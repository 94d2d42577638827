"""metrics.jsonl: one line of global means per logged step; the progress bar, throughput and MFU."""

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
from torch import Tensor
from tqdm import tqdm

from zephyr.files import atomic
from zephyr.metrics.means import Means, peak_flops
from zephyr.metrics.phases import Phases, Trace

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
        self.phase, self.written, self.trained = Phases(self.device), start_step, 0.0
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
        """Return this rank's share of the line under way, as JSON, and flush the lines before it to
        the disk."""
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
        """Add one micro-batch of this rank: `sums` that belong to `count` pairs or tokens, and
        what `means.work` counts."""
        self.means.add(count, sums)
        for name, value in work.items():
            self.totals[name] += value

    def step(self, step: int, **scalars: float | Tensor) -> None:
        """Ends optimizer step `step` on every rank; writes a line when it is due.

        The means are over everything added since the last line. `scalars` are this step's own and
        already global (grad_norm, learning_rate, epoch); a 0-d tensor is read only for a line.
        tokens_per_second and pairs_per_second are over all ranks, mfu a fraction of their peak.
        What `self.phase` timed follows, see zephyr/metrics/phases.py.
        """
        self.trace.end(step, self._say)
        if step % self.every == 0 or step == self.total_steps:
            row = self.means.reduce(**self.totals)
            total = {name: row.pop(name) for name in self.totals}
            row |= {name: float(value) for name, value in scalars.items()}
            now = time.perf_counter()
            seconds, self.since = now - self.since, now
            self.trained += seconds
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
        """Start optimizer step `step`, counted from 1, and the trace if this is the step to
        trace."""
        self.trace.begin(step)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a reader that went away must not end the run
                tqdm.write(text, file=sys.stderr)

    def evaluation(self, step: int, means: Mapping[str, float]) -> None:
        """Write one line of global means (see Means), each name with eval_ in front."""
        self._write(step, {f"eval_{name}": float(value) for name, value in means.items()})
        self._show(step, means, always=True, kind="eval  ")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block whose time (evaluation, checkpoints) does not count for the throughput."""
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
        """Show a line on the progress bar or on stderr."""
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

    def seconds_per_step(self) -> float:
        """Return the mean over the steps that this process's lines are of, pauses left out."""
        first = self.start_step // self.every * self.every  # a line holds what had none before
        return self.trained / max(1, self.written - first)

    def summary(self, more: Mapping[str, str]) -> str:
        """Return what a finished run ends with: the last value of everything logged, `more`, and
        where the results are."""
        width = max(map(len, self.last), default=0)
        values = [f"  {name:{width}}  {value:.6g}" for name, value in self.last.items()]
        made = [name for name in ("adapter", "model") if (self.folder / name).exists()]
        places = [
            *(f"  {name:{width}}  {text}" for name, text in more.items()),
            *(f"  {name:{width}}  {self.folder / name}" for name in made),
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
    """Return the lines of a run's metrics.jsonl, without a last line that a killed run left
    unfinished."""
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
    """Return the lines without what depends on clock and memory. Two runs that are the same have
    equal trajectories."""
    of_the_machine = re.compile(r"seconds/|memory/|mfu$|\w+_per_second$")
    return [{k: x for k, x in row.items() if not of_the_machine.match(k)} for row in rows]
