"""The benchmarks' own arithmetic: budgets that catch an error, tables, files, limits of time."""

import io
import json
import math
import os
import runpy
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import kernels
from benchmarks import facts, gpu
from helpers import WORKERS
from kernels import jit, provenance, reference
from kernels.bench import __main__ as bench
from kernels.bench import budget, cases, peers, report, timing
from zephyr.packing import Pair, pack_pairs

pytestmark = pytest.mark.tools

CPU = torch.device("cpu")
TINY = ["--n", "3", "5", "--d", "8", "--v", "17", "--repeat", "2"]
FIELDS = {
    "op",
    "implementation",
    "dtype",
    "N",
    "D",
    "V",
    "forward_ms",
    "both_ms",
    "rate",
    "unit",
    "limit",
    "peak_mib",
    "errors",
    "budget",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No compiler, whose work takes long, and no large buffers."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("ZEPHYR_KERNELS", raising=False)
    monkeypatch.setattr(bench, "COPIED", {"cpu": 2**16, "cuda": 2**28})
    monkeypatch.setattr(timing, "CPU_CACHE", 2**12)
    monkeypatch.setattr(timing, "keep_buffers", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_run(tmp_path, capsys):
    file, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    bench.main([*TINY, "--json", str(file), "--plot", str(picture)])
    bench.main([*TINY, "--json", str(file), "--op", "response_sums"])
    out = capsys.readouterr().out
    assert "measured: the torch implementation" in out
    assert "absent: compile" in out and "absent: liger" in out
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 and picture.read_bytes().startswith(b"\x89PNG")
    assert lines[0]["device"] and lines[0]["versions"]["torch"] == torch.__version__
    assert "commit" in lines[0] and lines[0]["kernels"] == "torch"
    rows = lines[0]["rows"]
    assert {row["op"] for row in rows} == set(cases.HEADS) | set(cases.LOSSES)
    assert {(row["N"], row["dtype"]) for row in rows if row["V"]} == {
        (N, dtype) for N in (3, 5) for dtype in ("fp32", "bf16")
    }
    for row in rows:
        assert row.keys() == FIELDS
        assert row["forward_ms"] > 0 and (row["both_ms"] is None) == (row["op"] == "no_grad")
        assert all(math.isfinite(error) for error in row["errors"].values())
        if row["implementation"] == "ours (torch)" and row["op"] != "linear_dpo":
            assert all(row["errors"][what] <= most for what, most in row["budget"].items())
        assert report.line(row) in out


def off(run, share: float, gradient: bool):
    """`run`, its output or only its gradient larger by `share`."""

    def wrong(*tensors):
        out = run(*tensors)
        return out + share * (out - out.detach()) if gradient else out * (1 + share)

    return wrong


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_head_one_percent_off_stops_the_run(dtype, gradient, monkeypatch):
    monkeypatch.setattr(kernels, "linear_logprob", off(kernels.linear_logprob, 0.01, gradient))
    monkeypatch.setattr(bench, "measure", None)
    what, error = ("dh", r"(1\..e-02|9\..e-03)") if gradient else ("logprob", "1.0e-02")
    message = (
        rf"^kernels.bench: linear_logprob {dtype} N 3 D 8 V 17: the error of {what} .ours. "
        rf"is {error}, beyond its budget of .*; linear_logprob is not timed$"
    )
    with pytest.raises(SystemExit, match=message) as stop:
        bench.main([*TINY, "--op", "linear_logprob", "--dtype", dtype])
    assert isinstance(stop.value.code, str)  # Python prints it, and exits with 1


@pytest.mark.parametrize("op", ["dpo_loss", "response_sums"])
def test_a_loss_off_stops_the_run(op, monkeypatch):
    right = getattr(kernels, op)

    def wrong(*tensors):
        out = right(*tensors)
        return out * 1.0001 if op == "response_sums" else out._replace(loss_P=out.loss_P * 1.0001)

    monkeypatch.setattr(kernels, op, wrong)
    with pytest.raises(SystemExit, match="beyond its budget"):
        bench.main([*TINY, "--op", op])


def test_a_single_pair_that_plain_has_right_by_luck_is_no_budget():
    case = cases.dpo_loss(64, torch.device("cpu"))
    for seed in range(20):
        torch.manual_seed(seed)
        tensors, c = case.draw(), torch.randn(case.outputs)
        found = budget.whole_errors(case, case.contenders["ours"], tensors, c)
        for what, most in budget.allowed(case, tensors, c).items():
            assert found[what] <= most, (seed, what)


def test_a_nan_is_beyond_every_budget(monkeypatch):
    right = kernels.linear_logprob
    monkeypatch.setattr(kernels, "linear_logprob", lambda *x: right(*x) * float("nan"))
    with pytest.raises(SystemExit, match="the error of logprob .ours. is nan"):
        bench.main([*TINY, "--op", "no_grad"])


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_wrong_costs_no_other_op_its_times(fails, monkeypatch, tmp_path, capsys):
    """A loss that is off, or fails, takes along what is made of it; a candidate goes alone."""

    def wrong(*tensors):
        if fails:
            raise RuntimeError("no kernel image\nand more")
        return kernels.linear_logprob(*tensors) * 1.01

    right, file = kernels.dpo_loss, tmp_path / "x"
    loss_off = lambda *x: right(*x)._replace(loss_P=right(*x).loss_P * 1.01)  # noqa: E731
    monkeypatch.setattr(kernels, "dpo_loss", wrong if fails else loss_off)
    monkeypatch.setattr(cases, "candidate", lambda device: {"fused_forward": wrong})
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, "--dtype", "fp32", "--json", str(file)])
    lines = stop.value.code.splitlines()
    names = ["fused_forward", "dpo_loss"]
    assert [line.rpartition("; ")[2] for line in lines] == [f"{x} is not timed" for x in names]
    assert all(("failed: RuntimeError: no kernel image;" in line) == fails for line in lines)
    rows = json.loads(file.read_text())["rows"]
    assert {row["op"] for row in rows} == {"linear_logprob", "no_grad", "response_sums"}
    assert "fused_forward" not in {row["implementation"] for row in rows}


MISTAKES = [
    (["--n", "4", "1"], "--n 1 must be at least 2"),
    (["--v", "1"], "--v 1 must be at least 2"),
    (["--repeat", "0"], "--repeat 0 must be at least 1"),
    (["--op", "fast"], "argument --op: invalid choice: 'fast'"),
    (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    (["--n", "many"], "argument --n: invalid int value: 'many'"),
    (["--json", "no/such/file"], "--json no/such/file: there is no folder no/such"),
    (["--quick"], "unrecognized arguments: --quick"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda x: str(x)[:30])
def test_a_mistake_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"kernels.bench: {message}")
    assert error.count("\n") == 1


def test_what_cannot_be_done_is_said_first(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^--plot needs matplotlib: pip install zephyr-dpo.plot.$"):
        bench.parse(["--plot", "x.png"])
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    monkeypatch.setattr(jit, "INTERPRETED", True)
    with pytest.raises(ValueError, match="^TRITON_INTERPRET=1: the interpreter's times say "):
        bench.parse([])


def test_a_peer_that_fails_is_a_row(monkeypatch, capsys, tmp_path):
    def fails(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(peers, "narrow", fails)
    bench.main([*TINY, "--op", "no_grad", "--dtype", "fp32", "--plot", str(tmp_path / "x.png")])
    assert capsys.readouterr().out.count("failed: RuntimeError: out of memory\n") == 2


def test_an_interrupted_run_is_recorded(monkeypatch, tmp_path):
    real = bench.measure
    done = []

    def measure(*args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*TINY, "--op", "no_grad", "--json", str(tmp_path / "x")])
    assert {row["N"] for row in json.loads((tmp_path / "x").read_text())["rows"]} == {3}


@pytest.mark.parametrize("N", [1, 64, 130])
def test_errors_of_a_whole_run_are_those_of_its_sample(N):
    """The specification in fp32 is right to rounding; one row in the sample that is wrong shows."""
    case = cases.linear_logprob("fp32", N, 8, 33, CPU)
    tensors, c = case.draw(), torch.randn(N)
    found = budget.whole_errors(case, reference.linear_logprob, tensors, c)
    assert found.keys() == {"logprob", "dh", "dw"} and max(found.values()) < 1e-6
    rows, _ = budget.sample(case, tensors)
    assert rows[0] == 0 and rows[-1] == N - 1 and len(set(rows.tolist())) == min(N, budget.SAMPLE)

    def last_wrong(*x):
        return reference.linear_logprob(*x) * torch.where(torch.arange(N) == N - 1, 1.1, 1.0)

    assert min(budget.whole_errors(case, last_wrong, tensors, c).values()) > 1e-4


def test_a_loss_is_compared_with_the_sum():
    case = cases.linear_logprob("fp32", 5, 8, 33, CPU)
    tensors, c = case.draw(), torch.randn(5)
    loss = lambda *x: -reference.linear_logprob(*x).sum()  # noqa: E731
    assert max(budget.errors(case, loss, tensors, c).values()) < 1e-6


def test_trl_in_our_lines():
    """Two sequences; fp32 is exact to rounding, bf16 gives bf16."""
    h, w, targets = torch.randn(512, 4), torch.randn(9, 4), torch.randint(9, (512,))
    truth = F.log_softmax((h.double() @ w.double().T), -1)[torch.arange(512), targets]
    torch.testing.assert_close(peers.narrow(h, w, targets).double(), truth, rtol=1e-5, atol=1e-6)
    half = peers.narrow(h.bfloat16(), w.bfloat16(), targets)
    assert half.dtype == torch.bfloat16 and half.shape == (512,)


class FakeLiger:
    """Chosen responses come before the rejected ones, as Liger wants them."""

    def __init__(self, beta, compiled, use_ref_model, chunk_size):
        assert not compiled and not use_ref_model
        self.beta = beta

    def __call__(self, w, h_RTD, targets_RT):
        z = h_RTD @ w.T
        sums = F.log_softmax(z, -1).gather(-1, targets_RT[..., None]).sum((1, 2))
        chosen, rejected = sums.chunk(2)
        return -F.logsigmoid(self.beta * (chosen - rejected)).mean(), ()


def test_liger_gets_its_order(monkeypatch):
    fake = ModuleType("liger_kernel.chunked_loss")
    fake.LigerFusedLinearDPOLoss = FakeLiger
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", fake)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name == "liger_kernel")
    case = cases.linear_dpo("fp32", 2048, 8, 33, CPU)
    assert list(case.contenders) == ["ours", "plain", "liger", "liger 4 pairs"]
    tensors = case.draw()
    for run in case.contenders.values():
        assert budget.errors(case, run, tensors, torch.zeros(1))["loss"] < 1e-5


@pytest.mark.parametrize("N", [2, 3, 511, 1024, 5000])
def test_responses_are_whole_pairs(N):
    lengths = torch.bincount(cases.response_of(N, CPU))
    assert len(lengths) == cases.responses(N) and len(lengths) % 2 == 0
    assert lengths.min() >= 1 and lengths.max() - lengths.min() <= 1


def test_rates():
    head = SimpleNamespace(flops=2 * 6000, leaves=2)
    ms = {"ours": 2.0, "limit": 1.5}
    assert bench.rate(head, ms, "ours", 0) == {
        "rate": pytest.approx(6 * 6000 / 2e-3 / 1e12),
        "unit": "TFLOP/s",
        "limit": 0.75,
    }
    head.leaves = 0
    assert bench.rate(head, ms, "ours", 0)["rate"] == pytest.approx(2 * 6000 / 2e-3 / 1e12)
    loss = SimpleNamespace(N=10**6, flops=None)
    assert bench.rate(loss, ms, "ours", 16.0) == {"rate": 8.0, "unit": "GB/s", "limit": 0.5}


def test_rotation_leaves_the_cache():
    for nbytes in (5, 100, 2**12, 2**20):
        count = timing.rotation(nbytes, CPU)
        assert count >= 2 and (count - 1) * nbytes >= timing.CPU_CACHE


def test_medians_take_turns():
    seen = []
    calls = {name: lambda x, name=name: seen.append((name, int(x))) for name in "ab"}
    sets = [[torch.tensor(i)] for i in range(3)]
    ms = timing.medians(calls, sets, repeat=4)
    assert ms.keys() == {"a", "b"}
    assert seen[:4] == [("a", 0), ("b", 1), ("a", 2), ("b", 0)] and len(seen) == 8


def test_peak_memory_is_that_of_the_call():
    def call(x):
        wide = x.expand(2**24).clone()  # 64 MiB, twice
        return wide + 1

    for _ in range(2):  # what the first call freed is not held against the second
        peak = timing.peak_mib(call, [torch.ones(1)])
        assert 120 < peak < 180
    assert timing.peak_mib(lambda x: None, [torch.ones(1)]) < 20


@pytest.mark.parametrize(("tile", "one_read"), [(32, True), (8, False), (16, False)])
def test_the_sweep_launches_the_kernel(tile, one_read):
    device = CPU if jit.INTERPRETED else torch.device("cuda")
    z, targets, logprob, lse, g = bench.logits(3, 17, device)
    bench.launch(tile, 4, one_read, z, targets, logprob, lse, g)
    p = F.softmax(z, -1)
    p[torch.arange(3), targets] -= 1
    torch.testing.assert_close(g.float(), p, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, z.logsumexp(-1))


def test_verdict():
    rows = [
        {"implementation": "ours (triton)", "forward_ms": 3.0},
        {"implementation": "fused_forward", "forward_ms": 2.0},
    ]
    assert report.verdict(rows) == "fused_forward wins: 1.500 x as fast as the other"
    rows[0]["forward_ms"] = 1.0
    assert report.verdict(rows) == "linear_logprob wins: 2.000 x as fast as the other"
    del rows[1]["forward_ms"]
    assert report.verdict(rows) == "linear_logprob wins: fused_forward failed"


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path):
    sizes = ["--n", "64", "700", "--d", "64", "--v", "1000", "40000", "--repeat", "3"]
    command = [sys.executable, "-m", "kernels.bench", *sizes, "--json", str(tmp_path / "x")]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    subprocess.run(command, check=True, env=environment)
    rows = json.loads((tmp_path / "x").read_text())["rows"]
    assert {row["op"] for row in rows} == set(bench.OPS)
    assert not [row for row in rows if "failed" in row]


# benchmarks/


@pytest.mark.parametrize("main", [gpu.main, lambda argv: facts.main(["clock", *argv])])
def test_no_gpu_is_one_line(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and not out
    assert "sees no" in error


@pytest.mark.parametrize("argv", [["--parts", "all"], ["--minutes", "0"], ["--fast"]])
def test_mistaken_flags_of_the_gpu_run(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("benchmarks.gpu: ") and error.count("\n") == 1


ENDS = [
    (("-c", "print('done')"), (), "ok", "done\n"),
    (("-c", "raise SystemExit(3)"), (), "failed: exit status 3", ""),
    (("-c", "pass"), ("torch", "no_such_module"), "left out: it needs no_such_module", ""),
    ((str(WORKERS / "interrupted.py"),), (), "stopped at 2 s", "saved\n"),
]


@pytest.mark.parametrize(("command", "needs", "end", "output"), ENDS, ids=lambda x: str(x)[:20])
def test_a_part_ends(command, needs, end, output, tmp_path):
    log = io.StringIO()
    assert gpu.attempt(gpu.Part("", 2, command, needs), tmp_path, 2, log) == end
    assert log.getvalue() == output


def test_a_part_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    row = {"op": "linear_logprob", "dtype": "bf16", "N": 8, "V": 9, "limit": 0.8, "peak_mib": 7.0}
    times = {"ours": 2.0, "liger": 9.0}
    line = {"rows": [row | {"implementation": k, "both_ms": ms} for k, ms in times.items()]}
    write = f"import sys; open(sys.argv[1], 'w').write({json.dumps(line)!r})"
    parts = {
        "broken": gpu.Part("first", 9, ("-c", "raise SystemExit(1)")),
        "bench": gpu.Part("second", 9, ("-c", write, "{out}/bench.jsonl")),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert not gpu.run(gpu.parse(["--out", str(tmp_path / "new")]))
    out = capsys.readouterr().out
    assert "linear_logprob bf16 N 8 V 9: 1.250 x the bare matmuls, 7 MiB; liger 4.50 x" in out
    assert "broken" in out and "failed: exit status 1" in out
    assert out.rstrip().endswith(str(tmp_path / "new"))
    assert (tmp_path / "new" / "log.txt").read_text() in out
    assert gpu.run(gpu.parse(["--out", str(tmp_path / "new"), "--parts", "bench"]))


def test_some_parts_alone_are_added_to_what_there_is(monkeypatch, tmp_path):
    write = "import sys; open(sys.argv[1], 'a').write('{}\\n')"
    parts = {
        name: gpu.Part(name, 9, ("-c", write, f"{{out}}/{name}.jsonl")) for name in ("facts", "x")
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    (tmp_path / "facts.jsonl").write_text("{}\n")
    (tmp_path / "log.txt").write_text("before\n")
    for argv, facts_there, begins in ((["--parts", "x"], 1, True), ([], 1, False)):
        gpu.run(gpu.parse(["--out", str(tmp_path), *argv]))
        assert len((tmp_path / "facts.jsonl").read_text().splitlines()) == facts_there
        assert (tmp_path / "log.txt").read_text().startswith("before\n") == begins


def test_every_part_names_what_is_there():
    for part in gpu.PARTS.values():
        assert part.command[0] == "-m" and gpu.importlib.util.find_spec(part.command[1])
    assert [
        part.command[2] for name, part in gpu.PARTS.items() if part.command[1] == "benchmarks.facts"
    ] == list(facts.FACTS)
    assert sum(part.seconds for name, part in gpu.PARTS.items() if name != "trl") < 16 * 60
    for name in ("kernels", "wide"):
        bench.parse(list(gpu.PARTS[name].command[4:6]))


def test_without_matplotlib_only_the_figure_is_missing(monkeypatch):
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    bare = runpy.run_path(gpu.__file__, run_name="bare")["PARTS"]["kernels"]
    assert "--plot" not in bare.command and "{out}/bench.jsonl" in bare.command


def textbook(q, k, v, window):
    """One sequence: softmax over the visible keys, a query and a head at a time."""
    out = torch.zeros_like(q)
    for i in range(len(q)):
        first = 0 if window is None else max(0, i - window + 1)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = k[first : i + 1, group] @ q[i, head] / q.shape[2] ** 0.5
            out[i, head] = scores.softmax(0) @ v[first : i + 1, group]
    return out


@pytest.mark.parametrize("window", [None, 3])
def test_the_attention_reference(window):
    """Prompts of 3 and 1; a response's last token is no row: rows 0-2 prompt, 3-5 chosen, 6 rej."""
    packed = facts.layout([(3, 4, 2), (1, 1, 3)], CPU)
    q, k, v, _ = (x.double() for x in facts.attention(packed, 4, 2, 8))
    out = facts.plain(packed, q, k, v, window)
    for rows, new in [([0, 1, 2, 3, 4, 5], 0), ([0, 1, 2, 6], 3), ([7], 0), ([7, 8, 9], 1)]:
        expected = textbook(q[rows], k[rows], v[rows], window)[new:]
        torch.testing.assert_close(out[rows[new:]], expected)


def test_the_attention_comparison():
    """On a CPU training runs the reference in fp32: no larger errors, those of rounding to bf16."""
    packed = facts.layout([(3, 40, 20), (10, 1, 30)], CPU)
    found = facts.exactness(packed, facts.attention(packed, 4, 2, 8), 16)
    assert len(found["ours"]) == 4
    for ours, plain in zip(found["ours"], found["plain"], strict=True):
        assert 1e-4 < ours <= plain < 2e-2


def test_code_without_a_checkout_is_told_apart(tmp_path, monkeypatch):
    """A GPU that is lent gets the files without .git; results of other code are not its results."""
    told = []
    for line in ("a = 1", "a = 2", "a = 1"):
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / "kernels" / "provenance.py"))
        for name in ("kernels/provenance.py", "zephyr/run/folder.py", "train_dpo.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(line if name.startswith("z") else "")
        told.append(provenance.code())
    assert told[0] == told[2] != told[1] and all(x.startswith("files ") for x in told)
    monkeypatch.undo()
    assert provenance.code() == (provenance.commit() or f"files {provenance.digest()}")


class Mark:
    """A CUDA event: each second of work takes two."""

    record = synchronize = lambda self: None

    def elapsed_time(self, other) -> float:
        return 2000.0


def test_a_fact_keeps_what_it_has_when_it_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "CUDA", CPU)
    monkeypatch.setattr(facts, "SIDE", 64)
    monkeypatch.setattr(facts.timing, "medians", lambda *_: {"": 1000.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Mark())
    monkeypatch.setattr(facts, "machine", lambda: {"gpu": "one", "commit": "abc"})
    readings = iter(["1980, 700, 50", "1900, 700, 60"])

    def read(*_, **__):
        try:
            return SimpleNamespace(stdout=next(readings))
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(facts.subprocess, "run", read)
    with pytest.raises(KeyboardInterrupt):
        facts.main(["clock", "--json", str(tmp_path / "facts.jsonl")])
    kept = json.loads((tmp_path / "facts.jsonl").read_text())
    assert (kept["fact"], kept["gpu"], kept["commit"]) == ("clock", "one", "abc")
    assert [row["clocks.sm"] for row in kept["rows"]] == [1980, 1900]
    assert kept["rows"][0]["tflops"] == pytest.approx(2 * 64**3 / 2000 / 1e9)


def test_sensors(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.nvidia_smi() == "", "it is not installed"
    assert facts.sensors("1980, 693.51, [N/A]\n345, 75.0, 30\n") == {
        "clocks.sm": 1980.0,
        "power.draw": 693.51,
        "temperature.gpu": None,
    }
    assert facts.sensors("") == dict.fromkeys(facts.SENSORS)


def test_linear_layers_are_mistrals():
    width, mlp, vocabulary = 4096, 14336, 32000
    kv = facts.KV_HEADS * facts.HEAD
    assert facts.HEADS * facts.HEAD == width
    assert facts.LINEAR == {
        "q, o": (width, width),
        "k, v": (width, kv),
        "gate, up": (width, mlp),
        "down": (mlp, width),
        "head": (width, vocabulary),
    }


def test_attention_of_a_pack_of_pairs():
    """Its segments are zephyr.packing's, each contender is within the budget, and FLOPs are those
    of the keys that are seen."""
    case = cases.attention("fp32", 60, CPU, (7, 9, 5), (2, 1, 16))
    batch = pack_pairs([Pair(*(np.zeros(n, np.int64) for n in (7, 9, 5)))] * 3, [0, 1, 2])
    assert case.N == len(batch.tokens_T) == 57
    assert case.flops == 4 * 2 * 16 * batch.layout.attended(None)
    tensors, c = case.draw(), torch.randn(case.outputs)
    for name, run in case.contenders.items():
        found = budget.whole_errors(case, run, tensors, c)
        for what, most in budget.allowed(case, tensors, c).items():
            assert found[what] <= most, (name, what)
    attended = batch.layout.attend(*tensors, 0, None).flatten()
    torch.testing.assert_close(case.contenders["ours"](*tensors), attended)


def test_attention_is_timed(monkeypatch):
    monkeypatch.setattr(bench, "SIDE", 8)
    o = bench.parse([*TINY, "--op", "response_sums"])
    rows = bench.measure(cases.attention("fp32", 1, CPU, (3, 2, 2), (2, 1, 4)), o, 1.0)
    assert [row["implementation"] for row in rows] == ["ours (torch)", "plain"]
    for row in rows:
        assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["unit"] == "TFLOP/s"


def test_attention_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--op", "attention"])
    message = "kernels.bench: --op attention needs a GPU: on a CPU attention is torch's own\n"
    assert capsys.readouterr().err == message
