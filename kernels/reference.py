"""The specification of every fused op: plain PyTorch, any dtype, one page. Tests compare with it.

N predicting rows, D width, V vocabulary
"""

import torch
from torch import Tensor


def linear_logprob(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) per row [N] in nats, where p = softmax(h @ wᵀ).

    logprob_n = z_n[target_n] - log Σ_v exp z_n[v],   z = h wᵀ
    With c the gradient of logprob and G = onehot(target) - softmax(z):
    dh = c ∘ (G w),   dw = Gᵀ (c ∘ h).
    Inputs narrower than fp32 are widened first, so a bf16 model's log-probs carry fp32 sums.
    """
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    z_NV = h_ND.to(wide) @ w_VD.to(wide).T
    return z_NV.gather(1, targets_N[:, None]).squeeze(1) - z_NV.logsumexp(1)
