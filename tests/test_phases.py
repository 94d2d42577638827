"""Seconds and memory by phase, the trace of a step, and a step in which the host reads nothing."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_dpo
import train_sft
from model_helpers import model, pairs
from run_helpers import DPO, SFT, run
from zephyr import lora, losses, optim, reference
from zephyr.architecture import PROJECTIONS
from zephyr.distributed import fsdp, group
from zephyr.metrics import phases
from zephyr.metrics.log import Log
from zephyr.metrics.means import Means
from zephyr.metrics.phases import Phases
from zephyr.run.guard import Guard
from zephyr.weights.masters import fill

CPU = torch.device("cpu")


def test_seconds_are_a_mean_over_the_steps_of_a_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    phase = Phases(CPU)
    for seconds in (1.0, 2.0, 5.0):
        with phase("forward"):
            now[0] += seconds
        with phase("data"):
            now[0] += 0.5
        now[0] += 100
    row = phase.read(steps=2)
    assert (row["seconds/forward"], row["seconds/data"]) == (4.0, 0.75)
    assert list(row) == ["seconds/data", "seconds/forward", "memory/peak"]
    assert 0.01 < row["memory/peak"] < 1000
    assert phase.read(steps=1) == {}, "it starts over"


def test_what_a_gpus_allocator_held_and_how_often_it_gave_back(monkeypatch):
    stats = {"allocated_bytes.all.peak": 0, "reserved_bytes.all.peak": 0, "num_alloc_retries": 0}
    cuda = SimpleNamespace(
        reset_peak_memory_stats=lambda: None,
        memory_stats=lambda: stats,
        synchronize=lambda: None,
        Event=lambda enable_timing: SimpleNamespace(
            record=lambda: None, elapsed_time=lambda other: 2000.0
        ),
    )
    monkeypatch.setattr(phases.torch, "cuda", cuda)
    phase, seen = Phases(torch.device("cuda")), []
    for allocated, reserved, retries in ((1, 4, 2), (3, 9, 2), (2, 8, 5)):
        with phase("forward"):
            stats |= {
                "allocated_bytes.all.peak": allocated * 2**30,
                "reserved_bytes.all.peak": reserved * 2**30,
                "num_alloc_retries": retries,
            }
        if retries == 2 and allocated == 3 or retries == 5:
            seen.append(phase.read(steps=1))
    assert [row["memory/forward"] for row in seen] == [3, 2]
    assert [row["memory/reserved"] for row in seen] == [9, 8]
    assert [row["memory/retries"] for row in seen] == [2, 3], "those since the line before"
    assert [row["seconds/forward"] for row in seen] == [4, 2]


def test_a_gpu_whose_memory_is_short_costs_one_line(tmp_path, monkeypatch, capsys):
    with Log(tmp_path, 4, ["loss"]) as log:
        for step, retries in enumerate((0, 3, 1, 0), 1):
            monkeypatch.setattr(log.phase, "read", lambda _, n=retries: {"memory/retries": n})
            log.add(1, {"loss": 1.0})
            log.step(step)
    err = capsys.readouterr().err
    assert err.count("step 2: the GPU's memory is short") == err.count("memory is short") == 1


def test_a_phase_has_a_name_of_the_list():
    with pytest.raises(AssertionError, match="thinking"), Phases(CPU)("thinking"):
        pass


def test_a_run_says_where_its_time_went(place, tmp_path):
    rows = run(train_dpo, place, tmp_path / "run", *DPO, "--save-every", "1", "--batch", "4")
    spent = [sum(row[f"seconds/{name}"] for name in phases.NAMES) for row in rows[1:]]
    whole = [4 / row["pairs_per_second"] + row["seconds/checkpoint"] for row in rows[1:]]
    assert all(0.2 * b < a < 1.02 * b for a, b in zip(spent, whole, strict=True)), (spent, whole)
    for row in rows:
        assert row["unshared_per_second"] > 1.2 * row["tokens_per_second"]
        assert min(row["seconds/backward"], row["seconds/optimizer"]) > 0
    rows = run(train_sft, place, tmp_path / "sft", *SFT)
    assert all("unshared_per_second" not in row for row in rows), "documents share nothing"


def test_a_step_can_be_traced(place, tmp_path, capsys):
    run(train_dpo, place, tmp_path / "run", *DPO, "--profile", "2")
    folder = tmp_path / "run" / "profile"
    assert {p.name for p in folder.iterdir()} == {"step-000002-rank-0.json.gz", "step-000002.txt"}
    with gzip.open(folder / "step-000002-rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    head, *lines = (folder / "step-000002.txt").read_text().splitlines()
    assert head.split() == ["ms", "share", "calls", "kernel"] and len(lines) == phases.DEAREST
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times, reverse=True) and "aten::mm" in "".join(lines)
    assert "step 2, its trace and this in" in capsys.readouterr().err


class Reads(TorchDispatchMode):
    """Counts where the host would wait for a device: values read, shapes that depend on values."""

    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().partition("::")[2].partition(".")[0].lstrip("_")
        if name in [w.lstrip("_") for w in self.waits]:
            self.found.append(op.name())
        return op(*args, **(kwargs or {}))


def test_the_host_reads_nothing_inside_a_step(place, tmp_path, monkeypatch):
    """From a micro-batch's log-probs to the update. Before that a CPU alone reads: the sizes of its
    segments, and its targets to check them."""
    reads, calls = Reads(), []

    def watched(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            with reads:
                return function(*args, **kwargs)

        return call

    inside = (
        (losses, "preference"),
        (losses, "sft"),
        (torch.Tensor, "backward"),
        (Guard, "broken"),
        (Means, "add"),
        (optim, "step"),
    )
    for owner, name in inside:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    for script, flags in ((train_dpo, DPO), (train_sft, SFT)):
        run(script, place, tmp_path / script.__name__, *flags)
        run(script, place, tmp_path / f"{script.__name__} bf16", *flags, "--precision", "bf16")
    assert {name for _, name in inside} == set(calls)
    assert reads.found == []


# torch calls the check of syncs a prototype; compiling does what torch warns of
@pytest.mark.filterwarnings("ignore")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp32", "split", "lora"])
@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
def test_on_a_gpu_the_host_waits_for_nothing(recompute, kind):
    ranks = group.start()
    masters, adapters = "split" if kind == "split" else "fp32", None
    if kind == "lora":
        adapters = lora.Spec(8, 16, PROJECTIONS)
    m = fsdp.build(model().config, ranks, "bf16", recompute, masters, adapters=adapters)
    with torch.no_grad():
        for name, p in m.named_parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            own = lora.is_adapter(name)
            fill(p, local, torch.ones_like(p) if own else model().get_parameter(name))
    optimizer, guard = optim.adamw(m, 0.0), Guard("stop", str, ranks)
    batch = pairs(0).pinned()
    try:
        for step in range(3):
            # the first step compiles, and makes the optimizer's moments
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            here = batch.to(ranks.device)
            reference_2P = torch.zeros(2 * len(batch.pairs), device=ranks.device)
            if kind == "lora":
                reference_2P = reference.live(lora.without(m))(here)
            found = losses.preference("dpo", m(here), here.response_N, reference_2P, beta=0.1)
            found["loss"].sum().backward()
            guard.saw(batch.pairs, found["loss"])
            norm = optim.step(optimizer, 1e-3, 1.0, guard.broken())
            guard.seen.clear()
        torch.cuda.set_sync_debug_mode("default")
        assert norm.isfinite()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        group.finish()
