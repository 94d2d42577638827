"""The one mask (causal × window × document × shared prompt) and its two back ends.

T rows  G gathered keys  S segments  H query heads  K key/value heads  E head width
"""

import inspect
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def visible(i: Tensor, j: Tensor, window: int | None) -> Tensor:
    """May the query at position i see the key at position j?  i - window < j <= i.

    `window` keys, the query's own included; None is no limit. Positions count from the start of
    a sequence, so a packed row and a lone sequence agree. Broadcasts.
    """
    return (j <= i) if window is None else (j <= i) & (j > i - window)


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a packed row: segment s holds queries cu_q[s]:cu_q[s+1], in row order, and
    keys cu_k[s]:cu_k[s+1] of the rows listed in `kv_rows` (None: the rows themselves).

    A segment's last query and last key are the same row, so masks align at the bottom right.
    Prompt `a b c` shared by chosen `p` and rejected `x y` (rows a b c p x y):
        cu_q 0 4 6    cu_k 0 4 9    kv_rows 0 1 2 3 | 0 1 2 4 5    position 0 1 2 3 3 4
    """

    position_T: Tensor
    cu_q: Tensor  # [S+1] int32
    cu_k: Tensor  # [S+1] int32
    kv_rows_G: Tensor | None
    max_q: int
    max_k: int

    def attended(self, window: int | None) -> int:
        """Visible (query, key) pairs: a segment holds its sequence from position 0 on."""
        keys_T = self.position_T + 1
        return int((keys_T if window is None else keys_T.clamp(max=window)).sum())

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int | None):
        """softmax(q kᵀ / √E, over visible keys) v  [T, H, E]; the same for every `layer`."""
        if self.kv_rows_G is not None:
            k_TKE, v_TKE = (x.index_select(0, self.kv_rows_G) for x in (k_TKE, v_TKE))
        if q_THE.is_cuda and q_THE.dtype in (torch.bfloat16, torch.float16):
            return self._flash(q_THE, k_TKE, v_TKE, window)
        # fp32 at least: on a CPU attention in bf16 is slower and takes more memory
        wide = torch.promote_types(q_THE.dtype, torch.float32)
        q_THE, k_TKE, v_TKE, dtype = q_THE.to(wide), k_TKE.to(wide), v_TKE.to(wide), q_THE.dtype
        return self._segments(q_THE, k_TKE, v_TKE, window).to(dtype)

    def _flash(self, q_THE: Tensor, k_GKE: Tensor, v_GKE: Tensor, window: int | None) -> Tensor:
        """One variable-length call; its left window counts the keys before the query's own."""
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if window is None else window - 1
        return varlen_attn(
            q_THE, k_GKE, v_GKE, self.cu_q, self.cu_k, self.max_q, self.max_k,
            window_size=(left, 0), **_grouped_queries(),
        )  # fmt: skip

    def _segments(self, q_THE: Tensor, k_GKE: Tensor, v_GKE: Tensor, window: int | None) -> Tensor:
        """The same, segment by segment, for CPUs and fp32."""
        sizes_q, sizes_k = self.cu_q.diff().tolist(), self.cu_k.diff().tolist()
        position_G = self.position_T if self.kv_rows_G is None else self.position_T[self.kv_rows_G]
        # split, not slices: the gradient of a split is one concatenation
        segments = zip(
            q_THE.transpose(0, 1).split(sizes_q, 1), self.position_T.split(sizes_q),
            k_GKE.transpose(0, 1).split(sizes_k, 1), v_GKE.transpose(0, 1).split(sizes_k, 1),
            position_G.split(sizes_k), strict=True,
        )  # fmt: skip
        outputs = []
        for q_HQE, i_Q, k_KGE, v_KGE, j_G in segments:
            whole = len(i_Q) == len(j_G) and (window is None or len(j_G) <= window)
            mask_QG = None if whole else visible(i_Q[:, None], j_G, window)
            outputs.append(
                F.scaled_dot_product_attention(
                    q_HQE[None], k_KGE[None], v_KGE[None], mask_QG, is_causal=whole, enable_gqa=True
                )[0]
            )
        return torch.cat(outputs, 1).transpose(0, 1)


@cache
def _grouped_queries() -> dict[str, bool]:
    """torch 2.12 made grouped queries a flag of `varlen_attn`; 2.11 accepts them without one."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
