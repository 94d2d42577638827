"""Attention that reads a shared prompt in place, against float64 and against today's path.

The kernels run interpreted in fp32 where there is no GPU; there their blocks are of 16 queries and
16 keys. What is bf16 is under the marker `gpu`.
"""

import re
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import kernels
from benchmarks import facts
from kernels import fused_attention, reference
from model_helpers import gradients, model
from zephyr import attention, packing
from zephyr.attention import Layout
from zephyr.distributed import fsdp
from zephyr.packing import Batch, PackBuilder, Pair, pack_documents, pack_pairs

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
PAIRS = [(37, 6, 21), (1, 1, 2), (3, 5, 1), (16, 1, 17)]  # prompt, chosen, rejected
DOCUMENTS = [1, 16, 33, 2, 1]


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    monkeypatch.delenv("ZEPHYR_ATTENTION", raising=False)


@pytest.fixture
def poison():
    """torch.empty is all NaN: what is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(*lengths) -> Batch:
    """A pack of pairs, whose lengths are (prompt, chosen, rejected), or of documents."""
    rng = np.random.default_rng(0)
    if isinstance(lengths[0], int):
        pieces = [rng.integers(0, 101, n + 1) for n in lengths]
        return pack_documents([(ids, np.ones(len(ids), bool), 0) for ids in pieces])
    if len(lengths[0]) > 3:
        return branches(*lengths[0])
    made = [Pair(*(rng.integers(0, 101, n) for n in three)) for three in lengths]
    return pack_pairs(made, list(range(len(made))))


def branches(prompt: int, *responses: int) -> Batch:
    """A pack of one prompt that any number of responses continue; the other back ends, which look
    keys up, take two."""
    pack = PackBuilder(shares_prompts=True)
    document = pack.segment(np.arange(prompt + responses[0]))
    for n in responses[1:]:
        pack.segment(np.arange(n), prompt, document[:prompt])
    pack.predict(document, document)
    with mock.patch.object(packing, "inverse"):
        return pack.batch()


def tensors(T: int, H: int, K: int, E: int) -> list[Tensor]:
    """q, k, v and the gradient that arrives at the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, heads, E) for heads in (H, K, K, H)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def places(layout: Layout) -> tuple:
    return layout.cu_seqlens_q, layout.cu_seqlens_k, layout.kv_rows_G


def ours(layout: Layout, window: int | None):
    return lambda *qkv: kernels.attention(*qkv, *places(layout), layout.max_q, window)


def exact(layout: Layout, window: int | None):
    return lambda *qkv: reference.attention(*qkv, *places(layout), window)


def run(function, given: list[Tensor], dtype=torch.float32, device="cpu") -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    q, k, v, c = (x.to(device, dtype) for x in given)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, c)]


def errors(got: list[Tensor], right: list[Tensor]) -> list[float]:
    """Root mean squares; infinite where something is not finite, as where nothing was written."""
    return [
        float((x.double().cpu() - y).square().mean().sqrt()) if x.isfinite().all() else np.inf
        for x, y in zip(got, right, strict=True)
    ]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "lengths, H, K, E, window",
    [
        (PAIRS, 4, 1, 16, None),
        (PAIRS, 2, 2, 16, 5),  # less than a block: whole blocks are out of sight
        (PAIRS, 2, 1, 16, 20),  # some queries of a branch see the prompt's end, the last ones none
        (PAIRS, 1, 1, 32, 39),
        ([(1, 1, 1)], 4, 1, 16, 1),
        ([(18, 2, 17, 1, 3)], 2, 1, 16, 30),  # four responses
        (DOCUMENTS, 4, 2, 16, None),
        (DOCUMENTS, 1, 1, 128, 17),
        ([1] * 5, 2, 1, 16, None),
    ],
    ids=str,
)
def test_error_budget(lengths, H, K, E, window, device, poison):
    b = batch(*lengths)
    given, layout = tensors(len(b.tokens_T), H, K, E), b.to(torch.device(device)).layout
    right = run(exact(b.layout, window), given, torch.float64)
    got = errors(run(ours(layout, window), given, device=device), right)
    usual = errors(run(exact(layout, window), given, device=device), right)
    for name, error, plain in zip(("o", "dq", "dk", "dv"), got, usual, strict=True):
        assert error <= (2 * plain or of_a_zero(given)), name


@torch.no_grad()
def of_a_zero(given: list[Tensor]) -> float:
    """The most that dq and dk may be, as root mean squares, where every query sees its own key
    alone. They are ds times a key or a query, and ds = do·v - do·o is 0, as o is v. Plain PyTorch
    gives 0. The kernel adds both sums of E products, each in an order that the CPU's matmul may
    choose, with a rounding of at most E eps / 2 of the products' magnitudes, whatever the order."""
    q, k, v, do = given
    heads, E = q.shape[1] // k.shape[1], q.shape[2]
    terms_TH1 = (do * v.repeat_interleave(heads, 1)).abs().sum(-1, keepdim=True)
    ds_TH1 = E * torch.finfo(torch.float32).eps * terms_TH1 / E**0.5
    sides = ds_TH1 * k.repeat_interleave(heads, 1), heads * ds_TH1 * q
    return max(float(x.square().mean().sqrt()) for x in sides)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4096, 100])
@pytest.mark.parametrize("E", [16, 64, 128])
def test_error_budget_in_bf16(E, window, monkeypatch):
    monkeypatch.setenv("ZEPHYR_ATTENTION", "triton")
    packed = facts.layout(facts.LENGTHS, torch.device("cuda"))
    found = facts.exactness(packed, facts.attention(packed, 32, 8, E), window)
    assert all(x <= 2 * y for x, y in zip(found["ours"], found["plain"], strict=True)), found


@pytest.mark.parametrize("window", [None, 1, 3, 18])
@pytest.mark.parametrize("lengths", [[(17, 3, 4), (2, 1, 3)], [3, 18]], ids=str)
def test_the_path_of_today_gives_the_same(lengths, window, monkeypatch):
    layout = batch(*lengths).layout
    given = tensors(len(layout.position_T), 2, 1, 16)
    both = []
    for name in ("flash2", "triton"):
        monkeypatch.setenv("ZEPHYR_ATTENTION", name)
        both.append(run(lambda *qkv: layout.attend(*qkv, 0, window), given))
    for today, other in zip(*both, strict=True):
        torch.testing.assert_close(other, today, rtol=0, atol=5e-6)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_two_runs_give_equal_bits(device):
    layout = batch((20, 3, 18)).to(torch.device(device)).layout
    given = tensors(len(layout.position_T), 2, 1, 16)
    first, again = (run(ours(layout, 9), given, device=device) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_the_example_of_the_docstring():
    """x sees a b c x: of these four its output is the mean where all scores are equal."""
    layout = batch((3, 2, 3)).layout
    assert [x.tolist() for x in places(layout)] == [
        [0, 4, 6],
        [0, 4, 9],
        [0, 1, 2, 3, 0, 1, 2, 4, 5],
    ]
    v = torch.arange(6.0)[:, None, None].expand(6, 1, 16)
    zero = torch.zeros(6, 1, 16)
    for window, mean in ((None, (0 + 1 + 2 + 4) / 4), (2, (2 + 4) / 2)):
        out = kernels.attention(zero, zero, v, *places(layout), layout.max_q, window)
        assert out[4].tolist() == [[mean] * 16]


def test_scores_of_ten_thousand(poison):
    """Weights are 0 or 1, never NaN: nothing overflows."""
    layout = batch((18, 2, 3)).layout
    given = tensors(len(layout.position_T), 1, 1, 16)
    given[0] *= 1e4
    right = run(exact(layout, None), given, torch.float64)
    got = run(ours(layout, None), given)
    torch.testing.assert_close(got[0].double(), right[0], rtol=0, atol=1e-2)
    assert all(x.isfinite().all() for x in got)


def test_the_ops_are_registered_as_torch_wants_them():
    for layout in (batch((3, 2, 2)).layout, batch(2, 1).layout):
        q, k, v, _ = (x.float() for x in tensors(len(layout.position_T), 2, 1, 16))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(fused_attention.forward, (*leaves, *places(layout), layout.max_q, 4))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_inside_compile(device, monkeypatch):
    """One graph, which the layout's sizes do not make anew."""
    monkeypatch.setenv("ZEPHYR_ATTENTION", "triton")

    def attend(q, k, v):
        return layout.attend(2 * q, k, v, 0, 5)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for b in (batch((5, 2, 3)), batch((7, 4, 2), (3, 3, 3))):
        layout = b.to(torch.device(device)).layout
        given = tensors(len(b.tokens_T), 2, 1, 16)
        results = [run(f, given, device=device) for f in (attend, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("lengths", [[(5, 4, 3), (2, 1, 6)], [7, 3]], ids=str)
def test_a_model_gives_the_same(lengths, monkeypatch):
    """Its log-probs and the gradient of every weight."""
    b, found = batch(*lengths), []
    for name in ("flash2", "triton"):
        monkeypatch.setenv("ZEPHYR_ATTENTION", name)
        m = model(head_dim=16)
        found.append({"logprob": m(b).detach()} | gradients(m, [b]))
    for name, today in found[0].items():
        torch.testing.assert_close(found[1][name], today, rtol=1e-4, atol=1e-5, msg=name)


class Counter:
    """Stands in the place of a kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("recompute, forwards", [("none", 1), ("elementwise", 1), ("full", 2)])
def test_recomputation_keeps_what_the_backward_needs(recompute, forwards, monkeypatch):
    monkeypatch.setenv("ZEPHYR_ATTENTION", "triton")
    counter = Counter(fused_attention.attention_kernel)
    monkeypatch.setattr(fused_attention, "attention_kernel", counter)
    m, b = model(head_dim=16, num_hidden_layers=1), batch((3, 2, 2))
    expected = gradients(m, [b])
    m.zero_grad()
    counter.launches = 0
    for block in m.model.layers:
        block.forward = fsdp.wrapped(block, recompute, compiled=False)
    for name, got in gradients(m, [b]).items():
        assert torch.equal(got, expected[name]), name
    assert counter.launches == forwards


@pytest.mark.parametrize(
    "env, message",
    [
        ({"ZEPHYR_ATTENTION": "flash4"}, "ZEPHYR_ATTENTION=flash4 is none of flash2, flash3, tri"),
        (
            {"ZEPHYR_ATTENTION": "triton", "ZEPHYR_KERNELS": "torch"},
            "ZEPHYR_ATTENTION=triton: no Triton kernel runs on cpu; unset it (tests set ZEP",
        ),
    ],
    ids=str,
)
def test_a_back_end_that_cannot_run(env, message, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    q, k, v, _ = tensors(3, 1, 1, 16)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Layout.alone(3).attend(q, k, v, 0, None)


def test_flash3_must_be_installed(monkeypatch):
    monkeypatch.setenv("ZEPHYR_ATTENTION", "flash3")
    message = r"^ZEPHYR_ATTENTION=flash3: FlashAttention 3 is not installed \(No module named 'fla"
    with pytest.raises(ValueError, match=message):
        attention.prepare_back_end()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_TKE": torch.zeros(6, 3, 16)}, r"^q, k and v are \[6, 2, 16\], \[6, 3, 16\] and \[6"),
        ({"v_TKE": torch.zeros(6, 1, 16).double()}, "^q, k and v are torch.float32, torch.float32"),
        ({"kv_rows_G": torch.tensor([0, 1, 2, 3, 0, 2, 1, 4, 5])}, "^kv_rows of segment 1 are not"),
        ({"kv_rows_G": torch.tensor([0, 1, 2, 3, 2, 3, 4, 4, 5])}, "^kv_rows of segment 1 are not"),
    ],
)
def test_inputs_that_do_not_match(change, message):
    layout = batch((3, 2, 3)).layout
    q, k, v, _ = (x.float() for x in tensors(6, 2, 1, 16))
    inputs = {"q_THE": q, "k_TKE": k, "v_TKE": v, "window": None}
    where = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "kv_rows_G"), places(layout), strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.attention(**inputs | where | {"max_q": 4} | change)


@pytest.mark.parametrize(
    "E, dtype, message",
    [
        (8, torch.float32, "^the head width is 8; the Triton kernel's are 16, 32, 64 and 128$"),
        (16, torch.float64, "^the Triton kernels have no float64; set ZEPHYR_KERNELS=reference$"),
    ],
)
def test_what_the_kernels_do_not_have(E, dtype, message):
    with pytest.raises(ValueError, match=message):
        run(ours(Layout.alone(3), None), tensors(3, 1, 1, E), dtype)


def test_gradcheck_of_the_specification(monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "reference")
    q, k, v, _ = tensors(6, 2, 1, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(ours(batch((3, 2, 3)).layout, 3), leaves)
