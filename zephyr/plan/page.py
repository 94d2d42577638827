"""The page that the planner prints of a job."""

from zephyr.plan import costs
from zephyr.plan.fit import FRAGMENTS, GIB, POLICIES, again, largest
from zephyr.plan.job import Job, remedy


def report(job: Job) -> str:
    """Return the page that the command prints."""
    settled = job.settled()
    left = settled.left() / GIB
    if left >= 0:
        verdict = f"fits, with {left:.1f} GiB to spare"
    else:
        cure = remedy(job)
        cure = f"enough would be {cure}" if cure else "no flag and no number of GPUs is enough"
        verdict = f"does not fit, by {-left:.1f} GiB; {cure}"
    sent = [_sent(settled)] if job.ranks > 1 else []
    sections = [_memory(settled), _policies(settled), _flop(settled), *sent, _hours(settled)]
    return "\n\n".join([*sections, verdict])


def _memory(job: Job) -> str:
    t, parts = job.t, job.parts()
    rank = f", adapters of rank {t.lora_rank}" if t.lora_rank else ""
    notes = {
        "frozen weights": "bf16" if t.precision != "fp32" else "fp32",
        "masters": "bf16 weights, and the other 16 bits" if t.masters == "split" else "fp32" + rank,
        "gradients": "fp32",
        "bf16 copies": "of the adapters, while they compute",
        "moments": f"AdamW's, {t.adam_state}",
        "gathered weights": f"reshard {t.reshard}",
        "gradient buffers": "before reduce-scatter",
        "gradients all-reduced": "of a micro-batch, until its backward ends",
        "activations": f"{job.microbatch():,.0f} tokens, recompute {t.recompute}",
        "context and fragments": f"assumed: 1 GiB, and {FRAGMENTS:.0%} of the rest",
    }
    rows = [(name, f"{x / GIB:.2f}", notes.get(name, "")) for name, x in parts.items()]
    rows.append(("in all", f"{sum(parts.values()) / GIB:.2f}", f"of {job.card.gib}"))
    return _table(("GiB of a GPU", "", ""), rows, left=(0, 2))


def _policies(job: Job) -> str:
    rows, one = [], job.item.times(1 / job.item.tokens)
    how = job.itemsize, job.t.masters == "split", job.adapters
    for recompute in POLICIES:
        size = costs.activations(job.c, one.times(1000), recompute, *how) / GIB
        most = largest(job.c, job.t, job.memory, job.ranks, recompute, True, one, 1 << 20)
        shown = f"{most:,}" if most >= job.item.tokens else "none fits"
        more = again(job.c, job.item, recompute, job.adapters)
        rows.append((recompute, f"{size:.2f}", shown, f"{more:.1%}"))
    return _table(("recompute", "GiB per 1,000 tokens", "largest micro-batch", "more time"), rows)


def _flop(job: Job) -> str:
    parts, t, a = costs.forward(job.c, job.item, job.adapters), job.t, job.adapters
    flop = {
        "blocks' matmuls": (2 if a else 3) * (parts["projections"] + parts["mlp"]),
        "attention": 3 * parts["attention"],
        "head": (2 if a else 3) * parts["head"],
        **({"adapters": 3 * parts["adapters"]} if a else {}),
        "forward and backward": job.useful,
        "recomputed": costs.recomputed(job.c, job.item, t.recompute, a),
    }
    if t.table == "dpo":
        once = "reference, each epoch" if t.reference == "live" else "reference, once"
        flop[once] = sum(parts.values())
    rows = [(name, f"{x / 1e12:.2f}", f"{x * job.items / 1e18:.3f}") for name, x in flop.items()]
    return _table(("FLOP", f"T per {'pair' if t.table == 'dpo' else 'chunk'}", "E per epoch"), rows)


def _sent(job: Job) -> str:
    rows = [(name, f"{x / 1e9:.2f}", f"{s:.3f}") for name, (x, s) in job.traffic().items() if x]
    times = job.seconds()
    bare = (
        times["step"]
        - times["compute"]
        - times["forward"] * (getattr(job.t, "reference", "") == "live")
    )
    hidden = min(1.0, max(0.0, 1 - bare / times["communication"]))
    rows += [("compute", "", f"{times['compute']:.3f}"), ("hidden behind it", "", f"{hidden:.0%}")]
    kind = f"HSDP, {job.t.replicas} replicas" if job.t.replicas > 1 else "FSDP"
    return _table((f"communication of a GPU and step, {kind}", "GB", "seconds"), rows)


def _hours(job: Job) -> str:
    t, times, n = job.t, job.seconds(), job.microbatches()
    steps = -(-job.items // t.batch)
    passes = {"an epoch": steps * times["step"]}
    if t.table == "dpo" and t.reference == "cached":
        passes["the reference pass"] = steps * times["forward"]
    passes["the run"] = sum(passes.values()) + (t.epochs - 1) * passes["an epoch"]
    rows = [(name, f"{s / 3600:.3f}", f"{s / 3600 * job.ranks:.2f}") for name, s in passes.items()]
    count = f"a step of {t.batch}, {n} micro-batch{'es' * (n > 1)} a GPU"
    rows.insert(0, (count, f"{times['step']:.2f} s", ""))
    peak = f"{job.efficiency:.0%} of {job.card.flops / 1e12:,.0f} TFLOP/s"
    ours = "assumed" if t.precision != "fp32" else "bf16's, which fp32 is far from"
    return _table((f"time at {peak}, {ours}", "hours", "GPU-hours"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> str:
    """Return aligned columns under a head, the first column indented. Columns not in `left` stand
    to the right."""
    lines = [head, *((f"  {name}", *rest) for name, *rest in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(
            f"{x:<{w}}" if i in left else f"{x:>{w}}"
            for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
