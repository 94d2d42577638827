"""Each op beside its peers and the hardware's limit: exact first, then how fast and how large.

    python -m kernels.bench                                     every op, at this machine's sizes
    python -m kernels.bench --op linear_logprob --n 8192 --v 32000 --json out.jsonl --plot out.png

C rows of a chunk  V vocabulary
"""

import argparse
import gc
import importlib.util
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import kernels
from kernels import fused_logprob, jit
from kernels.bench import budget, peers, report, timing
from kernels.bench.cases import DTYPES, HEADS, LOSSES, Case, attention
from kernels.bench.report import Row

ABOUT = """An op is timed only if our error, against float64, is within its budget at every size:
twice plain PyTorch's in the same dtype and, for half-precision inputs, a tenth of the error of
log-probs whose logits are rounded to that dtype. On a CPU the torch implementation is measured, and
every contender runs under the same allocator settings (glibc's thresholds, as the training scripts
set them). On a GPU times are the device's, and inputs rotate among sets larger than its cache.
Where there is a backward, all but the first time are of forward and backward.

limit  the share reached of what bounds the op, measured in the same run: the bare vendor matmuls of
       the same shape, one forward and three with the backward, or the bandwidth of a copy
MiB    peak memory beyond the inputs"""
SIZES = {
    "cuda": {"n": [2048, 8192, 16384], "d": [4096], "v": [32000, 128256], "dtype": ["bf16"]},
    "cpu": {"n": [128, 512, 1024], "d": [256], "v": [32000], "dtype": ["fp32", "bf16"]},
}
TOKENS = {"cuda": [16384, 2**20], "cpu": [4096, 2**18]}  # the n of dpo_loss and response_sums
REPEAT = {"cuda": 50, "cpu": 9}
COPIED = {"cuda": 2**32, "cpu": 2**28}  # bytes, to find the bandwidth
TILES = [8192, 4096, 16384, 32768]  # of a row kernel that reads twice
WARPS = [16, 8, 32]
PACK = 16384  # the n of attention
SIDE = 4096  # width of the matmuls that bound it
OPS = (*HEADS, *LOSSES, "attention", "row_kernel")
# what has no check of its own, and the ops that it is made of
MADE_OF = {"linear_dpo": ("linear_logprob", "dpo_loss"), "row_kernel": ("linear_logprob",)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises ValueError for one that is unknown or out of range."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__.partition("\n")[0],
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = SIZES[kind]
    add = parser.add_argument
    add(
        "--op",
        nargs="+",
        choices=OPS,
        default=OPS,
        metavar="OP",
        help=f"of {', '.join(OPS)}, the last two on a GPU only [all]",
    )
    add(
        "--n",
        nargs="+",
        type=int,
        help=f"rows or tokens {sizes['n']}, of losses {TOKENS[kind]}, of attention {PACK}",
    )
    add("--d", nargs="+", type=int, default=sizes["d"], help=f"width {sizes['d']}")
    add("--v", nargs="+", type=int, default=sizes["v"], help=f"vocabulary {sizes['v']}")
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=sizes["dtype"],
        metavar="DTYPE",
        help=f"of {', '.join(DTYPES)} [{' '.join(sizes['dtype'])}]",
    )
    add("--repeat", type=int, default=REPEAT[kind], help=f"runs of a median [{REPEAT[kind]}]")
    add("--json", type=Path, help="file to append one line to: machine, versions, every row")
    add("--plot", type=Path, help="PNG: time and memory against n")

    def error(message: str) -> None:
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = error
    o = parser.parse_args(argv)
    o.tokens, o.packs, o.n = o.n or TOKENS[kind], o.n or [PACK], o.n or sizes["n"]
    o.device = torch.device(kind)
    for flag, least in (("n", 2), ("d", 1), ("v", 2), ("repeat", 1)):
        values = [o.repeat] if flag == "repeat" else getattr(o, flag)
        if min(values) < least:
            raise ValueError(f"--{flag} {min(values)} must be at least {least}")
    for flag in ("json", "plot"):
        if (path := getattr(o, flag)) and not path.parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no folder {path.parent}")
    if o.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install zephyr-dpo[plot]")
    if kind == "cpu" and "attention" in o.op and o.op is not OPS:
        raise ValueError("--op attention needs a GPU: on a CPU attention is torch's own")
    if kernels.implementation(o.device) == "triton" and jit.INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET=1: the interpreter's times say nothing about a GPU's; unset it"
        )
    return o


def cases(o: argparse.Namespace) -> Iterator[Case]:
    for op, make in HEADS.items():
        if op in o.op:
            for dtype, D, V, N in itertools.product(o.dtype, o.d, o.v, o.n):
                yield make(dtype, N, D, V, o.device)
    for op, make in LOSSES.items():
        if op in o.op:
            yield from (make(N, o.device) for N in o.tokens)
    if "attention" in o.op and o.device.type == "cuda":
        for dtype, N in itertools.product(o.dtype, o.packs):
            yield attention(dtype, N, o.device)


def verify(case: Case, device: torch.device, faults: dict[str, str]) -> dict[str, float]:
    """Return the budget of each result. If an error of ours is beyond it, or the call fails, a line
    says so in `faults`, by the op's name or, for a candidate, by its own."""
    torch.manual_seed(0)
    tensors, c = case.draw(), torch.randn(case.outputs, device=device)
    allowed = budget.allowed(case, tensors, c)
    for name in ("ours", "fused_forward"):
        if name not in case.contenders:
            continue
        at_fault = case.op if name == "ours" else name
        try:
            found = budget.whole_errors(case, case.contenders[name], tensors, c)
        except Exception as error:
            traceback.print_exc()
            why = f"{name} failed: {type(error).__name__}: {error}".splitlines()[0]
            faults.setdefault(at_fault, f"{case}: {why}; {at_fault} is not timed")
            continue
        for what, error in found.items():
            if not error <= allowed[what]:  # so that a NaN is an error
                why = f"the error of {what} ({name}) is {error:.1e}, beyond its budget of "
                why += f"{allowed[what]:.1e}; {at_fault} is not timed"
                faults.setdefault(at_fault, f"{case}: {why}")
        told = ", ".join(f"{what} {e:.1e} of {allowed[what]:.1e}" for what, e in found.items())
        print(f"errors: {case} ({name}): {told}", flush=True)
    return allowed


def measure(case: Case, o: argparse.Namespace, copy_gbs: float) -> list[Row]:
    """A row for each contender. A peer's failure is a result: it may need too much memory."""
    gc.collect()  # what the last case left would count as memory held before
    torch.compiler.reset()  # so that each peer is compiled for this size
    torch.manual_seed(0)
    first = case.draw()
    count = timing.rotation(sum(x.nbytes for x in first), o.device)
    sets = [first, *(case.draw() for _ in range(count - 1))]
    c = torch.randn(case.outputs, device=o.device)
    rows, forward, both = {}, {}, {}
    for name, run in case.contenders.items():
        label = f"ours ({kernels.implementation(o.device)})" if name == "ours" else name
        rows[name] = {
            "op": case.op,
            "implementation": label,
            "dtype": case.dtype,
            "N": case.N,
            "D": case.D,
            "V": case.V,
        }
        calls = (partial(only, run, case.leaves), partial(back, run, case.leaves, c))
        try:
            for call in calls[: 1 + bool(case.leaves)]:
                call(*first)
            rows[name] |= {
                "peak_mib": timing.peak_mib(call, first),
                "errors": budget.errors(case, run, first, c),
            }
        except Exception as error:
            if name == "ours":
                raise
            rows[name]["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        forward[name], both[name] = calls
    if case.flops:
        forward["limit"], both["limit"] = bound(case, first)
    forward_ms = timing.medians(forward, sets, o.repeat)
    both_ms = timing.medians(both, sets, o.repeat) if case.leaves else {}
    for name in forward.keys() & rows.keys():
        rows[name] |= {"forward_ms": forward_ms[name], "both_ms": both_ms.get(name)}
        rows[name] |= rate(case, both_ms or forward_ms, name, copy_gbs)
    return list(rows.values())


def only(run, leaves: int, *tensors: Tensor) -> None:
    with torch.set_grad_enabled(leaves > 0):
        run(*tensors)


def back(run, leaves: int, c: Tensor, *tensors: Tensor) -> None:
    budget.results(run, list(tensors), leaves, c)


def bound(case: Case, tensors: list[Tensor]) -> tuple[Callable, Callable]:
    """The bare matmuls that an op has in it or, for attention, has the FLOPs of."""
    if case.V:
        return timing.matmuls(*tensors[:2])
    rows = max(1, case.flops // (2 * SIDE * SIDE))
    h_ND, w_VD = (tensors[0].new_empty(n, SIDE).normal_() for n in (rows, SIDE))
    one, three = timing.matmuls(h_ND, w_VD)
    return lambda *_: one(h_ND, w_VD), lambda *_: three(h_ND, w_VD)


def rate(case: Case, ms: dict[str, float], name: str, copy_gbs: float) -> Row:
    """What was reached per second, and its share of the limit.

    A head is 2NDV FLOPs, and attention 4E for each pair of a query and a key that it sees in each
    head; three times that with the backward. A loss must read 12 bytes of each token (its log-prob,
    its response), and its backward write 4.
    """
    if case.flops is None:
        gbs = 16 * case.N / ms[name] / 1e6
        return {"rate": gbs, "unit": "GB/s", "limit": gbs / copy_gbs}
    flops = (3 if case.leaves else 1) * case.flops
    return {"rate": flops / ms[name] / 1e9, "unit": "TFLOP/s", "limit": ms["limit"] / ms[name]}


def sweep(o: argparse.Namespace, copy_gbs: float) -> Iterator[Row]:
    """The row kernel alone, with its gradient, at other launch settings: it reads 4 bytes of each
    logit and writes 2 of its gradient."""
    C = fused_logprob.ROWS["cuda"]
    for V in o.v:
        sets = [logits(C, V, o.device) for _ in range(2)]
        one_read = V <= fused_logprob.ONE_READ
        for tile in [1 << (V - 1).bit_length()] if one_read else TILES:
            for warps in WARPS:
                call = partial(launch, tile, warps, one_read)
                call(*sets[0])
                ms = timing.medians({"": call}, sets, o.repeat)[""]
                gbs = 6 * C * V / ms / 1e6
                yield {
                    "op": "row_kernel",
                    "implementation": f"{tile} x {warps} warps",
                    "N": C,
                    "dtype": "bf16",
                    "D": None,
                    "V": V,
                    "forward_ms": ms,
                    "both_ms": None,
                    "peak_mib": None,
                    "errors": {},
                    "budget": {},
                    "rate": gbs,
                    "unit": "GB/s",
                    "limit": gbs / copy_gbs,
                }


def logits(C: int, V: int, device: torch.device) -> list[Tensor]:
    """What the row kernel takes: logits, targets, and room for its results."""
    z_CV, targets_C = 2 * torch.randn(C, V, device=device), torch.randint(V, (C,), device=device)
    g_CV = torch.empty(C, V, dtype=torch.bfloat16, device=device)
    return [z_CV, targets_C, *torch.empty(2, C, device=device).unbind(), g_CV]


def launch(tile: int, warps: int, one_read: bool, *tensors: Tensor) -> None:
    C, V = tensors[0].shape
    fused_logprob.row_kernel[(C,)](*tensors, V, 1.0, TILE=tile, ONE_READ=one_read, num_warps=warps)


def run(o: argparse.Namespace) -> None:
    """Check every case, then time those whose ops are exact everywhere; exits with 1 if one is not.
    What there is by then is recorded even if the run is interrupted."""
    if o.device.type == "cpu":
        timing.keep_buffers()
    copy_gbs = timing.copy_gbs(o.device, COPIED[o.device.type], o.repeat)
    about = report.machine(o.device, copy_gbs)
    print(report.heading(about, peers.missing(o.device)), flush=True)
    checked, faults = list(cases(o)), {}
    budgets = {str(x): verify(x, o.device, faults) for x in checked if x.op not in MADE_OF}

    def sound(op: str) -> bool:
        return not faults.keys() & {op, *MADE_OF.get(op, ())}

    for line in faults.values():
        print(line, flush=True)
    print(report.HEADING, flush=True)
    rows: list[Row] = []
    try:
        for case in (case for case in checked if sound(case.op)):
            if "fused_forward" in faults:
                case.contenders.pop("fused_forward", None)
            own = measure(case, o, copy_gbs)
            rows += [row | {"budget": budgets.get(str(case), {})} for row in own]
            print(*map(report.line, rows[-len(own) :]), sep="\n", flush=True)
            if "fused_forward" in case.contenders:
                print(report.verdict(own))
        if "row_kernel" in o.op and o.device.type == "cuda" and sound("row_kernel"):
            for row in sweep(o, copy_gbs):
                rows.append(row)
                print(report.line(row), flush=True)
    finally:
        if o.json:
            with o.json.open("a") as file:
                file.write(json.dumps(about | {"rows": rows}) + "\n")
    if o.plot and rows:
        report.plot(rows, o.plot)
    if faults:
        sys.exit("\n".join(f"kernels.bench: {line}" for line in faults.values()))


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        print(f"kernels.bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
