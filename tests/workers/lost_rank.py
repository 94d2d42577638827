"""Rank 1 of two is lost: python lost_rank.py SIGNAL|bug together|backward"""

import os
import signal
import sys

import torch
from torch.distributed.fsdp import fully_shard

from zephyr.distributed import group
from zephyr.run import exits


def main():
    ranks = group.start(int(os.environ["WORLD_SIZE"]))  # groups of the mesh's own
    layer = fully_shard(torch.nn.Linear(64, 64), mesh=ranks.mesh)
    group.agree(False)
    group.set_timeout(3)
    loss = layer(torch.ones(1, 64)).sum()
    if ranks.rank == 1:
        print("ready", file=sys.stderr, flush=True)
        if sys.argv[1] == "bug":
            raise TypeError("a bug of ours")
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    if sys.argv[2] == "together":
        with group.together():
            pass
    loss.backward()


sys.argv[0] = "train_dpo.py"
exits.call(main)
