"""Process group, device mesh, FSDP2, activation recomputation: everything that acts on the model
from outside it. Also what it is to lose a rank."""

import contextlib
import functools
import itertools
import logging
import os
import re
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from zephyr import machine, plan, signals
from zephyr.config import Training
from zephyr.exits import Storage, kind, shared
from zephyr.model import Mistral, MistralConfig

T = TypeVar("T")
# what attention is, by the names of its ops: on a GPU, on a CPU, compiled on a CPU
ATTENTION = ("torch_attn::_varlen_attn", "aten::_scaled_dot_product", "zephyr::segments")
PATIENCE = 2 * 3600  # seconds: before training one rank may tokenize while all others wait
MEETING = timedelta(minutes=10)  # for the ranks, all started by now, to find each other
VISIBLE = 5.0  # seconds after which a new file must be seen on every node
# what gloo, NCCL and torchrun's store say of a rank that is gone or silent
GONE = re.compile(
    r"closed by (remote )?peer|likely closed|reset by peer|broken pipe|unreachable|"
    r"connection refused|no route to host|ncclRemoteError|aborted",
    re.I,
)
SILENT = re.compile(r"timed out|time-?out", re.I)


class Ranks(NamedTuple):
    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh

    def say(self, *lines: str) -> None:
        """Print the lines on the first rank; the others keep quiet."""
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a reader that went away must not end the run
                for line in lines:
                    print(line, file=sys.stderr, flush=True)


def start(replicas: int = 1, masters: str = "fp32", deterministic: bool = False) -> Ranks:
    """Join the process group: torchrun's, or one of a single process under plain python.

    With replicas the mesh is 2-D: each group of size / replicas neighbouring ranks shards the model
    among themselves, and gradients are averaged over the groups too. From here on SIGTERM and
    SIGUSR1 only ask to stop, see zephyr/signals.py.
    """
    rank, size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if replicas < 1 or size % replicas:
        fits = [str(n) for n in range(1, size + 1) if size % n == 0]
        use = " or ".join(filter(None, (", ".join(fits[:-1]), fits[-1])))
        raise ValueError(f"--replicas {replicas} does not divide the {size} ranks; use {use}")
    if masters == "split" and size > 1:
        raise ValueError(
            f"--masters split is for one process; sharded over {size} ranks an fp32 "
            "master takes the same 4 bytes, and is cast as it is gathered: leave it "
            "out"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        machine.tune_arithmetic(deterministic)
    notes = machine.tune_allocators()
    if "RANK" in os.environ:
        store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
        store = dist.PrefixStore(_attempt(store, rank, size), store)
    else:
        store = dist.HashStore()
    # objects, flags and checkpoints in the background go through gloo, past the device's queue
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=MEETING)
    if replicas == 1:
        mesh = init_device_mesh(device.type, (size,))
    else:
        shape = (replicas, size // replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    tighten(PATIENCE)
    signals.listen()
    ranks = Ranks(rank, size, local_rank, device, mesh)
    ranks.say(*notes)
    return ranks


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name that the ranks of this attempt share and no earlier attempt had.

    torchrun's store outlives its ranks, so after a restart it still has the keys under which the
    last attempt's ranks found each other, and whoever comes first reads those. Nothing torchrun
    says tells attempts apart: on several nodes TORCHELASTIC_RESTART_COUNT is each agent's own, and
    one that restarts because others did does not count it. So the ranks agree: each shows up under
    a word of its own, and rank 0 answers with the name to whomever it sees until all have answered
    back. A word is one process's alone, so no answer meant for a dead rank reaches a living one.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"rank {rank}", word)
        name = store.get(f"name for {word}").decode()
        store.set(f"{name} has {rank}", "")
        return name
    missing, deadline = set(range(1, size)), time.monotonic() + MEETING.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{word} has {other}"]):
                missing.remove(other)
            elif store.check([f"rank {other}"]):
                store.set(f"name for {store.get(f'rank {other}').decode()}", word)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"Timed out waiting for ranks {sorted(missing)} to start")
        time.sleep(0.01)
    return word


_limit = PATIENCE


def tighten(seconds: int) -> None:
    """From now on a collective that waits longer for another rank than this fails, in each group
    there is: the mesh's, the checkpoints'."""
    global _limit
    _limit = seconds
    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def agree(flag: bool) -> bool:
    """True on every rank if the flag is True on any. On the CPU: no device waits."""
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def lost(error: RuntimeError) -> bool:
    """Does the error tell of another rank that died or did not answer in time?"""
    text = str(error)
    of_ranks = isinstance(error, dist.DistError) or "gloo" in text
    return of_ranks and bool(GONE.search(text) or SILENT.search(text))


def lost_message(error: RuntimeError) -> str:
    """One line for such an error: what waited, for whom or how long, and what to do."""
    text, where = str(error), error.__traceback__
    operation = "a collective"  # FSDP waits for some outside of the call that began them
    while where:
        code = where.tb_frame.f_code
        if code.co_filename == c10d.__file__ and code.co_name in c10d.__all__:
            operation = code.co_name
            break
        where = where.tb_next
    peer = re.search(r"\[([0-9a-f.:]+)\]:\d+", text)
    if SILENT.search(text):
        happened = f"another rank did not answer within {_limit} s: it hangs, or its node is gone"
    else:
        happened = f"the rank at {peer[1]} died" if peer else "another rank died"
    return (
        f"{operation}: {happened}. Start the same command again: it goes on from the last "
        "checkpoint"
    )


def finish() -> None:
    """Leave the process group. Without the barrier gloo aborts many a good run at exit."""
    dist.barrier()
    dist.destroy_process_group()


def together(build: Callable[[], T]) -> T:
    """`build()` of this rank; if it fails on any rank with a user's mistake, every rank raises the
    first failing rank's error, so that none waits for the others."""
    result, error = None, None
    try:
        result = build()
    except (ValueError, OSError) as mistake:
        error = kind(mistake), str(mistake)
    errors: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            same, text = error
            raise shared(same(text))
    return result  # type: ignore[return-value]


def once_per_node(ranks: Ranks, build: Callable[[], T]) -> T:
    """`build()` on each node's first rank, then, when its result lies on disk, on all others."""
    first = together(build if ranks.local_rank == 0 else lambda: None)
    return together((lambda: first) if ranks.local_rank == 0 else build)  # type: ignore


def on_first(build: Callable[[], T]) -> T:
    """`build()` of rank 0, for every rank."""
    results = [together(build if dist.get_rank() == 0 else lambda: None)]
    dist.broadcast_object_list(results)
    return results[0]  # type: ignore[return-value]


def shared_folder(path: Path | str) -> None:
    """Raise Storage on every rank unless `path`, made if need be, is one folder for them all."""
    path = Path(path)

    def leave() -> str:
        token = f".seen-{secrets.token_hex(8)}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / token).touch()
        except OSError as error:
            raise Storage(f"{path}: cannot write: {error.strerror}") from None
        return token

    def look() -> None:
        deadline = time.monotonic() + VISIBLE
        while not (path / token).exists():
            if time.monotonic() > deadline:
                here = f"{socket.gethostname()} (rank {dist.get_rank()})"
                raise Storage(
                    f"{path} on {here} is not the folder that rank 0 has; give one that "
                    "all nodes share"
                )
            time.sleep(0.05)

    token = on_first(leave)
    try:
        together(look)
    finally:
        if dist.get_rank() == 0:
            (path / token).unlink(missing_ok=True)


def total(count: int) -> int:
    """Sum of `count` over the ranks. On the CPU: no device waits."""
    counts = torch.tensor(count)
    dist.all_reduce(counts)
    return int(counts)


def fitted(c: Training, shape: MistralConfig, ranks: Ranks, lengths: np.ndarray) -> Training:
    """The settings with values for what they leave to auto, by the least memory that a rank has
    and the packed lengths of the pairs or rows; see zephyr/plan.py."""
    memory = torch.tensor(machine.memory(ranks.device))
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    step = float(lengths.mean()) * c.batch
    tokens, recompute = plan.choose(shape, c, int(memory), ranks.size, int(lengths.max()), step)
    anew = plan.reshard(shape, c, int(memory), ranks.size, tokens, recompute)
    if "auto" in (c.microbatch_tokens, c.recompute):
        ranks.say(
            f"--microbatch-tokens {tokens} --recompute {recompute}, by "
            f"{int(memory) / 2**30:.1f} GiB a rank"
        )
    return replace(
        c, microbatch_tokens=tokens, recompute=recompute, reshard="always" if anew else "never"
    )


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
