"""AdamW in place against torch's and against the formula in float64, in every implementation."""

import itertools

import numpy as np
import pytest
import torch
from packaging.version import Version

import kernels
from kernels import fused_adamw, reference
from kernels.provenance import installed

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
BETAS, EPS, ULP = (0.9, 0.999), 1e-8, 2.0**-23
# torch's kernel for GPUs has everything in fp32: 1 - β of a rounded β, and 1 - βᵗ of a power that
# is at most 4 last places off, as CUDA's powf is
ROUNDED, POWF = tuple(float(np.float32(beta)) for beta in BETAS), 2.0**-22
FP32, BF16 = torch.float32, torch.bfloat16
VARIANTS = list(itertools.product((False, True), (FP32, BF16)))


@pytest.fixture(params=kernels.IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", request.param)
    return request.param


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize])


def number(x: float, device="cpu") -> torch.Tensor:
    return torch.tensor(float(x), device=device)


def state(n: int, split: bool, moments: torch.dtype, seed: int = 0, device="cpu"):
    """weight, low, m and v of a run under way, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    w, m, v, grad = torch.randn(4, n, generator=generator).mul(0.02)
    weight, low = kernels.split(w) if split else (w, None)
    made = weight, low, m.to(moments), v.square().to(moments), grad
    return [None if x is None else x.to(device).clone() for x in made]


def master(weight, low):
    return weight if low is None else kernels.join(weight, low)


def shared(lr=1e-3, t=1.0, skip=0.0, scale=1.0, device="cpu"):
    t, scale, skip = (number(x, device) for x in (t, scale, skip))
    return kernels.adamw_step(t, lr, BETAS, EPS, scale, skip)


def step(weight, low, m, v, grad, lr=1e-3, decay=0.1, t=1.0, skip=0.0, scale=1.0):
    kernels.adamw_(weight, low, m, v, grad, decay, shared(lr, t, skip, scale, weight.device))


def truth(w, m, v, grad, lr=1e-3, decay=0.1, t=1, betas=BETAS):
    """Algorithm 2 of arXiv:1711.05101 in float64."""
    w, m, v, grad = (x.double().cpu() for x in (w, m, v, grad))
    m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
    hat_m, hat_v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return w - lr * (hat_m / (hat_v.sqrt() + EPS) + decay * w), m, v


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_example_of_the_docstring(device):
    master_bits = torch.tensor([0x3F800000, 0x3F807FFF, 0x3F808000], dtype=torch.int32)
    weight, low = kernels.split(master_bits.to(device).view(FP32))
    assert bits(weight).tolist() == [0x3F80, 0x3F80, 0x3F81]
    assert low.tolist() == [0, 32767, -32768] and low.dtype == torch.int16
    assert bits(kernels.join(weight, low)).tolist() == master_bits.tolist()
    assert master_bits.view(FP32).bfloat16().view(torch.int16).tolist() == [0x3F80] * 3


def test_join_gives_back_every_bit():
    """Around each bf16 and halfway to its neighbours: denormals, both zeros, infinities and what
    becomes infinite as a bf16 among them; then a million random bits."""
    around = torch.tensor([-0x8000, -0x7FFF, -1, 0, 1, 0x7FFE, 0x7FFF])
    near = (torch.arange(-(2**15), 2**15)[:, None] * 2**16 + around).flatten()
    anything = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([near, anything]).to(torch.int32).view(FP32)
    weight, low = kernels.split(x)
    back = kernels.join(weight, low)
    nan = x.isnan()
    assert torch.equal(bits(back)[~nan], bits(x)[~nan])
    assert torch.equal(weight.isnan(), nan) and torch.equal(back.isnan(), nan)
    # a cast differs at halves alone, where it goes to the even neighbour
    half = low == -0x8000
    cast = bits(x.bfloat16())
    assert torch.equal(cast[~half & ~nan], bits(weight)[~half & ~nan])
    to_odd = half & ~nan & (bits(weight) & 1 == 1)
    assert torch.equal(cast[half & ~nan] + to_odd[half & ~nan], bits(weight)[half & ~nan])
    assert 0 < to_odd.sum() < (half & ~nan).sum()


def test_what_is_not_finite():
    """The largest masters have an infinite weight, and come back; NaNs of any bits stay NaN."""
    x = torch.tensor([0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7F7F7FFF], dtype=torch.int32).view(FP32)
    for values in (x, -x):
        weight, low = kernels.split(values)
        assert weight.isinf().tolist() == [True, True, True, False]
        assert torch.equal(kernels.join(weight, low), values)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000], dtype=torch.int32).view(FP32)
    weight, low = kernels.split(nan)
    assert weight.isnan().all() and kernels.join(weight, low).isnan().all()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("n", [1, 7, 1_000_003])
def test_a_hundred_steps_are_torchs_bit_for_bit(n, split, monkeypatch):
    monkeypatch.setenv("ZEPHYR_KERNELS", "torch")
    weight, low, m, v, _ = state(n, split, FP32)
    m.zero_(), v.zero_()
    theirs = torch.nn.Parameter(master(weight, low).clone())
    optimizer = torch.optim.AdamW([theirs], betas=BETAS, eps=EPS, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(1)
    for t in range(100):
        theirs.grad = torch.randn(n, generator=generator)
        optimizer.param_groups[0]["lr"] = lr = 1e-3 * min(t, 100 - t) / 50
        optimizer.step()
        step(weight, low, m, v, theirs.grad, lr, t=t + 1)
    kept = optimizer.state[theirs]
    for ours, right in (
        (master(weight, low), theirs),
        (m, kept["exp_avg"]),
        (v, kept["exp_avg_sq"]),
    ):
        assert torch.equal(bits(ours), bits(right.detach()))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("split, moments", VARIANTS, ids=str)
@pytest.mark.parametrize("t", [1, 2, 10_000])
def test_error_budget(t, split, moments, device, implementation):
    weight, low, m, v, grad = state(5003, split, moments, device=device)
    before = master(weight, low).clone().cpu()
    if t == 1:
        m.zero_(), v.zero_()
    torchs = implementation == "torch" and device == "cuda"
    beta1, beta2 = betas = ROUNDED if torchs else BETAS
    right_w, right_m, right_v = truth(before, m, v, grad, t=t, betas=betas)
    size_m = 0.9 * m.cpu().double().abs() + 0.1 * grad.cpu().double().abs()
    step(weight, low, m, v, grad, t=t)
    got = master(weight, low)
    # two roundings of w, and of the update several, beside those of m; the powers' errors count by
    # what is left of 1, and half under a root
    powers = POWF * (1 / (1 - beta1**t) + 0.5 / (1 - beta2**t)) if torchs else 0.0
    step_size = 1e-3 / (1 - beta1**t)
    scale = (right_v / (1 - beta2**t)).sqrt() + EPS
    budget = ULP * 1.1 * before.abs() + (4 * ULP + powers) * step_size * size_m / scale
    assert ((got.cpu() - right_w).abs() <= budget).all()
    half = 2.0**-8 if moments == BF16 else 0.0  # of a last place; v may be rounded by a whole one
    for ours, right, size, far in ((m, right_m, size_m, half), (v, right_v, right_v, 2 * half)):
        budget = far * right.abs() + 2 * ULP * size
        assert ((ours.cpu().double() - right).abs() <= budget).all()


@pytest.fixture
def fma_rounds_once(monkeypatch):
    """As on a GPU. The interpreters before Triton 3.9 round the product of an fma too."""
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    if Version(installed("triton")) < Version("3.9"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.mark.parametrize("split, moments", VARIANTS, ids=str)
@pytest.mark.parametrize("n", [1, 7, 3001])
def test_the_kernel_and_torch_take_the_same_step(n, split, moments, monkeypatch, fma_rounds_once):
    """To a rounding or two of the weight, from every state of a run."""
    ours = state(n, split, moments)
    for t in range(1, 21):
        generator = torch.Generator().manual_seed(t)
        ours[4] = torch.randn(n, generator=generator)
        theirs = [None if x is None else x.clone() for x in ours]
        before = master(*ours[:2]).abs()
        for choice, tensors in (("triton", ours), ("torch", theirs)):
            monkeypatch.setenv("ZEPHYR_KERNELS", choice)
            step(*tensors, t=t)
        w, right = (master(*tensors[:2]) for tensors in (ours, theirs))
        assert ((w - right).abs() <= 2 * ULP * torch.maximum(before, right.abs())).all()
        # the last few elements torch does one by one, rounded otherwise
        for a, b in zip(ours[2:4], theirs[2:4], strict=True):
            whole = n // 8 * 8
            assert (a == b)[:whole].float().mean() > 0.99 or n < 8
            torch.testing.assert_close(a, b, rtol=2**-7 if moments == BF16 else 1e-6, atol=1e-7)


def test_bf16_moments_of_gradients_that_stay_alike(implementation):
    """The weights go where fp32 moments take them, to a few hundredths of the way."""
    runs = {}
    for moments in (FP32, BF16):
        weight, low, m, v, _ = state(2000, True, moments)
        start = master(weight, low)
        m.zero_(), v.zero_()
        for t in range(1, 31):
            generator = torch.Generator().manual_seed(t)
            step(weight, low, m, v, 0.3 + torch.randn(2000, generator=generator), decay=0.0, t=t)
        runs[moments] = master(weight, low) - start
    away = (runs[BF16] - runs[FP32]).norm() / runs[FP32].norm()
    assert 0 < away < 0.02


def test_a_bf16_v_falls_as_a_wide_one_does(implementation):
    """By 1 - β₂ = 0.001 a step, where a bf16 number's neighbours are 0.004 to 0.008 away: of many
    the mean falls, and the steps of 200 go together to no number more than their chances would."""
    weight, low, m, v, grad = state(4000, True, BF16)
    before = v.double()
    for t in range(1, 201):
        step(weight, low, m, v, torch.zeros_like(grad), t=t)
    ratio = v.double()[before > 0] / before[before > 0]
    assert ratio.mean() == pytest.approx(0.999**200, rel=0.003)
    assert 0.005 < ratio.std() < 0.06


def test_chances_are_even_and_the_same_everywhere():
    x = reference.chance(0, 100_000, number(7.0))
    assert x.min() >= 0 and x.max() < 2**16
    assert x.double().mean() == pytest.approx(2**15, rel=0.01)
    assert x.double().std() == pytest.approx(2**16 / 12**0.5, rel=0.01)
    for other in (reference.chance(0, 100_000, number(8.0)), x.roll(1)):
        assert abs(torch.corrcoef(torch.stack((x, other)).double())[0, 1]) < 0.01
    assert torch.equal(reference.chance(99_000, 1000, number(7.0)), x[99_000:])

    def mixed(place: int) -> int:  # in Python's own integers
        y = (place * 0x9E3779B1 + 7 * 0x85EBCA6B) % 2**32
        y = (y ^ y >> 16) * 0x7FEB352D % 2**32
        y = (y ^ y >> 15) * 0x846CA68B % 2**32
        return (y ^ y >> 16) % 2**16

    assert x[::9973].tolist() == [mixed(place) for place in range(0, 100_000, 9973)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("split, moments", VARIANTS, ids=str)
@pytest.mark.parametrize("skip", [1.0, 2.0, float("nan"), float("-inf")])
def test_skipped_steps_leave_every_bit(skip, split, moments, device, implementation):
    """The first step too, of which `step` is then 0, and whatever the gradient."""
    *tensors, grad = state(2051, split, moments, device=device)
    tensors = [x for x in tensors if x is not None]
    before = [bits(x).clone() for x in tensors]
    grad[::2], grad[1::2] = float("nan"), float("inf")
    for t in (0, 5):
        step(tensors[0], tensors[1] if split else None, *tensors[-2:], grad, t=t, skip=skip)
        assert all(torch.equal(bits(x), old) for x, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("split, moments", VARIANTS, ids=str)
def test_a_gradient_of_nan_shows(split, moments, device, implementation):
    """One with the bits of a GPU's own, which would round to a zero."""
    weight, low, m, v, grad = state(9, split, moments, device=device)
    bits(grad)[3] = 0x7FFFFFFF
    step(weight, low, m, v, grad)
    for x in (weight, master(weight, low), m, v):
        assert x.isnan().tolist() == [i == 3 for i in range(9)]


@pytest.mark.parametrize("split", [False, True])
def test_any_shape_and_chunk(split, implementation, monkeypatch):
    """A parameter, nothing at all, and one that is many chunks, all of them as if one vector."""
    monkeypatch.setattr(fused_adamw, "CHUNK", 64)
    flat = state(1000, split, BF16)
    shaped = [None if x is None else x.view(10, 4, 25).clone() for x in flat]
    shaped[0].requires_grad_()
    step(*flat), step(*shaped)
    for a, b in zip(flat, shaped, strict=True):
        assert a is None or torch.equal(a, b.detach().flatten())
    step(*(None if x is None else x[:0] for x in flat))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"low": None}, r"^weight is torch.bfloat16 and low None; they are float32 and None"),
        ({"low": torch.zeros(4)}, "^weight is torch.bfloat16 and low torch.float32; they"),
        ({"weight": torch.zeros(4)}, "^weight is torch.float32 and low torch.int16; they "),
        ({"m": torch.zeros(4)}, "^m is torch.float32 and v torch.bfloat16; both are float32"),
        ({"m": torch.zeros(4).half(), "v": torch.zeros(4).half()}, "^m is torch.float16 and v tor"),
        ({"grad": torch.zeros(4).bfloat16()}, "^grad is torch.bfloat16; it is float32$"),
        ({"grad": torch.zeros(5)}, r"^grad is \[5\] on cpu and weight \[4\] on cpu$"),
        ({"grad": torch.zeros(4, device="meta")}, r"^grad is \[4\] on meta and weight \[4\] on cp"),
        ({"grad": torch.zeros(8)[::2]}, "^grad is not contiguous$"),
        ({"step": shared(device="meta")}, "^step is on meta and weight on cpu$"),
    ],
)
def test_inputs_that_do_not_match(change, message, implementation):
    weight, low, m, v, grad = state(4, True, BF16)
    inputs = {
        "weight": weight,
        "low": low,
        "m": m,
        "v": v,
        "grad": grad,
        "weight_decay": 0.0,
        "step": shared(),
    }
    with pytest.raises(ValueError, match=message):
        kernels.adamw_(**inputs | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"number": torch.ones(1)}, r"^number is torch.float32 \[1\] on cpu; it is float32"),
        ({"skip": torch.tensor(False)}, r"^skip is torch.bool \[\] on cpu; it is float32 "),
        ({"grad_scale": torch.ones((), device="meta")}, r"^grad_scale is torch.float32 \[\] on me"),
    ],
)
def test_scalars_that_do_not_match(change, message):
    inputs = dict.fromkeys(("number", "grad_scale", "skip"), number(1))
    with pytest.raises(ValueError, match=message):
        kernels.adamw_step(**inputs | change, lr=1e-3, betas=BETAS, eps=EPS)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("split, moments", VARIANTS, ids=str)
def test_a_gradient_and_its_scale_are_one_quotient(split, moments, device, implementation):
    """Rounded to nearest, so that every bit is that of a gradient which was divided before. By a
    number on the device: by one of Python's, a GPU multiplies with its reciprocal."""
    scaled = state(5003, split, moments, device=device)
    divided = [None if x is None else x.clone() for x in scaled]
    divided[4] /= number(3.7, device)
    step(*scaled, t=3, scale=3.7), step(*divided, t=3)
    for a, b in zip(scaled[:4], divided[:4], strict=True):
        assert a is None or torch.equal(bits(a), bits(b))


def test_halves_that_do_not_match():
    with pytest.raises(ValueError, match="^master is torch.bfloat16; it is float32$"):
        kernels.split(torch.zeros(2).bfloat16())
    weight, low = kernels.split(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^weight is torch.bfloat16 \[2\] and low torch.int1"):
        kernels.join(weight, low[:1])
    with pytest.raises(ValueError, match=r"^weight is torch.float32 \[2\] and low torch.int1"):
        kernels.join(weight.float(), low)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("split", [False, True])
def test_on_a_gpu_it_is_torchs_step_and_the_host_waits_for_nothing(split):
    weight, low, m, v, grad = state(1_000_003, split, FP32, device="cuda")
    t, one, skip = (number(x, "cuda") for x in (1, 1, 0))

    def ours(*tensors):
        once = kernels.adamw_step(t, 1e-5, ROUNDED, EPS, one, skip)
        kernels.adamw_(*tensors, 0.1, once)

    ours(*(None if x is None else x.clone() for x in (weight, low, m, v, grad)))  # compiled
    before = master(weight, low).clone()
    theirs = torch.nn.Parameter(before.clone())
    optimizer = torch.optim.AdamW([theirs], 1e-5, ROUNDED, EPS, weight_decay=0.1, fused=True)
    theirs.grad = grad
    right = optimizer.state[theirs]
    right |= {"step": number(0, "cuda"), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(weight, low, m, v, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    w, size = master(weight, low), theirs.detach().abs().clamp(min=1e-3)
    # of 1 - β₂ the power's 4 last places are 2.4e-4, and of its root half that
    powers = POWF * (1 / (1 - ROUNDED[0]) + 0.5 / (1 - ROUNDED[1]))
    assert ((w - theirs).abs() <= ULP * size + powers * (theirs - before).abs()).all()
    torch.testing.assert_close(m, right["exp_avg"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(v, right["exp_avg_sq"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "n, device", [(20_000, "cpu"), pytest.param(2**31 + 4096, "cuda", marks=pytest.mark.gpu)]
)
def test_more_than_two_billion_elements(n, device, monkeypatch):
    """The last ones, as a parameter of their own has them; but v is rounded by its place."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "triton")
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 14 * n:
        pytest.skip("12 bytes for each of 2**31 elements do not fit")
    weight, low, m, v, grad = end = state(8192, True, BF16, device=device)
    long = [x.new_zeros(n) for x in end]
    for x, y in zip(long, end, strict=True):
        x[-8192:] = y
    m, v = m.float(), v.float()
    step(*long), step(weight, low, m, v, grad)
    up = reference.chance(n - 8192, 8192, number(1, device))
    right = weight, low, reference.nearest_bf16(m), reference.bf16_by_chance(v, up)
    for name, x, y in zip(("weight", "low", "m", "v"), long, right, strict=False):
        assert torch.equal(x[-8192:], y), name
