"""One AdamW step in place, in one pass over a parameter: every number is read once, written once.

The maths is `reference.adamw_`'s. In fp32, with √ and / rounded to nearest, in this order:

    w ← fma(w, -lr λ, w)                 m ← fma(g - m, 1 - β₁, m)
    v ← fma((1 - β₂) g, g, β₂ v)         w ← w - (lr / (1 - β₁ᵗ)) m / (√v / √(1 - β₂ᵗ) + ε)

Nothing is left for a compiler to contract, so any chip and the interpreter give equal bits. Torch's
fused kernel for AVX CPUs has the same m and v; the same w too where λ is 0, and otherwise it first
multiplies w by 1 - lr λ, rounded to fp32. g is the gradient over `grad_scale`, a quotient rounded
to nearest, as torch's kernels have it: clipping takes no pass of its own over the gradients.

N elements of a parameter, or of this rank's part of it  C chunk of them
"""

from __future__ import annotations  # so that `tl.constexpr` need not exist without Triton

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kernels import reference
from kernels.jit import jit, tl
from kernels.reference import AdamWStep

BLOCK = 1024  # with 4 warps 16 bytes or more per thread and load, of fp32 and of bf16
CHUNK = 2**18  # elements that the torch implementation has in fp32 at a time: 1 MiB each


@jit
def join(weight, low):
    """See `kernels.join`."""
    upper = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (upper + low.to(tl.int32)).to(tl.float32, bitcast=True)


@jit
def upper_half(x):
    """Return the bits of x's nearest bf16 number as an int32; halves are rounded away from zero,
    and a NaN gives 0x7FC0. There is no cast: on a GPU it would round halves to even, and in the
    interpreter everything towards zero."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True) + 0x8000 >> 16, 0x7FC0)


@jit
def bf16(upper):
    """Return the bf16 number that has these bits."""
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def chance(place, seed):
    """See `reference.chance`."""
    x = place.to(tl.uint32) * 0x9E3779B1 + seed
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return ((x ^ (x >> 16)) & 0xFFFF).to(tl.int32)


@jit
def adamw_kernel(
    weight_ptr,
    low_ptr,
    m_ptr,
    v_ptr,
    grad_ptr,
    scalars_ptr,
    seed_ptr,
    N,
    decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    SPLIT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK elements. SPLIT: the weight is bf16, with its lower half at low_ptr.
    NARROW: m and v are bf16."""
    if tl.load(scalars_ptr + 3) != 0:
        return
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    step_size, correction = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    grad_scale = tl.load(scalars_ptr + 2)
    b_g = tl.div_rn(tl.load(grad_ptr + o_n, mask=m_n, other=0.0), grad_scale)
    b_m = tl.load(m_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_v = tl.load(v_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_w = tl.load(weight_ptr + o_n, mask=m_n, other=0.0)
    if SPLIT:
        b_w = join(b_w, tl.load(low_ptr + o_n, mask=m_n, other=0))
    b_w = tl.fma(b_w, -decay, b_w)
    b_m = tl.fma(b_g - b_m, 1 - BETA1, b_m)
    b_v = tl.fma(b_g * (1 - BETA2), b_g, b_v * BETA2)
    b_w -= tl.div_rn(b_m * step_size, tl.div_rn(tl.sqrt_rn(b_v), correction) + EPS)
    if SPLIT:
        b_upper = upper_half(b_w)
        b_low = b_w.to(tl.int32, bitcast=True) - (b_upper << 16)
        tl.store(low_ptr + o_n, b_low.to(tl.int16), mask=m_n)
        b_w = bf16(b_upper)
    if NARROW:
        b_m = bf16(upper_half(b_m))
        b_up = chance(o_n, tl.load(seed_ptr).to(tl.uint32))
        b_v = bf16(tl.where(b_v == b_v, b_v.to(tl.int32, bitcast=True) + b_up >> 16, 0x7FC0))
    tl.store(weight_ptr + o_n, b_w, mask=m_n)
    tl.store(m_ptr + o_n, b_m, mask=m_n)
    tl.store(v_ptr + o_n, b_v, mask=m_n)


def in_triton(
    weight: Tensor,
    low: Tensor | None,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    weight_decay: float,
    step: AdamWStep,
) -> None:
    """Update as `kernels.adamw_` does, in Triton."""
    N, split = weight.numel(), low is not None
    if N:
        with torch.cuda.device_of(weight):
            adamw_kernel[(-(-N // BLOCK),)](
                weight,
                low if split else weight,
                m,
                v,
                grad,
                step.scalars_4,
                step.seed,
                N,
                step.lr * weight_decay,
                BETA1=step.betas[0],
                BETA2=step.betas[1],
                EPS=step.eps,
                SPLIT=split,
                NARROW=m.dtype == torch.bfloat16,
                BLOCK=BLOCK,
            )


def in_torch(
    weight: Tensor,
    low: Tensor | None,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    weight_decay: float,
    step: AdamWStep,
) -> None:
    """Update as `kernels.adamw_` does, with torch's own fused kernel. With fp32 moments, every bit
    is that of torch.optim.AdamW(fused=True) on the masters. What is narrower is widened a chunk at
    a time."""
    wide = all(x.dtype == torch.float32 for x in (weight, m, v))
    flat = [x.view(-1) for x in (weight, weight if low is None else low, m, v, grad)]
    chunks = (x.split(max(1, len(x)) if wide else CHUNK) for x in flat)
    for k, (weight_C, low_C, m_C, v_C, grad_C) in enumerate(zip(*chunks, strict=True)):
        w_C = weight_C if low is None else reference.join(weight_C, low_C)
        # .float() of an fp32 tensor is that tensor, whose update is then in place already
        wide_m_C, wide_v_C = m_C.float(), v_C.float()
        # torch adds 1 to the step that it is given, and takes 1 off again where it skips
        adamw(
            [w_C],
            [grad_C],
            [wide_m_C],
            [wide_v_C],
            [],
            [step.number - 1],
            grad_scale=step.grad_scale,
            found_inf=(step.skip != 0).float(),
            lr=step.lr,
            beta1=step.betas[0],
            beta2=step.betas[1],
            eps=step.eps,
            weight_decay=weight_decay,
            fused=True,
            amsgrad=False,
            maximize=False,
        )
        if low is not None:
            for half_C, new_C in zip((weight_C, low_C), reference.split(w_C), strict=True):
                half_C.copy_(new_C)
        if m.dtype == torch.bfloat16:
            m_C.copy_(reference.nearest_bf16(wide_m_C))
            up_C = reference.chance(k * CHUNK, len(v_C), step.number)
            v_C.copy_(torch.where(step.skip == 0, reference.bf16_by_chance(wide_v_C, up_C), v_C))
