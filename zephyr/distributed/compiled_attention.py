"""Attention on a CPU as one op to torch.compile, which cannot trace sizes that are data.

While a block is traced, this op stands in for `attention.segment_by_segment`. Nothing else uses it.
"""

import torch
from torch import Tensor

from zephyr.attention import segment_by_segment, visible

NAME = "zephyr::segments"


@torch.library.custom_op(NAME, mutates_args=())
def opaque(
    q_THE: Tensor,
    k_GKE: Tensor,
    v_GKE: Tensor,
    position_T: Tensor,
    position_G: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
) -> Tensor:
    places = position_T, position_G, cu_seqlens_q, cu_seqlens_k
    return segment_by_segment(q_THE, k_GKE, v_GKE, *places, window).contiguous()


@torch.library.custom_op("zephyr::segments_backward", mutates_args=())
def backward(
    g_THE: Tensor,
    q_THE: Tensor,
    k_GKE: Tensor,
    v_GKE: Tensor,
    position_T: Tensor,
    position_G: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the gradient g at the output. With s = q kᵀ / √E and
    p = softmax(s):

        dv = pᵀ g     ds = p ∘ (g vᵀ - Σ p ∘ g vᵀ)     dq = ds k / √E     dk = dsᵀ q / √E
    """
    (_, H, E), K = q_THE.shape, k_GKE.shape[1]
    sizes_q, sizes_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    found = []
    for q_HQE, g_HQE, i_Q, k_KGE, v_KGE, j_G in zip(
        q_THE.transpose(0, 1).split(sizes_q, 1),
        g_THE.transpose(0, 1).split(sizes_q, 1),
        position_T.split(sizes_q),
        k_GKE.transpose(0, 1).split(sizes_k, 1),
        v_GKE.transpose(0, 1).split(sizes_k, 1),
        position_G.split(sizes_k),
        strict=True,
    ):
        k_HGE, v_HGE = (x.repeat_interleave(H // K, 0) for x in (k_KGE, v_KGE))
        s_HQG = q_HQE @ k_HGE.mT / E**0.5
        p_HQG = s_HQG.masked_fill(~visible(i_Q[:, None], j_G, window), -torch.inf).softmax(-1)
        dp_HQG = g_HQE @ v_HGE.mT
        ds_HQG = p_HQG * (dp_HQG - (p_HQG * dp_HQG).sum(-1, keepdim=True)) / E**0.5
        dk_HGE, dv_HGE = ds_HQG.mT @ q_HQE, p_HQG.mT @ g_HQE
        # a key head's gradient is the sum over the query heads that share it
        dk_KGE, dv_KGE = (x.unflatten(0, (K, H // K)).sum(1) for x in (dk_HGE, dv_HGE))
        found.append((ds_HQG @ k_HGE, dk_KGE, dv_KGE))
    joined = (torch.cat(x, 1).transpose(0, 1) for x in zip(*found, strict=True))
    return tuple(x.contiguous() for x in joined)


@opaque.register_fake
def _(q_THE, *_):
    return q_THE.new_empty(q_THE.shape)


@backward.register_fake
def _(g_THE, q_THE, k_GKE, v_GKE, *_):
    return tuple(x.new_empty(x.shape) for x in (q_THE, k_GKE, v_GKE))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, g_THE):
    return *backward(g_THE, *ctx.saved_tensors, ctx.window), None, None, None, None, None


opaque.register_autograd(_gradients, setup_context=_save)


@torch.compiler.substitute_in_graph(segment_by_segment, skip_signature_check=True)
def traced(*arguments):
    return opaque(*arguments)
