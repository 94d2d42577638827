"""The one mask (causal × window × document × shared prompt) and its back ends.

On a GPU torch's variable-length attention computes it, which is FlashAttention 2. ZEPHYR_ATTENTION
chooses another: flash3, FlashAttention 3 where that is installed, or triton, the kernels of
kernels/fused_attention.py, which read a shared prompt's keys in place. On a CPU, and in fp32 unless
triton is chosen, segments are computed one by one.

T tokens of the pack  G gathered keys  S segments  H query heads  K key/value heads  E head width
"""

import inspect
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

import kernels

# torch 2.12 made grouped queries a flag; 2.11 accepts them without one
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
BACK_ENDS = ("flash2", "flash3", "triton")


def back_end() -> str:
    """Return the back end that ZEPHYR_ATTENTION names, by default flash2."""
    name = os.environ.get("ZEPHYR_ATTENTION") or "flash2"
    if name not in BACK_ENDS:
        raise ValueError(
            f"ZEPHYR_ATTENTION={name} is none of {', '.join(BACK_ENDS)}; unset it for flash2"
        )
    return name


def prepare_back_end() -> None:
    """Check ZEPHYR_ATTENTION and, for flash3, let torch's variable-length attention be that. To be
    called once, before the first pass."""
    cuda = torch.cuda.is_available()
    if back_end() == "triton":
        _check_triton(torch.device("cuda" if cuda else "cpu"))
    if back_end() == "flash3" and cuda and torch.cuda.get_device_capability()[0] != 9:
        raise ValueError("ZEPHYR_ATTENTION=flash3: it is for Hopper GPUs (H100, H200); unset it")
    if back_end() == "flash3" and current_flash_attention_impl() != "FA3":
        try:
            activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"ZEPHYR_ATTENTION=flash3: FlashAttention 3 is not installed ({error}); build it "
                "from hopper/ of github.com/Dao-AILab/flash-attention, or unset ZEPHYR_ATTENTION"
            ) from None


def _check_triton(device: torch.device) -> None:
    if kernels.implementation(device) == "torch":
        raise ValueError(
            f"ZEPHYR_ATTENTION=triton: no Triton kernel runs on {device.type}; unset it "
            "(tests set ZEPHYR_KERNELS=triton and TRITON_INTERPRET=1)"
        )


def visible(i: Tensor, j: Tensor, window: int | None) -> Tensor:
    """Return True where the query at position i may see the key at position j:  i - window < j <=
    i.

    That is `window` keys, the query's own included; None is no limit. Positions count from the
    start of a sequence, so in a pack a sequence sees what it would see alone. Broadcasts.
    """
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def in_one_call(x: Tensor) -> bool:
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
        kv_inverse   0 1 2 3 7 8, and a second time 4 5 6 - - -

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
    kv_inverse_2T: Tensor | None  # where each place stands in kv_rows: once, and again or -1
    max_q: int  # queries of the longest segment
    max_k: int  # its keys

    @classmethod
    def alone(cls, length: int) -> "Layout":
        """Return the layout of one causal sequence."""
        ends = torch.tensor([0, length], dtype=torch.int32)
        return cls(torch.arange(length), ends, ends, None, None, length, length)

    def attended(self, window: int | None) -> int:
        """Return the number of visible (query, key) pairs in the pack."""
        keys_T = self.position_T + 1  # a segment holds its sequence from position 0 on
        return int((keys_T if window is None else keys_T.clamp(max=window)).sum())

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int | None):
        """Return softmax(q kᵀ / √E, over visible keys) v  [T, H, E]; the same for every `layer`."""
        if back_end() == "triton":
            return self._in_place(q_THE, k_TKE, v_TKE, window)
        if self.kv_rows_G is not None:
            k_TKE, v_TKE = gathered(k_TKE, self), gathered(v_TKE, self)
        if in_one_call(q_THE):
            return self.flash(q_THE, k_TKE, v_TKE, window)
        # fp32 at least: on a CPU attention in bf16 is slower and takes more memory
        wide = torch.promote_types(q_THE.dtype, torch.float32)
        position_G = self.position_T if self.kv_rows_G is None else self.position_T[self.kv_rows_G]
        ends = [self.cu_seqlens_q, self.cu_seqlens_k]
        q_THE, k_TKE, v_TKE, dtype = q_THE.to(wide), k_TKE.to(wide), v_TKE.to(wide), q_THE.dtype
        return segment_by_segment(
            q_THE, k_TKE, v_TKE, self.position_T, position_G, *ends, window
        ).to(dtype)

    def _in_place(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int | None) -> Tensor:
        """Attend with kernels that gather no keys."""
        _check_triton(q_THE.device)
        places = self.cu_seqlens_q, self.cu_seqlens_k, self.kv_rows_G
        return kernels.attention(q_THE, k_TKE, v_TKE, *places, self.max_q, window)

    def flash(self, q_THE: Tensor, k_GKE: Tensor, v_GKE: Tensor, window: int | None) -> Tensor:
        """Attend with one variable-length call; its left window counts the keys before the query's
        own."""
        left = -1 if window is None else window - 1
        lengths = self.cu_seqlens_q, self.cu_seqlens_k, self.max_q, self.max_k
        return varlen_attn(q_THE, k_GKE, v_GKE, *lengths, window_size=(left, 0), **GROUPED)


def gathered(x_TKE: Tensor, layout: Layout) -> Tensor:
    """Return the keys or values [G, K, E] at the places `kv_rows`.

    No place is among them more than twice, so its gradient is the sum of two that are looked up.
    Autograd's would be additions to zeros, by atomics: slower, and in no fixed order.
    """
    return _Gather.apply(x_TKE, layout.kv_rows_G, layout.kv_inverse_2T)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TKE: Tensor, kv_rows_G: Tensor, kv_inverse_2T: Tensor) -> Tensor:
        ctx.save_for_backward(kv_inverse_2T)
        return x_TKE.index_select(0, kv_rows_G)

    @staticmethod
    def backward(ctx, g_GKE: Tensor):
        once_T, again_T = ctx.saved_tensors[0]
        second_TKE = g_GKE.index_select(0, again_T.clamp(min=0))
        second_TKE = second_TKE.masked_fill(again_T[:, None, None] < 0, 0)
        return g_GKE.index_select(0, once_T) + second_TKE, None, None


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
