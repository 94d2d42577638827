"""LoRA (arXiv:2106.09685): the weights stay as they are, and beside each of the named matrices W a
product of two thin ones is trained.

    y = W x + s B A x        Eq. 3, s = α / r; rsLoRA's is α / √r (arXiv:2312.03732)

B starts at zero, so the model starts as it was, to the bit. The frozen weights have the dtype that
computes and no fp32 copy, gradient or moments; A and B are fp32 masters. Nothing is dropped out: a
random policy would differ from the reference log-probs, which are computed once.

T tokens  D width in  F width out  r rank
"""

import contextlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zephyr.config import Training
from zephyr.model import Mistral

A, B = ".lora_A.weight", ".lora_B.weight"  # how the adapters' names end, as PEFT's do


class Spec(NamedTuple):
    """Which adapters a model has: `targets` are projections by their name in a block."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor s on B A x."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def spec(c: Training) -> Spec | None:
    """Return the adapters that the settings ask for; None if all weights are trained."""
    if not c.lora_rank:
        return None
    targets = tuple(c.lora_targets.split(","))
    return Spec(c.lora_rank, c.lora_alpha or c.lora_rank, targets, c.lora_rslora)


class LoRALinear(nn.Linear):
    """A linear layer whose weight is frozen, with adapters beside it. Its parameters are `weight`,
    which keeps its name, `lora_A.weight` [r, D] and `lora_B.weight` [F, r]."""

    def __init__(self, layer: nn.Linear, spec: Spec, device: torch.device):
        widths = layer.in_features, layer.out_features
        super().__init__(*widths, bias=False, device="meta")
        self.weight = layer.weight
        self.lora_A = nn.Linear(widths[0], spec.rank, bias=False, device="meta")
        self.lora_B = nn.Linear(spec.rank, widths[1], bias=False, device="meta")
        # tensors, so that one compiled graph serves with adapters and without
        self.on, self.off = (torch.tensor(s, device=device) for s in (spec.scale, 0.0))
        self.scale = self.on

    def forward(self, x_TD: Tensor) -> Tensor:
        a_rD, b_Fr = (layer.weight.to(x_TD.dtype) for layer in (self.lora_A, self.lora_B))
        y_TF, ax_Tr = super().forward(x_TD), x_TD @ a_rD.T
        sax_Tr = (self.scale * ax_Tr.float()).to(x_TD.dtype)  # bf16 has not every s
        return torch.addmm(y_TF, sax_Tr, b_Fr.T)


def attach(model: Mistral, spec: Spec, precision: str, device: torch.device) -> None:
    """Freeze a model that lies on the meta device, in the dtype that computes, and put adapters
    beside the targets of each block. `initial` has the values to start from."""
    for p in model.requires_grad_(False).parameters():
        p.data = p.data.bfloat16() if precision == "bf16" else p.data
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if name in spec.targets:
                    setattr(part, name, LoRALinear(layer, spec, device))


def matmuls(names: tuple[str, ...], spec: Spec | None) -> tuple[str, ...]:
    """Return the matmuls of a block (`aten.mm`) in the order of its forward, given those of a block
    without adapters: each target's W is followed by its A. B's is an addmm, and not among them."""
    targets = spec.targets if spec else ()
    return tuple(m for name in names for m in (name, f"{name}{A}")[: 1 + (name in targets)])


def is_adapter(name: str) -> bool:
    """Return True for the name of an adapter's parameter."""
    return name.endswith((A, B))


def initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the values from which an adapter starts: B's are zero, A's uniform in ±1/√D, as PEFT
    has them. They depend on the seed and the parameter's name, not on the number of ranks."""
    start = torch.zeros(shape)
    if name.endswith(A):
        digest = sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        start.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
    return start


@contextlib.contextmanager
def switched_off(model: Mistral) -> Iterator[None]:
    """Let the model compute without its adapters while the block runs."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.scale = layer.off  # another tensor: a backward to come may need this one
    try:
        yield
    finally:
        for layer in layers:
            layer.scale = layer.on


def without(model: Mistral) -> Callable[..., Tensor]:
    """Return a function that computes what the model does without its adapters: it is then the one
    that the run started from."""

    def start(batch) -> Tensor:
        with switched_off(model):
            return model(batch)

    return start
