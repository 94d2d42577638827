"""From token log-probs to a preference loss and its gradient, in one launch.

One program per pair. It finds the pair's tokens by bisection, since responses ascend; adds the
log-probs of either response in a fixed order; forms the log-ratios, the loss and ∂loss/∂logprob,
one number per response; and writes that number for each of its tokens. The maths is
`reference.dpo_loss`'s. Nothing is read back by the host.

N predicting rows  P pairs  2P responses
"""

from __future__ import annotations  # so that `tl.constexpr` need not exist without Triton

import torch
from torch import Tensor

from kernels.jit import jit, tl
from kernels.reference import Preference

BLOCK = 1024


@jit
def first_token(response_ptr, N, r, STEPS: tl.constexpr):
    """Return the first of the N tokens whose response is r or a later one; STEPS must be more than
    log2 N."""
    low, high = tl.zeros([], tl.int64), tl.zeros([], tl.int64) + N
    for _ in range(STEPS):
        middle = (low + high) // 2
        before = tl.load(response_ptr + middle, mask=middle < high, other=r) < r
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    return low


@jit
def lane_sum(b_x, BLOCK: tl.constexpr):
    """Return the sum of BLOCK lanes, a power of 2: of neighbours, then of neighbouring sums, and so
    on. tl.sum adds the lanes in an order that depends on which thread the compiler gives which, and
    that on what else is in the kernel; two numbers have one sum."""
    STEPS: tl.constexpr = BLOCK.bit_length() - 1
    for step in tl.static_range(1, STEPS + 1):
        b_x = tl.sum(tl.reshape(b_x, [BLOCK >> step, 2]), 1)
    return tl.sum(b_x, 0)


@jit
def response_sum(logprob_ptr, response_ptr, r, start, end, N, responses, BLOCK: tl.constexpr):
    """Return the sum of response r's tokens start..end-1, added lane by lane and then over the
    lanes.

    It is NaN if one of the tokens is not r's, if the range is empty, or if tokens lie before the
    first response or after the last. So if no sum is NaN, the responses ascend and every token was
    added once.
    """
    whole = (start <= end) & ((r > 0) | (start == 0)) & ((r < responses - 1) | (end == N))
    b_sum = tl.zeros([BLOCK], tl.float32)
    for offset in range(start, end, BLOCK):
        o_n = offset + tl.arange(0, BLOCK)
        m_n = o_n < end
        stray = tl.load(response_ptr + o_n, mask=m_n, other=r) != r
        b_logprob = tl.load(logprob_ptr + o_n, mask=m_n, other=0.0)
        b_sum += tl.where(stray, float("nan"), b_logprob)
    return tl.where(whole, lane_sum(b_sum, BLOCK), float("nan"))


@jit
def fill(ptr, value, start, end, BLOCK: tl.constexpr):
    """Set ptr[start:end] = value."""
    for offset in range(start, end, BLOCK):
        o_n = offset + tl.arange(0, BLOCK)
        tl.store(ptr + o_n, tl.zeros([BLOCK], tl.float32) + value, mask=o_n < end)


@jit
def minus_log_sigmoid(z):
    """Return -log σ(z) = max(-z, 0) + log(1 + exp(-|z|)), exact to rounding where exp(-|z|) is tiny
    too: x / (u - 1) undoes the rounding error of u = 1 + x."""
    x = tl.exp(-tl.abs(z))
    u = 1.0 + x
    rest = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(-z, 0.0) + rest


@jit
def sums_kernel(logprob_ptr, response_ptr, sum_ptr, N, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per response."""
    r, R = tl.program_id(0), tl.num_programs(0)
    start = first_token(response_ptr, N, r, STEPS)
    end = first_token(response_ptr, N, r + 1, STEPS)
    tl.store(sum_ptr + r, response_sum(logprob_ptr, response_ptr, r, start, end, N, R, BLOCK))


@jit
def dpo_kernel(
    logprob_ptr,
    response_ptr,
    reference_ptr,
    loss_ptr,
    sum_ptr,
    reward_ptr,
    margin_ptr,
    grad_ptr,
    N,
    beta,
    smoothing,
    IPO: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per pair k: responses 2k and 2k+1."""
    k, R = tl.program_id(0), 2 * tl.num_programs(0)
    start = first_token(response_ptr, N, 2 * k, STEPS)
    middle = first_token(response_ptr, N, 2 * k + 1, STEPS)
    end = first_token(response_ptr, N, 2 * k + 2, STEPS)
    chosen = response_sum(logprob_ptr, response_ptr, 2 * k, start, middle, N, R, BLOCK)
    rejected = response_sum(logprob_ptr, response_ptr, 2 * k + 1, middle, end, N, R, BLOCK)
    chosen_ratio = chosen - tl.load(reference_ptr + 2 * k)
    rejected_ratio = rejected - tl.load(reference_ptr + 2 * k + 1)
    z = beta * (chosen_ratio - rejected_ratio)
    chosen_share, rejected_share = 1.0, 1.0
    if IPO:
        chosen_share = 1.0 / (middle - start).to(tl.float32)
        rejected_share = 1.0 / (end - middle).to(tl.float32)
        off = chosen_ratio * chosen_share - rejected_ratio * rejected_share - 0.5 / beta
        loss, slope = off * off, 2.0 * off
    else:
        loss = (1.0 - smoothing) * minus_log_sigmoid(z) + smoothing * minus_log_sigmoid(-z)
        sigmoid = 1.0 / (1.0 + tl.exp(-tl.abs(z)))  # of |z|, so that nothing overflows
        small = tl.exp(-tl.abs(z)) * sigmoid
        right, wrong = tl.where(z > 0, sigmoid, small), tl.where(z > 0, small, sigmoid)
        slope = beta * (smoothing * right - (1.0 - smoothing) * wrong)
    tl.store(loss_ptr + k, loss)
    tl.store(margin_ptr + k, z)
    tl.store(sum_ptr + 2 * k, chosen)
    tl.store(sum_ptr + 2 * k + 1, rejected)
    tl.store(reward_ptr + 2 * k, beta * chosen_ratio)
    tl.store(reward_ptr + 2 * k + 1, beta * rejected_ratio)
    fill(grad_ptr, slope * chosen_share, start, middle, BLOCK)
    fill(grad_ptr, -slope * rejected_share, middle, end, BLOCK)


@torch.library.custom_op("zephyr_kernels::response_sums", mutates_args=())
def _sums(logprob_N: Tensor, response_N: Tensor, responses: int) -> Tensor:
    sums_R, N = logprob_N.new_empty(responses), len(logprob_N)
    if responses:
        with torch.cuda.device_of(logprob_N):
            sums_kernel[(responses,)](
                logprob_N, response_N, sums_R, N, STEPS=N.bit_length(), BLOCK=BLOCK
            )
    return sums_R


@_sums.register_fake
def _(logprob_N, response_N, responses):
    return logprob_N.new_empty(responses)


_sums.register_autograd(
    lambda ctx, c_R: (c_R.index_select(0, ctx.saved_tensors[0]), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@torch.library.custom_op("zephyr_kernels::dpo_loss", mutates_args=())
def _dpo(
    logprob_N: Tensor,
    response_N: Tensor,
    reference_2P: Tensor,
    beta: float,
    smoothing: float,
    ipo: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_P, logprob_2P, reward_2P, margin_P and each token's gradient of its own pair's loss."""
    P, N = len(reference_2P) // 2, len(logprob_N)
    loss_P, margin_P, sum_2P, reward_2P = (logprob_N.new_empty(n) for n in (P, P, 2 * P, 2 * P))
    grad_N = torch.empty_like(logprob_N)
    if P:
        with torch.cuda.device_of(logprob_N):
            dpo_kernel[(P,)](
                logprob_N,
                response_N,
                reference_2P,
                loss_P,
                sum_2P,
                reward_2P,
                margin_P,
                grad_N,
                N,
                beta,
                smoothing,
                IPO=ipo,
                STEPS=N.bit_length(),
                BLOCK=BLOCK,
            )
    return loss_P, sum_2P, reward_2P, margin_P, grad_N


@_dpo.register_fake
def _(logprob_N, response_N, reference_2P, beta, smoothing, ipo):
    P = len(reference_2P) // 2
    shapes = (P, 2 * P, 2 * P, P, len(logprob_N))
    return tuple(logprob_N.new_empty(n) for n in shapes)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # only the loss is given a gradient
    ctx.save_for_backward(output[4], inputs[1])


def _gradient(ctx, c_P, *_):
    grad_N, response_N = ctx.saved_tensors
    dlogprob_N = None if c_P is None else grad_N * c_P.index_select(0, response_N // 2)
    return dlogprob_N, None, None, None, None, None


_dpo.register_autograd(_gradient, setup_context=_save)


def _fp32(logprob_N: Tensor, response_N: Tensor) -> tuple[Tensor, Tensor]:
    if logprob_N.dtype != torch.float32:
        raise ValueError(f"logprob is {logprob_N.dtype}; the Triton kernel adds float32")
    return logprob_N.contiguous(), response_N.contiguous()


def response_sums(logprob_N: Tensor, response_N: Tensor, responses: int) -> Tensor:
    """Return what `kernels.response_sums` returns, computed in Triton."""
    return _sums(*_fp32(logprob_N, response_N), responses)


def dpo_loss(
    logprob_N: Tensor,
    response_N: Tensor,
    reference_2P: Tensor,
    beta: float,
    smoothing: float,
    objective: str,
) -> Preference:
    """Return what `kernels.dpo_loss` returns, computed in Triton. A response_N that does not ascend
    gives NaN."""
    logprob_N, response_N = _fp32(logprob_N, response_N)
    reference_2P = reference_2P.to(torch.float32).contiguous()
    loss_P, *rest, _ = _dpo(
        logprob_N, response_N, reference_2P, beta, smoothing, objective == "ipo"
    )
    return Preference(loss_P, *(x.detach() for x in rest))
