"""The log-prob kernel that writes no logits: truth in float64, ragged tiles, the order of tiles.

It runs interpreted where there is no GPU, and as it is under the marker `gpu`. The interpreter's
bf16 matmul is wrong, so bf16 is for a GPU alone.
"""

import numpy as np
import pytest
import torch

from kernels.bench import fused_forward

pytestmark = pytest.mark.tools

CHIPS = [80, 90]  # by pointers and by tensor descriptors
SHAPES = [  # N, D, V
    (7, 5, 13),
    (1, 1, 1),
    (0, 8, 13),
    (1, 64, 257),
    (129, 72, 256),
    (131, 200, 513),
    (1100, 8, 70),
]


def inputs(n: int, d: int, v: int, dtype, device="cpu"):
    """Targets begin with the last and the first token."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=generator)
    w = torch.randn(v, d, generator=generator)
    targets = torch.randint(v, (n,), generator=generator)
    targets[:1], targets[1:2] = v - 1, 0
    return h.to(device, dtype), w.to(device, dtype), targets.to(device)


def truth(h, w, targets) -> np.ndarray:
    """In float64, where the tensors are: a CPU would take a minute for the largest."""
    z = h.double() @ w.double().T
    return (z.gather(1, targets[:, None])[:, 0] - z.logsumexp(1)).cpu().numpy()


def close(ours: torch.Tensor, h, w, targets, scale: float = 1.0) -> None:
    expected = truth(h, w, targets)
    assert ours.dtype == torch.float32 and tuple(ours.shape) == expected.shape
    np.testing.assert_allclose(ours.cpu().numpy(), expected, rtol=2e-6, atol=2e-5 * scale)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truth(shape, dtype, chip):
    """Whatever the number of programs, the same bits."""
    h, w, targets = inputs(*shape, dtype)
    ours = fused_forward.launch(h, w, targets, chip, programs=3)
    close(ours, h, w, targets)
    assert torch.equal(ours, fused_forward.launch(h, w, targets, chip, programs=1))


@pytest.mark.parametrize("chip", CHIPS)
def test_logits_of_ten_thousand(chip):
    """log p is 0 or about -2e4, never NaN or infinite, across tiles that hold only small logits."""
    h, w, targets = inputs(6, 16, 600, torch.float32)
    h *= 1e4 / (h @ w.T).abs().amax(1, keepdim=True)
    z = h @ w.T
    targets = torch.where(torch.arange(6) % 2 > 0, z.argmax(1), z.argmin(1))
    ours = fused_forward.launch(h, w, targets, chip, programs=2)
    assert (ours[1::2] == 0).all() and (ours[0::2] < -1e4).all()
    close(ours, h, w, targets, scale=100)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_target_outside_the_vocabulary_is_nan(chip):
    h, w, targets = inputs(5, 8, 300, torch.float16)
    targets[2], targets[3] = -1, 300
    ours = fused_forward.launch(h, w, targets, chip, programs=1)
    assert ours.isnan().tolist() == [False, False, True, True, False]
    kept = [0, 1, 4]
    close(ours[kept], h[kept], w, targets[kept])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3000, 4096, 32_000)], ids=str)
def test_truth_on_a_gpu(shape, dtype):
    h, w, targets = inputs(*shape, dtype, "cuda")
    h /= h.shape[1] ** 0.5
    ours = fused_forward.linear_logprob(h, w, targets)
    close(ours, h, w, targets)
    assert torch.equal(ours, fused_forward.linear_logprob(h, w, targets))
