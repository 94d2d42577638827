"""What FSDP holds in a forward and a backward: python gathered.py FOLDER"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_costs import WIDE, Live

from zephyr import packing
from zephyr.distributed import fsdp, group
from zephyr.packing import Pair

ranks, result = group.start(), {}
draw = np.random.default_rng(0)
b = packing.pack_pairs([Pair(*(draw.integers(0, 400, n) for n in (3, 4, 4)))], [0])
replicas = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
for kind, mesh in (("always", ranks.mesh), ("never", ranks.mesh), ("replicas", replicas)):
    reshard = "never" if kind == "never" else "always"
    made = fsdp.build(WIDE, ranks._replace(mesh=mesh), "bf16", reshard=reshard)
    for p in made.parameters():
        torch.nn.init.normal_(p.to_local(), std=0.02)
    made(b).sum().backward()  # the second micro-batch finds gradients there
    own = [p.to_local() for p in made.parameters()] + [p.grad.to_local() for p in made.parameters()]
    with Live(own) as live:
        logprob_N = made(b)
        forward, live.peak = live.peak, 0
        logprob_N.sum().backward()
    result[kind] = forward, live.peak
torch.save(result, f"{sys.argv[1]}/{ranks.rank}.pt")
group.finish()
