"""How exact an op must be before `kernels.bench` times it: truth in float64, and no magic numbers.

The budget is twice plain PyTorch's error in the same dtype and, for log-probs of half-precision
inputs, a tenth of the error of log-probs whose logits were rounded to that dtype.

N rows or tokens  D width  V vocabulary  S sampled rows
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.bench import peers
from kernels.bench.cases import DTYPES, Case

SAMPLE = 64  # rows of a head that are compared with float64
TRIES = 8  # inputs of a loss


def results(run: Callable, tensors: list[Tensor], leaves: int, c: Tensor) -> list[Tensor]:
    """The output of `run` and the gradients of its first `leaves` inputs, where c arrives at the
    output; a single number is a loss and needs none."""
    with torch.set_grad_enabled(leaves > 0):
        out = run(*tensors)
    if not leaves:
        return [out.detach()]
    arriving = c.to(out.dtype) if out.dim() else None
    return [out.detach(), *torch.autograd.grad(out, tensors[:leaves], arriving)]


def sample(case: Case, tensors: list[Tensor]) -> tuple[Tensor | slice, list[Tensor]]:
    """Numbers of rows all over N, and the inputs of these alone: rows of a head are independent."""
    if case.op not in ("linear_logprob", "no_grad"):
        return slice(None), tensors
    h_ND, w_VD, targets_N = tensors
    rows_S = torch.linspace(0, case.N - 1, min(case.N, SAMPLE), device=h_ND.device).long()
    h_SD = h_ND.detach()[rows_S].requires_grad_(h_ND.requires_grad)
    return rows_S, [h_SD, w_VD, targets_N[rows_S]]


def errors(case: Case, run: Callable, tensors: list[Tensor], c: Tensor) -> dict[str, float]:
    """|x - truth| / |truth| of each of the case's results, as `run` has them on a sample of the
    rows. Where `run` gives a loss instead of log-probs, it is compared with -Σ log p."""
    rows, some = sample(case, tensors)
    got = results(run, some, len(case.results) - 1, c[rows])
    return apart(case, got, truth(case, some, c[rows], case.outputs > 1 and not got[0].dim()))


def whole_errors(case: Case, run: Callable, tensors: list[Tensor], c: Tensor) -> dict[str, float]:
    """The same of a `run` on all rows, of which only the sample has a gradient arriving, so that
    the sample's truth is all of dw too."""
    rows, some = sample(case, tensors)
    only = torch.zeros_like(c)
    only[rows] = c[rows]
    got = results(run, tensors, len(case.results) - 1, only)
    by_row = [name in ("logprob", "dh") for name in case.results]
    got = [x[rows] if cut else x for x, cut in zip(got, by_row, strict=True)]
    return apart(case, got, truth(case, some, c[rows]))


def truth(case: Case, tensors: list[Tensor], c: Tensor, loss: bool = False) -> list[Tensor]:
    """The case's results in float64; with `loss`, those of -Σ output."""
    leaves = len(case.results) - 1
    doubles = [x.detach().double() if x.is_floating_point() else x for x in tensors]
    doubles = [x.requires_grad_(i < leaves) for i, x in enumerate(doubles)]
    exact = (lambda *x: -case.exact(*x).sum()) if loss else case.exact
    return results(exact, doubles, leaves, c.double())


def apart(case: Case, got: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    pairs = zip(case.results, got, exact, strict=True)
    return {name: float((x.double() - y).norm() / y.norm()) for name, x, y in pairs}


def allowed(case: Case, tensors: list[Tensor], c: Tensor) -> dict[str, float]:
    """The largest error allowed of each result; none has to be below one rounding of its dtype.

    A loss of a few pairs is a few numbers, and plain PyTorch may have these right by luck: what
    counts is the largest of its errors with TRIES inputs.
    """
    plain = peers.plain if case.V else case.contenders["plain"]
    others = (case.draw() for _ in range(0 if case.flops else TRIES - 1))
    found = [errors(case, plain, drawn, c) for drawn in (tensors, *others)]
    largest = {name: 2 * max(error[name] for error in found) for name in case.results}
    if "logprob" in largest and case.dtype != "fp32":
        narrow = errors(case, peers.narrow, tensors, c)["logprob"]
        largest["logprob"] = min(largest["logprob"], 0.1 * narrow)
    dtypes = {name: DTYPES[case.dtype] for name in ("dh", "dw")}
    return {
        name: max(error, torch.finfo(dtypes.get(name, torch.float32)).eps)
        for name, error in largest.items()
    }
