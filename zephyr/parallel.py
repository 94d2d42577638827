"""Process group, device mesh, FSDP2, activation recomputation: everything that acts on the model
from outside it."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from zephyr.model import Mistral, MistralConfig

T = TypeVar("T")


class Ranks(NamedTuple):
    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh

    def say(self, text: str) -> None:
        """Print on the first rank; the others keep quiet."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)


def start() -> Ranks:
    """Join the process group: torchrun's, or one of a single process under plain python."""
    rank, size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_buffers()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    return Ranks(rank, size, local_rank, device, init_device_mesh(device.type, (size,)))


def keep_buffers() -> None:
    """Stop glibc from giving every big buffer back to the kernel: page faults on the next
    operation's buffer otherwise take half of a CPU's training time."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # big buffers come from the heap, where they can be used again


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
        code = getattr(mistake, "code", None)
        error = (type(mistake) if code else ValueError, str(mistake))
    errors: list[tuple[type[ValueError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            kind, text = error
            shared = kind(text)
            shared.shared = True  # the first rank speaks for all: see exits.run
            raise shared
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


def total(count: int, ranks: Ranks) -> int:
    """Sum of `count` over the ranks."""
    counts = torch.tensor(count, device=ranks.device)
    dist.all_reduce(counts)
    return int(counts)


def build(config: MistralConfig, ranks: Ranks, precision: str, recompute: str = "none") -> Mistral:
    """The model with empty fp32 weights, sharded over the ranks; only `weights.load` fills them.

    One FSDP2 unit per block, one for embedding, norm and head; parameter names do not change.
    fp32 masters are cast to `precision` when gathered, gradients are reduced in fp32 after every
    micro-batch: a full unsharded gradient would not fit beside a large model. A single process in
    fp32 has nothing to shard and nothing to cast, so it stays a plain module.
    """
    with torch.device("meta"):
        model = Mistral(config)
    if recompute == "full":
        for block in model.model.layers:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if ranks.size > 1 or precision == "bf16":
        compute = torch.bfloat16 if precision == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
    return model.to_empty(device=ranks.device)

