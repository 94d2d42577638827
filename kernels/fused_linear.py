"""A linear layer whose backward adds dw to an fp32 sum of gradients, in the matmul itself.

Autograd would round dw to the weight's bf16, write it, copy it to fp32, and add that to the sum: 20
bytes a weight. Here a matmul accumulates into the sum (Megatron-LM's `main_grad`), which is read
and written once: 8 bytes.

T tokens  D width in  F width out; of `swiglu_linear`, D out and F in
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels import elementwise


def main_grad(weight: Tensor) -> Tensor:
    """Return a sum of gradients for `weight`, fp32, which has no memory before the first is added:
    an empty storage stands for zeros."""
    total = torch.empty_like(weight, dtype=torch.float32, requires_grad=False)
    clear_grad(total)
    return total


def clear_grad(total: Tensor) -> None:
    """Make a sum zero by giving its memory back; a view's is that of the whole."""
    total.untyped_storage().resize_(0)


def add_gradient(total: Tensor, gradient: Tensor) -> None:
    """total ← total + gradient, where the gradient may be bf16."""
    if _allocate(total):
        total.add_(gradient)
    else:
        total.copy_(gradient)


def _allocate(total: Tensor) -> bool:
    """Give a sum without memory some. Returns True if it had some before."""
    storage = total.untyped_storage()
    had = storage.nbytes() > 0
    if not had:
        storage.resize_(total.nbytes)
    return had


def linear(x_TD: Tensor, w_FD: Tensor, total_FD: Tensor) -> Tensor:
    """x wᵀ [T, F]. Its backward adds dw to `total_FD`, see `main_grad`, and gives w no gradient.

    dx = g w        total ← total + gᵀ x, with g the gradient that arrives

    x must take a gradient: without one no backward would run, and dw would be missing.
    """
    assert x_TD.requires_grad or not torch.is_grad_enabled()
    return _Linear.apply(x_TD, w_FD, total_FD)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, w_FD: Tensor, total_FD: Tensor) -> Tensor:
        ctx.total = total_FD  # not saved: autograd would refuse what another backward has changed
        ctx.save_for_backward(x_TD, w_FD)
        return torch.mm(x_TD, w_FD.T)

    @staticmethod
    def backward(ctx, g_TF: Tensor):
        return backward(g_TF, *ctx.saved_tensors, ctx.total), None, None


# Here and below the schema does not say that the sum changes: a compiler that knew would copy the
# sum, and copy it back. Nothing else in a backward reads it. No compiler leaves out an op whose
# result is used, and dx always is.
@torch.library.custom_op("zephyr_kernels::linear_backward", mutates_args=())
def backward(g_TF: Tensor, x_TD: Tensor, w_FD: Tensor, total_FD: Tensor) -> Tensor:
    """Add gᵀ x to the total, and return dx = g w."""
    add_product(total_FD, g_TF, x_TD)
    return torch.mm(g_TF, w_FD)


@backward.register_fake
def _(g_TF, x_TD, w_FD, total_FD):
    return g_TF.new_empty(x_TD.shape)


def add_product(total_FD: Tensor, g_TF: Tensor, x_TD: Tensor) -> None:
    """total ← total + gᵀ x."""
    if not g_TF.is_cuda or g_TF.dtype == torch.float32:
        add_gradient(total_FD, torch.mm(g_TF.T, x_TD))
    elif _allocate(total_FD):
        torch.addmm(total_FD, g_TF.T, x_TD, out_dtype=torch.float32, out=total_FD)
    else:
        torch.mm(g_TF.T, x_TD, out_dtype=torch.float32, out=total_FD)


def swiglu_linear(gate_up_T2F: Tensor, w_DF: Tensor, total_DF: Tensor, triton: bool) -> Tensor:
    """(silu(gate) ∘ up) wᵀ [T, D] of the two halves of gate_up; `total_DF` as in `linear`.

    With p = silu(gate) ∘ up, and g the gradient that arrives, total ← total + gᵀ p, and dp = g w
    gives the gradients of gate and up. One pass over gate, up and dp makes those gradients, side
    by side as their matmul takes them, and p, which is not kept.
    """
    assert gate_up_T2F.requires_grad or not torch.is_grad_enabled()
    return _SwiGLULinear.apply(gate_up_T2F, w_DF, total_DF, triton)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_T2F: Tensor, w_DF: Tensor, total_DF: Tensor, triton: bool):
        ctx.total, ctx.triton = total_DF, triton
        ctx.save_for_backward(gate_up_T2F, w_DF)
        gate_TF, up_TF = gate_up_T2F.chunk(2, 1)
        return torch.mm(functional.silu(gate_TF) * up_TF, w_DF.T)

    @staticmethod
    def backward(ctx, g_TD: Tensor):
        dx_T2F = swiglu_backward(g_TD, *ctx.saved_tensors, ctx.total, ctx.triton)
        return dx_T2F, None, None, None


@torch.library.custom_op("zephyr_kernels::swiglu_linear_backward", mutates_args=())
def swiglu_backward(
    g_TD: Tensor, gate_up_T2F: Tensor, w_DF: Tensor, total_DF: Tensor, triton: bool
) -> Tensor:
    """Add gᵀ p to the total, and return the gradients of gate and up side by side."""
    d_gate_up_T2F, p_TF = elementwise.swiglu_gradient(gate_up_T2F, torch.mm(g_TD, w_DF), triton)
    add_product(total_DF, g_TD, p_TF)
    return d_gate_up_T2F


@swiglu_backward.register_fake
def _(g_TD, gate_up_T2F, w_DF, total_DF, triton):
    return torch.empty_like(gate_up_T2F)
