"""zephyr.metrics against plain arithmetic, torch's FLOP counter, and two real processes."""

import io
import json
import math
import stat
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM

from zephyr import packing
from zephyr.config import SFTConfig
from zephyr.metrics import __main__ as metrics_command
from zephyr.metrics import plots
from zephyr.metrics.journal import Journal
from zephyr.metrics.log import Log, read
from zephyr.metrics.means import Means, peak_flops
from zephyr.metrics.plots import smooth
from zephyr.plan.__main__ import MODELS
from zephyr.plan.costs import model_flops


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(tmp_path):
    made = []

    def make(*args, folder="run", **options):
        made.append(Log(tmp_path / folder, *args, **options))
        return made[-1]

    yield make
    for one in made:
        one.__exit__()


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_mean_is_one_sum_over_one_count():
    means = Means(["loss", "nll"])
    means.add(3, {"loss": torch.tensor(6.0, requires_grad=True), "nll": 1})
    means.add(1, {"loss": torch.tensor(4.0)})
    assert means.reduce(pairs=4) == {"loss": 2.5, "nll": 1 / 3, "pairs": 4}
    assert all(math.isnan(value) for value in means.reduce().values()), "reduce starts over"


def test_sums_are_kept_in_double_and_leave_the_callers_tensor_alone():
    means, value = Means(["a", "b"]), torch.tensor(-(2.0**24))
    double = value.double()
    means.add(1, {"a": value, "b": double})
    for _ in range(100):
        means.add(0, {"a": torch.tensor(0.25), "b": torch.tensor(0.25)})
    assert means.reduce() == {"a": 25 - 2**24, "b": 25 - 2**24}
    assert value == double == -(2**24)


def test_an_unregistered_key_is_our_bug():
    with pytest.raises(AssertionError, match="rewards/typo is not among"):
        Means(["loss"]).add(1, {"rewards/typo": 1.0})


def counts(rank):
    """Micro-batches of 3 optimizer steps, each the values of its pairs; rank 1 idles in step 3."""
    seconds = [[[1.0, 2.0, 3.0], [4.0]], [[5.0]], [[-1.0, 7.5]]]
    return seconds if rank == 0 else [[[10.0]], [[20.0, 30.0], [40.0, 50.0, 60.0]], []]


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    log = Log(folder, 3, ["loss", "only/zero", "never"], rank=rank, world=2)
    for step, microbatches in enumerate(counts(rank), start=1):
        for values in microbatches:
            sums = {"loss": torch.tensor(values).sum()}
            if rank == 0:
                sums["only/zero"] = sum(values)
            log.add(len(values), sums, tokens=7 * len(values), pairs=len(values))
        log.step(step, grad_norm=torch.tensor(float(step)))
    assert log.last["loss"] == pytest.approx(3.25), "every rank knows the global mean"
    log.__exit__()
    dist.destroy_process_group()


def test_two_ranks_with_unequal_counts(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, mine, other in zip(rows, counts(0), counts(1), strict=True):
        everyone = np.concatenate(mine + other)
        assert row["loss"] == pytest.approx(everyone.mean(), rel=1e-12)
        assert row["only/zero"] == pytest.approx(np.concatenate(mine).mean(), rel=1e-12)
        assert row["never"] is None
        assert row["tokens_per_second"] == pytest.approx(7 * row["pairs_per_second"])


def test_a_line_covers_all_steps_since_the_last_one(log, tmp_path):
    run = log(5, ["loss"], every=2)
    for step in range(1, 6):
        run.add(step, {"loss": torch.tensor(float(10 * step))})
        run.add(1, {"loss": 0.0})
        run.step(step, grad_norm=torch.tensor(step + 0.5), learning_rate=1 / step, epoch=step)
    assert [(row["step"], row["grad_norm"], row["epoch"]) for row in read(tmp_path / "run")] == [
        (2, 2.5, 2),
        (4, 4.5, 4),
        (5, 5.5, 5),
    ]
    assert [row["loss"] for row in read(tmp_path / "run")] == [30 / 5, 70 / 9, 50 / 6]


def test_lines_are_strict_json_and_there_at_once(log, tmp_path):
    run, path = log(9, ["loss", "rewards/margins"]), tmp_path / "run" / "metrics.jsonl"
    run.add(1, {"loss": torch.tensor(math.nan), "rewards/margins": torch.tensor(-math.inf)})
    run.step(1, grad_norm=torch.tensor(math.inf), learning_rate=5e-7)
    run.evaluation(1, {"loss": 0.5, "rewards/accuracies": math.nan})
    assert path.read_text() == (
        '{"step": 1, "loss": null, "rewards/margins": null, "grad_norm": null, '
        '"learning_rate": 5e-07}\n'
        '{"step": 1, "eval_loss": 0.5, "eval_rewards/accuracies": null}\n'
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert run.last["learning_rate"] == 5e-7
    assert run.last["eval_loss"] == 0.5


def test_throughput_leaves_pauses_out(log, clock, tmp_path):
    run = log(4, ["loss"], every=2)
    run.peak, run.world = 1e12, 2
    for step in range(1, 5):
        run.add(8, {"loss": 8.0}, tokens=600, pairs=8, flops=1e12)
        clock[0] += 3
        with run.paused():
            clock[0] += 20
            with run.paused():
                clock[0] += 50
        run.step(step)
    assert run.seconds_per_step() == 3
    for row in read(tmp_path / "run"):
        assert row["tokens_per_second"] == 1200 / 6
        assert row["pairs_per_second"] == 16 / 6
        assert row["mfu"] == pytest.approx(2e12 / 6 / 2e12)


def test_a_finished_run_says_what_passes_without_an_update_took(ranks, clock, tmp_path):
    """Beside an epoch of training, which is 5 steps of 4 s here; evaluations take 3, 1 and 2 s."""
    c = SFTConfig(model="m", data=("d",), out=str(tmp_path / "run"))
    run = SimpleNamespace(c=c, ranks=ranks, start=0, kept={})
    data = SimpleNamespace(steps_per_epoch=5, data=SimpleNamespace(where=str))
    with Journal(run, MODELS["mistral-7b"], ["loss"], data, 3) as journal:
        for step, seconds in enumerate((3, 1, 2), start=1):
            journal.begin(step)
            journal.saw(packing.nothing(), {"loss": torch.zeros(())}, 0)
            clock[0] += 4
            journal.broken()
            journal.end(torch.tensor(1.0), 1e-3)
            with journal.evaluation():
                clock[0] += seconds
        said = "20 s of training; beside it {}evaluation 2 s, 10%"
        for reference, words in ((0.0, ""), (7.0, "reference pass 7 s, 35%, ")):
            (line,) = (x for x in journal.summary(reference).splitlines() if "an epoch" in x)
            assert line.split(maxsplit=2)[2] == said.format(words)


def test_without_pairs_or_a_known_peak_their_names_are_absent(log, tmp_path):
    run = log(1, ["loss"])
    run.add(1, {"loss": 1.0}, tokens=5, flops=1e9)
    run.step(1)
    assert set(read(tmp_path / "run")[0]) == {"step", "loss", "tokens_per_second"}


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H20", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_peak(name, teraflops):
    assert peak_flops(name) == (teraflops and teraflops * 1e12)


@pytest.mark.parametrize("kv_heads, head_dim", [(4, 16), (2, 24)])
def test_model_flops_are_what_torch_counts_of_transformers(kv_heads, head_dim):
    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        use_cache=False,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation="eager",
    )
    model = MistralForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(33)[None], logits_to_keep=33).logits.sum().backward()
    # eager attention multiplies every query with every key, and the mask hides half of them later
    ours = model_flops(config, tokens=33, predicted=33, attended=33 * 33)
    assert ours == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_resume_keeps_each_step_once(log, tmp_path):
    whole = log(6, ["loss"])
    for step in range(1, 7):
        whole.add(1, {"loss": step / 7})
        whole.step(step)
        if step % 2 == 0:
            whole.evaluation(step, {"loss": math.nan})
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_text().splitlines()
    path.write_text(path.read_text() + '{"step": 7, "lo')
    again = log(6, ["loss"], start_step=4)
    assert path.read_text().splitlines() == before[:6]
    again.add(1, {"loss": 5 / 7})
    again.step(5)
    assert path.read_text().splitlines() == before[:7]
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_line_under_way_goes_on_where_it_stopped(log, clock, tmp_path):
    """Lines of three steps; the state after the fourth goes to one rank, and to two."""

    def steps(run, first, last):
        for step in range(first, last + 1):
            clock[0] += step
            run.add(2, {"loss": torch.tensor([step / 7, step / 3])}, pairs=2)
            run.step(step)

    steps(log(6, ["loss"], every=3), 1, 6)
    first = log(6, ["loss"], every=3, folder="resumed")
    steps(first, 1, 4)
    state = json.loads(json.dumps(first.state()))
    clock[0] += 1000
    again = log(6, ["loss"], every=3, folder="resumed", start_step=4, kept=[state])
    assert again.last["step"] == 3, "the summary of a run that has no step left"
    steps(again, 5, 6)
    assert again.seconds_per_step() == 5, "steps 4, 5 and 6 take 4, 5 and 6 seconds"
    files = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "resumed")]
    assert files[0] == files[1] and len(files[0].splitlines()) == 2

    shares = [log(9, ["loss"], every=9, rank=rank, world=2, kept=[state] * 3) for rank in (0, 1)]
    assert [share.totals["pairs"] for share in shares] == [6, 0]
    assert [share.means.counts["loss"] for share in shares] == [6, 0]
    assert shares[0].means.sums["loss"] == pytest.approx(3 * (4 / 7 + 4 / 3))


def test_a_fresh_start_forgets_the_old_lines(log, tmp_path):
    log(6, ["loss"]).evaluation(0, {"loss": 1.0})
    log(6, ["loss"])
    assert read(tmp_path / "run") == []


def test_other_ranks_write_and_say_nothing(log, tmp_path, capsys):
    run = log(1, ["loss"], rank=1, world=2)
    run.add(1, {"loss": 1.0})
    run.step(1)
    run.evaluation(1, {"loss": 2.0})
    assert run.last == {"step": 1, "loss": 1.0, "eval_loss": 2.0}
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_a_log_file_gets_a_plain_line_every_few_seconds(log, clock, capsys):
    run = log(100, ["loss", "rewards/accuracies"])
    for step in range(1, 101):
        clock[0] += 1
        run.add(4, {"loss": 2.0, "rewards/accuracies": 3}, pairs=4)
        run.step(step)
        if step == 50:
            run.evaluation(step, {"loss": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/100  loss 0.5  accuracy 0.75  pairs/s 4  01:39 left"
    assert "step 50/100  eval  loss 0.25  00:50 left" in lines
    steps = [int(line.removeprefix("step ").split("/")[0]) for line in lines]
    assert steps == [*range(1, 50, 5), *range(50, 101, 5)]


def test_a_terminal_gets_one_bar(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    run = log(40, ["loss", "rewards/margins"], start_step=10)
    for step in range(11, 41):
        run.add(2, {"loss": 1.0, "rewards/margins": 0.25})
        run.step(step, learning_rate=1e-3)
        if step == 20:
            run.evaluation(step, {"loss": 0.75, "rewards/margins": 3.0})
    run.__exit__()
    text = screen.getvalue()
    bars = [part for part in text.replace("\n", "\r").split("\r") if "run:" in part]
    assert text.count("step ") == 1
    assert "step 20  eval  loss 0.75  margin 3\n" in text
    assert "10/40" in bars[0]
    assert "40/40" in bars[-1]
    assert "loss 0.5  margin 0.125" in bars[-1]


def test_a_reader_that_goes_away_does_not_end_the_run(log, monkeypatch, tmp_path):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    run = log(1, ["loss"])
    run.step(1, grad_norm=2.0)
    assert read(tmp_path / "run") == [{"step": 1, "loss": None, "grad_norm": 2.0}]


def test_tensorboard_gets_the_same_values(log, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = log(2, ["loss"])
    for step in (1, 2):
        run.add(2, {"loss": float(step)})
        run.step(step)
    run.evaluation(2, {"loss": 9.0})
    run.__exit__()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval_loss")] == [(2, 9.0)]


def test_without_tensorboard_nothing_is_missing(log, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log(1, ["loss"]).step(1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_smoothing_leaves_a_constant_alone():
    first, *rest = smooth([math.nan, 3.0, 3.0, math.nan, *[3.0] * 200], 20)
    assert math.isnan(first)
    assert rest == pytest.approx([3.0] * 203)


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    values, keep = np.random.default_rng(0).normal(size=50), 1 - 2 / 8
    weights = keep ** np.arange(50)[::-1]
    assert smooth(values, 7)[-1] == pytest.approx((weights * values).sum() / weights.sum())


def write(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def dpo_rows(steps):
    names = [name for panel in plots.PANELS for name in panel]
    rows = [{"step": step, **dict.fromkeys(names, 1 / step)} for step in range(1, steps + 1)]
    return [*rows, {"step": steps, **{f"eval_{name}": 0.5 for name in names[:7]}}]


def drawn(monkeypatch):
    """The figures that are saved from here on."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def test_runs_are_drawn_over_each_other(monkeypatch, tmp_path, capsys):
    figures = drawn(monkeypatch)
    runs = [write(tmp_path / "one", dpo_rows(100)), write(tmp_path / "two", dpo_rows(1))]
    metrics_command.main([*runs, "--out", str(tmp_path / "new" / "a.png")])
    out = tmp_path / "new" / "a.png"
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    [figure] = figures
    titles = [axis.get_title("left") for axis in figure.axes]
    assert titles == [", ".join(panel) for panel in plots.PANELS]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "one",
        "two",
        "train",
        "eval",
        "rejected",
    ]
    # one: raw, average and eval; two: one point and eval
    assert len(figure.axes[0].lines) == 5
    schedule, _ = figure.axes[5].lines
    assert list(schedule.get_ydata()) == [1 / step for step in range(1, 101)]


def test_panels_without_data_are_left_out(monkeypatch, tmp_path):
    figures = drawn(monkeypatch)
    rows = [{"step": s, "loss": 2.0, "learning_rate": 1e-5, "grad_norm": None} for s in range(1, 4)]
    rows[1]["loss"] = None
    metrics_command.main([write(tmp_path / "sft", rows)])
    assert [axis.get_title("left") for axis in figures[0].axes] == ["loss", "learning_rate"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["sft", "train"]
    assert (tmp_path / "sft" / "metrics.png").exists()


def test_runs_of_one_name_are_told_apart_by_their_path(monkeypatch, tmp_path):
    figures = drawn(monkeypatch)
    runs = [write(tmp_path / name / "dpo", [{"step": 1, "loss": 0.5}]) for name in "ab"]
    metrics_command.main(runs)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [*runs, "train"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "{run}: no metrics.jsonl in it; give the folder of a run"),
        ("", "run: nothing to draw yet"),
        (
            '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n',
            "{run}/metrics.jsonl:2 is not a JSON object with a `step`; delete the line",
        ),
        ('{"loss": 1}\n', "{run}/metrics.jsonl:1 is not a JSON object"),
        ("3\n", "{run}/metrics.jsonl:1 is not a JSON object"),
        ("\n", "{run}/metrics.jsonl:1 is not a JSON object"),
    ],
)
def test_a_mistake_costs_one_line(text, message, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        metrics_command.main([str(run)])
    error = capsys.readouterr().err
    assert error.startswith("metrics: " + message.format(run=run))
    assert error.count("\n") == 1


def test_reading_names_the_line_and_forgives_a_torn_last_one(tmp_path):
    run = write(tmp_path / "run", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}])
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "loss": 0.')
    assert read(run) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3 is not a JSON object"):
        read(run)


def test_drawing_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install zephyr-dpo\[plot\]"):
        plots.draw({"run": [{"step": 1, "loss": 1.0}]}, tmp_path / "a.png")
