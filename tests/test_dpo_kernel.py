"""The fused DPO loss against the papers' formulas in float64, in every implementation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import fused_dpo

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
OBJECTIVES = [("dpo", 0.0), ("dpo", 0.1), ("ipo", 0.0)]


@pytest.fixture(params=["torch", "triton"])
def implementation(request, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", request.param)
    return request.param


@pytest.fixture
def poison():
    """torch.empty is all NaN: what is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tokens(lengths: list[int], seed: int = 0, ratio: float = 1.0):
    """Token log-probs, their responses, reference sums about `ratio` away, upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    response = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    logprob = -torch.rand(len(response), generator=generator) * 3
    sums = torch.zeros(len(lengths)).index_add(0, response, logprob)
    reference = sums + ratio * torch.randn(len(lengths), generator=generator)
    return logprob, response, reference, torch.randn(len(lengths) // 2, generator=generator)


def truth(logprob, response, reference, c, beta, smoothing, objective):
    """loss, logprob, reward, margin and the gradient of Σ c loss, pair by pair in Python."""
    logprob, reference = logprob.cpu().double().numpy(), reference.cpu().double().numpy()
    response = response.cpu().numpy()
    losses, sums, rewards, margins, grad = [], [], [], [], np.zeros(len(logprob))
    for k in range(len(reference) // 2):
        totals, shares = [], []
        for r in (2 * k, 2 * k + 1):
            own = logprob[response == r]
            sums.append(math.fsum(own))
            shares.append(1 / len(own) if objective == "ipo" else 1.0)
            totals.append(sums[-1] - reference[r])
        h = totals[0] * shares[0] - totals[1] * shares[1]
        z = beta * h
        if objective == "ipo":
            losses.append((h - 0.5 / beta) ** 2)
            slope = 2 * (h - 0.5 / beta)
        else:

            def nll(x):  # -log σ(x)
                return max(-x, 0) + math.log1p(math.exp(-abs(x)))

            losses.append((1 - smoothing) * nll(z) + smoothing * nll(-z))
            p = 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))
            wrong = math.exp(-z) * p if z > 0 else 1 - p
            slope = beta * (smoothing * p - (1 - smoothing) * wrong)
        rewards += [beta * total for total in totals]
        margins.append(beta * (totals[0] - totals[1]))
        grad[response == 2 * k] = float(c[k]) * slope * shares[0]
        grad[response == 2 * k + 1] = -float(c[k]) * slope * shares[1]
    return losses, sums, rewards, margins, grad


def run(logprob, response, reference, c, beta, smoothing, objective):
    logprob = logprob.detach().requires_grad_()
    out = kernels.dpo_loss(logprob, response, reference, beta, smoothing, objective)
    assert [x.requires_grad for x in out] == [True, False, False, False]
    return *out, torch.autograd.grad(out.loss_P, logprob, c.to(logprob.dtype))[0]


def plain(logprob, response, reference, c, beta, smoothing, objective):
    """The textbook in fp32: masked sums of each response, then autograd."""
    logprob = logprob.detach().requires_grad_()
    sums = torch.stack([logprob[response == r].sum() for r in range(len(reference))])
    ratio = total = sums - reference
    if objective == "ipo":
        ratio = ratio / response.bincount()
    h = ratio[0::2] - ratio[1::2]
    if objective == "ipo":
        loss = (h - 1 / (2 * beta)) ** 2
    else:
        z = torch.nn.functional.logsigmoid(beta * h), torch.nn.functional.logsigmoid(-beta * h)
        loss = -(1 - smoothing) * z[0] - smoothing * z[1]
    values = loss, sums, beta * total, beta * (total[0::2] - total[1::2])
    return *values, torch.autograd.grad(loss, logprob, c)[0]


def error(got, expected) -> float:
    got = got.detach().cpu().double().numpy()
    assert got.shape == np.shape(expected)
    return float(np.abs(got - expected).max()) if np.isfinite(got).all() else np.inf


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    "lengths", [[1, 1], [3, 5, 1, 2], [1025, 1, 7, 2048], [1] * 40, [100_000, 3]], ids=len
)
def test_error_budget(lengths, objective, device, implementation, poison):
    inputs = [x.to(device) for x in tokens(lengths)]
    arguments = (0.1, objective[1], objective[0])
    right = truth(*inputs, *arguments)
    got, usual = run(*inputs, *arguments), plain(*inputs, *arguments)
    # a sum's rounding error is that of its size; it reaches whatever is made of a difference
    size = np.finfo(np.float32).eps * max(np.abs(right[1])) / 2
    for k, weight in enumerate((1, 1, 0.1, 0.1, 1)):
        assert error(got[k], right[k]) <= 2 * error(usual[k], right[k]) + weight * size, k


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [-1e4, -300.0, -40.0, -1.0, 0.0, 1e-3, 17.0, 40.0, 80.0, 1e4])
def test_margins_of_ten_thousand(margin, smoothing, device, implementation):
    """Nothing overflows, and what is small is not lost: at a margin of 40 the loss is e^-40."""
    logprob, response = torch.tensor([-2.0, -1.0]), torch.tensor([0, 1])
    reference = torch.tensor([-2.0 - margin, -1.0])
    inputs = [x.to(device) for x in (logprob, response, reference, torch.ones(1))]
    got = run(*inputs, 1.0, smoothing, "dpo")
    right = truth(*inputs, 1.0, smoothing, "dpo")
    for ours, true in zip(got, right, strict=True):
        np.testing.assert_allclose(ours.detach().cpu(), true, rtol=2e-6, atol=1e-37)


@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=12).filter(lambda n: len(n) % 2 == 0),
    st.integers(0, 99),
    st.floats(0.01, 2),
    st.sampled_from(OBJECTIVES),
    st.sampled_from(["torch", "triton"]),
)
def test_any_lengths(lengths, seed, beta, objective, implementation):
    inputs = tokens(lengths, seed)
    arguments = (beta, objective[1], objective[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEPHYR_KERNELS", implementation)
        got = run(*inputs, *arguments)
    for ours, true in zip(got, truth(*inputs, *arguments), strict=True):
        np.testing.assert_allclose(ours.detach(), true, rtol=1e-4, atol=2e-5 * max(1, 1 / beta))


@pytest.mark.parametrize("choice", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_a_hundred_thousand_pairs(choice, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", choice)
    device = "cuda" if choice == "triton" else "cpu"
    inputs = [x.to(device) for x in tokens([1, 3] * 100_000)]
    loss, _, _, margin, grad = run(*inputs, 0.1, 0.0, "dpo")
    ratio = inputs[0].double().view(-1, 4) @ torch.tensor([1.0, -1, -1, -1], device=device).double()
    z = 0.1 * (ratio - (inputs[2][0::2] - inputs[2][1::2]).double())
    torch.testing.assert_close(margin.double(), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), torch.log1p(torch.exp(-z)), rtol=1e-5, atol=1e-6)
    slope = -0.1 * inputs[3] * torch.sigmoid(-z).float()
    torch.testing.assert_close(grad.view(-1, 4), torch.stack([slope, -slope, -slope, -slope], 1))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradcheck_of_the_specification(objective, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "reference")
    logprob, response, reference, _ = (x.double() for x in tokens([3, 1, 2, 5]))

    def loss(logprob):
        return kernels.dpo_loss(
            logprob, response.long(), reference, 0.3, objective[1], objective[0]
        ).loss_P

    assert torch.autograd.gradcheck(loss, logprob.requires_grad_())


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_lanes_of_a_sum_are_added_in_pairs(device, monkeypatch):
    """Lane by lane over blocks of 1024, then neighbours, in fp32: the order is no compiler's, so
    that two kernels have one sum."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    logprob, response, _, _ = tokens([700, 2500])
    right = []
    for part in logprob.split([700, 2500]):
        blocks = np.zeros(-(-len(part) // 1024) * 1024, np.float32)
        blocks[: len(part)] = part
        lanes = np.zeros(1024, np.float32)
        for block in blocks.reshape(-1, 1024):
            lanes += block
        while len(lanes) > 1:
            lanes = lanes[0::2] + lanes[1::2]
        right += lanes.tolist()
    logprob, response = logprob.to(device), response.to(device)
    assert kernels.response_sums(logprob, response, 2).tolist() == right
    zeros = torch.zeros(2, device=device)
    for name in ("dpo", "ipo"):
        assert kernels.dpo_loss(logprob, response, zeros, 0.1, 0.0, name)[1].tolist() == right


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_example_of_the_docstring(device, implementation):
    logprob = torch.tensor([-1.0, -2, -3, -1, -2, -2], device=device)
    response = torch.tensor([0, 0, 1, 2, 3, 3], device=device)
    reference = torch.tensor([-4.0, -3, -1, -3], device=device)
    got = kernels.dpo_loss(logprob, response, reference, beta=1.0)
    assert got.logprob_2P.tolist() == [-3, -3, -1, -4]
    assert got.reward_2P.tolist() == [1, 0, 0, -1]
    assert got.margin_P.tolist() == [1, 1]
    assert got.loss_P.tolist() == pytest.approx([0.313262] * 2, abs=1e-6)
    ipo = kernels.dpo_loss(logprob, response, reference, beta=1.0, objective="ipo")
    assert ipo.loss_P.tolist() == [0, 0]
    assert torch.equal(ipo.reward_2P, got.reward_2P) and ipo.margin_P.tolist() == [1, 1]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_policy_that_is_its_reference_has_margins_of_zero(objective, device, implementation):
    """Bit for bit, whatever the lengths: both add in one order."""
    logprob, response, _, _ = (x.to(device) for x in tokens([700, 1300, 1, 90, 2500, 33]))
    reference = kernels.response_sums(logprob, response, 6)
    got = kernels.dpo_loss(logprob, response, reference, 0.1, objective[1], objective[0])
    assert got.margin_P.tolist() == [0.0] * 3 and torch.equal(got.logprob_2P, reference)
    expected = 25.0 if objective[0] == "ipo" else math.log(2)
    assert got.loss_P.tolist() == pytest.approx([expected] * 3, rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_response_sums_and_their_gradient(device, implementation, poison):
    logprob, response, _, _ = (x.to(device) for x in tokens([1500, 2, 1]))
    logprob.requires_grad_()
    sums, upstream = kernels.response_sums(logprob, response, 3), torch.randn(3, device=device)
    expected = [math.fsum(part) for part in logprob.detach().double().cpu().split([1500, 2, 1])]
    assert sums.tolist() == pytest.approx(expected, rel=2e-7)
    sums.backward(upstream)
    assert torch.equal(logprob.grad, upstream[response])
    assert kernels.response_sums(logprob[:0], response[:0], 0).shape == (0,)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_no_pairs(device, implementation):
    none = torch.zeros(0, device=device, requires_grad=True)
    got = kernels.dpo_loss(none, none.detach().long(), none.detach(), 0.1)
    assert [len(x) for x in got] == [0] * 4


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "response",
    [[0, 1, 0, 1], [1, 0, 0, 0], [-1, 0, 0, 1], [0, 1, 2, 2], [0, 2, 1, 3], [3, 2, 1, 0]],
    ids=str,
)
def test_the_kernel_answers_nan_to_responses_that_do_not_ascend(response, device, monkeypatch):
    """Among them tokens that belong to none of the responses; none is left out silently."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    logprob = -torch.rand(4, device=device)
    response = torch.tensor(response, device=device)
    R = 4 if 3 in response.tolist() else 2
    got = kernels.dpo_loss(logprob, response, torch.zeros(R, device=device), 0.1)
    assert got.loss_P.isnan().any()
    assert kernels.response_sums(logprob, response, R).isnan().any()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_inside_compile(objective, device, implementation):
    inputs = [x.to(device) for x in tokens([3, 5, 1, 2])]
    arguments = (0.1, objective[1], objective[0])

    def loss(logprob, response, reference):
        sums = kernels.response_sums(logprob, response, 4)
        return kernels.dpo_loss(2 * logprob, response, reference, *arguments).loss_P + sums[::2]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        logprob = inputs[0].clone().requires_grad_()
        value = function(logprob, *inputs[1:3])
        results.append((value, *torch.autograd.grad(value, logprob, inputs[3])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()


def test_the_ops_are_registered_as_torch_wants_them():
    logprob, response, reference, _ = tokens([3, 5, 1, 2])
    logprob.requires_grad_()
    torch.library.opcheck(fused_dpo._dpo, (logprob, response, reference, 0.1, 0.0, False))
    torch.library.opcheck(fused_dpo._sums, (logprob, response, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objective": "hinge"}, "^objective 'hinge' is neither 'dpo' nor 'ipo'$"),
        ({"response_N": torch.zeros(5).long()}, r"^logprob is \[4\] and response \[5\]; both are"),
        ({"logprob_N": torch.zeros(4, 1)}, r"^logprob is \[4, 1\] and response \[4\]; both are "),
        ({"reference_2P": torch.zeros(3)}, r"^reference is \[3\]; it has a chosen and a rejecte"),
    ],
)
def test_inputs_that_do_not_match(change, message, implementation):
    logprob, response, reference, _ = tokens([3, 1])
    inputs = {"logprob_N": logprob, "response_N": response, "reference_2P": reference, "beta": 0.1}
    with pytest.raises(ValueError, match=message):
        kernels.dpo_loss(**inputs | change)


def test_triton_adds_fp32_only(monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    logprob, response, reference, _ = tokens([3, 1])
    with pytest.raises(ValueError, match="^logprob is torch.bfloat16; the Triton kernel adds"):
        kernels.dpo_loss(logprob.bfloat16(), response, reference, 0.1)
