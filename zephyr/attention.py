"""The one mask (causal × window × document × shared prompt) and its two back ends.

T rows  G gathered keys  S segments  H query heads  K key/value heads  E head width
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
        position_G = self.position_T if self.kv_rows_G is None else self.position_T[self.kv_rows_G]
        place = [self.position_T, position_G, self.cu_q, self.cu_k]
        run = opaque if torch.compiler.is_compiling() else segments
        return run(q_THE.to(wide), k_TKE.to(wide), v_TKE.to(wide), place, window).to(q_THE.dtype)

    def _flash(self, q_THE: Tensor, k_GKE: Tensor, v_GKE: Tensor, window: int | None) -> Tensor:
        """One variable-length call; its left window counts the keys before the query's own."""
        left = -1 if window is None else window - 1
        return varlen_attn(
            q_THE,
            k_GKE,
            v_GKE,
            self.cu_q,
            self.cu_k,
            self.max_q,
            self.max_k,
            window_size=(left, 0),
            **GROUPED,
        )


def segments(
    q_THE: Tensor, k_GKE: Tensor, v_GKE: Tensor, place: list[Tensor], window: int | None
) -> Tensor:
    """The same, segment by segment, for CPUs and fp32; `place` has the positions of queries and of
    gathered keys, and where segments end among both: position_T, position_G, cu_q, cu_k."""
    outputs = []
    for q_HQE, k_KGE, v_KGE, i_Q, j_G in zip(*split(place, q_THE, k_GKE, v_GKE), strict=True):
        whole = len(i_Q) == len(j_G) and (window is None or len(j_G) <= window)
        mask_QG = None if whole else visible(i_Q[:, None], j_G, window)
        outputs.append(
            F.scaled_dot_product_attention(
                q_HQE[None], k_KGE[None], v_KGE[None], mask_QG, is_causal=whole, enable_gqa=True
            )[0]
        )
    return torch.cat(outputs, 1).transpose(0, 1)


def split(place: list[Tensor], q_THE: Tensor, *of_keys: Tensor) -> list:
    """Queries [H, Q, E], keys and values [K, G, E] and both positions of each segment."""
    position_T, position_G, cu_q, cu_k = place
    sizes_q, sizes_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    # split, not slices: the gradient of a split is one concatenation
    return [
        q_THE.transpose(0, 1).split(sizes_q, 1),
        *(x_GKE.transpose(0, 1).split(sizes_k, 1) for x_GKE in of_keys),
        position_T.split(sizes_q),
        position_G.split(sizes_k),
    ]


@torch.library.custom_op("zephyr::segments", mutates_args=())
def opaque(
    q_THE: Tensor, k_GKE: Tensor, v_GKE: Tensor, place: list[Tensor], window: int | None
) -> Tensor:
    """`segments` as one op to torch.compile, which cannot trace sizes that are data."""
    return segments(q_THE, k_GKE, v_GKE, place, window).contiguous()


@torch.library.custom_op("zephyr::segments_backward", mutates_args=())
def opaque_backward(
    g_THE: Tensor,
    q_THE: Tensor,
    k_GKE: Tensor,
    v_GKE: Tensor,
    place: list[Tensor],
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, of a g that arrives at the output. With p = softmax(s), s = q kᵀ / √E:

    dv = pᵀ g     ds = p ∘ (g vᵀ - Σ p ∘ g vᵀ)     dq = ds k / √E     dk = dsᵀ q / √E
    """
    (_, H, E), K = q_THE.shape, k_GKE.shape[1]
    found = []
    parts = zip(*split(place, q_THE, k_GKE, v_GKE), split(place, g_THE)[0], strict=True)
    for q_HQE, k_KGE, v_KGE, i_Q, j_G, g_HQE in parts:
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
def _(q_THE, k_GKE, v_GKE, place, window):
    return q_THE.new_empty(q_THE.shape)


@opaque_backward.register_fake
def _(g_THE, q_THE, k_GKE, v_GKE, place, window):
    return tuple(x.new_empty(x.shape) for x in (q_THE, k_GKE, v_GKE))


def _save(ctx, inputs, output) -> None:
    q_THE, k_GKE, v_GKE, place, ctx.window = inputs
    ctx.save_for_backward(q_THE, k_GKE, v_GKE, *place)


def _gradients(ctx, g_THE):
    q_THE, k_GKE, v_GKE, *place = ctx.saved_tensors
    gradients = opaque_backward(g_THE, q_THE, k_GKE, v_GKE, place, ctx.window)
    return *gradients, [None] * len(place), None


opaque.register_autograd(_gradients, setup_context=_save)
