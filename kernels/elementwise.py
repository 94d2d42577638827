"""RMSNorm and SwiGLU that keep only what their backward needs, for activation memory.

Autograd would keep every intermediate; here each backward is written out and computes them again.
On a GPU torch.compile fuses both into the ops around them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
