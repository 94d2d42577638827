"""Fused ops for training on token log-probs, and the one rule that picks their implementation.

They know tensors, not language models, and never import `zephyr`.
"""

import os

from torch import Tensor

from kernels import reference

IMPLEMENTATIONS = ("reference",)


def implementation() -> str:
    """The implementation every op uses: ZEPHYR_KERNELS if set, else `reference`.

    Raises ValueError when the variable asks for one that this installation does not have.
    """
    choice = os.environ.get("ZEPHYR_KERNELS") or "reference"
    if choice not in IMPLEMENTATIONS:
        have = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"ZEPHYR_KERNELS={choice}: this installation has {have}; unset it")
    return choice


def linear_logprob(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) per row [N], fp32 nats, p = softmax(h @ wᵀ). See `reference.linear_logprob`."""
    return {"reference": reference.linear_logprob}[implementation()](h_ND, w_VD, targets_N)
