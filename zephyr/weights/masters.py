"""fp32 master weights, kept whole or split in two halves of 16 bits."""

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import kernels
from zephyr.model import Mistral


def fill(parameter: Tensor, local: Tensor, values: Tensor) -> None:
    """Put values into `local`, this rank's part of a parameter; a split master in both halves."""
    if hasattr(parameter, "low"):
        values, low = kernels.split(values.to(local.device, torch.float32))
        parameter.low.copy_(low)
    local.copy_(values)


def full_master(parameter: Tensor) -> Tensor:
    """The fp32 master that a parameter is, or is the upper half of; of a shard, all of it."""
    if hasattr(parameter, "low"):
        return kernels.join(parameter.detach(), parameter.low)
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def resharded_parameters(model: Mistral) -> dict[str, Tensor]:
    """The model's parameters by name, sharded ones as shards.

    A forward without a backward leaves FSDP's root gathered and cast, and the blocks too with
    `--reshard never`; what is then there under their names is not what the optimizer works on, so
    all are put back first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())
