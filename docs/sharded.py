"""What one rank of eight sends and computes while a model of three blocks takes a step: as JSON.

    python docs/sharded.py        for one copy of the model, and for two (HSDP)

The model is Mistral-7B but for its number of blocks, sharded by zephyr/distributed/fsdp.py. A fake
process group answers each collective, and fake tensors have shapes but no numbers, so that it runs
on a laptop. The events are in the order in which the program asks for them.
"""

import json
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # wherever it is started from

from zephyr import attention, packing  # noqa: E402
from zephyr.distributed import fsdp  # noqa: E402
from zephyr.distributed.group import Ranks  # noqa: E402
from zephyr.plan.__main__ import MODELS  # noqa: E402

RANKS, BLOCKS = 8, 3
COLLECTIVES = {
    "c10d::_allgather_base_": "gather",
    "c10d::_reduce_scatter_base_": "scatter",
    "c10d::allreduce_": "sum",
}


class Events(TorchDispatchMode):
    """Records collectives while it is entered, and the passes of blocks that are told to it."""

    def __init__(self):
        super().__init__()
        back = list(reversed(range(BLOCKS)))
        # embedding, norm and head are a unit of their own, gathered first and scattered last;
        # blocks are gathered in the order of the forward, then in that of the backward
        self.units = {
            "gather": iter(["root", *range(BLOCKS), *back]),
            "scatter": iter([*back, "root"]),
            "sum": iter([*back, "root"]),
        }
        self.rows = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if what := COLLECTIVES.get(op.name()):
            tensors = args[0] if isinstance(args[0], list) else args[:2]
            whole = max(tensors, key=torch.Tensor.numel)
            kind = str(whole.dtype).removeprefix("torch.")
            unit = next(self.units[what])
            self.rows.append({"what": what, "unit": unit, "dtype": kind, "bytes": whole.nbytes})
        return op(*args, **(kwargs or {}))

    def passed(self, what: str, number: int, block: torch.nn.Module, *_) -> None:
        """The end of a block's forward, or the beginning of its backward."""
        freed = isinstance(block.mlp.up_proj.weight, DTensor)
        self.rows.append({"what": what, "unit": number, "freed": freed})


def step(replicas: int) -> dict:
    """Return the ranks' numbers by copy of the model, and the events of rank 0."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    sizes = (RANKS,) if replicas == 1 else (replicas, RANKS // replicas)
    names = None if replicas == 1 else ("replicate", "shard")
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    pair = packing.Pair(*(np.zeros(n, np.int64) for n in (5, 4, 3)))
    batch, events = packing.pack_pairs([pair], [0]), Events()
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = replace(MODELS["mistral-7b"], num_hidden_layers=BLOCKS)
        model = fsdp.build(shape, Ranks(0, RANKS, 0, torch.device("cpu"), mesh), "bf16")
        for number, block in enumerate(model.model.layers):
            block.register_forward_hook(partial(events.passed, "forward", number))
            block.register_full_backward_pre_hook(partial(events.passed, "backward", number))
        with events:
            model(batch).sum().backward()
    dist.destroy_process_group()
    return {"mesh": mesh.mesh.view(replicas, -1).tolist(), "events": events.rows}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    attention.in_one_call = lambda _: True  # as on a GPU: the one call of variable length
    print(json.dumps([step(replicas=1), step(replicas=2)]))
