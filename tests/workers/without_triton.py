"""The loss head and the loss where Triton cannot be imported, as on macOS, and without zephyr."""

import sys

import torch

sys.modules["triton"] = None


def main():
    from kernels import dpo_loss, linear_logprob, response_sums

    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    response = torch.tensor([0, 0, 1, 1])
    logprob = linear_logprob(h, w, torch.arange(4))
    dpo_loss(logprob, response, response_sums(logprob, response, 2), 0.1).loss_P.sum().backward()
    assert h.grad.isfinite().all() and not any(m.startswith("zephyr") for m in sys.modules)


main()
