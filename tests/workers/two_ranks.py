"""What each of two ranks finds, for test_distributed.py: torchrun two_ranks.py FOLDER"""

import os
import sys
from functools import partial
from pathlib import Path

import torch

from zephyr import losses, optim, packing, reference
from zephyr.data.batching import PairSteps
from zephyr.distributed import fsdp, group
from zephyr.weights import config_json, hub

where = Path(sys.argv[1])
ranks = group.start()
os.environ["ZEPHYR_CACHE"] = str(where / f"cache of {ranks.rank}")
inputs = torch.load(where / "inputs.pt", weights_only=False)
batches, data = inputs["batches"], inputs["data"]
count = sum(len(batch.targets_N) for batch in batches)
everything = PairSteps(data, len(data), 10**6, 0, 0, 1).microbatches(0)[0]


def attempt(act):
    try:
        return act()
    except ValueError as error:
        return f"ValueError: {error}"


def refuse(kind, *guilty):
    if ranks.rank in guilty:
        raise kind(f"{ranks.rank} refuses")
    return f"{ranks.rank} agrees"


def in_step(act):
    with group.together():
        result = act()
    return result


def built(folder, recompute="none", precision="fp32"):
    m = fsdp.build(config_json.read(where / folder), ranks, precision, recompute)
    with group.together():
        hub.load(where / folder, m)
    return m


def whole(tensors):
    return {name: x.full_tensor() for name, x in tensors.items()}


def backward(m, batches):
    logprobs = [m(batch) for batch in batches]
    for logprob_N in logprobs:
        (losses.sft(logprob_N) * ranks.size / count).backward()
    return logprobs, whole({name: p.grad for name, p in m.named_parameters()})


mine, nothing = batches[ranks.rank], packing.nothing()
uneven = list(batches) if ranks.rank == 0 else [nothing, nothing]
results = {
    "together": [
        attempt(partial(in_step, partial(refuse, kind, *guilty)))
        for kind, *guilty in ((ValueError,), (ValueError, 0, 1), (ValueError, 1), (OSError, 1))
    ],
    "on_first": [
        attempt(lambda: group.on_first(partial(refuse, ValueError, *guilty)))
        for guilty in ((), (0,), (1,))
    ],
    "total": group.total(10**ranks.rank),
}


def on_disk():
    first = not (where / "built").exists()
    (where / "built").touch()
    return first


results["once_per_node"] = [group.once_per_node(ranks, on_disk)] + [
    attempt(lambda: group.once_per_node(ranks, partial(refuse, ValueError, *guilty)))
    for guilty in ((0,), (1,))
]
for folder in ("base", "tied"):
    m = built(folder)
    shards = {name: p.to_local().numel() for name, p in m.named_parameters()}
    logprobs, gradient = backward(m, [mine])
    m.zero_grad()
    plan = PairSteps(data, 3, 40, 0, ranks.rank, ranks.size)
    reference.cached(m, plan, 99, folder, "fp32", ranks)
    cached = reference.cached(None, plan, 99, folder, "fp32", ranks)  # from rank 0's file alone
    _, of_uneven = backward(m, uneven)
    full = backward(built(folder, "full"), [mine])
    norm = optim.step(optim.adamw(m, 0.1), 1e-3, 1e-2)
    results[folder] = {
        "shards": shards,
        "logprob": logprobs[0].detach(),
        "gradients": gradient,
        "uneven": of_uneven,
        "recomputed": full[1],
        "norm": norm,
        "stepped": whole(dict(m.named_parameters())),
        "tied": m.lm_head.weight is m.model.embed_tokens.weight,
        "after": m(mine).detach(),
        "cached": cached(everything),
    }
results["bf16"] = backward(built("base", precision="bf16"), [mine])[1]
torch.save(results, where / f"{ranks.rank}.pt")
group.finish()
