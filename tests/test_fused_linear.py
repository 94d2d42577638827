"""A linear layer that sums its own weight gradients: against autograd's and against float64."""

import pytest
import torch
from torch.nn import functional

import kernels
from kernels import elementwise, reference
from model_helpers import model, pairs
from zephyr import optim
from zephyr.weights import masters

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def drawn(T: int, D: int, dtype: torch.dtype, device: str, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(T, n, generator=generator).to(device, dtype) for n in (D, 5))
    return x.requires_grad_(), g


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_micro_batches_of_odd_shapes(dtype, device):
    """dx is autograd's in every bit; the sum is at most a rounding of each term from float64's. On
    a GPU nothing is rounded to bf16: the products are exact, and of at most 11 additions in fp32,
    where its matrix units cut off, each is off by 2^-22 of the terms' magnitudes."""
    D, digits = 13, {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}[dtype]
    if device == "cuda" and dtype == torch.bfloat16:
        digits = 11 * 2.0**-22
    w = torch.randn(5, D, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    total = kernels.main_grad(w)
    w.requires_grad_()
    exact, size = (torch.zeros(5, D, dtype=torch.float64, device=device) for _ in range(2))
    for seed, T in enumerate((7, 3)):
        x, g = drawn(T, D, dtype, device, seed)
        out = kernels.linear(x, w, total)
        assert torch.equal(out, reference.linear(x, w))
        (dx,) = torch.autograd.grad(out, x, g)
        assert torch.equal(dx, torch.autograd.grad(reference.linear(x, w), x, g)[0])
        exact += g.double().T @ x.detach().double()
        size += g.double().abs().T @ x.detach().double().abs()
    assert total.dtype == torch.float32 and w.grad is None
    assert ((total - exact).abs() <= digits * size).all()


def test_a_sum_has_memory_from_the_first_gradient_until_it_is_cleared():
    w = torch.zeros(4, 8)
    total = torch.empty(4, 8)
    part = total[1:3]  # the sum of one of the weights that share a matmul
    kernels.clear_grad(total)
    x, g = torch.ones(2, 8, requires_grad=True), torch.ones(2, 4)
    for _ in range(2):
        assert total.untyped_storage().nbytes() == 0
        for times in (1, 2):
            kernels.linear(x, w, total).backward(g)
            assert torch.equal(part, torch.full((2, 8), 2.0 * times))
        kernels.clear_grad(part)
    kernels.add_gradient(total, torch.ones(4, 8).bfloat16())
    kernels.add_gradient(total, torch.full((4, 8), 2.0**-12).bfloat16())
    assert torch.equal(part, torch.full((2, 8), 1 + 2.0**-12)), "added in fp32"


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("T, F", [(1, 1), (3, 5), (2, 1025), (4, 2048)])
def test_swiglu_and_its_matmul_against_float64(T, F, implementation, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", implementation)
    generator = torch.Generator().manual_seed(T)
    shapes = (T, 2 * F), (7, F), (T, 7)
    gate_up, w, g = (torch.randn(shape, generator=generator) for shape in shapes)
    leaf, weight = gate_up.double().requires_grad_(), w.double().requires_grad_()
    exact = reference.swiglu_linear(leaf, weight)
    exact.backward(g.double())
    gate_up.requires_grad_(), w.requires_grad_()
    total = kernels.main_grad(w)
    out = kernels.swiglu_linear(gate_up, w, total)
    out.backward(g)
    assert w.grad is None
    for ours, right in ((out, exact), (gate_up.grad, leaf.grad), (total, weight.grad)):
        assert (ours - right).norm() <= 1e-6 * right.norm()


@pytest.mark.gpu
def test_swiglus_gradient_in_bf16_is_within_two_roundings():
    gate_up, g = (torch.randn(33, n, device="cuda").bfloat16() for n in (2 * 1500, 1500))
    leaf = gate_up.double().requires_grad_()
    p = functional.silu(leaf[:, :1500]) * leaf[:, 1500:]
    (exact,) = torch.autograd.grad(p, leaf, g.double())
    found = elementwise.swiglu_gradient(gate_up, g.clone(), True)
    for ours, right in zip(found, (exact, p), strict=True):
        assert ((ours - right).abs() <= 2.0**-8 * right.abs() + 1e-4).all()


def test_a_layer_that_is_used_twice_before_a_backward():
    w, total = torch.ones(3, 4), kernels.main_grad(torch.ones(3, 4))
    x = torch.ones(2, 4, requires_grad=True)
    (kernels.linear(x, w, total).sum() + 2 * kernels.linear(x, w, total).sum()).backward()
    assert torch.equal(total, torch.full((3, 4), 6.0))


def test_an_input_without_a_gradient_is_our_bug():
    w = torch.ones(3, 4)
    with pytest.raises(AssertionError):
        kernels.linear(torch.ones(2, 4), w, kernels.main_grad(w))
    with torch.no_grad():
        assert torch.equal(kernels.linear(torch.ones(2, 4), w, w), torch.full((2, 3), 4.0))


def test_weights_that_share_a_matmul_keep_names_and_shapes():
    plain = model().bfloat16()
    split = model().bfloat16()
    split.load_state_dict(plain.state_dict())
    masters.fuse_matmuls(split)
    assert split.state_dict().keys() == plain.state_dict().keys()
    for name, p in split.named_parameters():
        assert torch.equal(p, plain.get_parameter(name)) and p.is_contiguous(), name
    attention = split.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight += 1
    whole = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(attention.fused, torch.cat(whole)), "an update of one is one of the whole"


def test_the_gradients_of_a_model_are_autograds():
    """Of every parameter, the tied head's too, which gets two; and none is left behind."""
    plain, split = (model(tie_word_embeddings=True).bfloat16() for _ in range(2))
    masters.fuse_matmuls(split)
    masters.attach_halves(split)
    for m in (plain, split):
        for seed in range(2):
            m(pairs(seed)).sum().backward()
    for (name, p), q in zip(split.named_parameters(), plain.parameters(), strict=True):
        ours, theirs = masters.gradient(p), q.grad.float()
        assert p.grad is None and ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.03 * theirs.norm(), name
    optim.step(optim.adamw(split, 0.0), 1e-3, 1.0)
    assert all(masters.gradient(p).untyped_storage().nbytes() == 0 for p in split.parameters())
