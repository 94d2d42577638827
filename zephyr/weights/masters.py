"""fp32 master weights: whole, or split in two halves of 16 bits.

At a learning rate of 5e-7 an update is smaller than half a unit in a bf16 weight's last place, so a
model trained in bf16 alone stands still: its masters have to be fp32. Where one process computes in
bf16, the masters can be split: the parameter is the upper half, which is a bf16 number, and the
lower half lies beside it (`kernels.split`). This file alone knows where.
"""

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import kernels
from zephyr.model import Mistral


def attach_halves(model: Mistral) -> None:
    """Give each parameter, a bf16 one, an empty lower half, and gradients that add up in fp32."""
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        parameter.low = torch.empty_like(parameter, dtype=torch.int16)


def lower_half(parameter: Tensor) -> Tensor | None:
    """The lower half of a split master, int16; None of a whole one."""
    return getattr(parameter, "low", None)


def parts(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """What a checkpoint holds of a master: `NAME`, and of a split one `NAME.low` too."""
    low = lower_half(parameter)
    return ({} if low is None else {f"{name}.low": low}) | {name: parameter.detach()}


def empty_parts(name: str, shape: tuple[int, ...], split: bool) -> dict[str, Tensor]:
    """Tensors of the names, shape and dtypes that `parts` gave, to be read into."""
    if not split:
        return {name: torch.empty(shape)}
    low = torch.empty(shape, dtype=torch.int16)
    return {f"{name}.low": low, name: torch.empty(shape, dtype=torch.bfloat16)}


def joined(name: str, parts: dict[str, Tensor]) -> Tensor:
    """Return the fp32 master whose parts these are."""
    low = parts.get(f"{name}.low")
    return parts[name] if low is None else kernels.join(parts[name], low)


def fill(parameter: Tensor, local: Tensor, values: Tensor) -> None:
    """Copy values into a parameter's local part `local`, which is this rank's shard. The values of
    a split master are split, and fill both its halves."""
    if lower_half(parameter) is not None:
        values, low = kernels.split(values.to(local.device, torch.float32))
        parameter.low.copy_(low)
    local.copy_(values)


def full_master(parameter: Tensor) -> Tensor:
    """The full fp32 master of a parameter: joined from its halves if it is split, gathered from all
    ranks if it is sharded."""
    if lower_half(parameter) is not None:
        return kernels.join(parameter.detach(), parameter.low)
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def resharded_parameters(model: Mistral) -> dict[str, Tensor]:
    """The model's parameters by name, sharded ones as shards.

    A forward without a backward (reference pass, evaluation) leaves FSDP's root gathered and cast,
    and with `--reshard never` the blocks too. Those tensors are not the ones that the optimizer
    works on, so all units are resharded first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())
