"""Fused ops for training on token log-probs, and the one rule that picks their implementation.

    from kernels import linear_logprob, dpo_loss, response_sums, attention
    from kernels import rms_norm, swiglu, linear, swiglu_linear, main_grad
    from kernels import adamw_, adamw_step, split, join

They know tensors, not language models: torch is all they need, and Triton on a GPU.
ZEPHYR_KERNELS forces one of three implementations:

    triton     the default on CUDA; elsewhere only interpreted (TRITON_INTERPRET=1), for tests
    torch      the default elsewhere: the same algorithm with its row steps in torch ops
    reference  the specification, kernels/reference.py

N predicting rows  D width  V vocabulary  P pairs  2P responses
T tokens of a pack  G gathered keys  S segments  H query heads  K key heads  E head width
"""

import os

import torch
from torch import Tensor

from kernels import (
    fused_adamw,
    fused_attention,
    fused_dpo,
    fused_linear,
    fused_logprob,
    jit,
    reference,
)
from kernels.elementwise import rms_norm as rms_norm
from kernels.elementwise import swiglu as swiglu
from kernels.fused_linear import add_gradient as add_gradient
from kernels.fused_linear import clear_grad as clear_grad
from kernels.fused_linear import linear as linear
from kernels.fused_linear import main_grad as main_grad
from kernels.reference import AdamWStep, Preference

IMPLEMENTATIONS = ("triton", "torch", "reference")


def implementation(device: torch.device) -> str:
    """The implementation for tensors on `device`: ZEPHYR_KERNELS if set, else Triton on CUDA and
    torch elsewhere. Raises ValueError where that cannot run; nothing falls back silently."""
    forced = os.environ.get("ZEPHYR_KERNELS")
    choice = forced or ("triton" if device.type == "cuda" else "torch")
    if choice not in IMPLEMENTATIONS:
        raise ValueError(f"ZEPHYR_KERNELS={choice} is none of {', '.join(IMPLEMENTATIONS)}")
    if choice == "triton" and jit.triton is None:
        raise ValueError("Triton is not installed: pip install triton, or set ZEPHYR_KERNELS=torch")
    if choice == "triton" and device.type != "cuda" and not jit.INTERPRETED:
        raise ValueError(
            f"ZEPHYR_KERNELS=triton: no Triton kernel runs on {device.type}; unset it "
            "(tests set TRITON_INTERPRET=1, which is slow)"
        )
    return choice


def linear_logprob(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, workspace: int = 2**31) -> Tensor:
    """log p(target) per row [N], nats, p = softmax(h wᵀ); differentiable in h and w.

    fp32 for bf16, fp16 and fp32 inputs (fp64 for fp64): logits are never rounded to half precision.
    `workspace`, in bytes, bounds what is held of [N, V]; while softmax - onehot fits 7/8 of it,
    forward and backward are three matmuls, beyond it four, and without a gradient one. Two runs
    give equal bits. Raises ValueError if shapes or dtypes do not match or, on a CPU, if a target is
    not in 0..V-1; on a GPU, where looking would stall it, such a row's log-prob is NaN.
    """
    choice = implementation(h_ND.device)
    if choice == "reference":
        return reference.linear_logprob(h_ND, w_VD, targets_N)
    return fused_logprob.linear_logprob(h_ND, w_VD, targets_N, workspace, choice == "triton")


def swiglu_linear(gate_up_T2F: Tensor, w_DF: Tensor, total_DF: Tensor) -> Tensor:
    """(silu(gate) ∘ up) wᵀ [T, D] of the two halves of gate_up; its backward adds dw to `total_DF`,
    as that of `linear`. See kernels/fused_linear.py."""
    triton = implementation(w_DF.device) == "triton"
    return fused_linear.swiglu_linear(gate_up_T2F, w_DF, total_DF, triton)


def response_sums(logprob_N: Tensor, response_N: Tensor, responses: int) -> Tensor:
    """Sum of each response's token log-probs [responses]; `response_N` ascends from 0.

    The order of summation is fixed, and the same as in `dpo_loss`: there, a policy that equals its
    reference has margins of exactly 0.
    """
    if implementation(logprob_N.device) == "triton":
        return fused_dpo.response_sums(logprob_N, response_N, responses)
    return reference.response_sums(logprob_N, response_N, responses)


def dpo_loss(
    logprob_N: Tensor,
    response_N: Tensor,
    reference_2P: Tensor,
    beta: float,
    smoothing: float = 0.0,
    objective: str = "dpo",
) -> Preference:
    """Loss of each pair from the policy's token log-probs, and its rewards: see `Preference`.

    `response_N` says which response a token belongs to, ascending; pair k's chosen is response 2k,
    its rejected 2k+1. `reference_2P` are the reference's sums (`response_sums`). Two pairs:

        logprob    -1 -2 | -3 | -1 | -2 -2      reference  -4 -3 -1 -3
        response    0  0 |  1 |  2 |  3  3
        logprob_2P    -3   -3   -1     -4       log-ratio   1  0  0 -1

    so both log-ratios' differences h are 1, and with β = 1 both losses are -log σ(1) = 0.3133.
    For `ipo` h is the difference of the means over the tokens, 1/2 - 0 and 0 + 1/2, and both losses
    are 0. Rewards are β × the log-ratios, and margins their differences, for either: 1 and 1.

    `dpo`:  -(1-ε) log σ(βh) - ε log σ(-βh), ε = `smoothing`   (arXiv:2305.18290, Eq. 7, and cDPO)
    `ipo`:  (h - 1/(2β))²                                (arXiv:2310.12036, Eq. 17, on the means)
    Raises ValueError if shapes do not match, or for an objective that is neither.
    """
    if objective not in ("dpo", "ipo"):
        raise ValueError(f"objective {objective!r} is neither 'dpo' nor 'ipo'")
    if logprob_N.shape != response_N.shape or logprob_N.dim() != 1:
        raise ValueError(
            f"logprob is {list(logprob_N.shape)} and response "
            f"{list(response_N.shape)}; both are [N]"
        )
    if reference_2P.dim() != 1 or len(reference_2P) % 2:
        raise ValueError(
            f"reference is {list(reference_2P.shape)}; it has a chosen and a rejected "
            "entry for each pair"
        )
    run = fused_dpo if implementation(logprob_N.device) == "triton" else reference
    return run.dpo_loss(logprob_N, response_N, reference_2P, beta, smoothing, objective)


def attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_rows_G: Tensor | None,
    max_q: int,
    window: int | None,
) -> Tensor:
    """Causal attention of the segments of a pack [T, H, E]; differentiable in q, k and v.

    Segment s has the queries cu_seqlens_q[s] : cu_seqlens_q[s + 1], `max_q` of them at most, and
    the keys cu_seqlens_k[s] : cu_seqlens_k[s + 1] of the places `kv_rows_G`: its prefix, which is
    the beginning of the last segment that had none, and its own places. None means that no segment
    has a prefix. A query sees the last `window` keys up to its own; without a window, all of them.
    Prompt a b c, then p of one response, and x y of the other, which shares the prompt:

        place          0 1 2 3 4 5           a b c p x y
        cu_seqlens_q   0 4 6                 segments a b c p and x y, max_q 4
        cu_seqlens_k   0 4 9
        kv_rows        0 1 2 3 | 0 1 2 4 5   a b c p | a b c x y
        x sees         a b c x               with a window of 2: c x

    Query head h reads key head h // (H / K). In Triton neither keys nor heads are copied, and two
    runs give equal bits; elsewhere the specification runs, which has all scores [H, T, G] at once.
    Raises ValueError if shapes or dtypes do not match and, in Triton, if the head width is none of
    16, 32, 64, 128 or kv_rows are not such places (not checked on a GPU: the host would wait).
    """
    shapes = [list(x.shape) for x in (q_THE, k_TKE, v_TKE)]
    fits = len(shapes[0]) == len(shapes[1]) == 3 and shapes[1] == shapes[2]
    if not fits or shapes[0][::2] != shapes[1][::2] or shapes[0][1] % shapes[1][1]:
        raise ValueError(
            f"q, k and v are {shapes[0]}, {shapes[1]} and {shapes[2]}; they are [T, H, E], "
            "[T, K, E] and [T, K, E], H a multiple of K"
        )
    if not q_THE.dtype == k_TKE.dtype == v_TKE.dtype:
        raise ValueError(
            f"q, k and v are {q_THE.dtype}, {k_TKE.dtype} and {v_TKE.dtype}; they are of one dtype"
        )
    where = cu_seqlens_q, cu_seqlens_k, kv_rows_G
    if implementation(q_THE.device) == "triton":
        return fused_attention.attention(q_THE, k_TKE, v_TKE, *where, max_q, window=window)
    return reference.attention(q_THE, k_TKE, v_TKE, *where, window)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 master as its nearest bf16 and, int16, how far its bits are from that one's.

        master       bits         weight          low
        1.0          3F800000     3F80  1.0         0
        1.00390613   3F807FFF     3F80  1.0     32767
        1.00390625   3F808000     3F81  1.0078 -32768   a half: a cast would give 3F80, the even one

    Halves go away from zero: for either sign weight = (bits + 8000) >> 16, and low = bits -
    (weight << 16) is -32768..32767, the 65,536 values that 16 bits have. With halves to even, as in
    a cast, an even weight would have 65,537 masters. The two differ at every other half: at one
    master in 131,072. From 3.3962e38 (7F7F8000) on, a finite master's weight is infinite.
    Raises ValueError if the master is not float32.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"master is {master.dtype}; it is float32")
    return reference.split(master)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 master whose `split` this is, equal in every bit; for a NaN, some NaN.

    Raises ValueError if weight and low are not bfloat16 and int16 of one shape.
    """
    if (weight.dtype, low.dtype) != (torch.bfloat16, torch.int16) or weight.shape != low.shape:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)} and low {low.dtype} {list(low.shape)}; "
            "they are bfloat16 and int16 of one shape"
        )
    return reference.join(weight, low)


@torch.no_grad()
def adamw_step(
    number: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor,
    skip: Tensor,
) -> AdamWStep:
    """Return what all parameters share in one AdamW update: made once, so that each parameter's
    `adamw_` is one launch.

    `number` counts updates from 1. Gradients are divided by `grad_scale`; max(1, norm / limit)
    clips their norm. If `skip` is not 0, nothing will change.
    The three are fp32 scalars on the device, and the host waits for none of them.
    Raises ValueError if one is not.
    """
    for name, x in {"number": number, "grad_scale": grad_scale, "skip": skip}.items():
        if x.dim() or x.dtype != torch.float32 or x.device != number.device:
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} on {x.device}; it is float32 [] "
                f"on {number.device}"
            )
    return reference.adamw_step(number, lr, betas, eps, grad_scale, skip)


@torch.no_grad()
def adamw_(
    weight: Tensor,
    low: Tensor | None,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    weight_decay: float,
    step: AdamWStep,
) -> None:
    """One AdamW update of weight, low, m and v in place, by torch.optim.AdamW's formula; `grad`
    may be overwritten.

    The weight is fp32 and `low` None, or the two are halves of an fp32 master (see `split`), which
    is what is updated. The moments m and v are fp32 or bf16; if bf16 they are rounded after the
    weight is updated with them, m to nearest, v by chance: up with the probability with which its
    mean stays what it is. With β₂ = 0.999 a step takes less off v than half its last place, so that
    rounded to nearest it would never fall. The chance is a hash of place and step: no state, and a
    step taken again gives the same bits. `step` is what the parameters share: see `adamw_step`.
    Raises ValueError if dtypes, shapes or devices do not match, or if a tensor is not contiguous.
    """
    _check_adamw(weight, low, m, v, grad, step)
    run = {
        "triton": fused_adamw.in_triton,
        "torch": fused_adamw.in_torch,
        "reference": reference.adamw_,
    }[implementation(weight.device)]
    run(weight, low, m, v, grad, weight_decay, step)


def _check_adamw(weight, low, m, v, grad, step) -> None:
    halves = weight.dtype, None if low is None else low.dtype
    if halves not in ((torch.float32, None), (torch.bfloat16, torch.int16)):
        raise ValueError(
            f"weight is {halves[0]} and low {halves[1]}; they are float32 and None, "
            "or bfloat16 and int16"
        )
    if m.dtype != v.dtype or m.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"m is {m.dtype} and v {v.dtype}; both are float32, or both bfloat16")
    if grad.dtype != torch.float32:
        raise ValueError(f"grad is {grad.dtype}; it is float32")
    names = {"weight": weight, "m": m, "v": v, "grad": grad} | ({} if low is None else {"low": low})
    for name, x in names.items():
        if x.shape != weight.shape or x.device != weight.device:
            raise ValueError(
                f"{name} is {list(x.shape)} on {x.device} and weight "
                f"{list(weight.shape)} on {weight.device}"
            )
        if not x.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
    if step.number.device != weight.device:
        raise ValueError(f"step is on {step.number.device} and weight on {weight.device}")
