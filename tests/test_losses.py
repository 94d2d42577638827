"""Objectives and their gradients against closed forms in float64, written out anew here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from zephyr import losses
from zephyr.config import DPOConfig

MARGINS = [-1e4, -300.0, -50.0, -1.0, -1e-3, 0.0, 1e-3, 0.7, 1.0, 50.0, 300.0, 1e4]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def truth(name: str, h: float, beta: float, e: float) -> tuple[float, float]:
    """Loss and d loss / d h, from the papers, in float64."""
    z = beta * h
    nll, nll_flipped = softplus(-z), softplus(z)
    grad, grad_flipped = -beta * sigmoid(-z), beta * sigmoid(z)
    return {
        "dpo": ((1 - e) * nll + e * nll_flipped, (1 - e) * grad + e * grad_flipped),
        "robust": (
            ((1 - e) * nll - e * nll_flipped) / (1 - 2 * e),
            ((1 - e) * grad - e * grad_flipped) / (1 - 2 * e),
        ),
        "ipo": ((h - 0.5 / beta) ** 2, 2 * (h - 0.5 / beta)),
        "hinge": (max(0.0, 1 - z), -beta if z < 1 else 0.0),
    }[name]


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_objectives_and_gradients(name, smoothing, beta, dtype, rtol):
    h = torch.tensor([m / beta for m in MARGINS], dtype=dtype, requires_grad=True)
    upstream = torch.randn(len(h), dtype=dtype, generator=torch.Generator().manual_seed(0))
    loss = losses.OBJECTIVES[name](h, beta, smoothing)
    (loss * upstream).sum().backward()
    loss = loss.detach()
    for k, value in enumerate(h.tolist()):
        expected, slope = truth(name, value, beta, smoothing)
        if abs(beta * value - 1) < 1e-6 and name == "hinge":
            continue  # the corner has no derivative
        # the atol is for what is a difference of terms of this size
        atol = rtol * abs(beta * value)
        assert float(loss[k]) == pytest.approx(expected, rel=rtol, abs=atol)
        assert float(h.grad[k]) == pytest.approx(slope * float(upstream[k]), rel=rtol, abs=atol)


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_gradcheck(name):
    h = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda h: losses.OBJECTIVES[name](h, 0.3, 0.2), h)


def test_known_values_at_zero():
    zero = torch.zeros(1)
    assert float(losses.dpo(zero, 0.1, 0.0)) == pytest.approx(math.log(2), abs=1e-7)
    assert float(losses.dpo(zero, 0.1, 0.3)) == pytest.approx(math.log(2), abs=1e-7)
    assert float(losses.ipo(zero, 0.1, 0.0)) == pytest.approx(25.0)
    assert float(losses.hinge(zero, 0.1, 0.0)) == 1.0


def preference(name, policy_2P, reference_2P, tokens_2P, beta, smoothing=0.0):
    """`losses.preference` of responses with these sums and as many equal tokens."""
    tokens_2P = tokens_2P.long()
    logprob_N = (policy_2P / tokens_2P).repeat_interleave(tokens_2P)
    response_N = torch.arange(len(tokens_2P)).repeat_interleave(tokens_2P)
    return losses.preference(name, logprob_N, response_N, reference_2P, beta, smoothing)


values = st.floats(-500, 0, width=32)


@given(st.lists(st.tuples(values, values, values, values), min_size=1, max_size=9))
def test_metrics_of_interleaved_responses(rows):
    """policy chosen, policy rejected, reference chosen, reference rejected of each pair."""
    rows = np.array(rows, np.float64)
    policy, reference = rows[:, :2].ravel(), rows[:, 2:].ravel()
    tokens = np.arange(1, len(policy) + 1, dtype=np.float64)
    got = preference(
        "dpo", torch.tensor(policy), torch.tensor(reference), torch.tensor(tokens), 0.1
    )
    chosen, rejected = 0.1 * (rows[:, 0] - rows[:, 2]), 0.1 * (rows[:, 1] - rows[:, 3])
    # exactly as the papers define them: chosen at the even places
    np.testing.assert_allclose(got["rewards/chosen"], chosen, atol=1e-12)
    np.testing.assert_allclose(got["rewards/rejected"], rejected, atol=1e-12)
    np.testing.assert_allclose(got["rewards/margins"], chosen - rejected, atol=1e-12)
    np.testing.assert_allclose(got["logps/chosen"], rows[:, 0], atol=1e-12)
    np.testing.assert_allclose(got["logps/rejected"], rows[:, 1], atol=1e-12)
    expected = [
        truth("dpo", (c - r) / 0.1, 0.1, 0.0)[0] for c, r in zip(chosen, rejected, strict=True)
    ]
    np.testing.assert_allclose(got["loss"], expected, rtol=1e-9, atol=1e-12)
    assert set(got) == set(losses.METRICS)


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_equal_policies_have_accuracy_zero(name):
    logprob, response = torch.randn(60), torch.arange(6).repeat_interleave(10)
    got = losses.preference(name, logprob, response, kernels.response_sums(logprob, response, 6), 1)
    assert got["rewards/margins"].tolist() == got["rewards/accuracies"].tolist() == [0.0] * 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_the_loss_and_its_gradient_are_those_of_the_objective(name, smoothing):
    """Whether it runs fused or not: through sums, ratios and, for ipo, lengths written out here."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 9, (8,), generator=g)
    logprob = -torch.rand(int(tokens.sum()), dtype=torch.float64, generator=g)
    reference, upstream = -torch.rand(8, dtype=torch.float64, generator=g) * 5, torch.randn(4)
    response = torch.arange(8).repeat_interleave(tokens)
    logprob.requires_grad_()
    got = losses.preference(name, logprob, response, reference, 0.3, smoothing)
    (slope,) = torch.autograd.grad(got["loss"], logprob, upstream.double())
    weight = 1 / tokens if name == "ipo" else torch.ones(8)
    sums = [s.sum() for s in logprob.detach().split(tokens.tolist())]
    ratio = [float((s - r) * w) for s, r, w in zip(sums, reference, weight, strict=True)]
    for k in range(4):
        loss, dh = truth(name, ratio[2 * k] - ratio[2 * k + 1], 0.3, smoothing)
        assert float(got["loss"][k].detach()) == pytest.approx(loss, rel=1e-6)
        for r, sign in ((2 * k, 1), (2 * k + 1, -1)):
            expected = sign * dh * float(upstream[k] * weight[r])
            assert slope[response == r].tolist() == pytest.approx([expected] * int(tokens[r]))


def test_the_loss_of_ipo_divides_by_the_tokens_of_each_response_and_no_reward_does():
    policy, tokens = torch.tensor([-8.0, -30.0]), torch.tensor([4.0, 10.0])
    ipo = preference("ipo", policy, torch.zeros(2), tokens, 0.5)
    assert float(ipo["loss"]) == pytest.approx((-2.0 + 3.0 - 1.0) ** 2)
    dpo = preference("dpo", policy, torch.zeros(2), tokens, 0.5)
    for got in (ipo, dpo):
        assert float(got["rewards/chosen"]) == pytest.approx(-4)
        assert float(got["rewards/rejected"]) == pytest.approx(-15)
        assert float(got["rewards/margins"]) == pytest.approx(11)


def test_what_losses_py_says_is_what_runs(monkeypatch):
    """Whoever edits an objective sees another loss, and the specification of the kernels is equal
    to it in every bit."""
    g = torch.Generator().manual_seed(0)
    response = torch.arange(6).repeat_interleave(torch.tensor([3, 9, 1, 40, 7, 2]))
    logprob = -3 * torch.rand(len(response), generator=g)
    reference = kernels.response_sums(logprob, response, 6) + torch.randn(6, generator=g)
    upstream = torch.randn(3, generator=g)
    for name, smoothing in (("dpo", 0.1), ("ipo", 0.0)):
        both = []
        for function in (
            lambda x: losses.preference(name, x, response, reference, 0.3, smoothing)["loss"],
            lambda x: kernels.dpo_loss(x, response, reference, 0.3, smoothing, name).loss_P,
        ):
            leaf = logprob.clone().requires_grad_()
            loss = function(leaf)
            both.append((loss.detach(), *torch.autograd.grad(loss, leaf, upstream)))
        assert all(map(torch.equal, *both)), name
    monkeypatch.setitem(losses.OBJECTIVES, "dpo", lambda h, beta, smoothing: 7 * h)
    edited = losses.preference("dpo", logprob, response, reference, 0.3)
    torch.testing.assert_close(edited["loss"], 7 / 0.3 * edited["rewards/margins"])


def in_trl(name, logprob_PT, mask_PT, reference_PT, beta, smoothing) -> dict[str, np.ndarray]:
    """What TRL's DPOTrainer logs of each pair, in float64: of padded rows, the first half chosen,
    the other rejected. Its rewards are β × the summed log-ratio whatever the loss."""
    summed = (logprob_PT * mask_PT).sum(1)
    chosen, rejected = np.split(summed - (reference_PT * mask_PT).sum(1), 2)
    chosen_tokens, rejected_tokens = np.split(mask_PT.sum(1), 2)
    delta = chosen - rejected
    if name == "ipo":
        delta = chosen / chosen_tokens - rejected / rejected_tokens
    return {
        "loss": np.array([truth(name, d, beta, smoothing)[0] for d in delta]),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": (beta * chosen > beta * rejected).astype(float),
        "rewards/margins": beta * chosen - beta * rejected,
        "logps/chosen": np.split(summed, 2)[0],
        "logps/rejected": np.split(summed, 2)[1],
    }


@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
@pytest.mark.parametrize(
    "name, smoothing", [("dpo", 0.0), ("dpo", 0.2), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
)
def test_every_logged_quantity_is_trls(name, smoothing, implementation, monkeypatch):
    """A pair that is right by its sums and wrong by its means, and the other way, among them; the
    gradient is that of random upstream gradients through the same loss."""
    monkeypatch.setenv("ZEPHYR_KERNELS", implementation)
    rng, pairs, longest = np.random.default_rng(0), 7, 9
    mask = np.arange(longest) < rng.integers(1, longest + 1, (2 * pairs, 1))
    logprob, reference = -3 * rng.random((2, 2 * pairs, longest))
    mask[0], mask[pairs] = np.arange(longest) < 9, np.arange(longest) < 1
    logprob[0] = reference[0] + 0.1
    logprob[pairs] = reference[pairs] + 0.5  # sums 0.9 and 0.5, means 0.1 and 0.5
    expected = in_trl(name, logprob, mask, reference, 0.3, smoothing)
    assert expected["rewards/margins"][0] > 0 > logprob[0, 0] - reference[0, 0] - 0.5

    rows = np.arange(2 * pairs).reshape(2, pairs).T.ravel()  # pair k's chosen, then its rejected
    dtype = torch.float32 if implementation == "triton" else torch.float64
    tokens = torch.tensor(mask[rows].sum(1))
    response = torch.arange(2 * pairs).repeat_interleave(tokens)
    logprob_N = torch.tensor(logprob[rows][mask[rows]], dtype=dtype, requires_grad=True)
    sums = torch.tensor((reference * mask)[rows].sum(1), dtype=dtype)
    got = losses.preference(name, logprob_N, response, sums, 0.3, smoothing)
    assert set(got) == set(expected) == set(losses.METRICS)
    for key, value in expected.items():
        rtol, atol = (2e-5, 2e-5) if dtype == torch.float32 else (1e-6, 1e-9)
        np.testing.assert_allclose(got[key].detach(), value, rtol, atol, err_msg=key)

    upstream = rng.standard_normal(pairs)
    got["loss"].backward(torch.tensor(upstream, dtype=dtype))
    step = 1e-6
    for place in (0, 4, len(logprob_N) - 1):
        moved = []
        for sign in (1, -1):
            other = logprob[rows][mask[rows]]
            other[place] += sign * step
            padded = logprob[rows]
            padded[mask[rows]] = other
            back = padded[np.argsort(rows)]
            loss = in_trl(name, back, mask, reference, 0.3, smoothing)["loss"]
            moved.append(float(upstream @ loss))
        slope = (moved[0] - moved[1]) / (2 * step)
        assert float(logprob_N.grad[place]) == pytest.approx(slope, rel=1e-4, abs=1e-5), place


def test_a_constant_on_the_reference_changes_nothing_and_a_swap_negates_the_margin():
    g = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(8, dtype=torch.float64, generator=g) for _ in range(2))
    one = torch.ones(8)
    base = preference("dpo", policy, reference, one, 0.1)
    moved = preference("dpo", policy, reference + 3, one, 0.1)
    torch.testing.assert_close(moved["loss"], base["loss"])
    swap = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    swapped = preference("dpo", policy[swap], reference[swap], one, 0.1)
    torch.testing.assert_close(swapped["rewards/margins"], -base["rewards/margins"])


def settings(loss: str) -> DPOConfig:
    return DPOConfig(
        model="", data=("",), out="", loss=loss, beta=0.1, precision="fp32", label_smoothing=0.0
    )


@pytest.mark.parametrize("loss, margin", [(0.70, 0.0), (math.log(2), 1e-3), (math.inf, 0.0)])
def test_a_start_from_unequal_policies_stops(loss, margin):
    with pytest.raises(ValueError, match="before the first update policy and reference must agree"):
        losses.check_start(settings("dpo"), {"loss": loss, "rewards/margins": margin})


@pytest.mark.parametrize("name, loss", [("dpo", math.log(2)), ("ipo", 25.0), ("hinge", 1.0)])
def test_a_start_from_equal_policies_goes_on(name, loss):
    losses.check_start(settings(name), {"loss": loss, "rewards/margins": 0.0})


def test_a_start_that_is_not_finite_is_the_guards_to_report():
    nan = dict.fromkeys(("loss", "rewards/margins", "rewards/accuracies"), math.nan)
    losses.check_start(settings("dpo"), nan, exact=True)
