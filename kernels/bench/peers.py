"""What `kernels.bench` compares with: other ways to the same numbers, each at its best settings.

A linear one takes (h_ND, w_VD, targets_N) and returns log p(target) per row, or -Σ log p as a loss.
A DPO one takes (h_ND, w_VD, targets_N, response_N) and returns the mean loss of the pairs, whose
reference log-probs are all 0. An attention takes (q_THE, k_TKE, v_TKE).

N rows  D width  V vocabulary  B sequences  T tokens of each, or of a pack  R responses
G gathered keys  H query heads  K key heads  E head width
"""

import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

LENGTH, BETA = 256, 0.1  # tokens of a response, where N has that many
LIGER_ROWS = 4096  # of a chunk, in the larger of its two settings

Contenders = dict[str, Callable]


def plain(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Logits in the inputs' dtype, their log-softmax in fp32: what most trainers do."""
    z_NV = F.linear(h_ND, w_VD).float()
    return F.log_softmax(z_NV, -1).gather(1, targets_N[:, None]).squeeze(1)


def narrow(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
    """TRL's log-probs from logits, as its `selective_log_softmax` has them without a kernel: in the
    logits' dtype, sequence by sequence, log-sum-exp for fp32 and log-softmax for bf16."""
    return _by_sequence(_selective, h_ND, w_VD, targets_N)


def _selective(z_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    picked_BT1 = targets_BT[..., None]
    if z_BTV.dtype == torch.float32:
        lse_BT = torch.stack([z_TV.logsumexp(-1) for z_TV in z_BTV])
        return z_BTV.gather(-1, picked_BT1).squeeze(-1) - lse_BT
    rows = zip(z_BTV, picked_BT1, strict=True)
    return torch.stack([F.log_softmax(z, -1).gather(-1, t).squeeze(-1) for z, t in rows])


def _by_sequence(select: Callable, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
    length = LENGTH if len(h_ND) % LENGTH == 0 else len(h_ND)
    shape = (-1, length)
    return select(F.linear(h_ND, w_VD).unflatten(0, shape), targets_N.unflatten(0, shape)).flatten()


def plain_sums(logprob_N: Tensor, response_N: Tensor, responses: int) -> Tensor:
    return logprob_N.new_zeros(responses).index_add(0, response_N, logprob_N)


def plain_dpo(logprob_N: Tensor, response_N: Tensor, reference_R: Tensor) -> Tensor:
    """The loss of each pair [P]."""
    ratio_R = plain_sums(logprob_N, response_N, len(reference_R)) - reference_R
    return -F.logsigmoid(BETA * (ratio_R[0::2] - ratio_R[1::2]))


def plain_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rows_G: Tensor, seen_TG: Tensor
) -> Tensor:
    """PyTorch's own formula, with a mask."""
    q_HTE, k_KGE, v_KGE = (
        x.transpose(0, 1)[None] for x in (q_THE, k_TKE.index_select(0, rows_G), v_TKE[rows_G])
    )
    with sdpa_kernel(SDPBackend.MATH):
        o_HTE = F.scaled_dot_product_attention(q_HTE, k_KGE, v_KGE, seen_TG, enable_gqa=True)[0]
    return o_HTE.transpose(0, 1)


def attention(
    device: torch.device,
    ends_q: Tensor,
    ends_k: Tensor,
    rows_G: Tensor,
    max_q: int,
    max_k: int,
    window: int,
) -> Contenders:
    """FlashAttention on gathered keys, the gathering counted: torch's own version and, if it is
    installed, version 3."""
    if device.type != "cuda":
        return {}
    grouped = inspect.signature(varlen_attn).parameters
    gqa = {"enable_gqa": True} if "enable_gqa" in grouped else {}  # 2.11 accepts it without
    lengths, left = (ends_q, ends_k, max_q, max_k), (window - 1, 0)

    def gathered(attend: Callable, **options) -> Callable:
        def run(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
            k_GKE, v_GKE = (x.index_select(0, rows_G) for x in (k_TKE, v_TKE))
            return attend(q_THE, k_GKE, v_GKE, *lengths, window_size=left, **options).flatten()

        return run

    found = {"flash2": gathered(varlen_attn, **gqa)}
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func

        found["flash3"] = gathered(flash_attn_varlen_func, causal=True)
    return found


def linear(device: torch.device) -> Contenders:
    """Peers of linear_logprob that can run here."""
    found = {"plain": plain, "trl": narrow}
    if importlib.util.find_spec("trl"):
        found |= _trl()
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["liger"] = _liger_cross_entropy()
    return found


def linear_dpo(device: torch.device, n: int, responses: int) -> Contenders:
    """Peers from hidden states to the DPO loss."""

    def unfused(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, response_N: Tensor) -> Tensor:
        zeros_R = h_ND.new_zeros(responses, dtype=torch.float32)
        return plain_dpo(plain(h_ND, w_VD, targets_N), response_N, zeros_R).mean()

    found = {"plain": unfused}
    if importlib.util.find_spec("liger_kernel") and n % responses == 0:
        found["liger"] = _liger_dpo(device, responses, 1)  # its default
        many = min(responses // 2, LIGER_ROWS * responses // (2 * n))
        if many > 1:
            found[f"liger {many} pairs"] = _liger_dpo(device, responses, many)
    return found


def compiled(run: Callable, device: torch.device) -> Contenders:
    """`run` under torch.compile, where that works: on a CPU it calls a C++ compiler."""
    works = device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++"))
    return {"compile": torch.compile(run, dynamic=False)} if works else {}


def missing(device: torch.device) -> list[str]:
    """One line for each peer that cannot run here."""
    lines = []
    if not compiled(plain, device):
        lines.append("compile: on a CPU torch.compile needs a C++ compiler")
    if not importlib.util.find_spec("trl"):
        lines.append(
            "trl: not installed, so `trl` is its computation in our own lines and its "
            "chunked head is absent; pip install zephyr-dpo[peers]"
        )
    if not importlib.util.find_spec("liger_kernel"):
        lines.append("liger: not installed; pip install zephyr-dpo[peers]")
    elif device.type != "cuda":
        lines.append("liger: its cross-entropy needs a GPU; its DPO loss runs uncompiled")
    if device.type == "cuda" and not importlib.util.find_spec("flash_attn_interface"):
        lines.append("flash3: FlashAttention 3 is not installed")
    return lines


def _trl() -> Contenders:
    """Its log-softmax, fused on a GPU, and the chunked head that its DPOTrainer runs."""
    from trl.trainer import utils

    def selective(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
        return _by_sequence(utils.selective_log_softmax, h_ND, w_VD, targets_N)

    found: Contenders = {"trl": selective}
    if hasattr(utils, "_ChunkedLogProbFunction"):
        settings = (1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        apply = utils._ChunkedLogProbFunction.apply
        found["trl chunked"] = lambda h, w, targets: apply(h, w, None, targets, *settings)[0]
    return found


def _liger_cross_entropy() -> Callable:
    """Its gradients are formed in the forward, which a sum allows: its fastest setting."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda h_ND, w_VD, targets_N: loss(w_VD, h_ND, targets_N)


def _liger_dpo(device: torch.device, responses: int, pairs: int) -> Callable:
    """`pairs` of a chunk. It wants every chosen response before the first rejected one."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(
        beta=BETA, compiled=device.type == "cuda", use_ref_model=False, chunk_size=pairs
    )

    def run(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, response_N: Tensor) -> Tensor:
        h_RTD, targets_RT = (
            x.unflatten(0, (responses // 2, 2, -1)).transpose(0, 1).flatten(0, 1)
            for x in (h_ND, targets_N)
        )
        return loss(w_VD, h_RTD, targets_RT)[0]

    return run
