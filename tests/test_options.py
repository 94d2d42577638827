"""What may change a run's memory and speed leaves its trajectory as it is, through the scripts."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import train_dpo
import train_sft
from model_helpers import model, pairs
from run_helpers import DPO, SFT, launch, read, run, same, weights_of
from zephyr import losses, packing
from zephyr.distributed import fsdp
from zephyr.run import checkpoint
from zephyr.weights import masters

# while it traces, torch.compile does what torch warns of
pytestmark = pytest.mark.filterwarnings("ignore")
BF16 = (*DPO, "--precision", "bf16")


@pytest.fixture
def traced(monkeypatch):
    """Blocks are traced and their backward derived, but run as plain torch: that takes seconds."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled(f, backend="aot_eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def held(place) -> tuple[str, ...]:
    return "--eval-data", str(place / "test.jsonl"), "--eval-every", "3"


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
def test_compiled_blocks_give_the_same_trajectory(place, tmp_path, baseline, traced, recompute):
    flags = (*DPO, *held(place), "--compile", "on", "--recompute", recompute)
    same(run(train_dpo, place, tmp_path / "run", *flags), baseline[0])
    for name, weight in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, baseline[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "flags",
    [pytest.param(DPO, id="alone"), pytest.param(BF16, id="under FSDP", marks=pytest.mark.slow)],
)
def test_a_block_is_compiled_once_for_all_layers_rows_and_steps(
    place, tmp_path, traced, monkeypatch, flags
):
    """With and without a gradient the same graph, which is there after the reference pass and the
    first step, whatever sizes follow."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    flags = (*flags, "--compile", "on", "--microbatch-tokens", "150")
    run(train_dpo, place, tmp_path / "one", *flags, "--steps", "1", "--warmup", "0")
    first = counters["stats"]["unique_graphs"]
    run(train_dpo, place, tmp_path / "all", *flags, *held(place))
    assert (first, counters["stats"]["unique_graphs"]) == (1, 1)


@pytest.mark.parametrize("masters", ["fp32", "split"])
def test_an_evaluation_adds_no_graph(place, tmp_path, traced, masters):
    flags = (
        *SFT,
        "--eval-data",
        str(place / "chats.jsonl"),
        "--eval-every",
        "1",
        "--compile",
        "on",
        "--precision",
        "bf16",
        "--masters",
        masters,
        "--steps",
        "3",
    )
    run(train_sft, place, tmp_path / "run", *flags)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_without_pairs_adds_no_graph(traced, first):
    """It runs one token, without gathered keys, in the middle of a step too, when split masters
    have gradients."""
    m = parallel_blocks(model(num_hidden_layers=3).bfloat16())
    masters.fuse_matmuls(m)
    masters.attach_halves(m)
    batches = [pairs(0), pairs(1), packing.nothing(), pairs(2), packing.nothing()]
    for batch in [packing.nothing(), *batches][1 - first :]:
        (m(batch).sum() + 0 * m.lm_head.weight.sum()).backward()
    assert masters.gradient(m.model.layers[0].mlp.up_proj.weight).dtype == torch.float32
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
@pytest.mark.parametrize(
    "backend, apart", [("aot_eager", 0.05), pytest.param("inductor", 0.1, marks=pytest.mark.slow)]
)
def test_compiled_split_masters_have_the_gradients_of_others(
    backend, apart, recompute, monkeypatch
):
    """After two micro-batches, of which the second's are added in the matmuls, and after the sums
    were cleared again: within the roundings of bf16, of which Inductor leaves some out, of a model
    that is neither split nor compiled. A lost or a doubled micro-batch would be off by half."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled(f, backend=backend, **options)
    )
    torch._dynamo.reset()
    plain, split = (model(num_hidden_layers=2).bfloat16() for _ in range(2))
    masters.fuse_matmuls(split)
    for block in split.model.layers:
        block.forward = fsdp.wrapped(block, recompute, True, fsdp.FUSED)
    masters.attach_halves(split)
    for first in (0, 2):
        for m in (plain, split):
            for seed in (first, first + 1):
                m(pairs(seed)).sum().backward()
        for (name, p), q in zip(split.named_parameters(), plain.named_parameters(), strict=True):
            ours, theirs = masters.gradient(p), q[1].grad.float()
            assert (ours - theirs).norm() <= apart * theirs.norm(), name
        plain.zero_grad()
        masters.clear_gradients(list(split.parameters()))
    torch._dynamo.reset()


def parallel_blocks(m, recompute: str = "none"):
    for block in m.model.layers:
        block.forward = fsdp.wrapped(block, recompute, compiled=True)
    return m


def test_sizes_that_are_equal_by_chance_add_no_graph(traced):
    """Every token of the first batch predicts, and of the next ones every other."""
    m = parallel_blocks(model(num_hidden_layers=2))
    for lengths, each in (((5, 5), 1), ((9, 4), 2), ((7, 7), 2)):
        pieces = [(np.arange(n) % 7, np.arange(n) % each == 0, k) for k, n in enumerate(lengths)]
        m(packing.pack_documents(pieces)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="Inductor compiles C++")


@COMPILER
@pytest.mark.parametrize(
    "flags",
    [
        "--reference cached",
        pytest.param(
            "--masters split --reference live --recompute elementwise", marks=pytest.mark.slow
        ),
    ],
)
def test_before_the_first_update_every_margin_is_0_in_every_bit(
    place, tmp_path, monkeypatch, flags
):
    """In bf16, by the compiler that a GPU has too: what it fuses it does not round, so that two
    graphs of one function differ by tenths of a nat a response."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    exact, check = [], losses.check_start
    monkeypatch.setattr(losses, "check_start", lambda *a: (exact.append(a[-1]), check(*a)))
    held_out = ("--eval-data", str(place / "pairs.jsonl"), "--eval-every", "1")
    rows = run(
        train_dpo,
        place,
        tmp_path / "run",
        *BF16,
        "--compile",
        "on",
        *flags.split(),
        "--steps",
        "2",
        *held_out,
    )
    first, evaluated = rows[:2]
    assert first["rewards/margins"] == first["rewards/accuracies"] == 0 and exact == [True]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert evaluated["eval_rewards/margins"] == evaluated["eval_rewards/chosen"] == 0, "lr was 0"
    assert rows[-1]["eval_rewards/margins"] != 0
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_attention_as_on_a_gpu_compiles_once_too(as_on_a_gpu, traced, recompute):
    """Its op takes the longest segment's length as a number, which differs from batch to batch."""
    m, seen = parallel_blocks(model(num_hidden_layers=4), recompute), set()
    for rank in range(4):
        batch = pairs(rank)
        seen.add((batch.layout.max_q, len(batch.tokens_T)))
        m(batch).sum().backward()
    assert len(seen) == 4 and counters["stats"]["unique_graphs"] == 1


def test_compiled_and_sharded(place, tmp_path, wide, traced):
    """In bf16 FSDP gathers and casts around each compiled block."""
    flags = (*BF16, "--compile", "on", "--recompute", "elementwise")
    same(run(train_dpo, place, tmp_path / "run", *flags), wide[0], rel=0.02, abs=0.01)


@pytest.mark.slow
def test_compiled_for_this_machine(place, tmp_path, baseline):
    """By the default compiler, Inductor, and its C++."""
    torch._dynamo.reset()
    flags = (*DPO, "--compile", "on", "--reference", "live", "--steps", "6")
    rows = run(train_dpo, place, tmp_path / "run", *flags)
    same(
        rows,
        [{k: v for k, v in row.items() if k in rows[0]} for row in baseline[0] if "loss" in row],
    )
    torch._dynamo.reset()


def test_recomputing_and_resharding_leave_the_trajectory(place, tmp_path, baseline):
    """Where they are left to auto there is memory enough, and neither is done."""
    flags = (*DPO, *held(place), *"--recompute elementwise --reshard always".split())
    same(run(train_dpo, place, tmp_path / "one", *flags), baseline[0])
    launch("train_dpo.py", place, tmp_path / "two", 2, *flags)
    same(read(tmp_path / "two"), baseline[0])


@pytest.fixture(scope="module")
def wide(place, tmp_path_factory):
    """Six steps in bf16 on fp32 masters: metrics, weights."""
    out = tmp_path_factory.mktemp("wide") / "run"
    return run(train_dpo, place, out, *BF16), weights_of(out)


def test_split_masters_are_fp32_masters(place, tmp_path, wide):
    """The weights that compute differ from a cast of the masters at ties alone, as test_distributed
    shows; these sharp weights make much of one."""
    rows = run(train_dpo, place, tmp_path / "run", *BF16, "--masters", "split")
    same(rows, wide[0], rel=0.02, abs=0.01)
    masters = weights_of(tmp_path / "run")
    assert any((w != w.bfloat16()).any() for w in masters.values()), "all of a master is exported"


@pytest.mark.parametrize("masters", ["fp32", "split"])
def test_bf16_moments_train_the_same(place, tmp_path, wide, masters):
    """To the moments' rounding, 2^-9: every update of every weight is within a percent or so."""
    flags = (*BF16, "--adam-state", "bf16", "--masters", masters)
    rows = run(train_dpo, place, tmp_path / "run", *flags)
    same(rows, wide[0], rel=0.03, abs=0.02)
    moved, apart = 0.0, 0.0
    start = weights_of_base(place)
    for name, weight in weights_of(tmp_path / "run").items():
        moved += float((wide[1][name] - start[name]).square().sum())
        apart += float((weight - wide[1][name]).square().sum())
    assert math.sqrt(apart / moved) < 0.05
    assert rows[-1]["loss"] < 0.6


def weights_of_base(place) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(place / "base" / "model.safetensors")


@pytest.mark.parametrize(
    "ranks, flags",
    [(1, ["--masters", "split", "--adam-state", "bf16"]), (2, ["--adam-state", "bf16"])],
)
def test_resumed_bit_for_bit(place, tmp_path, ranks, flags):
    flags = (*BF16, *flags, "--save-every", "2", "--keep", "0")
    out = tmp_path / "run"

    def go() -> tuple[list[dict], dict[str, torch.Tensor]]:
        if ranks == 1:
            run(train_dpo, place, out, *flags)
        else:
            launch("train_dpo.py", place, out, ranks, *flags)
        return read(out), weights_of(out)

    rows, expected = go()
    checkpoint.export(out / "checkpoints" / "latest", tmp_path / "latest" / "model")
    exported = weights_of(tmp_path / "latest")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    for name in ("step-000004", "step-000006"):
        (out / "checkpoints" / name).rename(tmp_path / name)
    (out / "model").rename(tmp_path / "model")
    again, got = go()
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
    assert [r["grad_norm"] for r in again] == [r["grad_norm"] for r in rows]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_sft_takes_them_too(place, tmp_path, traced):
    flags = (*SFT, "--precision", "bf16")
    expected = run(train_sft, place, tmp_path / "plain", *flags)
    options = "--masters split --recompute elementwise --compile on".split()
    same(run(train_sft, place, tmp_path / "all", *flags, *options), expected, rel=0.02, abs=0.01)


def test_a_split_master_has_one_process_and_bf16(place, tmp_path):
    done = launch(
        "train_dpo.py", place, tmp_path / "run", 2, *BF16, "--masters", "split", check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_dpo.py")]
    assert any("--masters split is for one process; sharded over 2 ranks" in x for x in lines)
    with pytest.raises(ValueError, match="--masters split is for --precision bf16"):
        run(train_dpo, place, tmp_path / "run", *DPO, "--masters", "split")
