"""AdamW groups, the number of steps, learning-rate schedules, clip and step."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import kernels
from zephyr.config import Training
from zephyr.distributed.group import Ranks
from zephyr.weights.masters import clear_gradients, gradient, lower_half

BETAS, EPS = (0.9, 0.999), 1e-8  # Zephyr's (model card of zephyr-7b-beta)


def adamw(model: nn.Module, weight_decay: float, state: str = "fp32") -> torch.optim.Optimizer:
    """Return AdamW (arXiv:1711.05101) on the fp32 masters of what is trained: all, or the adapters.
    Norms, being vectors, are not decayed.
    Moments are fp32 or, with `state` bf16, rounded to that after each update.

    Build the optimizer before any forward. A forward without a backward (reference pass,
    evaluation) leaves FSDP's root gathered; an optimizer built then would hold tensors that
    backward and step do not work on.
    """
    sharded = {isinstance(p, DTensor) for p in model.parameters()}
    assert len(sharded) == 1, "some parameters are gathered: build the optimizer before a forward"
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if state == "fp32" and not any(lower_half(p) is not None for p in matrices):
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)
    return AdamW(groups, torch.bfloat16 if state == "bf16" else torch.float32)


class AdamW(torch.optim.Optimizer):
    """torch's AdamW for what it does not take: moments in bf16, and bf16 weights with the lower
    half of their masters beside them; see kernels.adamw_."""

    def __init__(self, groups: list[dict], moments: torch.dtype):
        super().__init__(groups, {"lr": 0.0})
        self.moments, self.grad_scale, self.found_inf = moments, None, None

    @torch.no_grad()
    def step(self) -> None:
        fill_state(self)
        counts = [self.state[p]["step"] for p in _parameters(self)]
        torch._foreach_add_(counts, [1 - self.found_inf] * len(counts))
        lr = self.param_groups[0]["lr"]  # that of the other group too
        update = kernels.adamw_step(counts[0], lr, BETAS, EPS, self.grad_scale, self.found_inf)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                tensors = p, state["exp_avg"], state["exp_avg_sq"], gradient(p)
                weight, m, v, grad = (_local(x) for x in tensors)
                kernels.adamw_(weight, lower_half(p), m, v, grad, group["weight_decay"], update)


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter without a state the one from which AdamW starts: no step, no moments."""
    for p in _parameters(optimizer):
        if not optimizer.state[p]:
            dtype = getattr(optimizer, "moments", p.dtype)  # torch's are as wide as the weights
            moments = {name: torch.zeros_like(p, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] |= {"step": torch.zeros((), device=p.device)} | moments


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def steps(c: Training, per_epoch: int, size: int, what: str, ranks: Ranks) -> int:
    """Return the number of optimizer steps of a run over `size` pairs or chunks (`what` is one of
    them). Tells the user if half of them or more are warm-up.

    Raises ValueError if no step would have a learning rate above 0, as with one step and a warm-up:
    such a run would end with the weights it began with.
    """
    total = c.steps or c.epochs * per_epoch
    if not any(schedule(c.schedule, step, total, c.warmup) for step in range(total)):
        made, fixes = f"--steps {c.steps}", ["--steps 10"]
        if not c.steps:
            what += "s" * (size > 1)
            made = f"{size} {what} with --batch {c.batch}, --epochs {c.epochs} and no --steps"
            batch = max(ranks.size, size // 10)
            smaller = f"--batch {batch}, which makes {-(-size // batch)} steps"
            fixes = [smaller, "--epochs 10"] if batch < size else ["--epochs 10"]
        raise ValueError(
            f"{made}: that is {total} step, whose learning rate --warmup {c.warmup} makes 0, and "
            f"nothing would be learned; use {', '.join(fixes)} or --warmup 0"
        )
    rise = math.ceil(c.warmup * total)
    if 2 * rise >= total:
        ranks.say(
            f"warm-up takes {rise} of the {total} steps (--warmup {c.warmup}): a smaller --batch "
            "or --warmup, or more --epochs or --steps, leaves more of them near the full learning "
            "rate"
        )
    return total


def first_moved(c: Training, total: int) -> int | None:
    """Return the first step, counted from 0, at which adapters must have moved the policy: the one
    after the first update with a learning rate above 0. It is None if all weights are trained, as
    bf16 may not show the first updates of those."""
    rates = (schedule(c.schedule, step, total, c.warmup) for step in range(total))
    return next(k for k, rate in enumerate(rates, 1) if rate) if c.lora_rank else None


def schedule(kind: str, step: int, total: int, warmup: float) -> float:
    """Return the factor on the peak learning rate for optimizer step `step`, counted from 0.

    The factor rises linearly from 0 over ceil(warmup x total) steps, so the first update has rate
    0. Then it falls to 0 along a line or half a cosine, or stays 1; as transformers' schedules do.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return step / rise
    progress = (step - rise) / max(1, total - rise)
    if kind == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0


def step(
    optimizer: torch.optim.Optimizer, lr: float, clip: float, skip_if: Tensor | float = 0.0
) -> Tensor:
    """Clip the global gradient norm to `clip`, update the weights, clear the gradients; return the
    norm before clipping.

    Clipping is a division in the update itself, by max(1, norm / clip): no pass over the gradients.
    Weights and moments stay as they are if the norm is not finite or `skip_if`, a flag on the
    device, is not 0. All of that is decided on the device: the host waits for nothing.
    """
    norm = nn.utils.get_total_norm([gradient(p) for p in _parameters(optimizer)])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    # torch's names, which its fused AdamW obeys: it divides by the one, which clips the gradients,
    # and skips by the other; 1e-6 as in clip_grad_norm_
    optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0).float()
    optimizer.found_inf = (~norm.isfinite() | (skip_if != 0)).float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    clear_gradients(_parameters(optimizer))
    return norm
