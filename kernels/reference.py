"""The specification of every fused op: plain PyTorch, any dtype, one page. Tests compare with it.

N predicting rows  D width  V vocabulary  P pairs  2P responses
T tokens of a pack  G gathered keys  S segments  H query heads  K key heads  E head width
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NAN = 0x7FC00000  # the bits of fp32's plain NaN


class AdamWStep(NamedTuple):
    """What all parameters share in one AdamW update; see `kernels.adamw_step`."""

    number: Tensor
    lr: float
    betas: tuple[float, float]
    eps: float
    grad_scale: Tensor
    skip: Tensor
    scalars_4: Tensor  # fp32: lr / (1 - β₁ᵗ), √(1 - β₂ᵗ), grad_scale, skip
    seed: Tensor  # int64, see `seed`


class Preference(NamedTuple):
    """What a pair's tokens say of it; only `loss_P` carries a gradient. Odd entries of the 2P are
    rejected responses."""

    loss_P: Tensor
    logprob_2P: Tensor  # nats, summed over the response
    reward_2P: Tensor  # β × (logprob_2P - reference_2P), summed whatever the objective
    margin_P: Tensor  # reward of chosen less reward of rejected


def linear_logprob(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) per row [N] in nats, where p = softmax(h @ wᵀ).

    logprob_n = z_n[target_n] - log Σ_v exp z_n[v],   z = h wᵀ
    ∂logprob_n / ∂z_n[v] = [v = target_n] - exp z_n[v] / Σ_u exp z_n[u] = -G[n, v]
    so with c the gradient that arrives at logprob, and z linear in h and in w:
    dh = -c ∘ (G w),   dw = Gᵀ (-c ∘ h).
    Inputs narrower than fp32 are widened first, so a bf16 model's log-probs carry fp32 sums.
    """
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    z_NV = h_ND.to(wide) @ w_VD.to(wide).T
    return z_NV.gather(1, targets_N[:, None].long()).squeeze(1) - z_NV.logsumexp(1)


def linear(x_TD: Tensor, w_FD: Tensor) -> Tensor:
    """x wᵀ, of which `kernels.linear` adds dw = gᵀ x to a sum instead of returning it."""
    return x_TD @ w_FD.T


def swiglu_linear(gate_up_T2F: Tensor, w_DF: Tensor) -> Tensor:
    """(silu(gate) ∘ up) wᵀ; `kernels.swiglu_linear` adds dw to a sum as `kernels.linear` does."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, 1)
    return (F.silu(gate_TF) * up_TF) @ w_DF.T


def response_sums(logprob_N: Tensor, response_N: Tensor, responses: int) -> Tensor:
    """Sum of each response's token log-probs [responses]:  s_r = Σ_n [response_n = r] logprob_n.

    ∂s_r / ∂logprob_n = [response_n = r]. Added in fp64, so that a response of thousands of tokens
    loses nothing and no order of addition shows.
    """
    zeros = torch.zeros(responses, dtype=torch.float64, device=logprob_N.device)
    return zeros.index_add(0, response_N, logprob_N.double()).to(logprob_N.dtype)


def dpo_loss(
    logprob_N: Tensor,
    response_N: Tensor,
    reference_2P: Tensor,
    beta: float,
    smoothing: float,
    objective: str,
) -> Preference:
    """Per-pair loss and rewards from token log-probs, as `kernels.dpo_loss` has it.

    ratio_r = s_r - reference_r, and h = ratio_chosen - ratio_rejected; for ipo, h is the difference
    of their means ratio_r / tokens_r
    dpo:  ℓ = -(1-ε) log σ(βh) - ε log σ(-βh)    ∂ℓ/∂h = β (ε σ(βh) - (1-ε) σ(-βh))
    ipo:  ℓ = (h - 1/(2β))²                      ∂ℓ/∂h = 2 (h - 1/(2β))
    A chosen token's gradient is ∂ℓ/∂h, a rejected token's -∂ℓ/∂h, divided by tokens_r for ipo:
    the same number for every token of a response. A reward is β ratio_r, a margin the difference of
    two, for ipo too, where the loss sees means: so TRL logs them.
    """
    logprob_2P = response_sums(logprob_N, response_N, len(reference_2P))
    ratio_2P = logprob_2P - reference_2P
    z_P = beta * (ratio_2P[0::2] - ratio_2P[1::2])
    if objective == "ipo":
        mean_2P = ratio_2P / torch.bincount(response_N, minlength=len(ratio_2P))
        loss_P = (mean_2P[0::2] - mean_2P[1::2] - 1 / (2 * beta)).square()
    else:
        loss_P = -(1 - smoothing) * F.logsigmoid(z_P) - smoothing * F.logsigmoid(-z_P)
    return Preference(loss_P, logprob_2P.detach(), beta * ratio_2P.detach(), z_P.detach())


def seen_keys(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int | None) -> Tensor:
    """Return which of the gathered keys each query sees [T, G]: those j of its own segment with
    i - window < j <= i. i and j are positions, which count from a segment's first key on; its last
    query and its last key have the same."""
    device = cu_seqlens_q.device
    queries_S, keys_S = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    segments_S = torch.arange(len(queries_S), device=device)
    segment_T, segment_G = (torch.repeat_interleave(segments_S, n) for n in (queries_S, keys_S))
    i_T = torch.arange(len(segment_T), device=device) - (cu_seqlens_q[1:] - keys_S)[segment_T]
    j_G = torch.arange(len(segment_G), device=device) - cu_seqlens_k[segment_G]
    seen_TG = (segment_T[:, None] == segment_G) & (j_G <= i_T[:, None])
    return seen_TG if window is None else seen_TG & (j_G > i_T[:, None] - window)


def attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_rows_G: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attention of the segments of a pack [T, H, E], as `kernels.attention` has it.

    o_i = Σ_j p_ij v_j,   p_ij = exp s_ij / Σ_l exp s_il,   s_ij = q_i · k_j / √E,   over the keys j
    that `seen_keys` has for query i. Inputs narrower than fp32 are widened first.
    """
    if kv_rows_G is not None:
        k_TKE, v_TKE = k_TKE[kv_rows_G], v_TKE[kv_rows_G]
    wide, group = torch.promote_types(q_THE.dtype, torch.float32), q_THE.shape[1] // k_TKE.shape[1]
    k_GHE, v_GHE = (x.to(wide).repeat_interleave(group, 1) for x in (k_TKE, v_TKE))
    s_HTG = torch.einsum("the,ghe->htg", q_THE.to(wide), k_GHE) / q_THE.shape[2] ** 0.5
    s_HTG = s_HTG.masked_fill(~seen_keys(cu_seqlens_q, cu_seqlens_k, window), -torch.inf)
    return torch.einsum("htg,ghe->the", s_HTG.softmax(-1), v_GHE).to(q_THE.dtype)


def nearest_bf16(x: Tensor) -> Tensor:
    """Return fp32 x rounded to the nearest bf16 number; halves are rounded away from zero, as
    `kernels.split` says. A NaN stays a NaN."""
    bits = torch.where(x.isnan(), NAN, x.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def seed(step: Tensor) -> Tensor:
    """Return the number that distinguishes one optimizer step from another in `chance`."""
    return step.long() * 0x85EBCA6B & 0xFFFFFFFF


def chance(first: int, N: int, step: Tensor) -> Tensor:
    """Return a number in 0..65535 for each of the places first..first+N-1 of a parameter: a hash of
    place and step, so that a step that is taken again rounds as it did, on any machine."""
    x = torch.arange(first, first + N, device=step.device) * 0x9E3779B1 + seed(step) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF
    return (x ^ x >> 16) & 0xFFFF


def bf16_by_chance(x: Tensor, chance: Tensor) -> Tensor:
    """Return fp32 x >= 0 rounded to one of its two neighbours in bf16 (stochastic rounding): up
    with the probability with which the mean of many such results is x. A NaN stays a NaN."""
    bits = torch.where(x.isnan(), NAN, x.view(torch.int32))
    upper = (bits + chance.int().view_as(bits)) >> 16
    return upper.to(torch.int16).view(torch.bfloat16)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.split`."""
    weight = nearest_bf16(master)
    upper = weight.view(torch.int16).to(torch.int32) << 16
    return weight, (master.view(torch.int32) - upper).to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """See `kernels.join`."""
    upper = weight.view(torch.int16).to(torch.int32) << 16
    return (upper + low).view(torch.float32)


def adamw_step(
    number: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor,
    skip: Tensor,
) -> AdamWStep:
    """See `kernels.adamw_step`. What depends on the number is formed in fp64, on its device."""
    t = number.double()
    step_size, correction = lr / (1 - betas[0] ** t), (1 - betas[1] ** t).sqrt()
    scalars_4 = torch.stack([step_size, correction, grad_scale, skip]).float()
    return AdamWStep(number, lr, betas, eps, grad_scale, skip, scalars_4, seed(number))


def adamw_(
    weight: Tensor,
    low: Tensor | None,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    weight_decay: float,
    step: AdamWStep,
) -> None:
    """Update t = `step.number`, in place, as `kernels.adamw_` has it: Algorithm 2 of
    arXiv:1711.05101, of the gradient g = grad / grad_scale.

    m ← β₁ m + (1 - β₁) g     v ← β₂ v + (1 - β₂) g²     w ← w - lr λ w - lr m̂ / (√v̂ + ε)
    m̂ = m / (1 - β₁ᵗ)         v̂ = v / (1 - β₂ᵗ)          λ = `weight_decay`, w = join(weight, low)
    """
    w, t = weight if low is None else join(weight, low), step.number.double()
    (beta1, beta2), lr, g = step.betas, step.lr, grad / step.grad_scale
    next_m = beta1 * m.to(w.dtype) + (1 - beta1) * g
    next_v = beta2 * v.to(w.dtype) + (1 - beta2) * g.square()
    hat_m, hat_v = next_m / (1 - beta1**t), next_v / (1 - beta2**t)
    next_w = w - lr * weight_decay * w - lr * hat_m / (hat_v.sqrt() + step.eps)
    halves = ((weight, next_w),)
    if low is not None:
        halves = zip((weight, low), split(next_w), strict=True)
    if m.dtype == torch.bfloat16:
        next_m = nearest_bf16(next_m)
        next_v = bf16_by_chance(next_v, chance(0, v.numel(), step.number))
    for old, new in (*halves, (m, next_m), (v, next_v)):
        old.copy_(torch.where(step.skip == 0, new, old))
