"""log p(target) with no logit ever written: matmul, log-sum-exp and target pick in one kernel.

A candidate for passes without a gradient (a reference's log-probs, evaluation) on a GPU. It is
tested but not wired into `kernels`: it has to be measured to beat the chunked matmuls and row step
of fused_logprob.py first.

A program computes tiles of z = h wᵀ, one after another, and reduces each while it is in registers
to a maximum and a sum of exponentials per row. Those go to a [V / BV, N] buffer, so that few rows
still make many tiles; which program took a tile, and when, leaves no trace in the result. The one
tile of a row that has its target stores that logit.

N predicting rows  D width  V vocabulary  BN, BV, BD a tile's extents  S tiles along V
"""

from __future__ import annotations  # so that `tl.constexpr` need not exist without Triton

import torch
from torch import Tensor

from kernels.fused_logprob import exp
from kernels.jit import jit, tl, triton

GROUP = 16  # row blocks taken together: these rows of h and the tiles of w in flight fit in L2


@jit
def load_tile(
    x, row, column, rows, columns, DESCRIPTOR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """x[row : row + BR, column : column + BC] of x [rows, columns], 0 beyond its edges."""
    if DESCRIPTOR:
        b_x = x.load([row, column])
    else:
        o_r, o_c = row + tl.arange(0, BR), column + tl.arange(0, BC)
        m_x = (o_r < rows)[:, None] & (o_c < columns)[None, :]
        b_x = tl.load(x + o_r.to(tl.int64)[:, None] * columns + o_c[None, :], mask=m_x, other=0.0)
    return b_x


@jit
def tile_kernel(
    h,
    w,
    target_ptr,
    logit_ptr,
    top_ptr,
    total_ptr,
    N,
    D,
    V,
    DESCRIPTOR: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program p computes tiles p, p + programs, ... h and w are pointers or tensor descriptors."""
    blocks, S = tl.cdiv(N, BN), tl.cdiv(V, BV)
    for tile in tl.range(tl.program_id(0), blocks * S, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * S) * GROUP
        height = min(blocks - first, GROUP)
        i_n, i_s = first + tile % (GROUP * S) % height, tile % (GROUP * S) // height
        b_z = tl.zeros([BN, BV], tl.float32)
        for d in range(0, D, BD):
            b_h = load_tile(h, i_n * BN, d, N, D, DESCRIPTOR, BN, BD)
            b_w = load_tile(w, i_s * BV, d, V, D, DESCRIPTOR, BV, BD)
            b_z = tl.dot(b_h, b_w.T, b_z, input_precision="ieee")
        o_n, o_v = i_n * BN + tl.arange(0, BN), i_s * BV + tl.arange(0, BV)
        m_n = o_n < N
        b_z = tl.where((o_v < V)[None, :], b_z, float("-inf"))
        b_top = tl.max(b_z, 1)
        tl.store(top_ptr + i_s.to(tl.int64) * N + o_n, b_top, mask=m_n)
        b_total = tl.sum(exp(b_z - b_top[:, None]), 1)
        tl.store(total_ptr + i_s.to(tl.int64) * N + o_n, b_total, mask=m_n)
        b_target = tl.load(target_ptr + o_n, mask=m_n, other=-1)
        b_logit = tl.sum(tl.where(o_v[None, :] == b_target[:, None], b_z, 0.0), 1)
        here = (b_target >= i_s * BV) & (b_target < min(i_s * BV + BV, V))
        tl.store(logit_ptr + o_n, b_logit, mask=here)


def settings(dtype: torch.dtype, capability: int) -> dict:
    """A tile's extents, warps and stages, of what registers and shared memory allow."""
    if dtype == torch.float32:
        return dict(BN=64, BV=64, BD=32, num_warps=8, num_stages=3)
    if 90 <= capability < 120:  # consumer chips have less shared memory
        return dict(BN=128, BV=256, BD=64, num_warps=8, num_stages=4)
    return dict(BN=128, BV=128, BD=64, num_warps=8, num_stages=4)


def launch(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, capability: int, programs: int) -> Tensor:
    """`linear_logprob` by that many programs, as a chip of this compute capability (90 is 9.0)."""
    (N, D), V = h_ND.shape, len(w_VD)
    chosen = settings(h_ND.dtype, capability)
    S, blocks = triton.cdiv(V, chosen["BV"]), triton.cdiv(N, chosen["BN"])
    logit_N = h_ND.new_full((N,), float("nan"), dtype=torch.float32)  # stays for a target not in w
    top_SN, total_SN = (h_ND.new_empty(S, N, dtype=torch.float32) for _ in range(2))
    if not blocks:
        return logit_N
    h, w = h_ND, w_VD
    described = capability >= 90 and D * h_ND.itemsize % 16 == 0  # as the copy engine wants rows
    if described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        h = TensorDescriptor.from_tensor(h_ND, [chosen["BN"], chosen["BD"]])
        w = TensorDescriptor.from_tensor(w_VD, [chosen["BV"], chosen["BD"]])
    tile_kernel[(min(programs, blocks * S),)](
        h,
        w,
        targets_N,
        logit_N,
        top_SN,
        total_SN,
        N,
        D,
        V,
        DESCRIPTOR=described,
        GROUP=GROUP,
        **chosen,
    )
    top_N = top_SN.amax(0)
    total_N = (total_SN * (top_SN - top_N).exp()).sum(0)
    return (logit_N - top_N) - total_N.log()


def linear_logprob(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) per row [N], nats, fp32, p = softmax(h wᵀ); without a gradient.

    h, w of one dtype: bf16, fp16 or fp32. A target that is not a row of w gives NaN. Two runs give
    equal bits.
    """
    chip = torch.cuda.get_device_properties(h_ND.device)
    capability = 10 * chip.major + chip.minor
    return launch(
        *(x.contiguous() for x in (h_ND, w_VD, targets_N)), capability, chip.multi_processor_count
    )
