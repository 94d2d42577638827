"""Where a step's time and memory go: phases, and a trace of one step.

    data        the host waits for the next micro-batches
    forward     the reference's forward too, if it is live
    backward
    optimizer   and one flag that the ranks agree on: is a loss not finite?
    checkpoint  training stands while its state is copied

The collectives of FSDP2 run inside forward and backward, mostly hidden behind computing.

On CUDA all but data and checkpoint are timed by events in the device's stream, which are read when
a line is due: nothing waits for them. Elsewhere a clock does.
"""

import contextlib
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

NAMES = ("data", "forward", "backward", "optimizer", "checkpoint")
HOST = ("data", "checkpoint")
DEAREST = 10


class Phases:
    """Seconds and peak memory of each phase since the last `read`."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: dict[str, list[tuple]] = defaultdict(list)
        self.peaks: dict[str, int] = {}
        self.retries = 0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        assert name in NAMES, name
        mark = self._event if self.cuda and name not in HOST else time.perf_counter
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = mark()
        yield
        self.spans[name].append((start, mark()))
        if self.cuda:
            found = torch.cuda.memory_stats()
            for which, of in ((name, "allocated"), ("reserved", "reserved")):
                self.peaks[which] = max(self.peaks.get(which, 0), found[f"{of}_bytes.all.peak"])

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, steps: int) -> dict[str, float]:
        """`seconds/PHASE`, a mean over `steps` steps, and the largest `memory/PHASE` in GiB, this
        rank's; then starts over.

        On CUDA `memory/reserved` is the most that the allocator held, and `memory/retries` how
        often it had to give back all that was free, with the device standing, to find room. Without
        CUDA there is `memory/peak`, of the process from its start.
        """
        if not self.spans:
            return {}
        if self.cuda:
            torch.cuda.synchronize()
        row = {}
        for name in NAMES:
            if spans := self.spans.pop(name, None):
                row[f"seconds/{name}"] = sum(_seconds(*span) for span in spans) / steps
        for name, peak in self.peaks.items():
            row[f"memory/{name}"] = peak / 2**30
        if self.cuda:
            before, self.retries = self.retries, torch.cuda.memory_stats()["num_alloc_retries"]
            row["memory/retries"] = self.retries - before
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes that getrusage counts in
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            row["memory/peak"] = peak / 2**30
        self.peaks.clear()
        return row


def _seconds(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


class Trace:
    """A torch profiler for step `wanted`, counted from 1. It writes
    RUN/profile/step-N-rank-R.json.gz, which a browser shows (ui.perfetto.dev), and step-N.txt, the
    kernels that took longest."""

    def __init__(self, wanted: int | None, folder: Path, rank: int, cuda: bool):
        self.wanted, self.folder, self.rank, self.cuda = wanted, folder / "profile", rank, cuda
        self.profile: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        if step == self.wanted:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
            # of one cycle all events are there in any case; without it torch warns that they are
            self.profile = torch.profiler.profile(activities=kinds, acc_events=True)
            self.profile.start()

    def end(self, step: int, say: Callable[[str], None]) -> None:
        if self.profile is None:
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.profile.stop()
        profile, self.profile = self.profile, None
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"step-{step:06d}"
        profile.export_chrome_trace(f"{stem}-rank-{self.rank}.json.gz")
        if self.rank == 0:
            text = table(profile.key_averages(), self.cuda)
            stem.with_suffix(".txt").write_text(text + "\n")
            say(f"step {step}, its trace and this in {self.folder}:\n{text}")


def table(averages: list, cuda: bool) -> str:
    """Return a table of the kernels that took longest. On a CPU it lists operators, each without
    what it called."""
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    on_device = torch.autograd.DeviceType.CUDA
    rows = [x for x in averages if not cuda or x.device_type == on_device]
    rows.sort(key=lambda x: -getattr(x, kind))
    whole = sum(getattr(x, kind) for x in rows) or 1
    lines = [f"{'ms':>10} {'share':>6} {'calls':>6}  kernel"]
    for x in rows[:DEAREST]:
        spent = getattr(x, kind)
        lines.append(f"{spent / 1e3:10.2f} {spent / whole:6.1%} {x.count:6}  {x.key[:100]}")
    return "\n".join(lines)
