"""What `kernels.bench` prints, records and draws."""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from kernels.provenance import code, installed

Row = dict[str, Any]
FORM = "{:14} {:16} {:5} {:>7} {:>5} {:>6} {:>9} {:>9} {:>13} {:>5} {:>6} {:>8} {:>8}"
HEADING = FORM.format(
    "op",
    "implementation",
    "dtype",
    "N",
    "D",
    "V",
    "fwd ms",
    "+ bwd ms",
    "rate",
    "limit",
    "MiB",
    "error",
    "budget",
)


def machine(device: torch.device, copy_gbs: float) -> Row:
    """What the numbers depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [s.partition(": ")[2] for s in info.splitlines() if s.startswith("model name")]
        name = next(iter(names), platform.machine())
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "copy_gbs": copy_gbs,
        "kernels": kernels.implementation(device),
        "commit": code(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}
        | {name: installed(name) for name in ("triton", "trl", "liger-kernel")},
    }


def heading(about: Row, missing: list[str]) -> str:
    """The machine, what a CPU cannot show, and the peers that are not here."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    lines = [
        f"{about['device']}, {about['threads']} threads, copies {about['copy_gbs']:.0f} GB/s; "
        f"{versions}"
    ]
    if about["kernels"] != "triton":
        lines.append(
            f"measured: the {about['kernels']} implementation; the Triton kernels need a "
            "GPU, and their interpreter is never timed"
        )
    return "\n".join([*lines, *(f"absent: {peer}" for peer in missing)])


def line(row: Row) -> str:
    """A row of the table; the error is that of the output."""
    head = [row[key] or "-" for key in ("op", "implementation", "dtype", "N", "D", "V")]
    if "failed" in row:
        return f"{FORM.format(*head, *[''] * 7).rstrip()}  failed: {row['failed']}"
    what = next(iter(row["errors"]), None)
    allowed = row.get("budget", {}).get(what)
    times = ("-" if ms is None else f"{ms:.3f}" for ms in (row["forward_ms"], row["both_ms"]))
    return FORM.format(
        *head,
        *times,
        f"{row['rate']:.3g} {row['unit']}",
        f"{row['limit']:.0%}",
        "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
        "-" if what is None else f"{row['errors'][what]:.1e}",
        "-" if allowed is None else f"{allowed:.1e}",
    )


def verdict(rows: list[Row]) -> str:
    """Which of our two forwards without a gradient won."""
    ms = {row["implementation"].partition(" ")[0]: row.get("forward_ms") for row in rows}
    ours, fused = ms["ours"], ms["fused_forward"]
    if fused is None:
        return "linear_logprob wins: fused_forward failed"
    winner = "fused_forward" if fused < ours else "linear_logprob"
    return f"{winner} wins: {max(ours, fused) / min(ours, fused):.3f} x as fast as the other"


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory against N, a line for each implementation, a column for each dtype and
    vocabulary of the first op."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["op"] == rows[0]["op"] and "failed" not in row]
    panels = {"ms": lambda row: row["both_ms"] or row["forward_ms"]}
    if any(row["peak_mib"] for row in rows):
        panels["peak MiB beyond the inputs"] = lambda row: max(row["peak_mib"], 2**-8)  # a page
    columns = list(dict.fromkeys((row["dtype"], row["V"]) for row in rows))
    figure = Figure((4.2 * len(columns), 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(columns), squeeze=False, sharex=True, sharey="row")
    for (i, j), axis in np.ndenumerate(axes):
        dtype, V = columns[j]
        label, value = list(panels.items())[i]
        for name in dict.fromkeys(row["implementation"] for row in rows):
            own = [r for r in rows if (r["implementation"], r["dtype"], r["V"]) == (name, dtype, V)]
            width = 2.4 if name.startswith("ours") else 1.2
            axis.plot([r["N"] for r in own], [value(r) for r in own], "o-", lw=width, label=name)
        axis.loglog(base=2)
        axis.set(ylabel=label, xlabel="N")
        axis.label_outer()
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{rows[0]['op']}  {dtype}" + (f"  V {V}" if V else "") if i == 0 else "")
        axis.grid(color="#ececec")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, format="png", dpi=130)
    part.replace(path)
