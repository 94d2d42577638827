"""fp32 master weights: whole, or split in two halves of 16 bits.

At a learning rate of 5e-7 an update is smaller than half a unit in a bf16 weight's last place, so a
model trained in bf16 alone stands still: its masters have to be fp32. Where one process computes in
bf16, the masters can be split: the parameter is the upper half, which is a bf16 number, and the
lower half lies beside it (`kernels.split`). So does the sum of its gradients, which is fp32: the
matmuls of the blocks add to it themselves. This file alone knows where, and changes the blocks.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import kernels
from zephyr.model import MLP, Attention, Mistral


def attach_halves(model: nn.Module) -> None:
    """Give each parameter, a bf16 one, an empty lower half, and an fp32 sum for its gradients.

    A gradient is added to the sum as it arrives, and does not stay in `.grad`, where torch.compile
    refuses fp32 beside bf16.
    """
    for parameter in model.parameters():
        parameter.low = torch.empty_like(parameter, dtype=torch.int16)
        if not hasattr(parameter, "main_grad"):
            parameter.main_grad = kernels.main_grad(parameter)
            parameter.register_post_accumulate_grad_hook(_add)


def fuse_matmuls(model: Mistral) -> None:
    """Let the matmuls of the blocks add the gradients of their weights to the sums themselves (see
    `kernels.linear`), and let those that have one input be one matmul: q, k and v; gate and up.

    The weights keep their names, and are parts of one tensor. Call it before `attach_halves`.
    """
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for layer in (attention.o_proj, mlp.down_proj):
            layer.weight.main_grad = kernels.main_grad(layer.weight)
        _fuse(attention, attention.q_proj, attention.k_proj, attention.v_proj)
        _fuse(mlp, mlp.gate_proj, mlp.up_proj)
        attention.project = MethodType(_project, attention)
        attention.o_proj.forward = MethodType(_linear, attention.o_proj)
        mlp.forward = MethodType(_mlp, mlp)


def _fuse(module: nn.Module, *layers: nn.Linear) -> None:
    """Make the weights of layers that `module` applies to one input parts of `module.fused`."""
    module.widths = [layer.out_features for layer in layers]
    module.fused = torch.cat([layer.weight.detach() for layer in layers])
    module.fused.main_grad = torch.empty_like(module.fused, dtype=torch.float32)
    weights, totals = (x.split(module.widths) for x in (module.fused, module.fused.main_grad))
    kernels.clear_grad(module.fused.main_grad)
    for layer, weight, total in zip(layers, weights, totals, strict=True):
        layer.weight = nn.Parameter(weight)
        layer.weight.main_grad = total


def _project(self: Attention, x_TD: Tensor) -> tuple[Tensor, ...]:
    return kernels.linear(x_TD, self.fused, self.fused.main_grad).split(self.widths, 1)


def _mlp(self: MLP, x_TD: Tensor) -> Tensor:
    gate_up = kernels.linear(x_TD, self.fused, self.fused.main_grad)
    down = self.down_proj.weight
    return kernels.swiglu_linear(gate_up, down, down.main_grad)


def _linear(self: nn.Linear, x_TD: Tensor) -> Tensor:
    return kernels.linear(x_TD, self.weight, self.weight.main_grad)


def _add(parameter: Tensor) -> None:
    kernels.add_gradient(parameter.main_grad, parameter.grad)
    parameter.grad = None


def gradient(parameter: Tensor) -> Tensor:
    """Return the sum of a parameter's gradients since the last step, in fp32 for a split master."""
    return getattr(parameter, "main_grad", parameter.grad)


def clear_gradients(parameters: list[Tensor]) -> None:
    """Forget all gradients, and free their memory."""
    for parameter in parameters:
        parameter.grad = None
        if hasattr(parameter, "main_grad"):
            kernels.clear_grad(parameter.main_grad)


def lower_half(parameter: Tensor) -> Tensor | None:
    """Return the lower half of a split master, int16; None for a whole one."""
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
