"""Everything there is to measure on one GPU, in under ten minutes: `make bench-gpu`.

    python -m benchmarks.gpu [--out FOLDER] [--parts kernels tests ...]

Each part is a process with a time limit of its own, so that one that fails or hangs costs no other.
The folder then holds log.txt, facts.jsonl, bench.jsonl, bench.png and vs_trl.jsonl.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 9.5
GRACE = 15  # seconds in which an interrupted part may write down what it has


class Part(NamedTuple):
    about: str
    seconds: int
    command: tuple[str, ...]  # of this Python, {out} being the folder
    needs: tuple[str, ...] = ()  # modules without which it is left out


def fact(name: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.facts", name, "--json", "{out}/facts.jsonl")


BENCH = ("-m", "kernels.bench", "--json", "{out}/bench.jsonl")
# without matplotlib the figure is missing, and no number
PLOT = ("--plot", "{out}/bench.png") if importlib.util.find_spec("matplotlib") else ()
GO_ON = "--continue-on-collection-errors"  # where a package of other tests is missing
PARTS = {  # in the order of what a short lease should not miss
    "varlen": Part("variable-length attention against the reference", 90, fact("varlen")),
    "matmuls": Part("Mistral-7B's linear layers", 60, fact("matmuls")),
    "transfers": Part("copy bandwidths", 40, fact("transfers")),
    "kernels": Part("every op at V = 32000", 240, (*BENCH, "--v", "32000", *PLOT)),
    "tests": Part("pytest -m gpu", 300, ("-m", "pytest", "-q", "-m", "gpu", GO_ON)),
    "wide": Part(
        "the head at V = 128256",
        120,
        (*BENCH, "--v", "128256", "--op", "linear_logprob", "no_grad", "row_kernel"),
    ),
    "clock": Part("a minute of matmuls", 90, fact("clock")),
    "trl": Part(
        "DPO training of a 1.1 B model beside TRL's",
        120,
        (
            "-m",
            "benchmarks.vs_trl",
            "--shape",
            "1b",
            "--precision",
            "bf16",
            "--steps",
            "4",
            "--batch",
            "16",
            "--trl-pairs",
            "8",
            "--json",
            "{out}/vs_trl.jsonl",
        ),
        ("benchmarks.vs_trl", "trl", "datasets"),
    ),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises ValueError for a mistaken one."""
    about = "parts:\n" + "".join(f"  {name:10} {part.about}\n" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__.partition("\n")[0],
        epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "h200")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of the results [{out}]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="[all]")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"in all [{MINUTES}]")

    def error(message: str) -> None:
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = error
    o = parser.parse_args(argv)
    if not o.minutes > 0:
        raise ValueError(f"--minutes {o.minutes} must be above 0")
    return o


def attempt(part: Part, out: Path, seconds: float, log) -> str:
    """Run a part, its output to the console and to `log`; returns how it ended. At its limit it is
    interrupted, so that it can write down what it has, and killed soon after."""
    absent = [name for name in part.needs if not importlib.util.find_spec(name)]
    if absent:
        return f"left out: it needs {', '.join(absent)}"
    if seconds < 1:
        return "left out: no time left"
    command = [sys.executable, *(word.replace("{out}", str(out)) for word in part.command)]
    began = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        timers = [
            threading.Timer(after, os.killpg, (process.pid, sent))
            for after, sent in ((seconds, signal.SIGINT), (seconds + GRACE, signal.SIGKILL))
        ]
        try:
            for timer in timers:
                timer.start()
            for text in process.stdout:
                print(text, end="", flush=True)
                log.write(text)
            code = process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if code and time.monotonic() - began >= seconds:
        return f"stopped at {seconds:.0f} s"
    return f"failed: exit status {code}" if code else "ok"


def summary(path: Path) -> list[str]:
    """What `kernels.bench` wrote, in a line for each size of the trained head: our time as a
    multiple of the bare matmuls', and the peers' as multiples of ours."""
    runs = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    groups: dict[tuple, list] = {}
    for row in (row for run in runs for row in run["rows"] if "failed" not in row):
        groups.setdefault((row["op"], row["dtype"], row["N"], row["V"]), []).append(row)
    lines = []
    for (op, dtype, N, V), (ours, *others) in groups.items():
        if op in ("linear_logprob", "linear_dpo"):
            ms = ours["both_ms"]
            ratios = ", ".join(f"{r['implementation']} {r['both_ms'] / ms:.2f} x" for r in others)
            lines.append(
                f"{op} {dtype} N {N} V {V}: {1 / ours['limit']:.3f} x the bare matmuls, "
                f"{ours['peak_mib']:.0f} MiB; {ratios}"
            )
    return lines


def run(o: argparse.Namespace) -> bool:
    """Run the parts; returns whether none failed."""
    o.out.mkdir(parents=True, exist_ok=True)
    out, began = o.out.resolve(), time.monotonic()
    table, ends = [], []
    whole = set(o.parts) == set(PARTS)
    if whole:  # some parts alone are added to what there is
        for name in ("facts.jsonl", "bench.jsonl", "vs_trl.jsonl"):
            (out / name).unlink(missing_ok=True)
    with (out / "log.txt").open("w" if whole else "a") as log:
        for name in (name for name in PARTS if name in o.parts):
            title = f"\n== {name}: {PARTS[name].about}\n"
            print(title, end="", flush=True)
            log.write(title)
            start = time.monotonic()
            left = 60 * o.minutes - (start - began) - GRACE
            ends.append(attempt(PARTS[name], out, min(PARTS[name].seconds, left), log))
            table.append(f"{name:10} {time.monotonic() - start:5.0f} s  {ends[-1]}")
        text = "\n".join(["", *summary(out / "bench.jsonl"), *table, f"all of it: {out}"])
        print(text)
        log.write(text + "\n")
    return all(end == "ok" or end.startswith("left out: it needs") for end in ends)


def main(argv: list[str] | None = None) -> None:
    try:
        o = parse(argv)
        if not torch.cuda.is_available():
            raise ValueError(f"torch {torch.__version__} sees no GPU; `make bench` measures a CPU")
        good = run(o)
    except (ValueError, OSError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
