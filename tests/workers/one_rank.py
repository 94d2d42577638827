"""One rank that loads and saves, for test_weights.py"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from zephyr.model import Mistral
from zephyr.weights import config_json, hub

where, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=rank, world_size=size)


def sharded():
    with torch.device("meta"):
        model = Mistral(config_json.read(where / "base"))
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model).to_empty(device="cpu")


model = sharded()
hub.load(where / "base", model)
assert model.lm_head.weight.to_local().shape[0] < 101
hub.save(model, where / "out", where / "base", shard_bytes=20_000)
dist.barrier()
for act, mine in (
    (lambda: hub.save(model, where / "out", where / "base"), rank == 0),
    (lambda: hub.load(where / "broken", sharded()), rank == size - 1),
):
    try:
        act()
        assert not mine, "this rank should have failed"
    except ValueError as error:
        assert mine and ("exists already" in str(error) or "NaN" in str(error)), error
    dist.barrier()
dist.destroy_process_group()
