"""Objectives and preference metrics: pure functions on vectors of response log-probs.

Every preference objective takes summed log-probs in nats, chosen and rejected interleaved
(`policy_2P[2k]` is pair k's chosen), and returns the loss of each pair. All are written in the
log-ratio  h = (log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected)).

N predicting places  P pairs  2P responses
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from zephyr.config import DPOConfig
from zephyr.errors import shared

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def sft(logprob_N: Tensor) -> Tensor:
    """Return -Σ log p(target), to be divided once by the trained tokens of the whole step (dSFT,
    Eq. 1 of arXiv:2310.16944)."""
    return -logprob_N.sum()


def dpo(h_P: Tensor, beta: float, smoothing: float) -> Tensor:
    """-(1-ε) log σ(βh) - ε log σ(-βh).

    ε = 0 is DPO, Eq. 7 of arXiv:2305.18290; ε > 0 is cDPO (E. Mitchell, A note on DPO with noisy
    preferences, 2023). ln 2 at h = 0.
    """
    z = beta * h_P
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


def robust(h_P: Tensor, beta: float, smoothing: float) -> Tensor:
    """(-(1-ε) log σ(βh) + ε log σ(-βh)) / (1 - 2ε): DPO's loss without the bias of a share ε of
    flipped labels (rDPO, Eq. 12 of arXiv:2403.00409)."""
    z = beta * h_P
    unscaled = -(1 - smoothing) * F.logsigmoid(z) + smoothing * F.logsigmoid(-z)
    return unscaled / (1 - 2 * smoothing)


def ipo(h_P: Tensor, beta: float, smoothing: float) -> Tensor:
    """Return (h - 1/(2β))², where h is made of log-probs averaged over the response's tokens (Eq.
    17 of arXiv:2310.12036; the mean is the authors' correction). It is 1/(4β²) at h = 0.
    `smoothing` has no part in it."""
    return (h_P - 1 / (2 * beta)).square()


def hinge(h_P: Tensor, beta: float, smoothing: float) -> Tensor:
    """Return max(0, 1 - βh), SLiC's loss (Eq. 10 of arXiv:2305.10425) on DPO's log-ratio, as in RSO
    (arXiv:2309.06657). It is 1 at h = 0. `smoothing` has no part in it."""
    return torch.relu(1 - beta * h_P)


OBJECTIVES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
}
FUSED = ("dpo", "ipo")  # those that are a kernel on a GPU


def preference(
    name: str,
    logprob_N: Tensor,
    response_N: Tensor,
    reference_2P: Tensor,
    beta: float,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """What METRICS names, of each pair [P]; `loss` alone carries a gradient.

    `response_N` says which response a token belongs to. A reward is β times the response's summed
    log-ratio, for `ipo` too, whose loss sees means over the tokens; a margin is the chosen's reward
    less the rejected's, and `rewards/accuracies` counts those strictly above 0, so it is 0 while
    policy and reference are the same. Every name means what it means in TRL's log.
    """
    if name in FUSED and kernels.implementation(logprob_N.device) == "triton":
        # what follows below in one launch; test_losses.py and test_dpo_kernel.py hold the two equal
        fused = kernels.dpo_loss(logprob_N, response_N, reference_2P, beta, smoothing, name)
        loss_P, policy_2P, reward_2P, margin_P = fused
    else:
        policy_2P = kernels.response_sums(logprob_N, response_N, len(reference_2P))
        ratio_2P = policy_2P - reference_2P
        reward_2P = beta * ratio_2P
        margin_P = beta * (ratio_2P[0::2] - ratio_2P[1::2])
        if name == "ipo":  # which averages over a response's tokens
            ratio_2P = ratio_2P / torch.bincount(response_N, minlength=len(ratio_2P))
        h_P = ratio_2P[0::2] - ratio_2P[1::2]
        loss_P = OBJECTIVES[name](h_P, beta, smoothing)
        policy_2P, reward_2P, margin_P = (x.detach() for x in (policy_2P, reward_2P, margin_P))
    return {
        "loss": loss_P,
        "rewards/chosen": reward_2P[0::2],
        "rewards/rejected": reward_2P[1::2],
        "rewards/accuracies": (margin_P > 0).float(),
        "rewards/margins": margin_P,
        "logps/chosen": policy_2P[0::2],
        "logps/rejected": policy_2P[1::2],
    }


def check_start(
    c: DPOConfig, means: dict[str, float], updated: bool = False, exact: bool = False
) -> None:
    """Raise ValueError unless a step taken before any update starts from equal policies, or, if
    `updated`, unless the first update has moved the margin.

    Then every margin is 0 and the loss is the objective's at h = 0 (`dpo`: ln 2), to 1e-5 in fp32
    and 1e-2 in bf16. `exact` says that the same code computed the reference of the same
    micro-batches: then the margins must be 0 in every bit. `means` are a step's `loss`,
    `rewards/margins` and `rewards/accuracies`. NaN passes: guard.py handles it.
    """
    tolerance = 1e-5 if c.precision == "fp32" else 1e-2
    expected = float(OBJECTIVES[c.loss](torch.zeros(1), c.beta, c.label_smoothing))
    loss, margin = means["loss"], means["rewards/margins"]
    if math.isnan(loss + margin):
        return
    if updated:
        if margin:
            return
        raise shared(
            ValueError(
                "after the first update the mean margin is 0 as before it: the adapters do not "
                f"move the policy; raise --lr {c.lr} or --lora-alpha"
            )
        )
    problem = None
    # relative where the loss is large (ipo)
    if abs(loss - expected) > tolerance * max(1, expected) or abs(margin) > 4 * tolerance:
        problem = (
            f", but the mean loss is {loss:.6f} where {expected:.6f} is due, and the mean margin "
            f"{margin:.2e}: the cached reference log-probs are not this model's; delete them "
            "(reference-*.npy in the cache)"
        )
    elif exact and (margin or means["rewards/accuracies"]):
        problem = (
            " in every bit, as the same code computed both, but the mean margin is "
            f"{margin:.2e}: this device does not give the same log-probs twice. Start the same "
            "command again: the reference's are cached now, and agree to rounding"
        )
    if problem:
        text = f"before the first update policy and reference must agree{problem}"
        raise shared(ValueError(text))
