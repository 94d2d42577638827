"""The model over the ranks: FSDP2 (ZeRO-2 and ZeRO-3), recomputation (activation checkpointing) and
torch.compile, all applied to the model from outside."""

import functools
import itertools
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from zephyr.architecture import MistralConfig
from zephyr.distributed.group import Ranks
from zephyr.model import Mistral

# what attention is, by the names of its ops: on a GPU, on a CPU, compiled on a CPU
ATTENTION = ("torch_attn::_varlen_attn", "aten::_scaled_dot_product", "zephyr::segments")


def build(
    config: MistralConfig,
    ranks: Ranks,
    precision: str,
    recompute: str = "none",
    masters: str = "fp32",
    compiled: str = "auto",
    reshard: str = "always",
) -> Mistral:
    """The model with empty weights, sharded over the ranks; only `weights.load` fills them.

    One FSDP2 unit per block, one for embedding, norm and head; parameter names do not change.
    fp32 masters are cast to `precision` when gathered, gradients are reduced in fp32 after every
    micro-batch: a full unsharded gradient would not fit beside a large model. Where `reshard` is
    never, a block stays gathered from its forward to its backward. `compiled` is on, off, or auto,
    which is on for a GPU.

    A single process in fp32 has nothing to shard and nothing to cast, so it stays a plain module.
    So does one with `masters` split: each weight is bf16, what its fp32 master has beyond that lies
    in an attribute `low` of the parameter (see kernels.split), and gradients add up in fp32.
    """
    plain = ranks.size == 1 and (precision == "fp32" or masters == "split")
    with torch.device("meta"):
        model = Mistral(config)
    compiling = compiled == "on" or (compiled == "auto" and ranks.device.type == "cuda")
    for block in model.model.layers:
        block.forward = wrapped(block, config, recompute, compiling)
    if not plain:
        shard(model, ranks.mesh, precision, reshard != "never")
    elif masters == "split":
        model.bfloat16()
    model.to_empty(device=ranks.device)
    if masters == "split":
        for p in model.parameters():
            p.grad_dtype = torch.float32
            p.low = torch.empty_like(p, dtype=torch.int16)
    return model


def shard(model: Mistral, mesh: DeviceMesh, precision: str, reshard: bool) -> None:
    """FSDP2 in place. While a block computes, the next one's weights are on their way."""
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    blocks = list(model.model.layers)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def wrapped(
    block: torch.nn.Module, config: MistralConfig, recompute: str, compiled: bool
) -> Callable:
    """A block's forward that keeps less for its backward, and is compiled.

    What a block keeps for its backward:

        none         all inputs of its matmuls, of attention, and what `Normed` and `Gated` name
        elementwise  the outputs of its matmuls and of attention, and its input: norms, rotations
                     and SwiGLU's product are computed again, no matmul is
        full         its input; its forward runs again but for the last matmul
    """
    forward = block.forward

    def keep(context, op: OpOverload, *args, **kwargs) -> CheckpointPolicy:
        if op is torch.ops.aten.mm.default:
            # whatever is computed again, the block's last matmul is not its input
            kept = args[0].shape[1] != config.intermediate_size
        else:
            kept = op.name().startswith(ATTENTION)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    if recompute != "none":
        context = {}
        if recompute == "elementwise":
            contexts = functools.partial(create_selective_checkpoint_contexts, keep)
            context = {"context_fn": contexts}
        forward = functools.partial(checkpoint, forward, use_reentrant=False, **context)
    return one_graph(forward, block) if compiled else forward


def one_graph(forward: Callable, block: torch.nn.Module) -> Callable:
    """A block's forward, compiled once for all layers, numbers of rows, and passes with and without
    a gradient (the last block, of fewer rows, a second time).

    A compiler fuses a pass without a gradient in another way, which rounds in another way: in bf16
    the log-probs of a response then differ by tenths of a nat, and so would the reference from the
    policy that it is. So here such a pass goes through the graph that training has, and keeps
    nothing of it. A rank without pairs has one row; 0 and 1 are numbers that compilers make graphs
    of their own for, so fewer than two rows run as they are written.
    """
    # what torch advises in vain: no op here works in place, and fp32 was asked for
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    # equal sizes that are so by chance, and a norm's eps, would otherwise be symbols of the graph
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.specialize_float = True
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)

    def run(x: Tensor, *rest, **named) -> Tensor:
        picked = [rows for rows in rest[3:] if rows is not None]  # see model.Block
        if min(map(len, (x.flatten(0, -2), *picked))) < 2:
            return forward(x, *rest, **named)
        if torch.is_grad_enabled():
            return traced(x, *rest, **named)
        with torch.enable_grad(), saved_tensors_hooks(_nothing, _nothing):
            return traced(x.detach().requires_grad_(), *rest, **named).detach()

    def traced(x: Tensor, *args, **named) -> Tensor:
        # under FSDP with a gradient x is a view, which a graph asks after: let it be one always
        args = x.view_as(x), *args
        try:
            return compiled(*args, **named)
        except torch._dynamo.exc.Unsupported:
            # in the middle of a step: it takes no bf16 weight that has a gradient in fp32
            kept = [(p, p.grad) for p in block.parameters()]
            for p, _ in kept:
                p.grad = None
            try:
                return compiled(*args, **named)
            finally:
                for p, grad in kept:
                    p.grad = grad

    return run


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)
