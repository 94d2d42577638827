"""The process group: joining it, and what its ranks decide together."""

import atexit
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import kernels
from zephyr import attention
from zephyr.distributed import machine, signals
from zephyr.errors import Storage, kind, shared

T = TypeVar("T")
PATIENCE = 2 * 3600  # seconds: before training one rank may tokenize while all others wait
MEETING = timedelta(minutes=10)  # for the ranks, all started by now, to find each other
VISIBLE = 5.0  # seconds after which a new file must be seen on every node


class Ranks(NamedTuple):
    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh

    def say(self, *lines: str) -> None:
        """Print the lines on the first rank; the others print nothing."""
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a reader that went away must not end the run
                for line in lines:
                    print(line, file=sys.stderr, flush=True)


def start(replicas: int = 1, masters: str = "fp32", deterministic: bool = False) -> Ranks:
    """Join the process group: torchrun's, or one of a single process under plain python.

    With replicas the mesh is 2-D: each group of size / replicas neighbouring ranks shards the model
    among themselves, and gradients are averaged over the groups too. From here on SIGTERM and
    SIGUSR1 only ask to stop, see zephyr/distributed/signals.py.
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
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if cuda and here > (seen := torch.cuda.device_count()):
        raise ValueError(
            f"{here} ranks on a machine where each sees {seen} GPU{'s' * (seen > 1)}, and every "
            f"rank needs its own: torchrun --nproc-per-node {seen}, or see CUDA_VISIBLE_DEVICES"
        )
    attention.prepare_back_end()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        machine.tune_arithmetic(deterministic)
        if kernels.implementation(device) == "triton":
            machine.start_triton()
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
    set_timeout(PATIENCE)
    signals.listen()
    ranks = Ranks(rank, size, local_rank, device, mesh)
    ranks.say(*notes)
    return ranks


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that the ranks of this attempt share and that no earlier attempt had.

    torchrun's store outlives its ranks. After a restart it still has the keys under which the ranks
    of the last attempt found each other, and a rank that comes first would read those. Nothing that
    torchrun says tells attempts apart: on several nodes TORCHELASTIC_RESTART_COUNT is each agent's
    own, and an agent that restarts because another did does not count it. So the ranks agree on a
    name. Each rank posts a random id; rank 0 replies to each id with the name of the attempt, until
    every rank has acknowledged it. An id belongs to one process alone, so no reply meant for a dead
    rank reaches a living one.
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


limit = PATIENCE


def set_timeout(seconds: int) -> None:
    """Set how many seconds a collective may wait for another rank before it fails, in every process
    group: the mesh's and the checkpoints'."""
    global limit
    limit = seconds
    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def agree(flag: bool) -> bool:
    """Return True on every rank if the flag is True on any of them. It runs on the CPU, so no
    device waits."""
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def leave() -> None:
    """Leave the process group. Without the barrier, gloo aborts some good runs at their end."""
    dist.barrier()
    dist.destroy_process_group()


@atexit.register
def _leave_at_the_end() -> None:
    """Leave the group of a single process that a mistake ended. NCCL would otherwise add lines of
    its own to the one that says which."""
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()


def finish() -> None:
    """Leave the process group; one of several ranks ends its process here, with code 0.

    A thread of gloo may let go of one of Python's tensors when Python is already winding up, and
    then aborts the process (`terminate called`), after a good run.
    """
    many = dist.get_world_size() > 1
    leave()
    if many:
        sys.stdout.flush()
        os._exit(0)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block on every rank, without a collective inside. If it fails on any rank with a user's
    mistake, every rank raises the first failing rank's error, so that none waits for the others."""
    error = None
    try:
        yield
    except (ValueError, OSError) as mistake:
        error = kind(mistake), str(mistake)
    errors: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            same, text = error
            raise shared(same(text))


def once_per_node(ranks: Ranks, build: Callable[[], T]) -> T:
    """Return the result of `build()`. Each node's first rank calls it before the node's other ranks
    do, which find on the disk what it has made."""
    result = None
    for first in (True, False):
        with together():
            if (ranks.local_rank == 0) == first:
                result = build()
    return result  # type: ignore[return-value]


def on_first(build: Callable[[], T]) -> T:
    """Return the result of rank 0's `build()` on every rank."""
    results = [None]
    with together():
        if dist.get_rank() == 0:
            results = [build()]
    dist.broadcast_object_list(results)
    return results[0]  # type: ignore[return-value]


def shared_folder(path: Path | str) -> None:
    """Make the folder `path` if need be. Raises Storage on every rank unless it is one and the same
    folder for all ranks."""
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
        with together():
            look()
    finally:
        if dist.get_rank() == 0:
            (path / token).unlink(missing_ok=True)


def total(count: int) -> int:
    """Return the sum of `count` over the ranks. It runs on the CPU, so no device waits."""
    counts = torch.tensor(count)
    dist.all_reduce(counts)
    return int(counts)
