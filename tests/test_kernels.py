"""The loss head and the one dispatch rule: truth in float64, an error budget, every implementation.

The Triton kernels run interpreted where there is no GPU, and as they are under the marker `gpu`.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.profiler import profile

import kernels
from helpers import ROOT, WORKERS
from kernels import aot, fused_logprob, jit, reference

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
WIDE = 2**30
SHAPES = [  # N, D, V, workspace: what does not fit is worked off in blocks
    (7, 5, 13, WIDE),
    (1, 1, 1, WIDE),
    (1, 33, 101, WIDE),
    (0, 5, 13, WIDE),
    (17, 3, 1, WIDE),
    (64, 32, 1024, WIDE),
    (3, 65, 257, WIDE),
    (601, 31, 999, WIDE),
    (45, 7, 2500, 50_000),
    (2, 3, 33_001, WIDE),
    (2, 3, 33_001, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton"])
def implementation(request, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", request.param)
    return request.param


@pytest.fixture
def poison():
    """torch.empty is all NaN: what is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n: int, d: int, v: int, dtype=torch.float32, device="cpu", scale: float = 1.0):
    """h, w, targets that begin with the first and the last token, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
    w = torch.randn(v, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=generator)
    targets[:1], targets[1:2] = 0, v - 1
    c = torch.randn(n, generator=generator)
    return h.to(device, dtype), w.to(device, dtype), targets.to(device), c.to(device)


def truth(h, w, targets, c):
    """log p(target) and the gradients of Σ c log p, in numpy's float64."""
    h, w, c = (x.detach().cpu().double().numpy() for x in (h, w, c))
    targets = targets.cpu().numpy()
    z = h @ w.T
    top = z.max(1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(1, keepdims=True))
    rows = np.arange(len(z))
    g = -np.exp(z - lse)
    g[rows, targets] += 1
    return z[rows, targets] - lse[:, 0], c[:, None] * (g @ w), g.T @ (c[:, None] * h)


def run(function, h, w, targets, c):
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    logprob = function(h, w, targets)
    return logprob, *torch.autograd.grad(logprob, (h, w), c.to(logprob.dtype))


def plain(h, w, targets):
    """What PyTorch does in the inputs' dtype, with the log-softmax in fp32 as trainers have it."""
    return F.log_softmax(h @ w.T, 1, torch.float32).gather(1, targets[:, None].long()).squeeze(1)


def half(h, w, targets):
    """The path that TRL takes for bf16 logits: row-wise log_softmax in bf16."""
    return F.log_softmax(h @ w.T, 1).gather(1, targets[:, None].long()).squeeze(1)


def error(got: torch.Tensor, expected: np.ndarray) -> float:
    """Root mean square; infinite if something is not finite, as where nothing was written."""
    assert tuple(got.shape) == expected.shape
    got = got.detach().cpu().double().numpy()
    if not np.isfinite(got).all():
        return np.inf
    return float(np.sqrt(np.square(got - expected).mean())) if got.size else 0.0


def plain_errors(right, h, w, targets, c) -> list[float]:
    """Of plain's log-probs, dh and dw, the largest with the columns of D in eight orders: of a few
    numbers one order may be right by luck, on one machine and not on another."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(8):
        order = torch.randperm(h.shape[1], generator=generator)
        got = run(plain, h[:, order], w[:, order], targets, c)
        true = right[0], *(x[:, order.numpy()] for x in right[1:])
        found.append([error(x, y) for x, y in zip(got, true, strict=True)])
    return [max(errors) for errors in zip(*found, strict=True)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype, device, implementation, poison):
    *sizes, workspace = shape
    h, w, targets, c = inputs(*sizes, dtype, device)

    def ours(h, w, targets):
        return kernels.linear_logprob(h, w, targets, workspace)

    right = truth(h, w, targets, c)
    got, usual = run(ours, h, w, targets, c), plain_errors(right, h, w, targets, c)
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    for name, ours_, plain_, true in zip(("logprob", "dh", "dw"), got, usual, right, strict=True):
        # where plain is exact, an eighth of the spacing of what the result is rounded to
        eps = torch.finfo(torch.float32 if name == "logprob" else dtype).eps
        tiny = eps / 8 * np.abs(true).max(initial=0)
        assert error(ours_, true) <= 2 * plain_ + tiny, name
    if dtype == torch.bfloat16 and sizes[0] and sizes[2] > 1:
        assert error(got[0], right[0]) <= 0.1 * error(half(h, w, targets), right[0])
    with torch.no_grad():
        assert error(ours(h, w, targets), right[0]) <= 2 * usual[0] + 1e-5


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype, device, implementation):
    """log p is 0 or about -1e4, never NaN or infinite; the gradient is that of a certain choice."""
    h, w, _, _ = inputs(6, 5, 13, dtype)
    z = h.double() @ w.double().T
    h = (h.double() / z.abs().amax(1, keepdim=True) * 1e4).to(dtype)
    z = h.double() @ w.double().T
    targets = torch.where(torch.arange(6) < 3, z.argmax(1), z.argmin(1))
    c = torch.linspace(-2, 2, 6)
    h, w, targets, c = (x.to(device) for x in (h, w, targets, c))
    right = truth(h, w, targets, c)
    got = run(kernels.linear_logprob, h, w, targets, c)
    assert (got[0][:3] == 0).all() and right[0].min() < -9e3
    for ours, true, rtol in zip(got, right, (2e-6, 1e-2, 1e-2), strict=True):
        assert error(ours, true) <= rtol * np.abs(true).max()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("v", [13, 33_001])
def test_a_row_of_minus_infinity_but_one(v, device, implementation):
    """p is 1 there and 0 elsewhere; w's gradient is exact, and finite but where w is not."""
    w = torch.full((v, 1), -torch.inf, device=device)
    w[v // 2] = 3.0
    h, c = torch.ones(2, 1, device=device), torch.tensor([1.0, 2.0], device=device)
    targets = torch.tensor([v // 2, 0], device=device)
    logprob, _, dw = run(kernels.linear_logprob, h, w, targets, c)
    assert logprob.tolist() == [0.0, -torch.inf]
    expected = torch.zeros(v, 1)
    expected[0], expected[v // 2] = 2.0, -2.0  # the second row alone: the first is certain
    assert torch.equal(dw.cpu(), expected)


@given(
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(0, 30),
    st.booleans(),
    st.sampled_from([WIDE, 1]),
    st.sampled_from(["torch", "reference"]),
)
def test_any_shape_in_float64(n, d, v, scale, need_w, workspace, implementation):
    h, w, targets, c = inputs(n, d, v, torch.float64, scale=scale)
    h.requires_grad_(), w.requires_grad_(need_w)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEPHYR_KERNELS", implementation)
        logprob = kernels.linear_logprob(h, w, targets, workspace)
        logprob.backward(c.double())
    right = truth(h, w, targets, c)
    assert logprob.dtype == torch.float64 and (w.grad is not None) == need_w
    for ours, true in zip((logprob, h.grad, w.grad)[: 2 + need_w], right, strict=False):
        assert error(ours, true) <= 1e-12 * max(1, np.abs(true).max(initial=0))


@pytest.mark.parametrize("workspace", [WIDE, 1])
@pytest.mark.parametrize("choice", ["reference", "torch"])
def test_gradcheck(choice, workspace, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", choice)
    h, w, targets, _ = inputs(5, 4, 7, torch.float64)
    h.requires_grad_(), w.requires_grad_()

    def head(h, w):
        return kernels.linear_logprob(h, w, targets, workspace)

    assert torch.autograd.gradcheck(head, (h, w))
    assert torch.autograd.gradcheck(lambda h: head(h, w.detach()), (h,))
    assert torch.autograd.gradcheck(lambda w: head(h.detach(), w), (w,))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_equal_bits_and_the_input_is_left_alone(dtype, device, implementation):
    h, w, targets, c = inputs(300, 31, 999, dtype, device)
    before = [x.clone() for x in (h, w, targets, c)]
    one, two = (run(kernels.linear_logprob, h, w, targets, c) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((h, w, targets, c), before, strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_second_backward_finds_the_kept_gradient_whole(device, implementation):
    h, w, targets, c = inputs(9, 5, 13, device=device)
    h.requires_grad_(), w.requires_grad_()
    logprob = kernels.linear_logprob(h, w, targets)
    one = torch.autograd.grad(logprob, (h, w), c, retain_graph=True)
    two = torch.autograd.grad(logprob, (h, w), c)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_need_not_be_contiguous(dtype, device, implementation):
    h, w, targets, c = inputs(20, 6, 50, dtype, device)
    strided = h.T.contiguous().T, w.T.contiguous().T, targets.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in strided)
    expected = run(kernels.linear_logprob, h, w, targets, c)
    got = run(kernels.linear_logprob, *strided, c)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_int32_targets_and_a_broadcast_gradient(device, implementation):
    h, w, targets, _ = inputs(9, 5, 13, device=device)
    ones = torch.ones(1, device=device).expand(9)  # what .sum().backward() sends
    expected = run(kernels.linear_logprob, h, w, targets, torch.ones(9, device=device))
    got = run(kernels.linear_logprob, h, w, targets.int(), ones)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("workspace", [WIDE, 1])
def test_inside_compile(workspace, device, implementation):
    """No graph break, the same bits; the chunks do not unroll into the graph."""
    h, w, targets, c = inputs(40, 5, 300, device=device)

    def head(h, w, targets):
        return kernels.linear_logprob(2 * h, w, targets, workspace) * 3

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    one, two = run(head, h, w, targets, c), run(compiled, h, w, targets, c)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(h, w, targets), head(h, w, targets))
    torch._dynamo.reset()


@pytest.mark.parametrize("workspace", [WIDE, 1])
def test_the_op_is_registered_as_torch_wants_it(workspace):
    h, w, targets, _ = inputs(9, 5, 13)
    arguments = (h.requires_grad_(), w.requires_grad_(), targets, workspace, True, False)
    torch.library.opcheck(fused_logprob.forward, arguments)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_under_autocast_the_head_is_bf16(device, implementation):
    h, w, targets, c = inputs(9, 64, 130, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = run(kernels.linear_logprob, h, w, targets, c)
    expected = run(kernels.linear_logprob, h.bfloat16(), w.bfloat16(), targets, c)
    assert got[1].dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize(
    "n, room, sizes",
    [
        (1100, 1.5, [384, 384, 332]),  # of 512 rows at most, even chunks of whole tiles
        (1100, 1.16, [176] * 6 + [44]),  # what is left beside G, below a tile as it is
        (1100, 0.9, [384, 384, 332]),  # too little for G: logits have all of it
        (5, 9.0, [5]),
    ],
)
def test_with_and_without_a_gradient_the_chunks_are_the_same(n, room, sizes, monkeypatch):
    """A matmul of other sizes may round in another way. `room` is the workspace, in times G."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "torch")
    h, w, targets, _ = inputs(n, 4, 30, torch.float32)
    original, found = fused_logprob.row_step, {False: [], True: []}
    for gradient in (False, True):

        def seen(z, *rest, sizes=found[gradient]):
            sizes.append(len(z))
            return original(z, *rest)

        monkeypatch.setattr(fused_logprob, "row_step", seen)
        kernels.linear_logprob(
            h.requires_grad_(gradient), w, targets, workspace=int(room * n * 30 * 4)
        )
    assert found == {False: sizes, True: sizes}


def test_with_and_without_a_gradient_the_row_kernel_is_the_same(monkeypatch):
    """Triton compiles one for each set of types and constants, and two may add a row's numbers in
    other orders. It does not look at the value of a float."""
    made, about = [], []
    monkeypatch.setattr(fused_logprob, "row_kernel", aot.Recorder(None, made))
    z, targets = torch.empty(4, 32_000), torch.zeros(4, dtype=torch.int64)
    for rows in (4, 0):
        g = torch.empty(rows, 32_000, dtype=torch.bfloat16)
        fused_logprob.row_step(z, targets, g, triton=True)
        _, args, options = made.pop()
        values = [x.dtype if isinstance(x, torch.Tensor) else x for x in args]
        about.append(([x for x in values if type(x) is not float], options))
        assert [x for x in values if type(x) is float] == [rows > 0]
    assert about[0] == about[1]


@pytest.mark.gpu
@pytest.mark.parametrize("v", [300, 32_000, 32_002, 40_000])
def test_on_a_gpu_a_pass_without_a_gradient_has_the_same_bits(v):
    h, w, targets, _ = inputs(700, 64, v, torch.bfloat16, "cuda")
    kept = kernels.linear_logprob(h.requires_grad_(), w, targets)
    with torch.no_grad():
        assert torch.equal(kernels.linear_logprob(h, w, targets), kept)


@pytest.mark.parametrize("n, rows", [(2048, 2048), (8192, 4096), (12_800, 3328), (29_360, 2048)])
def test_on_a_gpu_chunks_are_even_and_whole_tiles(n, rows):
    """Of Mistral's head, at the default workspace, beside a G that is kept."""
    about = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "itemsize": 2}
    assert fused_logprob.chunk_rows(n, 32_000, SimpleNamespace(**about), 2**31) == rows


def test_blocks_of_the_vocabulary_begin_at_multiples_of_64(monkeypatch):
    """A matmul reads rows that begin at any place a number or two at a time. There is room for
    1101 tokens."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "torch")
    original, widths = fused_logprob.gradient_step, []
    monkeypatch.setattr(
        fused_logprob,
        "gradient_step",
        lambda z, *rest: widths.append(z.shape[1]) or original(z, *rest),
    )
    h, w, targets, c = inputs(45, 7, 2500)
    run(lambda *x: kernels.linear_logprob(*x, 45 * 8 * (7 + 1101)), h, w, targets, c)
    assert widths == [1088, 1088, 324]


def test_without_a_gradient_nothing_of_n_by_v_is_kept(implementation, monkeypatch):
    monkeypatch.setitem(fused_logprob.ROWS, "cpu", 8)
    h, w, targets, _ = inputs(64, 4, 300, torch.bfloat16)
    shapes = []
    original = fused_logprob.row_step
    monkeypatch.setattr(
        fused_logprob,
        "row_step",
        lambda z, t, g, triton: shapes.append((z.shape, g.shape)) or original(z, t, g, triton),
    )
    kernels.linear_logprob(h.requires_grad_().detach(), w, targets)
    with torch.no_grad():
        kernels.linear_logprob(h, w, targets)
    assert shapes == [((8, 300), (0, 300))] * 16


def test_the_backward_makes_nothing_of_n_by_v(monkeypatch):
    """Not for a kept G, though it is an output of the op, one that gets no gradient."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "torch")
    h, w, targets, c = inputs(64, 4, 300)
    logprob = kernels.linear_logprob(h.requires_grad_(), w.requires_grad_(), targets)
    with profile(record_shapes=True, profile_memory=True, acc_events=True) as record:
        logprob.backward(c)
    largest = max(event.self_cpu_memory_usage for event in record.events())
    assert 0 < largest < 64 * 300 * 4


@pytest.mark.parametrize("n, kept", [(29_360, True), (29_361, False)])
def test_g_is_kept_while_it_leaves_an_eighth_of_the_workspace(n, kept):
    assert fused_logprob.keeps(n, 32_000, torch.bfloat16, 2**31) == kept


def test_peak_memory_stays_under_the_workspace():
    """Mistral's vocabulary on a CPU: what forward and backward take beside inputs and gradients."""
    env = {**os.environ, "ZEPHYR_KERNELS": "torch", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, WORKERS / "head_memory.py", str(2**27)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    gradient = 32_000 * 1024 * 2  # dw itself, added to w.grad when it is whole
    assert int(done.stdout) < 2**27 + gradient


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("bad", [-1, 13, 2**40])
def test_a_target_that_is_no_row_of_w(bad, device, implementation):
    h, w, targets, _ = inputs(5, 4, 13)
    targets[3] = bad
    message = rf"^targets\[3\] is {bad}, which is not a row of w: targets are 0\.\.12$"
    with pytest.raises(ValueError, match=message):
        kernels.linear_logprob(h, w, targets)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("v", [13, 33_001])
def test_the_kernel_answers_nan_to_a_bad_target(v, device):
    """A GPU is not made to wait for a look at the targets."""
    z = torch.randn(4, v, device=device)
    g = torch.empty_like(z)
    targets = torch.tensor([0, -1, v, v - 1], device=device)
    logprob, lse = fused_logprob.row_step(z, targets, g, triton=True)
    assert logprob.isnan().tolist() == [False, True, True, False]
    assert g.isnan().all(1).tolist() == [False, True, True, False]
    assert lse.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"h": torch.zeros(5, 3)}, r"^h is \[5, 3\] and w \[13, 4\]; they are \[N, D\] and \[V, D"),
        ({"h": torch.zeros(5, 1, 4)}, r"^h is \[5, 1, 4\] and w \[13, 4\]; they are"),
        ({"h": torch.zeros(5, 4).half()}, "^h is torch.float16 and w torch.float32; they are of"),
        ({"t": torch.zeros(4).long()}, r"^targets are torch.int64 \[4\]; they are int64 or int32"),
        ({"t": torch.zeros(5)}, r"^targets are torch.float32 \[5\]; they are int64 or int32 \[5\]"),
    ],
)
def test_inputs_that_do_not_match(change, message, implementation):
    h, w, targets, _ = inputs(5, 4, 13)
    with pytest.raises(ValueError, match=message):
        kernels.linear_logprob(change.get("h", h), w, change.get("t", targets))


def test_triton_has_no_float64(monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    with pytest.raises(ValueError, match="^the Triton kernels have no float64; set ZEPHYR"):
        kernels.linear_logprob(*inputs(5, 4, 13, torch.float64)[:3])


def test_the_callers_matmul_precision_is_given_back(monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "torch")
    before = torch.backends.mkldnn.matmul.fp32_precision
    run(kernels.linear_logprob, *inputs(5, 4, 13, torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_default_is_triton_on_a_gpu_and_torch_elsewhere(monkeypatch):
    for unset in (
        lambda: monkeypatch.delenv("ZEPHYR_KERNELS", raising=False),
        lambda: monkeypatch.setenv("ZEPHYR_KERNELS", ""),
    ):
        unset()
        assert kernels.implementation(GPU) == "triton"
        assert kernels.implementation(CPU) == kernels.implementation(torch.device("mps")) == "torch"


@pytest.mark.parametrize("choice", kernels.IMPLEMENTATIONS)
def test_the_variable_forces(choice, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", choice)
    monkeypatch.setattr(jit, "INTERPRETED", True)
    assert kernels.implementation(CPU) == kernels.implementation(GPU) == choice
    h, w, targets, _ = inputs(5, 4, 13)
    calls = []
    monkeypatch.setattr(reference, "linear_logprob", lambda *_: calls.append("reference"))
    monkeypatch.setattr(
        fused_logprob,
        "linear_logprob",
        lambda *arguments: calls.append("triton" if arguments[-1] else "torch"),
    )
    kernels.linear_logprob(h, w, targets)
    assert calls == [choice]


@pytest.mark.parametrize("choice", ["Reference", "fast please"])
def test_what_is_not_there_is_refused(choice, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", choice)
    message = f"^ZEPHYR_KERNELS={choice} is none of triton, torch, reference$"
    for act in (
        lambda: kernels.implementation(CPU),
        lambda: kernels.linear_logprob(*inputs(5, 4, 7)[:3]),
    ):
        with pytest.raises(ValueError, match=message):
            act()


def test_triton_on_a_cpu_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    monkeypatch.setattr(jit, "INTERPRETED", False)
    with pytest.raises(ValueError, match="^ZEPHYR_KERNELS=triton: no Triton kernel runs on cpu"):
        kernels.linear_logprob(*inputs(5, 4, 7)[:3])


def test_without_triton_a_gpu_says_so_and_a_cpu_needs_none(monkeypatch):
    monkeypatch.setattr(jit, "triton", None)
    monkeypatch.delenv("ZEPHYR_KERNELS", raising=False)
    assert kernels.implementation(CPU) == "torch"
    with pytest.raises(ValueError, match="^Triton is not installed: pip install triton, or set"):
        kernels.implementation(GPU)


def test_the_package_needs_neither_triton_nor_zephyr():
    """`from kernels import ...` where Triton cannot be imported, as on macOS."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ZEPHYR", "TRITON"))}
    env["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, WORKERS / "without_triton.py"], env=env, check=True)
