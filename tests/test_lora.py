"""LoRA: PEFT, the textbook and torch's AdamW are the oracle, and what is frozen stays frozen."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_costs import Live
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralForCausalLM

import kernels
import train_dpo
import train_sft
from helpers import shared
from model_helpers import close, folder_of, gradients, model, pairs
from run_helpers import (
    DPO,
    SFT,
    Theirs,
    in_the_textbook,
    launch,
    read,
    run,
    same,
    speak,
    weights_of,
)
from zephyr import feedback, generate, lora, losses, optim, source
from zephyr.architecture import PROJECTIONS, MistralConfig
from zephyr.attention import Layout
from zephyr.distributed import fsdp
from zephyr.lora import LoRALinear
from zephyr.metrics.journal import Journal
from zephyr.model import Mistral
from zephyr.run import checkpoint
from zephyr.tokenizer import Tokenizer
from zephyr.weights import __main__ as weights_command
from zephyr.weights import adapter, config_json, hub, locate

# transformers warns of a name that PEFT asks for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
LORA = (*DPO, "--lora-rank", "4")
IDS = torch.tensor([1, 30, 7, 22, 15, 9, 41, 3, 18, 27, 5, 12, 33, 8, 2, 19, 21, 4, 6, 11] * 2)


class Adapted(Theirs):
    """PEFT's model over transformers', with the adapters that a run of seed 42 starts from."""

    def __init__(self, folder: Path, rank: int, alpha: int, targets=PROJECTIONS, rslora=False):
        super().__init__(folder)
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(targets), use_rslora=rslora
        )
        self.model = peft.get_peft_model(self.model, config)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                ours = name.removeprefix(adapter.PREFIX).replace(".default", "")
                if lora.is_adapter(ours):
                    p.copy_(lora.initial(ours, p.shape, 42))


def loaded_by_peft(base: Path, folder: Path) -> torch.Tensor:
    """Logits [T, V] of IDS by an adapter on its base, as PEFT loads them."""
    theirs = MistralForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(theirs, folder)(IDS[None]).logits[0]


def loaded_by_transformers(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return Theirs(folder)(IDS)


@torch.no_grad()
def ours_unmerged(base: Path, folder: Path, spec: lora.Spec) -> torch.Tensor:
    """Logits of IDS by this project's layers, with an adapter's tensors beside the base's."""
    with torch.device("meta"):
        m = Mistral(config_json.read(base))
    lora.attach(m, spec, "fp32", torch.device("cpu"))
    m.to_empty(device="cpu")
    hub.load(base, m)
    for name, x in load_file(folder / locate.ADAPTER_WEIGHTS).items():
        m.get_parameter(name.removeprefix(adapter.PREFIX)).copy_(x)
    return m.logits(IDS, Layout.alone(len(IDS)))


@torch.no_grad()
def ours_merged(folder: Path, base: Path | None = None) -> torch.Tensor:
    m, _ = generate.load(str(folder), base and str(base))
    return m.logits(IDS, Layout.alone(len(IDS)))


def near(x_TV: torch.Tensor, y_TV: torch.Tensor, share: float = 1e-5) -> None:
    """Equal up to a share of the largest logit."""
    assert (x_TV - y_TV).abs().max() <= share * y_TV.abs().max()


@pytest.mark.parametrize(
    ("loss", "flags"),
    [
        ("dpo", "--lora-rank 4"),
        ("ipo", "--lora-rank 4 --lora-alpha 12 --lora-targets q_proj,v_proj,down_proj"),
        ("dpo", "--lora-rank 32 --lora-alpha 16 --lora-rslora"),
        ("ipo", "--lora-rank 32"),
    ],
)
def test_a_run_equals_peft_in_the_textbook(place, tmp_path, loss, flags):
    out = tmp_path / "run"
    rows = run(train_dpo, place, out, *DPO, "--loss", loss, *flags.split())
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    rank, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
    assert config["lora_dropout"] == 0 and config["bias"] == "none"
    assert config["base_model_name_or_path"] == str(place / "base")
    policy = Adapted(place / "base", rank, alpha, targets, "--lora-rslora" in flags)
    expected = in_the_textbook(place, loss, policy)
    same(rows, expected, rel=1e-4, abs=1e-4)
    assert [r["rewards/accuracies"] for r in rows] == [r["rewards/accuracies"] for r in expected]
    start = math.log(2) if loss == "dpo" else 25.0
    assert rows[0]["loss"] == pytest.approx(start, abs=1e-6)
    assert rows[0]["rewards/margins"] == 0 and abs(rows[-1]["rewards/margins"]) > 0.01
    # the files: as PEFT loads them, as they were trained, and merged
    logits = loaded_by_peft(place / "base", out / "adapter")
    spec = lora.Spec(rank, alpha, tuple(targets), "--lora-rslora" in flags)
    near(ours_unmerged(place / "base", out / "adapter", spec), logits)
    near(loaded_by_transformers(out / "model"), logits)
    near(ours_merged(out / "adapter"), logits)
    with torch.no_grad():
        near(policy(IDS), logits, 1e-4)
        assert (loaded_by_transformers(place / "base") - logits).abs().max() > 0.01


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made(place, tmp_path, rslora, capsys):
    targets, found = ["q_proj", "o_proj", "up_proj"], tmp_path / "theirs"
    torch.manual_seed(1)
    theirs = Adapted(place / "base", 6, 12, targets, rslora).model
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
        theirs.peft_config["default"].lora_dropout = 0.05
        theirs.save_pretrained(found)
        logits = theirs.eval()(IDS[None]).logits[0]
    near(ours_merged(found, place / "base"), logits)
    weights_command.main([str(found), str(tmp_path / "whole"), "--base", str(place / "base")])
    near(loaded_by_transformers(tmp_path / "whole"), logits)
    (tmp_path / "base").symlink_to(place / "base")
    path = found / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(config))
    near(ours_merged(found), logits)


@pytest.mark.parametrize(
    "which",
    [
        {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|o|up)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "up_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*0.*q_proj"},
    ],
    ids=str,
)
def test_an_adapter_of_some_layers_that_peft_made(place, tmp_path, which):
    model = MistralForCausalLM.from_pretrained(place / "base", attn_implementation="eager")
    config = peft.LoraConfig(r=3, lora_alpha=1.5, init_lora_weights=False, **which)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        near(ours_merged(tmp_path / "theirs", place / "base"), theirs(IDS[None]).logits[0])


def test_an_adapter_of_several_ranks_on_which_another_is_trained(place, tmp_path, capfd):
    """PEFT's rank_pattern; their sum has one rank, filled up with zeros."""
    model = MistralForCausalLM.from_pretrained(place / "base", attn_implementation="eager")
    ranks = {"rank_pattern": {"v_proj": 2}, "lora_dropout": 0.1, "init_lora_weights": False}
    config = peft.LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "v_proj"], **ranks)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        near(ours_merged(tmp_path / "theirs"), theirs(IDS[None]).logits[0])
    start = "--model", str(tmp_path / "theirs"), "--lora-targets", "v_proj,o_proj"
    run(train_dpo, place, tmp_path / "run", *LORA, *start)
    assert "theirs was trained with lora_dropout 0.1; it is added to" in capfd.readouterr().err
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 9 and config["target_modules"] == ["q_proj", "v_proj", "o_proj"]
    logits = loaded_by_peft(place / "base", tmp_path / "run" / "adapter")
    near(loaded_by_transformers(tmp_path / "run" / "model"), logits)


@pytest.fixture
def taken(monkeypatch):
    """The model and the optimizer of a run."""
    taken, load, adamw = {}, fsdp.load, optim.adamw
    monkeypatch.setattr(fsdp, "load", lambda *a: taken.setdefault("model", load(*a)))
    monkeypatch.setattr(optim, "adamw", lambda *a: taken.setdefault("optimizer", adamw(*a)))
    return taken


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_has_no_gradient_no_state_and_the_same_bytes(
    place, tmp_path, taken, precision
):
    flags = "--save-every", "6", "--precision", precision, "--reference", "live"
    rows = run(train_dpo, place, tmp_path / "run", *LORA, *flags)
    assert rows[0]["rewards/margins"] == rows[0]["rewards/accuracies"] == 0
    assert rows[-1]["loss"] < 0.68
    base = load_file(place / "base" / "model.safetensors")
    state, adapters = taken["optimizer"].state, []
    for name, p in taken["model"].named_parameters():
        if lora.is_adapter(name):
            assert p.dtype == torch.float32 and (p != 0).any()
            adapters.append(p)
        else:
            assert p.grad is None and p not in state and not p.requires_grad
            narrow = torch.bfloat16 if precision == "bf16" else torch.float32
            assert p.dtype == narrow and torch.equal(p, base.pop(name).to(narrow))
    assert not base and set(state) == set(adapters) and len(adapters) == 2 * 7 * 2
    (saved,) = checkpoint.complete(tmp_path / "run")
    kept = [x for path in saved.glob("*.safetensors") for x in load_file(path).values()]
    numbers = sum(p.numel() for p in adapters)
    assert sum(x.nbytes for x in kept) == 12 * numbers + 4, "a master, two moments; the step"
    assert sum(path.stat().st_size for path in saved.iterdir()) < 12 * numbers + 30_000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_bit_for_bit_on_the_same_base_alone(place, tmp_path, precision):
    here = shutil.copytree(place, tmp_path / "here")
    flags = (*LORA, "--save-every", "2", "--keep", "0", "--precision", precision)
    out = tmp_path / "run"
    whole, expected = run(train_dpo, here, out, *flags), weights_of(out)
    latest = out / "checkpoints" / "step-000006"
    checkpoint.export(latest, tmp_path / "latest" / "model")
    exported = weights_of(tmp_path / "latest")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    for name in ("checkpoints/step-000004", "checkpoints/step-000006", "model", "adapter"):
        (out / name).rename(tmp_path / Path(name).name)
    resumed = run(train_dpo, here, out, *flags)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole]
    assert [r["grad_norm"] for r in resumed] == [r["grad_norm"] for r in whole]
    got = weights_of(out)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    # another base, by one number of it
    for name in ("model", "adapter"):
        shutil.rmtree(out / name)
    base = load_file(here / "base" / "model.safetensors")
    base["model.norm.weight"][0] += 1e-6
    save_file(base, here / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="run holds another run: the content of --model changed"):
        run(train_dpo, here, out, *flags)
    with pytest.raises(ValueError, match="step-000004 holds adapters of another model than .*base"):
        checkpoint.export(out / "checkpoints" / "step-000004", tmp_path / "other")
    checkpoint.export(out / "checkpoints" / "step-000006", tmp_path / "right", place / "base")


@pytest.fixture(scope="module")
def six_steps(place, tmp_path_factory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("lora") / "run"
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    return run(train_dpo, place, out, *LORA, *held_out), out


@pytest.mark.parametrize(
    "change",
    [
        "--reference live --microbatch-tokens 140",
        "--recompute full --reference live",
        "--recompute elementwise --save-every 3",
        "--no-merge --microbatch-tokens 200",
    ],
)
def test_the_trajectory_is_the_same(place, tmp_path, six_steps, change, capfd):
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    out = tmp_path / "run"
    flags = (*LORA, *held_out, *change.split())
    same(run(train_dpo, place, out, *flags), six_steps[0])
    if "--no-merge" in change:
        assert not (out / "model").exists()
        told = capfd.readouterr().err
        assert f" {out}/adapter\n" in told and f" {out}/model\n" not in told
        again = [flag for flag in flags if flag != "--no-merge"]
        run(train_dpo, place, out, *again)
        told = capfd.readouterr().err
        command = f"python -m zephyr.weights {out}/adapter {out}/model"
        assert "is finished" in told and f"its adapter is not merged yet: {command}" in told
        weights_command.main([f"{out}/adapter", f"{out}/model"])
    for name, weight in weights_of(out).items():
        expected = weights_of(six_steps[1])[name]
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "flags",
    [
        "--reference live --recompute full --reshard always",
        pytest.param("--recompute elementwise --reshard never", marks=pytest.mark.slow),
        pytest.param("--replicas 2 --adam-state fp32 --clip 1", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(place, tmp_path, six_steps, flags, monkeypatch):
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    launch("train_dpo.py", place, tmp_path / "run", 2, *LORA, *held_out, *flags.split())
    same(read(tmp_path / "run"), six_steps[0])
    for name, weight in weights_of(tmp_path / "run").items():
        expected = weights_of(six_steps[1])[name]
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_ranks_equal_one_in_bf16_and_go_on_as_one(place, tmp_path):
    flags = (*LORA, "--precision", "bf16", "--save-every", "2", "--keep", "0")
    flags += ("--microbatch-tokens", "150")  # some packs are empty
    one = run(train_dpo, place, tmp_path / "one", *flags)
    out = tmp_path / "two"
    launch("train_dpo.py", place, out, 2, *flags)
    same(read(out), one, rel=0.02, abs=0.01)
    for name in ("checkpoints/step-000004", "checkpoints/step-000006", "model", "adapter"):
        (out / name).rename(tmp_path / Path(name).name)
    same(run(train_dpo, place, out, *flags), one, rel=0.02, abs=0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "recompute",
    ["elementwise", *(pytest.param(x, marks=pytest.mark.slow) for x in ("none", "full"))],
)
def test_one_compiled_graph_serves_all_blocks_with_adapters_and_without(
    place, tmp_path, six_steps, recompute, monkeypatch
):
    """The first block's input takes no gradient of its own, and --reference live switches."""
    compiled = torch.compile
    eager = {"backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **eager, **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    flags = (*held_out, "--compile", "on", "--reference", "live", "--recompute", recompute)
    same(run(train_dpo, place, tmp_path / "run", *LORA, *flags), six_steps[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_by_inductor_in_bf16_the_start_is_the_reference_to_the_bit(place, tmp_path, reference):
    """As on a GPU, where blocks are compiled: one graph, so one rounding, adapters on or off."""
    torch._dynamo.reset()
    flags = "--precision", "bf16", "--compile", "on", "--reference", reference, "--steps", "3"
    rows = run(train_dpo, place, tmp_path / "run", *LORA, *flags)
    assert [row["rewards/margins"] == row["rewards/chosen"] == 0 for row in rows[:2]] == [True] * 2
    assert rows[2]["rewards/margins"] != 0
    torch._dynamo.reset()


def test_a_frozen_head_makes_no_gradient_of_its_own_size():
    h_ND = torch.randn(4, 8, requires_grad=True)
    w_VD, targets_N = torch.randn(5000, 8), torch.arange(4)
    found = {}
    for frozen in (True, False):
        loss = kernels.linear_logprob(h_ND, w_VD.requires_grad_(not frozen), targets_N).sum()
        with Live([h_ND, w_VD]) as live:
            loss.backward()
        found[frozen], h_ND.grad = (live.peak, h_ND.grad), None
    assert torch.equal(found[True][1], found[False][1])
    assert found[True][0] < w_VD.nbytes <= found[False][0]


class Ops(TorchDispatchMode):
    """The names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_norm_sums_no_gradient_over_the_tokens(frozen):
    x_TD, weight_D = torch.randn(5, 8, requires_grad=True), torch.ones(8, requires_grad=not frozen)
    loss = kernels.rms_norm(x_TD, weight_D, 1e-5).sum()
    with Ops() as ops:
        loss.backward()
    sums = [name for name in ops.names if name.startswith("aten::sum")]
    assert len(sums) == (not frozen)


def test_what_is_frozen_gets_no_gradient_whatever_is_recomputed():
    """And the adapters' gradients are the same."""
    found = []
    for recompute in ("none", "elementwise", "full"):
        m = small_with_adapters()
        for block in m.model.layers:
            matmuls = lora.matmuls(PROJECTIONS, SPEC)
            block.forward = fsdp.wrapped(block, recompute, False, matmuls)
        losses.sft(m(pairs(0))).backward()
        grads = {name: p.grad for name, p in m.named_parameters()}
        assert all((g is not None) == lora.is_adapter(name) for name, g in grads.items())
        found.append({name: g for name, g in grads.items() if g is not None})
    close(found[1], found[0], 0)
    close(found[2], found[0], 0)


SPEC = lora.Spec(32, 16, ("q_proj", "o_proj", "gate_proj"))


def small_with_adapters(orthogonal: bool = False) -> Mistral:
    """A small model with adapters whose B is zero."""
    with torch.device("meta"):
        m = Mistral(model().config)
    lora.attach(m, SPEC, "fp32", torch.device("cpu"))
    m.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in m.named_parameters():
            if not lora.is_adapter(name):
                p.copy_(model().get_parameter(name))
            else:
                p.copy_(lora.initial(name, p.shape, 0))
                if name.endswith(lora.A) and orthogonal:
                    nn.init.orthogonal_(p)
    return m


def test_a_step_of_full_rank_is_one_of_full_training_to_first_order():
    """With AᵀA = 1 a step of SGD moves B by -η s G Aᵀ, and W by s ΔB A = -η s² G: full training's
    step at the rate η s². The loss falls by η s² |G|², to first order."""
    m, batch, rate = small_with_adapters(orthogonal=True), pairs(0), 1e-4
    full = gradients(model(), [batch])
    before = losses.sft(m(batch)) / len(batch.targets_N)
    before.backward()
    square = 0.0
    for name, layer in m.named_modules():
        if isinstance(layer, LoRALinear):
            expected = SPEC.scale**2 * full[f"{name}.weight"]
            moved = SPEC.scale * layer.lora_B.weight.grad @ layer.lora_A.weight
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5 * expected.norm())
            assert not layer.lora_A.weight.grad.any(), "B is zero"
            square += SPEC.scale**2 * float(full[f"{name}.weight"].square().sum())
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p -= rate * p.grad
        fell = before - losses.sft(m(batch)) / len(batch.targets_N)
    assert fell == pytest.approx(rate * square, rel=0.02)


def test_switched_off_it_is_the_base_to_the_bit():
    m, batch = small_with_adapters(), pairs(0)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if lora.is_adapter(name):
                p.normal_(std=0.1)
        on, base = m(batch), model()(batch)
        with lora.switched_off(m):
            assert torch.equal(m(batch), base)
        assert torch.equal(m(batch), on) and (on - base).abs().max() > 0.01


def test_a_policy_may_be_switched_off_between_its_forward_and_its_backward():
    expected = None
    for between in (False, True):
        m, batch = small_with_adapters(), pairs(0)
        loss = losses.sft(m(batch))
        if between:
            with lora.switched_off(m), torch.no_grad():
                m(batch)
        loss.backward()
        grads = {name: p.grad for name, p in m.named_parameters() if p.requires_grad}
        expected = expected or grads
    close(grads, expected, 0)


def test_adapters_start_as_pefts_do():
    torch.manual_seed(0)
    theirs = peft.LoraConfig(r=64, target_modules=["0"])
    made = peft.get_peft_model(nn.Sequential(nn.Linear(400, 30)), theirs).state_dict()
    a, b = (made[f"base_model.model.0.lora_{x}.default.weight"] for x in "AB")
    ours = lora.initial("x.lora_A.weight", a.shape, 0)
    for x in (a, ours):
        assert 0.0499 < x.abs().max() <= 0.05 and x.std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    zeros = lora.initial("x.lora_B.weight", b.shape, 0)
    assert not b.any() and not zeros.any() and zeros.shape == b.shape
    others = (lora.initial(name, a.shape, seed) for name, seed in (("y" + lora.A, 0), (lora.A, 1)))
    assert all((ours != x).float().mean() > 0.99 for x in others)


def test_dpo_on_an_adapter_of_sft_is_an_adapter_of_the_same_base(place, tmp_path, capfd):
    """Its rank is the sum of the two: what they name as their base has the weights that they are
    to be added to."""
    sft = "--lr 1e-2 --lora-rank 3 --lora-targets q_proj,up_proj --no-empty-system".split()
    rows = run(train_sft, place, tmp_path / "sft", *SFT, *sft)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    start, out = tmp_path / "sft" / "adapter", tmp_path / "dpo"
    second = "--model", str(start), "--lora-rank", "15", "--lora-targets", "q_proj,o_proj"
    flags = (*DPO, *second, "--save-every", "6")
    rows = run(train_dpo, place, out, *flags)
    assert rows[0]["rewards/margins"] == 0 and rows[-1]["rewards/margins"] > 0.01
    told = capfd.readouterr().err
    assert f"the chat template of {start} inserts no empty system message" in told
    assert (
        f"{out}/adapter has rank 18: vllm serve BASE --enable-lora --max-lora-rank 32 --lora-"
        in told
    )
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (18, 18)
    assert config["target_modules"] == ["q_proj", "o_proj", "up_proj"]
    assert config["base_model_name_or_path"] == str(place / "base")
    logits = loaded_by_peft(place / "base", out / "adapter")
    near(loaded_by_transformers(out / "model"), logits)
    near(ours_merged(out / "adapter"), logits)
    # the same as on the first adapter, merged
    merged = "--model", str(tmp_path / "sft" / "model"), "--lora-rank", "15"
    flags = (*DPO, *merged, "--lora-targets", "q_proj,o_proj")
    same(run(train_dpo, place, tmp_path / "merged", *flags), rows, rel=1e-3, abs=1e-3)
    near(loaded_by_transformers(tmp_path / "merged" / "model"), logits, 1e-4)
    checkpoint.export(out / "checkpoints" / "latest", tmp_path / "latest" / "model")
    exported, whole = weights_of(tmp_path / "latest"), weights_of(out)
    assert all(torch.equal(exported[name], whole[name]) for name in whole)
    assert Tokenizer(out / "adapter").digest == Tokenizer(place / "base").digest
    # one as PEFT leaves it, without a tokenizer, speaks as its base does
    alone = shutil.copytree(tmp_path / "merged" / "adapter", tmp_path / "peft" / "adapter")
    for path in alone.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    assert (found := source.open_source(str(alone))).empty_system is False
    assert source.title(found) == "peft"
    # full training on an adapter
    full = (*DPO, "--model", str(start), "--steps", "2")
    first = run(train_dpo, place, tmp_path / "full", *full)[0]
    assert first["logps/chosen"] == pytest.approx(rows[0]["logps/chosen"], rel=1e-5)


def test_a_policy_that_does_not_move_stops_the_run(place, tmp_path):
    line = "after the first update the mean margin is 0 as before it: .* raise --lr 1e-30"
    with pytest.raises(ValueError, match=line):
        run(train_dpo, place, tmp_path / "run", *LORA, "--lr", "1e-30")


@pytest.mark.slow
def test_on_real_pairs_on_two_ranks_the_policy_learns_to_tell_them(tmp_path):
    """UltraFeedback's, by Mistral's tokenizer, beside random weights that stay as they are."""
    base, out = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    shutil.copy(shared("mistral/tokenizer.model"), base)
    shape = dataclasses.replace(SHAPE_OF_REAL, vocab_size=Tokenizer(base).vocab_size)
    config_json.write_config(base, shape, "float32", {"initializer_range": 0.1})
    hub.fresh(base, 0)
    feedback.main(
        [str(shared("ultrafeedback.train.jsonl.gz")), "--out", str(tmp_path / "all.jsonl")]
    )
    some = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)[:64]
    (tmp_path / "pairs.jsonl").write_text("".join(some))
    flags = "--lora-rank 16 --lr 3e-3 --schedule constant --epochs 12 --batch 32 --beta 0.1"
    flags += " --precision fp32 --max-length 192 --max-prompt-length 96 --microbatch-tokens 4096"
    launch("train_dpo.py", tmp_path, out, 2, *flags.split())
    accuracies = [row["rewards/accuracies"] for row in read(out)]
    assert accuracies[0] == 0 and sum(accuracies[-2:]) / 2 > 0.85
    frozen, whole = load_file(base / "model.safetensors"), weights_of(out)
    targets = [name for name in frozen if name.split(".")[-2] in PROJECTIONS]
    assert all(torch.equal(frozen[x], whole[x]) != (x in targets) for x in frozen)


def test_a_step_that_was_left_out_is_no_policy_that_does_not_move(place, tmp_path, monkeypatch):
    """The second step's, the first with a learning rate above 0."""
    broken = Journal.broken

    def broken_in_the_second(self: Journal) -> torch.Tensor:
        self.flag = broken(self) + (self.step == 2)
        return self.flag

    monkeypatch.setattr(Journal, "broken", broken_in_the_second)
    rows = run(train_dpo, place, tmp_path / "run", *LORA, "--on-nonfinite", "skip")
    assert rows[1]["learning_rate"] > 0 == rows[2]["rewards/margins"] < rows[3]["rewards/margins"]


def test_the_reference_is_shared_by_ranks_of_adapters_and_not_with_full_training(
    place, tmp_path, own_cache
):
    """With adapters a compiled block is another graph, which may round in another way."""
    tables = []
    for name, flags in (("a", LORA), ("b", (*DPO, "--lora-rank", "2")), ("c", DPO)):
        run(train_dpo, place, tmp_path / name, *flags, "--steps", "2")
        tables.append(len(list((tmp_path / "cache").glob("reference-*.npy"))))
    assert tables == [1, 1, 2]


def test_an_adapter_answers(six_steps, place, tmp_path, monkeypatch, capsys):
    answers = []
    moved = shutil.copytree(six_steps[1] / "adapter", tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "mistralai/Mistral-7B-v0.1"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    for flags in (
        [six_steps[1] / "model"],
        [six_steps[1] / "adapter"],
        [moved, "--base", place / "base"],
    ):
        speak(monkeypatch, *flags, "--prompt", "one two", "--max-new", "9", "--temperature", "0")
        answers.append(capsys.readouterr().out)
    assert answers[0] and answers[1] == answers[2] == answers[0]
    with pytest.raises(SystemExit):
        speak(monkeypatch, moved, "--prompt", "one two")
    told = capsys.readouterr().err
    assert "is a LoRA adapter (adapter_config.json) of 'mistralai/Mistral-7B-v0.1', which" in told
    with pytest.raises(SystemExit):
        speak(monkeypatch, six_steps[1] / "adapter", "--base", "", "--prompt", "one two")
    assert "(adapter_config.json) of '', which is no folder here" in capsys.readouterr().err


SHAPE_OF_REAL = MistralConfig(
    vocab_size=1,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=128,
)


def broken(folder: Path, weights: dict | None = None, **changes) -> Path:
    """An adapter of q_proj in the first layer of `model()`, with something changed."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    name = adapter.PREFIX + "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 32),
        f"{name}.lora_B.weight": torch.ones(32, 2),
    }
    save_file(tensors if weights is None else weights, folder / "adapter_model.safetensors")
    return folder


Q = adapter.PREFIX + "model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("weights", "changes", "line"),
    [
        (None, {"peft_type": "LOHA"}, "peft_type is 'LOHA'; it must be 'LORA'"),
        (None, {"use_dora": True}, "use_dora is True; only None is implemented"),
        (None, {"bias": "all"}, "bias is 'all'; only 'none' is implemented"),
        (None, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; only True or"),
        (None, {"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; only None"),
        (None, {"lora_alpha": 0}, "lora_alpha is 0; it must be a positive number"),
        (None, {"use_rslora": 1}, "use_rslora is 1; it must be true or false"),
        (None, {"r": 8}, r"q_proj has rank 2, and adapter_config.json says 8 \(r, rank_pattern\)"),
        (None, {"r": 8, "rank_pattern": {"q_proj": 4}}, "rank 2, and .* says 4 or 8"),
        (None, {"r": None}, "r is None; it must be a whole number above 0"),
        (None, {"rank_pattern": {"v": "2"}}, "rank_pattern of v is '2'; it must be a whole number"),
        (None, {"rank_pattern": [2]}, r"rank_pattern is \[2\]; it must be an object"),
        (
            None,
            {"target_modules": ["k_proj"]},
            r"target_modules \['k_proj'\] leaves out model.layers.0.self_attn.q_proj, which has an",
        ),
        (None, {"target_modules": ["proj", "k_q_proj"]}, "leaves out model.layers.0.self_attn.q_p"),
        (None, {"exclude_modules": ["self_attn.q_proj"]}, "exclude_modules .* leaves out model"),
        (None, {"layers_to_transform": [1, 2]}, r"layers_to_transform \[1, 2\] leaves out model"),
        (None, {"layers_to_transform": "0"}, "layers_to_transform '0' leaves out model.layers.0"),
        (
            None,
            {"target_modules": ["q_proj", "up_proj", "elsewhere"]},
            "target_modules names up_proj, of which adapter_model.safetensors has no tensor",
        ),
        (None, {"\x1b[2J": 1}, r"adapter_config.json: '\\x1b\[2J' is 1; only None"),
        ({}, {}, "adapter_model.safetensors holds no tensor"),
        ({f"{Q}A.weight": torch.ones(2, 32)}, {}, r"q_proj are \[2, 32\] and None; they must be"),
        (
            {f"{Q}A.weight": torch.ones(2, 9), f"{Q}B.weight": torch.ones(32, 2)},
            {},
            r"q_proj.weight is for \[32, 9\], and .*base has \[32, 32\]: it is another model's",
        ),
        (
            {f"{Q}A.weight".replace(".0.", ".7."): torch.ones(2, 32)}
            | {f"{Q}B.weight".replace(".0.", ".7."): torch.ones(32, 2)},
            {},
            r"layers.7.*q_proj.weight is for \[32, 32\], and .*base has none",
        ),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, {}, "is no adapter of a"),
        (
            {f"{Q}A.weight": torch.ones(0, 32), f"{Q}B.weight": torch.ones(32, 0)},
            {},
            r"q_proj are \[0, 32\] and \[32, 0\]; they must be \[r, in\] and \[out, r\], and r",
        ),
        (
            {f"{Q}A.weight": torch.ones(2, 32).char(), f"{Q}B.weight": torch.ones(32, 2).char()},
            {},
            "lora_A.weight is I8; adapters are one of F64, F32, F16, BF16",
        ),
        (
            {f"{Q}{end}": torch.ones(2, 32) for end in ("A.weight", "A.default.weight")},
            {},
            r"has model.layers.0.self_attn.q_proj.lora_A.weight twice, once as base_model",
        ),
        (
            {f"{Q}A.weight": torch.full((2, 32), math.nan), f"{Q}B.weight": torch.ones(32, 2)},
            {},
            "NaN or infinity in model.layers.0.self_attn.q_proj.weight",
        ),
    ],
)
def test_an_adapter_that_cannot_be_added(tmp_path, weights, changes, line):
    base = folder_of(model(), tmp_path / "base")
    folder = broken(tmp_path / "it", weights, **changes)
    with pytest.raises(ValueError, match=line) as raised:
        hub.load(locate.parts(folder, base), Mistral(model().config))
    assert str(raised.value).isprintable()


def test_a_pickle_or_a_quantized_base_is_refused(tmp_path, capsys):
    base, folder = folder_of(model(), tmp_path / "base"), broken(tmp_path / "it")
    config = json.loads((base / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(config | quantized))
    with pytest.raises(SystemExit):
        weights_command.main([str(folder), str(tmp_path / "out"), "--base", str(base)])
    assert "'bitsandbytes': quantized weights cannot be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin, a pickle, and reading that can run"):
        adapter.read(folder)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--lora-rank -1", "--lora-rank -1 must be from 0 to 4096"),
        ("--lora-alpha 16", "--lora-alpha is for adapters; give --lora-rank too, such as 128"),
        ("--lora-alpha 0", "--lora-alpha is for adapters"),
        ("--lora-targets q_proj", "--lora-targets is for adapters"),
        ("--no-merge", "--no-merge is for adapters"),
        ("--lora-rank 4 --lora-alpha 0", "--lora-alpha 0 must be above 0"),
        (
            "--lora-rank 4 --lora-targets q_proj,k",
            "--lora-targets 'q_proj,k' must be different ones",
        ),
        ("--lora-rank 4 --lora-targets q_proj,q_proj", "must be different ones of q_proj,k_proj"),
        (
            "--lora-rank 4 --masters split --precision bf16",
            "--masters split does not go with --lora-rank",
        ),
        ("--lora-rank 4 --base elsewhere", "--base elsewhere is for a LoRA adapter, and"),
    ],
)
def test_flags_that_cannot_be_meant(place, tmp_path, flags, line):
    with pytest.raises(ValueError, match=line):
        run(train_dpo, place, tmp_path / "run", *DPO, *flags.split())
