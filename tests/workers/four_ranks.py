"""What each of four ranks finds, for test_nodes.py: python four_ranks.py FOLDER, under torchrun"""

import os
import sys
from pathlib import Path

import torch

from zephyr import losses, optim
from zephyr.data.batching import PairSteps, epoch
from zephyr.distributed import fsdp, group
from zephyr.metrics.means import Means
from zephyr.weights import config_json, hub

where, rank = Path(sys.argv[1]), int(os.environ["RANK"])
inputs = torch.load(where / "inputs.pt", weights_only=False)
batches, data = inputs["batches"], inputs["data"]
count = sum(len(batch.targets_N) for batch in batches)
os.environ["LOCAL_RANK"] = str(rank % 2)  # two nodes, so far as the code can tell
results = {}


def whole(tensors):
    return {name: x.full_tensor().clone() for name, x in tensors.items()}


for replicas in (1, 2, 4):
    ranks = group.start(replicas)
    m = fsdp.build(config_json.read(where / "base"), ranks, "fp32")
    with group.together():
        hub.load(where / "base", m)
    optimizer = optim.adamw(m, 0.1)
    shards = {name: p.to_local().numel() for name, p in m.named_parameters()}
    means = Means(losses.METRICS)
    plan = PairSteps(data, 8, 64, 0, rank, 4, shuffle=False)
    for batch in epoch(plan, torch.device("cpu")):
        means.add(
            len(batch.pairs),
            losses.preference(
                "dpo", m(batch), batch.response_N, torch.zeros(2 * len(batch.pairs)), 0.1
            ),
        )
    logprob_N = m(batches[rank])
    (losses.sft(logprob_N) * ranks.size / count).backward()
    gradient = whole({name: p.grad for name, p in m.named_parameters()})
    norm = optim.step(optimizer, 1e-3, 1e-2)
    results[replicas] = {
        "logprob": logprob_N.detach(),
        "gradients": gradient,
        "norm": norm,
        "shards": shards,
        "stepped": whole(dict(m.named_parameters())),
        "means": means.mean(),
    }
    if replicas == 4:
        results["agree"] = [group.agree(flag) for flag in (False, rank == 3, True)]
        node = where / f"node {rank // 2}"

        def built():
            node.mkdir(exist_ok=True)
            (node / str(rank)).touch()
            return sorted(p.name for p in node.iterdir())

        results["once_per_node"] = group.once_per_node(ranks, built)
        group.shared_folder(where / "made" / "run")
        try:
            group.shared_folder(node)
        except ValueError as error:
            results["not shared"] = error.code, str(error)
        results["left over"] = [p.name for p in where.rglob(".seen*")]
    else:
        group.leave()
torch.save(results, where / f"{rank}.pt")
group.finish()
