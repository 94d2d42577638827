"""The one mask (causal × window × document × shared prompt) and its two back ends.

T tokens of the pack  G gathered keys  S segments  H query heads  K key/value heads  E head width
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# torch 2.12 made grouped queries a flag; 2.11 accepts them without one
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def visible(i: Tensor, j: Tensor, window: int | None) -> Tensor:
    """Return True where the query at position i may see the key at position j:  i - window < j <=
    i.

    That is `window` keys, the query's own included; None is no limit. Positions count from the
    start of a sequence, so in a pack a sequence sees what it would see alone. Broadcasts.
    """
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def fused(x: Tensor) -> bool:
    """Return True where attention of such tensors is one variable-length call."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a pack of T tokens, by segments.

    Segment s has the queries cu_seqlens_q[s] : cu_seqlens_q[s + 1], which lie side by side, and the
    keys cu_seqlens_k[s] : cu_seqlens_k[s + 1] of the places listed in `kv_rows_G`; None means that
    its keys are its queries. (cu: cumulative sequence lengths, as FlashAttention names them.)

    Prompt `a b c`, shared by chosen `p q` and rejected `x y z`. A response's last token predicts
    nothing, so the pack is a b c p x y:

        cu_seqlens_q 0 4 6    cu_seqlens_k 0 4 9    kv_rows 0 1 2 3 | 0 1 2 4 5

                      keys   a b c p | a b c x y        position of the query
        segment 0  query a   #                          0
                   query b   # #                        1
                   query c   # # #                      2
                   query p   # # # #                    3
        segment 1  query x             # # # #          3
                   query y             # # # # #        4

    Segment 1 has two queries and five keys. Its last query and its last key are the same token, so
    the triangle of its mask stands in the bottom right corner.
    """

    position_T: Tensor
    cu_seqlens_q: Tensor  # [S+1] int32
    cu_seqlens_k: Tensor  # [S+1] int32
    kv_rows_G: Tensor | None
    max_q: int  # queries of the longest segment
    max_k: int  # its keys

    @classmethod
    def alone(cls, length: int) -> "Layout":
        """Return the layout of one causal sequence."""
        ends = torch.tensor([0, length], dtype=torch.int32)
        return cls(torch.arange(length), ends, ends, None, length, length)

    def attended(self, window: int | None) -> int:
        """Return the number of visible (query, key) pairs in the pack."""
        keys_T = self.position_T + 1  # a segment holds its sequence from position 0 on
        return int((keys_T if window is None else keys_T.clamp(max=window)).sum())

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int | None):
        """Return softmax(q kᵀ / √E, over visible keys) v  [T, H, E]; the same for every `layer`."""
        if self.kv_rows_G is not None:
            k_TKE, v_TKE = (x.index_select(0, self.kv_rows_G) for x in (k_TKE, v_TKE))
        if fused(q_THE):
            return self.flash(q_THE, k_TKE, v_TKE, window)
        # fp32 at least: on a CPU attention in bf16 is slower and takes more memory
        wide = torch.promote_types(q_THE.dtype, torch.float32)
        position_G = self.position_T if self.kv_rows_G is None else self.position_T[self.kv_rows_G]
        ends = [self.cu_seqlens_q, self.cu_seqlens_k]
        q_THE, k_TKE, v_TKE, dtype = q_THE.to(wide), k_TKE.to(wide), v_TKE.to(wide), q_THE.dtype
        return segment_by_segment(
            q_THE, k_TKE, v_TKE, self.position_T, position_G, *ends, window
        ).to(dtype)

    def flash(self, q_THE: Tensor, k_GKE: Tensor, v_GKE: Tensor, window: int | None) -> Tensor:
        """Attend with one variable-length call; its left window counts the keys before the query's
        own."""
        left = -1 if window is None else window - 1
        lengths = self.cu_seqlens_q, self.cu_seqlens_k, self.max_q, self.max_k
        return varlen_attn(q_THE, k_GKE, v_GKE, *lengths, window_size=(left, 0), **GROUPED)


def segment_by_segment(
    q_THE: Tensor,
    k_GKE: Tensor,
    v_GKE: Tensor,
    position_T: Tensor,
    position_G: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
) -> Tensor:
    """Return the attention of gathered keys and values, computed one segment after the other, for
    CPUs and fp32.

    `position_T` and `position_G` are the positions of the queries and of the gathered keys.
    """
    sizes_q, sizes_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    # split, not slices: the gradient of a split is one concatenation
    segments = zip(
        q_THE.transpose(0, 1).split(sizes_q, 1),
        k_GKE.transpose(0, 1).split(sizes_k, 1),
        v_GKE.transpose(0, 1).split(sizes_k, 1),
        position_T.split(sizes_q),
        position_G.split(sizes_k),
        strict=True,
    )
    outputs = []
    for q_HQE, k_KGE, v_KGE, i_Q, j_G in segments:
        whole = len(i_Q) == len(j_G) and (window is None or len(j_G) <= window)
        mask_QG = None if whole else visible(i_Q[:, None], j_G, window)
        outputs.append(
            F.scaled_dot_product_attention(
                q_HQE[None], k_KGE[None], v_KGE[None], mask_QG, is_causal=whole, enable_gqa=True
            )[0]
        )
    return torch.cat(outputs, 1).transpose(0, 1)
