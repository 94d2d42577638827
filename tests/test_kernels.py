"""The reference op against numpy in float64 and its closed-form gradient; the dispatch rule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference

SHAPES = [(7, 5, 13), (1, 1, 1), (1, 33, 101), (0, 5, 13), (17, 3, 1), (3, 65, 257), (64, 31, 1000)]
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
GRAD_RTOL = RTOL | {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # rounded to the inputs' dtype


def inputs(n: int, d: int, v: int, dtype=torch.float32, scale: float = 1.0):
    """h, w and targets that begin with the first and the last token of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
    w = torch.randn(v, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=generator)
    targets[:1], targets[1:2] = 0, v - 1
    return h.to(dtype), w.to(dtype), targets


def truth(h, w, targets, c):
    """log p(target) and the gradients of Σ c log p: dh = c (G w), dw = Gᵀ (c h)."""
    h, w, c = (x.detach().double().numpy() for x in (h, w, c))
    z = h @ w.T
    top = z.max(1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(1, keepdims=True))
    rows = np.arange(len(z))
    g = -np.exp(z - lse)
    g[rows, targets] += 1
    return z[rows, targets] - lse[:, 0], c[:, None] * (g @ w), g.T @ (c[:, None] * h)


def close(ours: torch.Tensor, expected: np.ndarray, rtol: float) -> None:
    assert tuple(ours.shape) == expected.shape
    size = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(ours.detach().double().numpy(), expected, rtol, rtol * size)


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    h, w, targets = inputs(*shape, dtype)
    h.requires_grad_(), w.requires_grad_()
    logprob = kernels.linear_logprob(h, w, targets)
    c = torch.randn(len(h), dtype=logprob.dtype, generator=torch.Generator().manual_seed(1))
    logprob.backward(c)
    assert logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (h.grad.dtype, w.grad.dtype) == (dtype, dtype)
    expected, dh, dw = truth(h, w, targets, c)
    close(logprob, expected, RTOL[dtype])
    close(h.grad, dh, GRAD_RTOL[dtype])
    close(w.grad, dw, GRAD_RTOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand(dtype):
    """log p is 0 or about -1e4, never NaN or infinite; the gradient is that of a certain choice."""
    h, w, _ = inputs(6, 5, 13, dtype)
    z = h.double() @ w.double().T
    h = (h.double() / z.abs().amax(1, keepdim=True) * 1e4).to(dtype).requires_grad_()
    w.requires_grad_()
    z = h.detach().double() @ w.detach().double().T
    targets = torch.where(torch.arange(6) < 3, z.argmax(1), z.argmin(1))
    logprob = kernels.linear_logprob(h, w, targets)
    c = torch.linspace(-2, 2, 6, dtype=logprob.dtype)
    logprob.backward(c)
    expected, dh, dw = truth(h, w, targets, c)
    assert (logprob[:3] == 0).all()
    assert expected.min() < -9e3 and np.abs(z.numpy()).max() > 9.9e3
    close(logprob, expected, RTOL[dtype])
    close(h.grad, dh, GRAD_RTOL[dtype])
    close(w.grad, dw, GRAD_RTOL[dtype])


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 40), st.floats(0, 30))
def test_any_shape(n, d, v, scale):
    h, w, targets = inputs(n, d, v, torch.float64, scale)
    logprob = reference.linear_logprob(h, w, targets)
    close(logprob, truth(h, w, targets, torch.ones(n))[0], 1e-12)
    assert (logprob <= 1e-12).all()


def test_gradcheck():
    h, w, targets = inputs(5, 4, 7, torch.float64)
    h.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: reference.linear_logprob(h, w, targets), (h, w))
    assert torch.autograd.gradcheck(
        lambda h: reference.linear_logprob(h, w.detach(), targets), (h,)
    )


def test_the_input_is_left_alone():
    h, w, targets = inputs(5, 4, 7)
    before = [x.clone() for x in (h, w, targets)]
    kernels.linear_logprob(h.requires_grad_(), w.requires_grad_(), targets).sum().backward()
    assert all(torch.equal(x, old) for x, old in zip((h, w, targets), before, strict=True))


@pytest.mark.parametrize("choice", [None, "", "reference"])
def test_the_default_is_the_reference(choice, monkeypatch):
    monkeypatch.delenv("ZEPHYR_KERNELS", raising=False)
    if choice is not None:
        monkeypatch.setenv("ZEPHYR_KERNELS", choice)
    h, w, targets = inputs(5, 4, 7)
    assert kernels.implementation() == "reference"
    assert torch.equal(
        kernels.linear_logprob(h, w, targets), reference.linear_logprob(h, w, targets)
    )


@pytest.mark.parametrize("choice", ["triton", "torch", "Reference", "fast please"])
def test_what_is_not_here_is_refused(choice, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", choice)
    message = f"^ZEPHYR_KERNELS={choice}: this installation has reference; unset it$"
    for act in (kernels.implementation, lambda: kernels.linear_logprob(*inputs(5, 4, 7))):
        with pytest.raises(ValueError, match=message):
            act()
