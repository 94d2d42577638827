"""The specification of every fused op: plain PyTorch, any dtype, one page. Tests compare with it.

N predicting rows  D width  V vocabulary  P pairs  2P responses
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Preference(NamedTuple):
    """What a pair's tokens say of it; only `loss_P` carries a gradient. Odd entries of the 2P are
    rejected responses."""

    loss_P: Tensor
    logprob_2P: Tensor  # nats, summed over the response
    reward_2P: Tensor  # beta x log-ratio (ipo: x its mean over the tokens)
    margin_P: Tensor  # reward of chosen less reward of rejected: beta h


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


def response_sums(logprob_N: Tensor, response_N: Tensor, responses: int) -> Tensor:
    """Sum of each response's token log-probs [responses]:  s_r = Σ_n [response_n = r] logprob_n.

    ∂s_r / ∂logprob_n = [response_n = r]. Added in fp64, so that a response of thousands of tokens
    loses nothing and no order of addition shows.
    """
    zeros = torch.zeros(responses, dtype=torch.float64, device=logprob_N.device)
    return zeros.index_add(0, response_N, logprob_N.double()).to(logprob_N.dtype)


def dpo_loss(
    logprob_N: Tensor, response_N: Tensor, reference_2P: Tensor, beta: float, smoothing: float,
    objective: str,
) -> Preference:  # fmt: skip
    """Per-pair loss and rewards from token log-probs, as `kernels.dpo_loss` has it.

    h = ratio_chosen - ratio_rejected, ratio_r = s_r - reference_r, and for ipo ratio_r / tokens_r
    dpo:  ℓ = -(1-ε) log σ(βh) - ε log σ(-βh)    ∂ℓ/∂h = β (ε σ(βh) - (1-ε) σ(-βh))
    ipo:  ℓ = (h - 1/(2β))²                      ∂ℓ/∂h = 2 (h - 1/(2β))
    A chosen token's gradient is ∂ℓ/∂h, a rejected token's -∂ℓ/∂h, divided by tokens_r for ipo:
    the same number for every token of a response.
    """
    logprob_2P = response_sums(logprob_N, response_N, len(reference_2P))
    ratio_2P = logprob_2P - reference_2P
    if objective == "ipo":
        ratio_2P = ratio_2P / torch.bincount(response_N, minlength=len(ratio_2P))
    h_P = ratio_2P[0::2] - ratio_2P[1::2]
    if objective == "ipo":
        loss_P = (h_P - 1 / (2 * beta)).square()
    else:
        z_P = beta * h_P
        loss_P = -(1 - smoothing) * F.logsigmoid(z_P) - smoothing * F.logsigmoid(-z_P)
    return Preference(
        loss_P, logprob_2P.detach(), beta * ratio_2P.detach(), beta * h_P.detach()
    )
