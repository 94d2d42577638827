"""Facts about a GPU that the design leans on, each measured alone.

    python -m benchmarks.facts varlen       packed attention, its errors and its speed
    python -m benchmarks.facts matmuls      rates of Mistral-7B's linear layers
    python -m benchmarks.facts transfers    bandwidth to, from and inside the device
    python -m benchmarks.facts clock        what a minute of matmuls does to their rate

T tokens  H query heads  K key/value heads  E head width  M rows
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.vs_trl import machine
from kernels.bench import timing
from zephyr.attention import Layout, segment_by_segment
from zephyr.packing import Pair, pack_pairs

HEADS, KV_HEADS, HEAD = 32, 8, 128
LENGTHS = [(170, 320, 290), (512, 511, 1), (3, 700, 200), (40, 1, 90), (300, 120, 500)]
WINDOWS = [None, 4096, 100]
PAIRS = 20  # of LENGTHS[0], to time: about 16k tokens
LINEAR = {  # inputs and outputs of Mistral-7B's linear layers
    "q, o": (4096, 4096),
    "k, v": (4096, 1024),
    "gate, up": (4096, 14336),
    "down": (14336, 4096),
    "head": (4096, 32000),
}
ROWS = (8192, 16384)
SIDE, SECONDS = 8192, 60  # of the square matmul that shows the sustained clock
SENSORS = ("clocks.sm", "power.draw", "temperature.gpu")  # MHz, W, °C
REPEAT = 30
CUDA = torch.device("cuda")

Row = dict[str, Any]


def layout(lengths: list[tuple[int, int, int]], device: torch.device) -> Layout:
    """The packed layout of pairs of these lengths: prompt, chosen, rejected."""
    pairs = [Pair(*(np.zeros(n, np.int64) for n in three)) for three in lengths]
    return pack_pairs(pairs, list(range(len(pairs)))).to(device).layout


def plain(packed: Layout, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int | None):
    """Attention segment by segment, whatever the device and the dtype."""
    rows_G = packed.kv_rows_G
    k_GKE, v_GKE = (x.index_select(0, rows_G) for x in (k_TKE, v_TKE))
    place = [packed.position_T, packed.position_T[rows_G], packed.cu_seqlens_q, packed.cu_seqlens_k]
    with sdpa_kernel(SDPBackend.MATH):  # not the library that is being checked, nor another
        return segment_by_segment(q_THE, k_GKE, v_GKE, *place, window)


def attention(packed: Layout, heads: int, kv_heads: int, head: int) -> list[Tensor]:
    """Random q, k and v in bf16, and the gradient that arrives at the output."""
    torch.manual_seed(0)
    device, T = packed.position_T.device, len(packed.position_T)
    shapes = [(T, n, head) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


def trained(attend: Callable, q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> list[Tensor]:
    """Output and gradients of q, k and v, where c arrives at the output."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, c)]


def exactness(packed: Layout, tensors: list[Tensor], window: int | None) -> dict[str, list[float]]:
    """|x - truth| / |truth| of output, dq, dk and dv as training has them, and as the plain
    reference has them in the same bf16; truth is that reference in float64."""
    reference, found = partial(plain, packed, window=window), {}
    truth = trained(reference, *(x.double() for x in tensors))
    ours = partial(packed.attend, layer=0, window=window)
    for name, attend in (("ours", ours), ("plain", reference)):
        pairs = zip(trained(attend, *tensors), truth, strict=True)
        found[name] = [float((x.double() - y).norm() / y.norm()) for x, y in pairs]
    return found


def varlen() -> Iterator[Row]:
    """The attention that training runs, at each window: its errors, and its speed. A row is `wrong`
    if an error is above twice the plain reference's in bf16."""
    packed, many = layout(LENGTHS, CUDA), layout(PAIRS * LENGTHS[:1], CUDA)
    tensors = attention(packed, HEADS, KV_HEADS, HEAD)
    timed = [attention(many, HEADS, KV_HEADS, HEAD) for _ in range(2)]
    for window in WINDOWS:
        found = exactness(packed, tensors, window)
        right = all(x <= 2 * y for x, y in zip(found["ours"], found["plain"], strict=True))
        attend = partial(many.attend, layer=0, window=window)
        calls = {
            "forward": lambda q, k, v, c, attend=attend: attend(q, k, v),
            "both": partial(trained, attend),
        }
        for call in calls.values():
            call(*timed[0])
        ms = timing.medians(calls, timed, REPEAT)
        flops = 4 * HEADS * HEAD * many.attended(window)  # three times that with the backward
        rates = [flops / ms["forward"] / 1e9, 3 * flops / ms["both"] / 1e9]
        yield {"window": window, "errors": found, "wrong": not right, "ms": ms, "tflops": rates}
        told = ", ".join(f"{x:.1e} ({y:.1e})" for x, y in zip(*found.values(), strict=True))
        print(
            f"window {window}: errors of output, dq, dk, dv (the reference's) {told}; "
            f"{ms['forward']:.2f} ms forward, {rates[0]:.0f} TFLOP/s; {ms['both']:.2f} ms with "
            f"backward, {rates[1]:.0f} TFLOP/s",
            flush=True,
        )


def matmuls() -> Iterator[Row]:
    """TFLOP/s of x wᵀ in bf16, and with an fp32 output."""
    for M, (name, (inputs, outputs)) in itertools.product(ROWS, LINEAR.items()):
        sets = [
            [torch.randn(n, inputs, device=CUDA, dtype=torch.bfloat16) for n in (M, outputs)]
            for _ in range(2)
        ]
        calls = {
            "bf16": lambda x, w: torch.mm(x, w.T),
            "fp32": lambda x, w: torch.mm(x, w.T, out_dtype=torch.float32),
        }
        for call in calls.values():
            call(*sets[0])
        ms = timing.medians(calls, sets, REPEAT)
        tflops = {kind: 2 * M * inputs * outputs / t / 1e9 for kind, t in ms.items()}
        yield {"layer": name, "M": M, "inputs": inputs, "outputs": outputs, "tflops": tflops}
        print(
            f"{name:9} M {M:5}  {inputs:5} -> {outputs:5}  bf16 {tflops['bf16']:.0f}, "
            f"fp32 output {tflops['fp32']:.0f} TFLOP/s",
            flush=True,
        )


def transfers() -> list[Row]:
    """GB/s of copies between pinned host memory and the device, and inside the device, where bytes
    read and written both count."""
    device = torch.arange(2**28, dtype=torch.int32, device=CUDA)
    host = device.cpu().pin_memory()
    calls = {
        "host to device": lambda d, h: d.copy_(h, non_blocking=True),
        "device to host": lambda d, h: h.copy_(d, non_blocking=True),
    }
    ms = timing.medians(calls, [(device, host)], REPEAT)
    rows = [{"copy": name, "gbs": device.nbytes / t / 1e6} for name, t in ms.items()]
    rows.append({"copy": "inside the device", "gbs": timing.copy_gbs(CUDA, 2**32, REPEAT)})
    print(", ".join(f"{row['copy']} {row['gbs']:.0f} GB/s" for row in rows))
    return rows


def clock() -> Iterator[Row]:
    """A minute of square matmuls: the rate of each second, and the sensors at its end."""
    a, b = (torch.randn(SIDE, SIDE, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    out = torch.mm(a, b)
    once = timing.medians({"": lambda a, b: torch.mm(a, b, out=out)}, [(a, b)], REPEAT)[""]
    many, rows = max(1, int(1e3 / once)), []
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(SECONDS + 2)]
    marks[0].record()
    for second in range(SECONDS + 1):
        for _ in range(many):
            torch.mm(a, b, out=out)
        marks[second + 1].record()
        if not second:
            continue
        start, end = marks[second - 1 : second + 1]
        end.synchronize()  # one second of work stays queued while the sensors are read
        rows.append(sensors(nvidia_smi()))
        rows[-1]["tflops"] = many * 2 * SIDE**3 / start.elapsed_time(end) / 1e9
        yield rows[-1]
    first, last = (statistics.mean(row["tflops"] for row in x) for x in (rows[:3], rows[-10:]))
    told = ", ".join(f"{name} {rows[-1][name]}" for name in SENSORS)
    print(
        f"{SIDE}^3 bf16 for {SECONDS} s: {first:.0f} TFLOP/s in the first 3 s, {last:.0f} in the "
        f"last 10; then {told}"
    )


def nvidia_smi() -> str:
    """What nvidia-smi says of the sensors, a line for each GPU; nothing where it is not installed,
    as in some containers."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SENSORS)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:
        return ""


def sensors(text: str) -> Row:
    """The first GPU's readings; None for one that nvidia-smi does not give.

    `1980, 693.5, [N/A]` is 1980 MHz, 693.5 W and no temperature.
    """
    values = re.split(r"\s*,\s*", text.strip().partition("\n")[0])
    numbers = [float(x) if re.fullmatch(r"[\d.]+", x) else None for x in values]
    return dict(itertools.zip_longest(SENSORS, numbers[: len(SENSORS)]))


FACTS = {"varlen": varlen, "matmuls": matmuls, "transfers": transfers, "clock": clock}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.facts", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("fact", choices=FACTS)
    parser.add_argument("--json", type=Path, help="file to append one line to")

    def error(message: str) -> None:
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = error
    try:
        o = parser.parse_args(argv)
        if not torch.cuda.is_available():
            raise ValueError(f"{o.fact} needs a GPU; torch {torch.__version__} sees none")
        rows: list[Row] = []
        try:
            rows.extend(FACTS[o.fact]())
        finally:  # what there is, even if the run is interrupted
            if o.json:
                with o.json.open("a") as file:
                    file.write(json.dumps({"fact": o.fact, **machine(), "rows": rows}) + "\n")
        if any(row.get("wrong") for row in rows):
            raise ValueError(f"{o.fact}: an error is above twice the reference's in bf16")
    except (ValueError, OSError) as mistake:
        print(f"benchmarks.facts: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
