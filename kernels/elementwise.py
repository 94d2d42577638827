"""RMSNorm and SwiGLU that keep only what their backward needs, for activation memory.

Autograd would keep every intermediate; here each backward is written out and computes them again.
On a GPU torch.compile fuses both into the ops around them, and reads nothing twice; but of SwiGLU's
two gradients side by side it makes a pass that reads what it needs for each, so that is a kernel.

T tokens  D width  F MLP width
"""

from __future__ import annotations  # so that `tl.constexpr` need not exist without Triton

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.jit import jit, tl

BLOCK = 1024  # with 4 warps 16 bytes of bf16 per thread and load


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) ∘ weight, over the last axis, in fp32 (arXiv:1910.07467).

    x is [T, D], weight [D]; the result has x's dtype. Keeps x and one number for each of the T.
    """
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up (arXiv:2002.05202), of two tensors of one shape, which it keeps."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    """With s = 1 / √(mean(x²) + eps) and u = x s:  y = weight ∘ u,  and of a gradient g at y,

    dx = s (g ∘ weight - u mean(g ∘ weight ∘ u))        dweight = Σ g ∘ u, over the T
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, scale = ctx.saved_tensors
        unit, gw = x.float() * scale, (g * weight).float()
        dx = scale * (gw - unit * (gw * unit).mean(-1, keepdim=True))
        if not ctx.needs_input_grad[1]:
            return dx.to(x.dtype), None, None
        dweight = (g * unit.to(x.dtype)).sum(0, dtype=torch.float32)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, g: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), g * F.silu(gate)


@jit
def swiglu_kernel(gate_up_ptr, g_ptr, d_gate_up_ptr, p_ptr, F, BLOCK: tl.constexpr):
    """One program per token and BLOCK of F: everything in fp32, rounded once."""
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    b_gate = tl.load(gate_up_ptr + 2 * F * i_t + o_f, mask=m_f).to(tl.float32)
    b_up = tl.load(gate_up_ptr + 2 * F * i_t + F + o_f, mask=m_f).to(tl.float32)
    b_g = tl.load(g_ptr + F * i_t + o_f, mask=m_f).to(tl.float32)
    b_sigma = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigma
    b_dgate = b_g * b_up * (b_sigma + b_silu * (1 - b_sigma))
    dtype = p_ptr.dtype.element_ty
    tl.store(d_gate_up_ptr + 2 * F * i_t + o_f, b_dgate.to(dtype), mask=m_f)
    tl.store(d_gate_up_ptr + 2 * F * i_t + F + o_f, (b_g * b_silu).to(dtype), mask=m_f)
    tl.store(p_ptr + F * i_t + o_f, (b_silu * b_up).to(dtype), mask=m_f)


def swiglu_gradient(gate_up_T2F: Tensor, g_TF: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, side by side [T, 2F], and p = silu(gate) ∘ up [T, F],
    given the gradient g at p, whose memory p may take. With σ = sigmoid(gate) and silu = gate σ:

    dgate = g ∘ up ∘ (σ + silu (1 - σ))        dup = g ∘ silu
    """
    if triton:
        return _in_triton(gate_up_T2F, g_TF)
    gate_TF, up_TF = gate_up_T2F.chunk(2, 1)
    d_gate_TF = torch.ops.aten.silu_backward(g_TF * up_TF, gate_TF)
    silu_TF = F.silu(gate_TF)
    return torch.cat([d_gate_TF, g_TF * silu_TF], 1), silu_TF * up_TF


def _in_triton(gate_up_T2F: Tensor, g_TF: Tensor) -> tuple[Tensor, Tensor]:
    (T, width), grad_T2F, p_TF = g_TF.shape, torch.empty_like(gate_up_T2F), g_TF
    assert gate_up_T2F.is_contiguous() and g_TF.is_contiguous()
    with torch.cuda.device_of(g_TF):
        grid = T, -(-width // BLOCK)
        swiglu_kernel[grid](gate_up_T2F, g_TF, grad_T2F, p_TF, width, BLOCK=BLOCK)
    return grad_T2F, p_TF
