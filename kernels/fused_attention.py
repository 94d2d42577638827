"""Attention over a pack of segments, which reads keys and values where they lie.

A segment is a run of queries. It sees the keys of its prefix, the first tokens of a segment before
it (a prompt that both continue), and then its own keys, causally, in a window of W positions:

    s_ij = q_i · k_j / √E,  i - W < j <= i      lse_i = log Σ_j exp s_ij
    p_ij = exp(s_ij - lse_i)                    o_i = Σ_j p_ij v_j
    ds_ij = p_ij (do_i · v_j - δ_i)             δ_i = o_i · do_i
    dq_i = Σ_j ds_ij k_j / √E                   dk_j = Σ_i ds_ij q_i / √E     dv_j = Σ_i p_ij do_i

i and j are positions in the segment's sequence: those of a prefix of P keys are 0..P-1, and the
segment's own tokens go on from P. Position j lies at place `origin + j`, where the prefix and the
segment's own tokens have an origin each. So nothing is gathered: every segment that shares a prompt
reads its keys in place. Query head h reads key head h // (H / K), so no head is expanded either.

A sum over keys, o or dq, belongs to the program that has this block of queries of this head. A sum
over queries, dk or dv, belongs to the program that has this block of keys of this key head: it
visits the query heads of the group, and all segments that read the block, one after another. Every
number has one writer and one order of addition, so there are no atomics, and two runs give equal
bits.

Scores are exponents of 2: exp(s) = 2^(s log₂e), where `scale` = log₂e / √E has the factor.

T tokens of the pack  G gathered keys  S segments  H query heads  K key heads  E head width
BM queries of a block  BN keys of a block
"""

from __future__ import annotations  # so that `tl.constexpr` need not exist without Triton

import torch
from torch import Tensor

from kernels.jit import jit, tl, triton

LOG2E = 1.4426950408889634
EVERYTHING = 2**30  # a window that no sequence fills
BLOCKS = {  # by dtype or, of half precision, by chip: BM, BN, warps, stages
    "fp32": {"attention": (16, 16, 4, 2), "dq": (16, 16, 4, 2), "dkdv": (16, 16, 8, 3)},
    80: {"attention": (128, 64, 8, 2), "dq": (64, 64, 4, 2), "dkdv": (32, 64, 8, 3)},
    90: {"attention": (128, 64, 8, 3), "dq": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3)},
    100: {"attention": (128, 64, 8, 3), "dq": (128, 64, 8, 3), "dkdv": (64, 64, 8, 3)},
}


@jit
def segment(cu_q_ptr, cu_k_ptr, rows_ptr, s):
    """Return the place of segment s's first query, how many it has, the place of its first key, and
    how many keys come before its own."""
    start = tl.load(cu_q_ptr + s)
    queries = tl.load(cu_q_ptr + s + 1) - start
    k = tl.load(cu_k_ptr + s)
    prefix = tl.load(cu_k_ptr + s + 1) - k - queries
    first = tl.load(rows_ptr + k, mask=prefix > 0, other=0).to(tl.int32)
    return start, queries, tl.where(prefix > 0, first, start), prefix


@jit
def rows(start, count, head, HEADS: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a head's rows start..start+BLOCK-1 of an [T, HEADS, E] tensor lie, and which of
    them are among the first `count`."""
    o_r, o_e = tl.arange(0, BLOCK)[:, None], tl.arange(0, E)[None, :]
    return (start.to(tl.int64) * HEADS + head) * E + (o_r * (HEADS * E) + o_e), o_r < count


@jit
def key_blocks(i, queries, prefix, window, BM: tl.constexpr, BN: tl.constexpr):
    """Return how many key blocks the prefix has, and the first and the end of those that the BM
    queries from the segment's i-th on see, counted over the prefix's and then its own."""
    blocks = tl.cdiv(prefix, BN)
    oldest = tl.maximum(prefix + i - window + 1, 0)  # position
    low = tl.where(oldest < prefix, oldest // BN, blocks + (oldest - prefix) // BN)
    return blocks, low, blocks + tl.cdiv(tl.minimum(i + BM, queries), BN)


@jit
def key_block(b, blocks, start, queries, first, prefix, BN: tl.constexpr):
    """Return the place and the position of key block b's first key, and the position at which its
    run, which is the prefix or the segment's own tokens, ends."""
    shared = b < blocks
    j = tl.where(shared, b * BN, prefix + (b - blocks) * BN)
    origin = tl.where(shared, first, start - prefix)
    return origin + j, j, tl.where(shared, prefix, prefix + queries)


@jit
def hide(
    b_s, i, j, end, window, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """Return scores [BM, BN] with -inf where a query does not see a key, or where the key is
    beyond `end`. The first query's position is i, the first key's j. TRANSPOSED ones are [BN, BM].
    """
    # most blocks lie wholly in sight
    if (j + BN > end) | (j + BN - 1 > i) | (j <= i + BM - 1 - window):
        o_m, o_n = i + tl.arange(0, BM), j + tl.arange(0, BN)
        if TRANSPOSED:
            o_m, o_n = o_m[None, :], o_n[:, None]
        else:
            o_m, o_n = o_m[:, None], o_n[None, :]
        m_s = (o_n < end) & (o_n <= o_m) & (o_n > o_m - window)
        b_s = tl.where(m_s, b_s, float("-inf"))
    return b_s


@jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    rows_ptr,
    T,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program per segment, block of queries and query head: o, and lse in base 2 (softmax
    online, arXiv:1805.02867)."""
    # the last blocks see the most keys, so they come first
    s, i_m, h = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    start, queries, first, prefix = segment(cu_q_ptr, cu_k_ptr, rows_ptr, s)
    i = i_m * BM
    if i >= queries:
        return
    o_q, m_q = rows(start + i, queries - i, h, H, E, BM)
    b_q = tl.load(q_ptr + o_q, mask=m_q, other=0.0)
    b_top = tl.full([BM], -1e30, tl.float32)  # finite: a row may see nothing of its first blocks
    b_total = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, E], tl.float32)
    blocks, low, high = key_blocks(i, queries, prefix, window, BM, BN)
    for b in range(low, high):
        place, j, end = key_block(b, blocks, start, queries, first, prefix, BN)
        o_k, m_k = rows(place, end - j, h // (H // K), K, E, BN)
        b_k = tl.load(k_ptr + o_k, mask=m_k, other=0.0)
        b_v = tl.load(v_ptr + o_k, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee")
        b_s = hide(b_s, prefix + i, j, end, window, BM, BN)
        b_new = tl.maximum(b_top, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_shrink = tl.exp2(b_top - b_new)
        b_total = b_total * b_shrink + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")
        b_top = b_new
    o_m = tl.arange(0, BM)
    m_m = o_m < queries - i
    b_total = tl.where(m_m, b_total, 1.0)  # what follows the last query may see nothing
    tl.store(o_ptr + o_q, (b_o / b_total[:, None]).to(o_ptr.dtype.element_ty), mask=m_q)
    lse_ptr += h.to(tl.int64) * T + start + i
    tl.store(lse_ptr + o_m, b_top + tl.log2(b_total), mask=m_m)


@jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    o_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    rows_ptr,
    T,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program per segment, block of queries and query head: dq, and δ for `dkdv_kernel`."""
    s, i_m, h = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    start, queries, first, prefix = segment(cu_q_ptr, cu_k_ptr, rows_ptr, s)
    i = i_m * BM
    if i >= queries:
        return
    o_q, m_q = rows(start + i, queries - i, h, H, E, BM)
    b_q = tl.load(q_ptr + o_q, mask=m_q, other=0.0)
    b_do = tl.load(do_ptr + o_q, mask=m_q, other=0.0)
    b_o = tl.load(o_ptr + o_q, mask=m_q, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    o_m = tl.arange(0, BM)
    o_t, m_t = h.to(tl.int64) * T + start + i + o_m, o_m < queries - i
    tl.store(delta_ptr + o_t, b_delta, mask=m_t)
    b_lse = tl.load(lse_ptr + o_t, mask=m_t, other=0.0)
    b_dq = tl.zeros([BM, E], tl.float32)
    blocks, low, high = key_blocks(i, queries, prefix, window, BM, BN)
    for b in range(low, high):
        place, j, end = key_block(b, blocks, start, queries, first, prefix, BN)
        o_k, m_k = rows(place, end - j, h // (H // K), K, E, BN)
        b_k = tl.load(k_ptr + o_k, mask=m_k, other=0.0)
        b_v = tl.load(v_ptr + o_k, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, b_k.T, input_precision="ieee")
        b_s = hide(b_s, prefix + i, j, end, window, BM, BN)
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        b_dp = tl.dot(b_do, b_v.T, input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    b_dq *= scale * 0.6931471805599453  # ln 2: the scale without log₂e
    tl.store(dq_ptr + o_q, b_dq.to(dq_ptr.dtype.element_ty), mask=m_q)


@jit
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_q_ptr,
    cu_k_ptr,
    rows_ptr,
    T,
    window,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program per segment, block of its own keys and key head: dk and dv.

    Readers of the block are the segment itself, and those that follow it as long as their prefix
    is its beginning. Scores stand transposed, [BN, BM].
    """
    s, i_n, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, own, first, prefix = segment(cu_q_ptr, cu_k_ptr, rows_ptr, s)
    if i_n * BN >= own:
        return
    place = start + i_n * BN
    o_k, m_k = rows(place, own - i_n * BN, i_k, K, E, BN)
    b_k = tl.load(k_ptr + o_k, mask=m_k, other=0.0)
    b_v = tl.load(v_ptr + o_k, mask=m_k, other=0.0)
    b_dk = tl.zeros([BN, E], tl.float32)
    b_dv = tl.zeros([BN, E], tl.float32)
    r, q_start, queries = s, start, own
    j, end = prefix + i_n * BN, prefix + own  # positions in r: of the first key, and after the last
    reads = r == s  # it does
    while reads:
        low = tl.maximum(j - prefix, 0) // BM
        newest = tl.minimum(j + BN, end) - 1 + window  # position
        count = tl.maximum(tl.cdiv(tl.minimum(queries, newest - prefix), BM) - low, 0)
        count = tl.where(j < end, count, 0)
        for n in range(count * (H // K)):
            h, i = i_k * (H // K) + n // count, (low + n % count) * BM
            o_q, m_q = rows(q_start + i, queries - i, h, H, E, BM)
            b_q = tl.load(q_ptr + o_q, mask=m_q, other=0.0)
            b_do = tl.load(do_ptr + o_q, mask=m_q, other=0.0)
            o_m = tl.arange(0, BM)
            o_t, m_t = h.to(tl.int64) * T + q_start + i + o_m, o_m < queries - i
            b_lse = tl.load(lse_ptr + o_t, mask=m_t, other=0.0)
            b_delta = tl.load(delta_ptr + o_t, mask=m_t, other=0.0)
            b_s = tl.dot(b_k, b_q.T, input_precision="ieee")
            b_s = hide(b_s, prefix + i, j, end, window, BM, BN, TRANSPOSED=True)
            b_p = tl.exp2(b_s * scale - b_lse[None, :])
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_dp = tl.dot(b_v, b_do.T, input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        r += 1
        reads = r < tl.num_programs(0)
        if reads:
            q_start, queries, first, prefix = segment(cu_q_ptr, cu_k_ptr, rows_ptr, r)
            j, end = i_n * BN, prefix
            reads = first == start
    b_dk *= scale * 0.6931471805599453  # ln 2: the scale without log₂e
    tl.store(dk_ptr + o_k, b_dk.to(dk_ptr.dtype.element_ty), mask=m_k)
    tl.store(dv_ptr + o_k, b_dv.to(dv_ptr.dtype.element_ty), mask=m_k)


def settings(kernel: str, dtype: torch.dtype, capability: int) -> dict:
    """Return a kernel's blocks, warps and stages, that fit registers and shared memory."""
    # consumer chips, 120 and on, have less shared memory than those of data centres
    chip = 80 if capability < 90 or capability >= 120 else 90 if capability < 100 else 100
    chosen = BLOCKS["fp32" if dtype == torch.float32 else chip][kernel]
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), chosen, strict=True))


def launch(kernel, name: str, tensors: tuple, cu_q, cu_k, kv_rows_G, max_q, window, capability):
    """Launch a kernel on its tensors, of which q and k are the first two, with the blocks that suit
    a chip of this compute capability (90 is 9.0)."""
    (T, H, E), K = tensors[0].shape, tensors[1].shape[1]
    chosen = settings(name, tensors[0].dtype, capability)
    block, heads = (chosen["BN"], K) if name == "dkdv" else (chosen["BM"], H)
    # long segments have more blocks than short ones, whose programs then end at once
    grid = (len(cu_q) - 1, triton.cdiv(max_q, block), heads)
    rows_G = cu_q if kv_rows_G is None else kv_rows_G  # without prefixes it is not read
    where = cu_q, cu_k, rows_G, T, window, LOG2E / E**0.5
    kernel[grid](*tensors, *where, H=H, K=K, E=E, **chosen)


def launch_forward(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *where) -> tuple[Tensor, Tensor]:
    """Return o and lse; `where` is what `launch` has after the tensors."""
    T, H, _ = q_THE.shape
    o_THE, lse_HT = torch.empty_like(q_THE), q_THE.new_empty(H, T, dtype=torch.float32)
    launch(attention_kernel, "attention", (q_THE, k_TKE, v_TKE, o_THE, lse_HT), *where)
    return o_THE, lse_HT


def launch_backward(
    do_THE: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    o_THE: Tensor,
    lse_HT: Tensor,
    *where,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `where` is what `launch` has after the tensors."""
    dq_THE, dk_TKE, dv_TKE, delta_HT = map(torch.empty_like, (q_THE, k_TKE, v_TKE, lse_HT))
    tensors = q_THE, k_TKE, v_TKE, do_THE, lse_HT, delta_HT
    launch(dq_kernel, "dq", (*tensors, o_THE, dq_THE), *where)
    launch(dkdv_kernel, "dkdv", (*tensors, dk_TKE, dv_TKE), *where)
    return dq_THE, dk_TKE, dv_TKE


def capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def check_rows(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_rows_G: Tensor | None) -> None:
    """Raise ValueError if the keys are not laid out as the kernels read them."""
    if kv_rows_G is None:
        return
    ends_q, ends_k, rows_G = (x.tolist() for x in (cu_seqlens_q, cu_seqlens_k, kv_rows_G))
    whole = range(0)  # the places of the last segment that has no prefix
    for s in range(len(ends_q) - 1):
        own, keys = range(*ends_q[s : s + 2]), rows_G[slice(*ends_k[s : s + 2])]
        prefix = len(keys) - len(own)
        whole = whole if prefix else own
        if keys != [*whole[:prefix], *own]:
            raise ValueError(
                f"kv_rows of segment {s} are not the first places of the last segment without such "
                "a prefix, and then the segment's own places"
            )


@torch.library.custom_op("zephyr_kernels::attention", mutates_args=())
def forward(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_rows_G: Tensor | None,
    max_q: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return o and the base-2 lse, which the backward needs."""
    if not q_THE.is_cuda:
        check_rows(cu_seqlens_q, cu_seqlens_k, kv_rows_G)
    where = cu_seqlens_q, cu_seqlens_k, kv_rows_G, max_q, window, capability(q_THE.device)
    with torch.cuda.device_of(q_THE):
        return launch_forward(q_THE, k_TKE, v_TKE, *where)


@forward.register_fake
def _(q_THE, *_):
    T, H, _ = q_THE.shape
    return torch.empty_like(q_THE), q_THE.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op("zephyr_kernels::attention_backward", mutates_args=())
def backward(
    do_THE: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    o_THE: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_rows_G: Tensor | None,
    max_q: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    tensors = do_THE.contiguous(), q_THE, k_TKE, v_TKE, o_THE, lse_HT
    where = cu_seqlens_q, cu_seqlens_k, kv_rows_G, max_q, window, capability(q_THE.device)
    with torch.cuda.device_of(q_THE):
        return launch_backward(*tensors, *where)


@backward.register_fake
def _(do_THE, q_THE, k_TKE, v_TKE, *_):
    return tuple(torch.empty_like(x) for x in (q_THE, k_TKE, v_TKE))


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # lse is given none
    *tensors, ctx.max_q, ctx.window = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _gradients(ctx, do_THE, _lse):
    if do_THE is None:
        return (None,) * 8
    return *backward(do_THE, *ctx.saved_tensors, ctx.max_q, ctx.window), *(None,) * 5


forward.register_autograd(_gradients, setup_context=_save)


def attention(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *segments, window: int | None) -> Tensor:
    """Return what `kernels.attention` returns, computed in Triton; `segments` are its arguments
    from cu_seqlens_q to max_q."""
    E = q_THE.shape[2]
    if E not in (16, 32, 64, 128):
        raise ValueError(f"the head width is {E}; the Triton kernel's are 16, 32, 64 and 128")
    if q_THE.dtype == torch.float64:
        raise ValueError("the Triton kernels have no float64; set ZEPHYR_KERNELS=reference")
    tensors = (x.contiguous() for x in (q_THE, k_TKE, v_TKE))
    limit = EVERYTHING if window is None else min(window, EVERYTHING)
    o_THE, _ = forward(*tensors, *segments, limit)
    return o_THE
