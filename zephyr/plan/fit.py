"""What fits the memory of a GPU: the largest micro-batch, recomputation, resharding. No torch."""

import bisect

from zephyr.architecture import MistralConfig
from zephyr.config import Training
from zephyr.plan import costs
from zephyr.plan.costs import Adapters, Load

GIB = 2**30
CONTEXT = 1.0 * GIB  # CUDA's context, and what cuBLAS and NCCL hold
FRAGMENTS = 0.04  # of all tensors: what an allocator whose segments grow holds and cannot use
GRAIN = 128  # a budget is a multiple of this many tokens: a matmul's tile
POLICIES = ("none", "elementwise", "full")
ELEMENTWISE = 0.015  # of a step's time: what norms, rotations and products take when computed again
FIXED = 256  # tokens' worth of time that a micro-batch takes besides: gradients are read and added


def occupied(
    c: MistralConfig, t: Training, ranks: int, load: Load, recompute: str, reshard: bool
) -> dict[str, float]:
    """Return the bytes of one GPU by part, at the peak of a micro-batch of `load`."""
    # --precision auto is bf16 on every card there is a plan for
    itemsize, shards = 2 if t.precision != "fp32" else 4, ranks // t.replicas
    a, split = costs.adapters(t), t.masters == "split"
    parts: dict[str, float] = {**costs.state(c, shards, t.adam_state, a, itemsize)}
    if not costs.plain(ranks, t.precision, t.masters, a):
        parts |= costs.sharding(c, shards, itemsize, reshard, a)
        if t.replicas > 1:
            # FSDP2 keeps what a micro-batch adds until its backward ends, in the memory of a stream
            # of its own, which the next forward cannot use
            parts["gradients all-reduced"] = parts["gradients"]
    elif a and itemsize == 2:
        parts["bf16 copies"] = costs.cast(c, recompute, itemsize, a)
    if getattr(t, "reference", "") == "live" and not a:
        parts["live reference"] = parts["masters"] + parts.get("gathered weights", 0)
    parts["activations"] = costs.activations(c, load, recompute, itemsize, split, a)
    block = costs.block_backward(c, load, recompute, itemsize, a)
    parts["head, or a block's backward"] = max(costs.head(c, load, itemsize, a=a), block)
    parts["context and fragments"] = CONTEXT + FRAGMENTS * sum(parts.values())
    return parts


def largest(
    c: MistralConfig,
    t: Training,
    memory: float,
    ranks: int,
    recompute: str,
    reshard: bool,
    row: Load,
    most: float,
) -> int:
    """Return the largest number of tokens, up to about `most`, whose micro-batch fits into `memory`
    bytes; 0 if none fits. `row` is the load of one token."""

    def size(grains: int) -> float:
        load = row.times(grains * GRAIN)
        return sum(occupied(c, t, ranks, load, recompute, reshard).values())

    grains = range(-int(-most // GRAIN) + 1)
    return GRAIN * max(0, bisect.bisect_right(grains, memory, key=size) - 1)


def choose(
    c: MistralConfig, t: Training, memory: float, ranks: int, longest: int, step: float
) -> tuple[int, str]:
    """Return (microbatch_tokens, recompute): the settings' own, or what fits where they say auto.

    `memory` is what a GPU can give, in bytes; `longest` the tokens of the longest pair or chunk;
    `step` the tokens of an optimizer step, over all ranks. For each recompute policy, the largest
    token budget that fits is found, never larger than one rank's whole step. The policy with the
    least time for a token is taken.
    """
    row, share = Load(1, 1 + (t.table == "dpo"), 1, 0), step / ranks
    most, auto = share + longest, t.microbatch_tokens == "auto"
    least = longest if auto else min(t.microbatch_tokens, most)
    a = costs.adapters(t)
    policies = POLICIES if t.recompute == "auto" else (t.recompute,)
    fit = []
    for recompute in policies:
        room = largest(c, t, memory, ranks, recompute, t.reshard != "never", row, most)
        if room >= least:
            fit.append((room if auto else t.microbatch_tokens, recompute))
    smallest = (longest if auto else t.microbatch_tokens, policies[-1])
    return min(fit, key=lambda x: slowness(c, share, *x, a), default=smallest)


def slowness(
    c: MistralConfig, share: float, budget: int, recompute: str, a: Adapters | None = None
) -> float:
    """Return the time of a token, in units of the least that it could be."""
    more = again(c, Load(1, 1, 1, 0), recompute, a)
    return (1 + more) * (1 + FIXED * -(-share // budget) / share)


def again(c: MistralConfig, load: Load, recompute: str, a: Adapters | None = None) -> float:
    """Return the time of what is computed again, as a share of forward and backward."""
    useful = costs.model_flops(c, load.tokens, load.predicted, load.attended, a)
    more = costs.recomputed(c, load, recompute, a) / useful
    return more + ELEMENTWISE * (recompute == "elementwise")


def reshard(
    c: MistralConfig, t: Training, memory: float, ranks: int, tokens: int, recompute: str
) -> bool:
    """Return True if FSDP frees a block's weights between its forward and its backward: as the
    settings say, or, if they say auto, unless all gathered weights fit beside micro-batches of
    `tokens`."""
    if t.reshard != "auto":
        return t.reshard == "always"
    load = Load(1, 1 + (t.table == "dpo"), 1, 0).times(tokens)
    return sum(occupied(c, t, ranks, load, recompute, False).values()) > memory
