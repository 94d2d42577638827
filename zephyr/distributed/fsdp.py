"""The model over the ranks: FSDP2 (ZeRO-2 and ZeRO-3), recomputation (activation checkpointing) and
torch.compile, all applied to the model from outside."""

import functools
import itertools
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

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

from zephyr import lora
from zephyr.architecture import PROJECTIONS, MistralConfig
from zephyr.config import Training
from zephyr.distributed import compiled_attention
from zephyr.distributed.group import Ranks, together
from zephyr.model import Mistral
from zephyr.weights import hub, locate
from zephyr.weights.masters import attach_halves, fuse_matmuls

ATTENTION = (  # the ops whose output is kept, by name
    "torch_attn::_varlen_attn",  # on a GPU
    "zephyr_kernels::attention",  # on a GPU, by ZEPHYR_ATTENTION=triton
    "aten::_scaled_dot_product",  # on a CPU
    compiled_attention.NAME,  # on a CPU, compiled
)
# a block's matmuls in the order of its forward, and those after masters.fuse_matmuls; nothing in
# the backward needs the output of LAST
MATMULS, LAST = PROJECTIONS, "down_proj"
FUSED = ("qkv", "o_proj", "gate_up", "down_proj")


def load(c: Training, shape: MistralConfig, ranks: Ranks) -> Mistral:
    """Return the model of the folder that the run starts from, sharded over the ranks as the
    settings say."""
    settings = c.precision, c.recompute, c.masters, c.compile, c.reshard
    model = build(shape, ranks, *settings, lora.spec(c))
    with together():
        hub.load(locate.parts(c.model, c.base), model, c.seed)
    return model


def build(
    config: MistralConfig,
    ranks: Ranks,
    precision: str,
    recompute: str = "none",
    masters: str = "fp32",
    compiled: str = "auto",
    reshard: str = "always",
    adapters: lora.Spec | None = None,
) -> Mistral:
    """The model with empty weights, sharded over the ranks; `hub.load` fills them.

    Each block is one FSDP2 unit; embedding, final norm and head are another. Names of parameters do
    not change. The fp32 masters are cast to `precision` when they are gathered. Gradients are
    reduced in fp32 after every micro-batch, as a full unsharded gradient would not fit beside a
    large model. With `reshard` never (ZeRO-2), a block stays gathered from its forward to its
    backward; else (ZeRO-3) it is freed between them. `compiled` is on, off, or auto, which means on
    for a GPU.

    A single process in fp32 has nothing to shard and nothing to cast, so its model stays a plain
    module. So does a model with `masters` split, see masters.attach_halves, and one with
    `adapters`, whose layers cast them themselves.
    """
    plain = ranks.size == 1 and (precision == "fp32" or masters == "split" or bool(adapters))
    with torch.device("meta"):
        model = Mistral(config)
    if adapters:
        lora.attach(model, adapters, precision, ranks.device)
    compiling = compiled == "on" or (compiled == "auto" and ranks.device.type == "cuda")
    for block in model.model.layers:
        matmuls = FUSED if masters == "split" else lora.matmuls(MATMULS, adapters)
        block.forward = wrapped(block, recompute, compiling, matmuls)
    if not plain:
        shard(model, ranks.mesh, precision, reshard != "never")
    elif masters == "split":
        model.bfloat16()
    model.to_empty(device=ranks.device)
    if masters == "split":
        fuse_matmuls(model)
        attach_halves(model)
    return model


def shard(model: Mistral, mesh: DeviceMesh, precision: str, reshard: bool) -> None:
    """Shard a model in place with FSDP2. While a block computes, the weights of the next one are
    gathered."""
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
    block: torch.nn.Module, recompute: str, compiled: bool, matmuls: tuple[str, ...] = MATMULS
) -> Callable:
    """A block's forward that keeps less for its backward (activation checkpointing), and is
    compiled. By `recompute`, a block keeps for its backward:

    none         all inputs of its matmuls and of attention, and what kernels.elementwise names
    elementwise  the outputs of attention and of its matmuls but the last, and its input: norms,
                 rotations and SwiGLU's product are computed again, and no matmul but B of
                 adapters, which is thin
    full         its input; its forward runs again but for the last matmul

    Where split masters or layers with adapters are not compiled, the last matmul runs again too.
    """
    forward = block.forward
    if recompute != "none":
        contexts = {"elementwise": functools.partial(matmuls_and_attention, matmuls)}
        if compiled:
            # without a policy a compiler marks what is to be computed again in a graph in which our
            # autograd functions are not written out yet, and then keeps most of what they keep
            contexts["full"] = functools.partial(create_selective_checkpoint_contexts, _again)
        context = {"context_fn": contexts[recompute]} if recompute in contexts else {}
        forward = functools.partial(checkpoint, forward, use_reentrant=False, **context)
    return one_graph(forward) if compiled else forward


def matmuls_and_attention(
    matmuls: tuple[str, ...],
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts for a block's forward and for its recomputation. In them, the outputs of
    the matmuls but LAST and of ATTENTION are saved. The matmuls are told apart by their order,
    which is that of their names in `matmuls`."""
    forward, again = iter(matmuls), iter(matmuls)

    def policy(context, op: OpOverload, *args, **kwargs) -> CheckpointPolicy:
        if op is torch.ops.aten.mm.default:
            kept = next(again if context.is_recompute else forward) != LAST
        else:
            kept = op.name().startswith(ATTENTION)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _again(context, op: OpOverload, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def one_graph(forward: Callable) -> Callable:
    """A block's forward, compiled once for all layers, all numbers of tokens, and passes with and
    without a gradient.

    A compiler fuses a pass without a gradient in another way, which rounds in another way. In bf16
    the log-probs of a response would then differ by tenths of a nat between the reference pass and
    the policy, although both are the same model. So a pass without a gradient goes through the
    graph that training has, and keeps nothing of it. The pack of a rank without pairs has one
    token; compilers make graphs of their own for the numbers 0 and 1, so such a pack runs as the
    block is written.
    """
    # what torch advises in vain: no op here works in place, and fp32 was asked for
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    # equal sizes that are so by chance, and a norm's eps, would otherwise be symbols of the graph
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.specialize_float = True
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)

    def run(x: Tensor, *rest, **named) -> Tensor:
        if x.shape[-2] < 2:
            return forward(x, *rest, **named)
        if torch.is_grad_enabled():
            # beside frozen embeddings the first block's input takes no gradient, and others' do
            return traced(x if x.requires_grad else x.detach().requires_grad_(), *rest, **named)
        with torch.enable_grad(), saved_tensors_hooks(_nothing, _nothing):
            return traced(x.detach().requires_grad_(), *rest, **named).detach()

    def traced(x: Tensor, *args, **named) -> Tensor:
        # under FSDP with a gradient x is a view, which a graph asks after: let it be one always
        return compiled(x.view_as(x), *args, **named)

    return run


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)
