"""A rank of many without the others: python tests/simulate.py MODEL RANKS REPLICAS RECOMPUTE LORA

A fake process group answers every collective, and fake tensors have shapes but no numbers: a 70 B
model on 512 ranks takes a step on a laptop. Prints what torch's own tracker saw of this rank's
bytes, and what zephyr/plan/costs.py and zephyr/plan/fit.py have for them, as JSON.
"""

import json
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from zephyr import attention, lora, optim, packing
from zephyr.config import DPOConfig
from zephyr.distributed import fsdp
from zephyr.distributed.group import Ranks
from zephyr.packing import Pair
from zephyr.plan import __main__ as plan_command
from zephyr.plan import costs, fit

LENGTHS = [(170, 320, 290)] * 5


def main(model: str, ranks: int, replicas: int, recompute: str, rank: int) -> dict:
    attention.in_one_call = lambda _: True  # as on a GPU: the one call of variable length
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    c, shards = plan_command.MODELS[model], ranks // replicas
    if replicas == 1:
        mesh = init_device_mesh("cpu", (ranks,))
    else:
        mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    pairs = [Pair(*(np.zeros(n, np.int64) for n in three)) for three in LENGTHS]
    batch = packing.pack_pairs(pairs, list(range(len(pairs))))
    load = costs.Load(
        len(batch.tokens_T),
        len(batch.layout.kv_rows_G),
        len(batch.targets_N),
        batch.layout.attended(c.sliding_window),
    )
    cpu, seen = torch.device("cpu"), {}
    t = DPOConfig(model="", data=("",), out="", replicas=replicas, lora_rank=rank)
    with FakeTensorMode(allow_non_fake_inputs=True):
        here = Ranks(0, ranks, 0, cpu, mesh)
        m = fsdp.build(c, here, "bf16", recompute, adapters=lora.spec(t))
        if rank:  # as where blocks are compiled, the first one's input takes a gradient
            m.model.embed_tokens.register_forward_hook(lambda *call: call[2].requires_grad_())
        optimizer = optim.adamw(m, 0.0)
        tracker = FSDPMemTracker(m, optimizer)
        tracker.track_inputs((batch.tokens_T,))

        def bytes_of(*kinds: _FSDPRefType, snapshot: str = "current") -> int:
            found = tracker.get_tracker_snapshot(snapshot)[cpu]
            return sum(found[kind] for kind in kinds) if kinds else found["Total"]

        with tracker:
            logprob_N = m(batch)
            seen["activations"] = bytes_of(_FSDPRefType.ACT)
            logprob_N.sum().backward()
            seen["masters"] = bytes_of(_FSDPRefType.SHARDED_PARAM)
            seen["gradients"] = bytes_of(_FSDPRefType.SHARDED_GRAD)
            seen["peak"] = bytes_of(snapshot="peak")
        optim.step(optimizer, 1e-3, 1.0)
        moments = (x for kept in optimizer.state.values() for x in kept.values() if x.dim())
        seen["moments"] = sum(x.to_local().nbytes for x in moments)
    parts = fit.occupied(c, t, ranks, load, recompute, reshard=True)
    del parts["context and fragments"]
    parts.pop("gradients all-reduced", 0)  # another stream's: not at the same time as activations
    parts["masters"] += parts.pop("frozen weights", 0)
    # the tracker ran before the optimizer made its moments
    parts["peak"] = sum(parts.values()) - parts["moments"]
    parts["activations"] += costs.head_kept(c, load, 2)
    return {name: (size, parts[name]) for name, size in seen.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    model, ranks, replicas, recompute, rank = sys.argv[1:]
    print(json.dumps(main(model, int(ranks), int(replicas), recompute, int(rank)), indent=1))
