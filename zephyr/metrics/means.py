"""Means over all micro-batches and ranks, and the work that a batch is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zephyr.plan.costs import CARDS, Adapters, model_flops


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of the GPU of this name; None for a GPU that is unknown, a MIG
    slice or a laptop's."""
    fits = (
        card.flops
        for key, card in CARDS.items()
        if re.search(rf"\b{key}\b(?!.*(MIG|Laptop))", name)
    )
    return next(fits, None)


def work(config: Any, batch: Any, adapters: Adapters | None = None) -> dict[str, float]:
    """Return what `Log.add` counts of a batch: tokens, pairs, FLOPs, and the tokens it would have
    without shared prompts."""
    layout, tokens, predicted = batch.layout, len(batch.tokens_T), len(batch.targets_N)
    attended = layout.attended(config.sliding_window)
    flops = model_flops(config, tokens, predicted, attended, adapters)
    # each response beside a prompt of its own has as many tokens as keys are gathered here
    unshared = tokens if layout.kv_rows_G is None else len(layout.kv_rows_G)
    return {"tokens": tokens, "unshared": unshared, "pairs": len(batch.pairs), "flops": flops}


class Means:
    """Global means: (sum over micro-batches and ranks) / (count over micro-batches and ranks), key
    by key.

    The keys and their order are given at the start, so that ranks which add different keys, or
    none, still reduce the same vector. Nothing waits for the device before `mean`.
    """

    def __init__(self, keys: Sequence[str], device: torch.device | str = "cpu"):
        self.keys, self.device = tuple(keys), device
        self.sums: dict[str, Any] = dict.fromkeys(self.keys, 0.0)
        self.counts = dict.fromkeys(self.keys, 0.0)

    def add(self, count: float, values: Mapping[str, float | Tensor]) -> None:
        """Add values that belong to `count` pairs or tokens; the elements of a tensor are summed in
        fp64. A key that is absent gets sum and count 0."""
        for key, value in values.items():
            assert key in self.sums, f"{key} is not among the registered keys {self.keys}"
            self.sums[key] += value.detach().double().sum() if isinstance(value, Tensor) else value
            self.counts[key] += count

    def mean(self, **totals: float) -> dict[str, float]:
        """Return the global mean of every key (NaN where the count is 0) and the global sum of
        `totals`.

        Every rank calls it: it is one all_reduce of one fp64 vector, sums | counts | totals.
        """
        values = [*self.sums.values(), *self.counts.values(), *totals.values()]
        # what the host knows goes there in one copy; of what the device knows nothing comes back
        known = [0.0 if isinstance(v, Tensor) else v for v in values]
        flat = torch.tensor(known, dtype=torch.float64).to(self.device)
        for k, value in enumerate(values):
            if isinstance(value, Tensor):
                flat[k] = value
        if dist.is_initialized():
            dist.all_reduce(flat)
        sums, counts, rest = flat.split([len(self.keys), len(self.keys), len(totals)])
        values = torch.cat([sums / counts, rest]).tolist()
        return dict(zip((*self.keys, *totals), values, strict=True))

    def reduce(self, **totals: float) -> dict[str, float]:
        """Return `mean`, then start again from 0."""
        means = self.mean(**totals)
        self.sums = dict.fromkeys(self.keys, 0.0)
        self.counts = dict.fromkeys(self.keys, 0.0)
        return means
