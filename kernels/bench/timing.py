"""What a call costs in time and memory, and the limits of the machine it ran on."""

import ctypes
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

SECONDS = 0.3  # spent on one median, where three runs fit
AHEAD = 20_000_000  # clock cycles that a GPU waits while the host queues the first calls
CPU_CACHE = 2**26  # bytes; no common CPU's share of the last level is larger


def keep_buffers() -> None:
    """Stop glibc from giving big buffers back to the kernel, whoever asked for them: page faults
    on the next call's buffers otherwise take half the time on a CPU."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # big buffers come from the heap, where they can be used again


def rotation(nbytes: int, device: torch.device) -> int:
    """How many input sets of `nbytes` to rotate among, so that none is still in the cache when its
    turn comes again: more than the cache in all, at least two, and at most a thousand."""
    cuda = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda else CPU_CACHE
    return min(1000, 2 + cache // max(1, nbytes))


def medians(
    calls: dict[str, Callable], sets: Sequence[Sequence[Tensor]], repeat: int
) -> dict[str, float]:
    """Each call's median time in ms over at most `repeat` runs, the input sets in turn. A call must
    have run once before, since the first run compiles.

    On a CPU the calls take turns, so that whatever else the machine does slows all of them. On a
    GPU it is the device's time: runs are queued ahead, so that launching costs nothing unless a
    call itself waits for the device, or is queued more slowly than it runs.
    """
    inputs = itertools.cycle(sets)
    if sets[0][0].is_cuda:
        return {
            name: _device_median(call, inputs, _runs(_wall(call, next(inputs)), repeat))
            for name, call in calls.items()
        }
    times = {name: [_wall(call, next(inputs))] for name, call in calls.items()}
    for _ in range(_runs(max(spent[0] for spent in times.values()), repeat) - 1):
        for name, call in calls.items():
            times[name].append(_wall(call, next(inputs)))
    return {name: statistics.median(spent) for name, spent in times.items()}


def _runs(once: float, repeat: int) -> int:
    return min(repeat, max(3, int(SECONDS * 1e3 / once)))


def _wall(call: Callable, inputs: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    call(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _device_median(call: Callable, inputs: Iterator[Sequence[Tensor]], runs: int) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda._sleep(AHEAD)
    marks[0].record()
    for mark in marks[1:]:
        call(*next(inputs))
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def peak_mib(call: Callable, inputs: Sequence[Tensor]) -> float | None:
    """The most memory that `call(*inputs)` held at a time beyond what was held before it, MiB: on a
    GPU what torch allocated, on Linux the resident pages of the process, else None."""
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*inputs)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def kib(what: str) -> int:
        return int(re.search(rf"{what}:\s+(\d+) kB", status.read_text())[1])

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used unseen
    clear.write_text("5")  # the peak starts again from here
    before = kib("VmRSS")
    call(*inputs)
    return (kib("VmHWM") - before) / 1024


def copy_gbs(device: torch.device, nbytes: int, repeat: int) -> float:
    """Copy bandwidth of the device's memory, GB/s, bytes read and bytes written both counted."""
    source = torch.arange(nbytes // 4, dtype=torch.int32, device=device)
    target = source.clone()
    calls = {"copy": lambda a, b: b.copy_(a)}
    ms = medians(calls, [(source, target), (target, source)], repeat)["copy"]
    return 2 * source.nbytes / ms / 1e6


def matmuls(h_ND: Tensor, w_VD: Tensor) -> tuple[Callable, Callable]:
    """The bare matmuls of a linear layer, h wᵀ alone and with the two of its backward, as calls of
    (h, w, ...): what any exact implementation must spend. Room for their outputs is there before.
    """
    z_NV = h_ND.new_empty(len(h_ND), len(w_VD))
    dh_ND, dw_VD = torch.empty_like(h_ND), torch.empty_like(w_VD)

    @torch.no_grad()
    def one(h: Tensor, w: Tensor, *_: Tensor) -> None:
        torch.mm(h, w.T, out=z_NV)

    @torch.no_grad()
    def three(h: Tensor, w: Tensor, *_: Tensor) -> None:
        torch.mm(h, w.T, out=z_NV)
        torch.mm(z_NV, w, out=dh_ND)
        torch.mm(z_NV.T, h, out=dw_VD)

    return one, three
