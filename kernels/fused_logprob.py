"""log p(target) under a language-model head, without its logits: three matmuls and a row step.

With z = h wᵀ, p = softmax(z), and c the gradient that arrives at logprob:

    logprob_n = z_n[target_n] - lse(z_n)       G = -∂logprob/∂z = p - onehot(target)
    dh = -c ∘ (G w)                            dw = Gᵀ (-c ∘ h)

G needs no c, so the forward writes it in the same pass over a row that finds its log-sum-exp, and
the backward is two matmuls. Logits exist for one chunk of rows at a time, in fp32 straight from the
matmul's accumulators; G is kept in the inputs' dtype. Where G does not fit the workspace, the
backward forms logits again, a block of the vocabulary at a time: each row's lse is known by then,
so a block needs no other, and its rows of dw are finished in one go.

N predicting rows  D width  V vocabulary  C chunk of rows  B block of the vocabulary
"""

from __future__ import annotations  # so that `tl.constexpr` need not exist without Triton

import contextlib

import torch
from torch import Tensor

from kernels.jit import jit, tl

ONE_READ = 32768  # the widest row that a program holds in registers
TILE = 8192  # what it takes at a time of a wider one
ROWS = {"cuda": 4096}  # of a chunk; elsewhere 512, whose logits stay near the cache
GRAIN = {"cuda": 256}  # a chunk's rows are a multiple of it, so of a matmul's tile; elsewhere 128
ALIGNED = 64  # tokens of a block, so that its rows begin where a matmul's fast loads can
WIDENED = 2**24  # weights of a half-precision head that a CPU has in fp32 at a time: 64 MiB


@jit
def exp(x):
    """Return e^x, computed with one multiplication and one instruction; a result below 2^-126
    becomes 0."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def row_kernel(
    z_ptr,
    target_ptr,
    logprob_ptr,
    lse_ptr,
    g_ptr,
    V,
    gradient,
    TILE: tl.constexpr,
    ONE_READ: tl.constexpr,
):
    """One program per row of z [C, V]: its log-sum-exp, its target's log-prob and, if `gradient`,
    its row of G, which may be the row of z itself.

    `gradient` is 1.0 or 0.0, floats being what Triton does not look at when it compiles. Were it a
    constant, there would be two kernels, and in the one that writes G the threads would hold other
    parts of the row; its sums would round in another way, and the log-probs of a pass with a
    gradient would not be those of one without.
    With ONE_READ the whole row is one tile that stays in registers. Otherwise the first pass keeps
    a maximum and a sum per lane, and the second reads the row again.
    A target outside 0..V-1 gives NaN.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, TILE)
    minus_infinity = float("-inf")
    target = tl.load(target_ptr + i_n)
    valid = (target >= 0) & (target < V)
    z_target = tl.load(z_ptr + i_n * V + target, mask=valid, other=float("nan")).to(tl.float32)
    if ONE_READ:
        b_z = tl.load(z_ptr + i_n * V + o_v, mask=o_v < V, other=minus_infinity).to(tl.float32)
        top = tl.max(b_z, 0)
        b_p = exp(b_z - top)
        total = tl.sum(b_p, 0)
    else:
        b_top = tl.full([TILE], minus_infinity, tl.float32)
        b_total = tl.zeros([TILE], tl.float32)
        for start in range(0, V, TILE):
            m_v = start + o_v < V
            b_z = tl.load(z_ptr + i_n * V + start + o_v, mask=m_v, other=minus_infinity)
            b_new = tl.maximum(b_top, b_z.to(tl.float32))
            # a lane that has seen only -inf has nothing to rescale
            b_shift = tl.where(b_new == minus_infinity, 0.0, b_new)
            b_total = b_total * exp(b_top - b_shift) + exp(b_z.to(tl.float32) - b_shift)
            b_top = b_new
        top = tl.max(b_top, 0)
        total = tl.sum(b_total * exp(b_top - top), 0)
    lse = top + tl.log(total)
    tl.store(lse_ptr + i_n, lse)
    tl.store(logprob_ptr + i_n, (z_target - top) - tl.log(total))
    if gradient > 0:
        scale = tl.where(valid, 1.0 / total, float("nan"))
        if ONE_READ:
            b_g = b_p * scale
            tl.store(g_ptr + i_n * V + o_v, b_g.to(g_ptr.dtype.element_ty), mask=o_v < V)
        else:
            for start in range(0, V, TILE):
                m_v = start + o_v < V
                b_z = tl.load(z_ptr + i_n * V + start + o_v, mask=m_v, other=minus_infinity)
                b_g = exp(b_z.to(tl.float32) - top) * scale
                tl.store(g_ptr + i_n * V + start + o_v, b_g.to(g_ptr.dtype.element_ty), mask=m_v)
        # one more store takes half the instructions of a comparison with target at every entry
        tl.debug_barrier()  # after the row's own store of that entry
        g_target = exp(z_target - top) * scale - 1.0
        tl.store(g_ptr + i_n * V + target, g_target.to(g_ptr.dtype.element_ty), mask=valid)


@jit
def gradient_kernel(z_ptr, target_ptr, lse_ptr, g_ptr, first, B, TILE: tl.constexpr):
    """One program per row and tile of z [N, B], the logits of tokens first..first+B-1: its part of
    G, by the rows' lse."""
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_b = i_b * TILE + tl.arange(0, TILE)
    b_z = tl.load(z_ptr + i_n * B + o_b, mask=o_b < B, other=0.0).to(tl.float32)
    b_p = tl.exp(b_z - tl.load(lse_ptr + i_n))
    b_g = b_p - tl.where(first + o_b == tl.load(target_ptr + i_n), 1.0, 0.0)
    tl.store(g_ptr + i_n * B + o_b, b_g.to(g_ptr.dtype.element_ty), mask=o_b < B)


def row_step(z_CV: Tensor, targets_C: Tensor, g_CV: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """Return log p(target) and lse of each row, fp32 (fp64 for fp64), and fill g_CV unless it has
    no rows. Both z and g are contiguous and may share storage; z is used up."""
    if triton:
        C, V = z_CV.shape
        logprob_C, lse_C = z_CV.new_empty(C), z_CV.new_empty(C)
        tile = 1 << (V - 1).bit_length() if V <= ONE_READ else TILE
        # rows that begin unaligned are read a number at a time, which takes more registers
        most = 16 if V % 16 == 0 else 8
        row_kernel[(C,)](
            z_CV,
            targets_C,
            logprob_C,
            lse_C,
            g_CV,
            V,
            float(len(g_CV) > 0),
            TILE=tile,
            ONE_READ=V <= ONE_READ,
            num_warps=min(most, max(4, tile // 1024)),
        )
        return logprob_C, lse_C
    rows = torch.arange(len(z_CV), device=z_CV.device)
    top_C, target_C = z_CV.amax(1), z_CV[rows, targets_C]
    p_CV = torch.softmax(z_CV, 1, out=z_CV)  # one pass of cached rows; exp alone would take longer
    # the largest p is exp(0) / total; the sum of p is 1 but for what softmax's own sum rounded off
    log_total_C = (p_CV.sum(1) / p_CV.amax(1)).log()
    if len(g_CV):
        p_CV[rows, targets_C] -= 1
        g_CV.copy_(p_CV)
    return target_C - top_C - log_total_C, top_C + log_total_C


def gradient_step(
    z_NB: Tensor, targets_N: Tensor, lse_N: Tensor, first: int, g_NB: Tensor, triton: bool
) -> None:
    """Fill g_NB, the part of G for tokens first..first+B-1; z_NB is used up."""
    N, B = z_NB.shape
    if triton:
        tile = min(1024, 1 << (B - 1).bit_length())
        grid = (N, -(-B // tile))
        gradient_kernel[grid](z_NB, targets_N, lse_N, g_NB, first, B, TILE=tile)
        return
    p_NB = z_NB.sub_(lse_N[:, None]).exp_()
    rows = ((targets_N >= first) & (targets_N < first + B)).nonzero().squeeze(1)
    p_NB[rows, targets_N[rows] - first] -= 1
    g_NB.copy_(p_NB)


@contextlib.contextmanager
def exact_in_bf16(dtype: torch.dtype):
    """Let CPU matmuls of fp32 tensors in this block multiply in bf16 and add in fp32, if the values
    were bf16 before they were widened. Nothing is lost, and chips with bf16 units are several times
    faster."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def logits(h_CD: Tensor, w_VD: Tensor, out_CV: Tensor) -> Tensor:
    """Write h wᵀ into out_CV, which is fp32 even where h and w are bf16 or fp16: nothing is
    rounded."""
    if h_CD.dtype == out_CV.dtype:
        return torch.mm(h_CD, w_VD.T, out=out_CV)
    if h_CD.is_cuda:
        return torch.mm(h_CD, w_VD.T, out_dtype=out_CV.dtype, out=out_CV)
    # a CPU's half-precision matmul rounds its output, so widen the factors, w a block at a time
    block = max(1, WIDENED // w_VD.shape[1])
    with exact_in_bf16(h_CD.dtype):
        wide_CD = h_CD.to(out_CV.dtype)
        for w_BD, out_CB in zip(w_VD.split(block), out_CV.split(block, 1), strict=True):
            torch.mm(wide_CD, w_BD.to(out_CV.dtype).T, out=out_CB)
    return out_CV


def unrounded(g_NB: Tensor, w_BD: Tensor) -> Tensor:
    """Return G w, in fp32 where that costs nothing; a CPU's half-precision matmul rounds it."""
    if g_NB.is_cuda and g_NB.dtype.itemsize == 2:
        return torch.mm(g_NB, w_BD, out_dtype=torch.float32)
    return torch.mm(g_NB, w_BD)


def keeps(N: int, V: int, dtype: torch.dtype, workspace: int) -> bool:
    """Return True if G is kept for the backward: if it leaves an eighth of the workspace for
    logits."""
    return N * V * dtype.itemsize <= workspace * 7 // 8


def chunk_rows(N: int, V: int, h_ND: Tensor, workspace: int) -> int:
    """Return how many rows of logits are computed at a time: as many as fit beside G, in chunks of
    about equal size.

    Room for G is left without a gradient too. A matmul of another size may round in another way,
    and a pass without a gradient must give the bits of one with it.
    """
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    kept = N * V * h_ND.dtype.itemsize if keeps(N, V, h_ND.dtype, workspace) else 0
    room = (workspace - kept) // (V * wide.itemsize)
    kind = h_ND.device.type
    most, grain = max(1, min(ROWS.get(kind, 512), room, N)), GRAIN.get(kind, 128)
    even = -(-N // -(-N // most)) if N else 1
    return min(most, -(-even // grain) * grain)


@torch.library.custom_op("zephyr_kernels::linear_logprob", mutates_args=())
def forward(
    h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, workspace: int, gradient: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob_N, lse_N and, if a gradient will be asked for and it fits, G_NV."""
    N, V = len(h_ND), len(w_VD)
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    if not h_ND.is_cuda and N and not 0 <= targets_N.min() <= targets_N.max() < V:
        row = int(((targets_N < 0) | (targets_N >= V)).nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets_N[row])}, which is not a row of w: "
            f"targets are 0..{V - 1}"
        )
    keep = gradient and keeps(N, V, h_ND.dtype, workspace)
    g_NV = h_ND.new_empty(N if keep else 0, V)
    rows = chunk_rows(N, V, h_ND, workspace)
    # G of an fp32 head takes the place of the logits, which then need no buffer of their own
    in_place = keep and h_ND.dtype == wide
    z_CV = h_ND.new_empty(0 if in_place else rows, V, dtype=wide)
    logprob_N, lse_N = (h_ND.new_empty(N, dtype=wide) for _ in range(2))
    if not h_ND.is_cuda and w_VD.numel() <= WIDENED:
        w_VD = w_VD.to(wide)  # once for all chunks
    with torch.autocast(h_ND.device.type, enabled=False), torch.cuda.device_of(h_ND):
        for start in range(0, N, rows):
            chunk = slice(start, min(start + rows, N))
            g_CV = g_NV[chunk]
            z = g_CV if in_place else z_CV[: chunk.stop - start]
            logits(h_ND[chunk], w_VD, out_CV=z)
            logprob_N[chunk], lse_N[chunk] = row_step(z, targets_N[chunk], g_CV, triton)
    return logprob_N, lse_N, g_NV


@forward.register_fake
def _(h_ND, w_VD, targets_N, workspace, gradient, triton):
    N, V = len(h_ND), len(w_VD)
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    keep = gradient and keeps(N, V, h_ND.dtype, workspace)
    vectors = (h_ND.new_empty(N, dtype=wide) for _ in range(2))
    return *vectors, h_ND.new_empty(N if keep else 0, V)


@torch.library.custom_op("zephyr_kernels::linear_logprob_backward", mutates_args=())
def backward(
    c_N: Tensor,
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    g_NV: Tensor,
    workspace: int,
    need_h: bool,
    need_w: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Return dh_ND = -c ∘ (G w) and dw_VD = Gᵀ (-c ∘ h); one that nobody needs is empty."""
    scale_N1 = -c_N[:, None]
    ch_ND = torch.mul(h_ND, scale_N1, out=torch.empty_like(h_ND)) if need_w else None
    with torch.autocast(h_ND.device.type, enabled=False), torch.cuda.device_of(h_ND):
        if len(g_NV) == len(h_ND):
            gw_ND = unrounded(g_NV, w_VD) if need_h else None
            dw_VD = torch.mm(g_NV.T, ch_ND) if need_w else None
        else:
            gw_ND, dw_VD = _by_block(h_ND, ch_ND, w_VD, targets_N, lse_N, workspace, need_h, triton)
    dh_ND = h_ND.new_empty(0)
    if need_h:  # one pass, which rounds what is fp32
        out_ND = gw_ND if gw_ND.dtype == h_ND.dtype else torch.empty_like(h_ND)
        dh_ND = torch.mul(gw_ND, scale_N1, out=out_ND)
    return dh_ND, dw_VD if need_w else w_VD.new_empty(0)


@backward.register_fake
def _(c_N, h_ND, w_VD, targets_N, lse_N, g_NV, workspace, need_h, need_w, triton):
    return h_ND.new_empty(h_ND.shape if need_h else 0), w_VD.new_empty(w_VD.shape if need_w else 0)


def _by_block(h_ND, ch_ND, w_VD, targets_N, lse_N, workspace, need_h, triton):
    """G w and Gᵀ ch without a kept G: logits again, as many tokens at a time as the workspace has
    room for beside ch and the fp32 sum that G w grows in. G w needs every block, dw's rows one."""
    (N, D), V = h_ND.shape, len(w_VD)
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    room = workspace // (N * (wide.itemsize + h_ND.itemsize)) - D
    room = room // ALIGNED * ALIGNED
    gw_ND = torch.zeros_like(h_ND, dtype=wide) if need_h else None
    dw_VD = None if ch_ND is None else torch.empty_like(w_VD)

    def block(first: int, w_BD: Tensor) -> None:
        z_NB = logits(h_ND, w_BD, h_ND.new_empty(N, len(w_BD), dtype=wide))
        g_NB = z_NB if h_ND.dtype == wide else torch.empty_like(z_NB, dtype=h_ND.dtype)
        gradient_step(z_NB, targets_N, lse_N, first, g_NB, triton)
        if need_h:
            gw_ND.add_(unrounded(g_NB, w_BD))
        if dw_VD is not None:
            torch.mm(g_NB.T, ch_ND, out=dw_VD[first : first + len(w_BD)])

    width = max(room, min(V, 1024))
    for first in range(0, V, width):
        block(first, w_VD[first : first + width])
    return gw_ND, dw_VD


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # or zeros [N, V] would stand for what arrives at G
    h_ND, w_VD, targets_N, ctx.workspace, _, ctx.triton = inputs
    _, lse_N, g_NV = output
    ctx.save_for_backward(h_ND, w_VD, targets_N, lse_N, g_NV)


def _gradients(ctx, c_N, _lse, _g):
    if c_N is None:
        return (None,) * 6
    h_ND, w_VD, targets_N, lse_N, g_NV = ctx.saved_tensors
    need_h, need_w = ctx.needs_input_grad[:2]
    dh_ND, dw_VD = backward(
        c_N, h_ND, w_VD, targets_N, lse_N, g_NV, ctx.workspace, need_h, need_w, ctx.triton
    )
    return dh_ND if need_h else None, dw_VD if need_w else None, None, None, None, None


forward.register_autograd(_gradients, setup_context=_save)


def linear_logprob(
    h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, workspace: int, triton: bool
) -> Tensor:
    """Return what `kernels.linear_logprob` returns, with the row step in Triton or in torch."""
    kind = h_ND.device.type
    if torch.is_autocast_enabled(kind):
        h_ND, w_VD = (x.to(torch.get_autocast_dtype(kind)) for x in (h_ND, w_VD))
    if h_ND.dim() != 2 or w_VD.dim() != 2 or h_ND.shape[1] != w_VD.shape[1]:
        raise ValueError(
            f"h is {list(h_ND.shape)} and w {list(w_VD.shape)}; they are [N, D] and [V, D]"
        )
    if h_ND.dtype != w_VD.dtype or not h_ND.is_floating_point():
        raise ValueError(f"h is {h_ND.dtype} and w {w_VD.dtype}; they are of one floating dtype")
    if targets_N.shape != h_ND.shape[:1] or targets_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"targets are {targets_N.dtype} {list(targets_N.shape)}; they are int64 "
            f"or int32 [{len(h_ND)}], one for each row of h"
        )
    if triton and h_ND.dtype == torch.float64:
        raise ValueError("the Triton kernels have no float64; set ZEPHYR_KERNELS=torch")
    gradient = torch.is_grad_enabled() and (h_ND.requires_grad or w_VD.requires_grad)
    return forward(h_ND, w_VD, targets_N.contiguous(), workspace, gradient, triton)[0]
