"""The number of steps; schedules against transformers', AdamW against itself in float64."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from model_helpers import model
from zephyr import optim
from zephyr.config import DPOConfig
from zephyr.weights.hub import initialise

SCHEDULES = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "constant": lambda o, rise, total: transformers.get_constant_schedule_with_warmup(o, rise),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "total, warmup, rise",
    [
        (100, 0.1, 10),
        (478, 0.1, 48),
        (5809, 0.1, 581),
        (7, 0.5, 4),
        (20, 0.0, 0),
        (1, 0.0, 0),
        (1, 0.1, 1),
        (2, 0.9, 2),
        (3, 1e-9, 1),
        (100, 0.07, 8),
    ],
)
def test_schedules_equal_transformers(kind, total, warmup, rise):
    """`rise` is ceil(total x warmup) in floating point, as its TrainingArguments count it."""
    theirs = SCHEDULES[kind](torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0), rise, total)
    factor = theirs.lr_lambdas[0]
    for step in range(total):
        assert optim.schedule(kind, step, total, warmup) == pytest.approx(factor(step), abs=1e-12)


def test_a_schedule_ends_near_zero_and_starts_there():
    for kind in ("linear", "cosine"):
        rates = [optim.schedule(kind, step, 1000, 0.1) for step in range(1000)]
        assert rates[0] == 0 and max(rates) == rates[100] == 1 and 0 < rates[-1] < 2e-3
        assert sorted(rates[:101]) == rates[:101] and sorted(rates[100:])[::-1] == rates[100:]


def config(**settings) -> DPOConfig:
    return DPOConfig(model="m", data=("d",), out="o", **settings)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"steps": 1},
        {"steps": 2},
        {"epochs": 2},
        {"batch": 8},
        {"batch": 7},
        {"warmup": 0.0},
        {"warmup": 0.99},
        {"warmup": 1e-12},
        {"warmup": 0.5, "steps": 10},
        {"steps": 1, "warmup": 0.0},
        {"epochs": 3, "batch": 100, "warmup": 0.9},
    ],
)
@pytest.mark.parametrize("size, world", [(1, 1), (2, 1), (2, 2), (9, 4), (100, 8), (129, 1)])
def test_a_run_without_a_rate_above_0_is_refused_and_what_is_said_mends_it(
    kind, given, size, world
):
    c = config(schedule=kind, **given)

    notes = []
    ranks = SimpleNamespace(size=world, say=notes.append)

    def steps(c: DPOConfig) -> int:
        return optim.steps(c, math.ceil(size / c.batch), size, "pair", ranks)

    total = c.steps or c.epochs * math.ceil(size / c.batch)
    theirs = SCHEDULES[kind](
        torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0), math.ceil(c.warmup * total), total
    ).lr_lambdas[0]
    if max(map(theirs, range(total))) > 0:
        found = steps(c)
        most = 2 * math.ceil(c.warmup * total) >= total
        assert found == total and len(notes) == most
        assert all(f"takes {math.ceil(c.warmup * total)} of the {total} steps" in x for x in notes)
        return
    with pytest.raises(ValueError, match="nothing would be learned") as refused:
        steps(c)
    message = str(refused.value)
    named = (
        {"--steps": c.steps, "--warmup": c.warmup}
        if c.steps
        else {"--batch": c.batch, "--epochs": c.epochs, "no --steps": None, "--warmup": c.warmup}
    )
    for flag, value in named.items():
        assert (flag if value is None else f"{flag} {value}") in message.split("; use ")[0]
    fixes = re.findall(r"--(\w+) (\d+)(?:, which makes (\d+) steps)?", message.split("; use ")[1])
    assert {"warmup"} < {name for name, *_ in fixes}
    for name, value, makes in fixes:
        mended = replace(c, **{name: int(value)})
        assert name != "batch" or mended.batch >= world
        assert steps(mended) == int(makes or steps(mended))


class Written:
    """AdamW, Algorithm 2 of arXiv:1711.05101, on lists of floats' tensors in float64."""

    def __init__(self, weights: list[torch.Tensor], decay: list[float]):
        self.w, self.decay, self.t = [w.double().clone() for w in weights], decay, 0
        self.m, self.v = ([torch.zeros_like(w) for w in self.w] for _ in range(2))

    def step(self, gradients: list[torch.Tensor], lr: float, clip: float) -> float:
        self.t += 1
        gradients = [g.double() for g in gradients]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        # what clips is an fp32 number, whatever the weights are; the 1e-6 is clip_grad_norm_'s
        scale = float(torch.tensor(max(1.0, (norm + 1e-6) / clip), dtype=torch.float32))
        for k, g in enumerate(gradients):
            g = g / scale
            self.w[k] -= lr * self.decay[k] * self.w[k]
            self.m[k] = 0.9 * self.m[k] + 0.1 * g
            self.v[k] = 0.999 * self.v[k] + 0.001 * g * g
            m, v = self.m[k] / (1 - 0.9**self.t), self.v[k] / (1 - 0.999**self.t)
            self.w[k] -= lr * m / (v.sqrt() + 1e-8)
        return norm


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "clip, clipped",
    [(1.0, [True] * 5), (40.0, [False, True, False, True, False]), (1e4, [False] * 5)],
)
def test_steps_equal_adamw_written_out(clip, clipped, decay, dtype, rtol):
    m = model().to(dtype)
    names, parameters = zip(*m.named_parameters(), strict=True)
    is_matrix = ["norm" not in name for name in names]
    written = Written([p.detach() for p in parameters], [decay * x for x in is_matrix])
    optimizer = optim.adamw(m, decay)
    generator = torch.Generator().manual_seed(0)
    norms = []
    for step in range(1, 6):
        size = 0.2 if step % 2 else 0.4
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype) * size
        gradients = [p.grad.clone() for p in parameters]
        lr = 1e-2 / step
        norm = optim.step(optimizer, lr, clip)
        norms.append(float(norm))
        assert float(norm) == pytest.approx(written.step(gradients, lr, clip), rel=1e-6)
        assert all(p.grad is None for p in parameters)
        for name, p, expected in zip(names, parameters, written.w, strict=True):
            difference = (p.detach().double() - expected).abs().max()
            assert difference <= rtol * expected.abs().max(), f"{name}, step {step}"
    assert [norm > clip for norm in norms] == clipped


def test_only_matrices_are_decayed():
    """Without a gradient, decay alone moves a weight: by the factor 1 - lr x decay."""
    m = model()
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    optimizer = optim.adamw(m, weight_decay=0.5)
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    assert optim.step(optimizer, 0.1, 1.0) == 0
    for name, p in m.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_spares_the_weights(value):
    m = model()
    before = [p.detach().clone() for p in m.parameters()]
    optimizer = optim.adamw(m, 0.1)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    m.lm_head.weight.grad[100, 31] = value
    assert not optim.step(optimizer, 0.1, 1.0).isfinite()
    assert all(p.grad is None for p in m.parameters())
    assert not any(x.any() for state in optimizer.state.values() for x in state.values())
    assert all(torch.equal(p, old) for p, old in zip(m.parameters(), before, strict=True))


def moved(m: nn.Module) -> float:
    """The share of matrix weights that one step at Zephyr's rate changes."""
    initialise(m, 0)
    matrices = [p for p in m.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in matrices]
    optimizer = optim.adamw(m, 0.0)
    generator = torch.Generator().manual_seed(0)
    for p in m.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optim.step(optimizer, 5e-7, 1.0)
    changed = sum(int((p != old).sum()) for p, old in zip(matrices, before, strict=True))
    return changed / sum(p.numel() for p in matrices)


def test_why_masters_are_fp32():
    """Adam's step is about lr, 5e-7; half the spacing of bf16 numbers near 0.02 is 6e-5."""
    assert moved(model()) >= 0.99
    assert moved(model().bfloat16()) < 0.02
