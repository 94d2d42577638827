"""Means over all micro-batches and ranks, and the work that a batch is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zephyr.plan.costs import CARDS, model_flops


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device of this name; None when unknown, a MIG slice or a laptop."""
    fits = (
        card.flops
        for key, card in CARDS.items()
        if re.search(rf"\b{key}\b(?!.*(MIG|Laptop))", name)
    )
    return next(fits, None)


def work(config: Any, batch: Any) -> dict[str, float]:
    """The host counts of a packed batch that `Log.add` takes beside its sums."""
    layout, tokens, predicted = batch.layout, len(batch.tokens_T), len(batch.targets_N)
    flops = model_flops(config, tokens, predicted, layout.attended(config.sliding_window))
    # each response beside a prompt of its own has as many rows as keys are gathered here
    unshared = tokens if layout.kv_rows_G is None else len(layout.kv_rows_G)
    return {"tokens": tokens, "unshared": unshared, "pairs": len(batch.pairs), "flops": flops}


class Means:
    """(sum over micro-batches and ranks) / (count over micro-batches and ranks), key by key.

    The keys and their order are given up front, so that ranks which add different keys, or none,
    still reduce the same vector. Nothing waits for the device before `mean`.
    """

    def __init__(self, keys: Sequence[str], device: torch.device | str = "cpu"):
        self.keys, self.device = tuple(keys), device
        self.sums: dict[str, Any] = dict.fromkeys(self.keys, 0.0)
        self.counts = dict.fromkeys(self.keys, 0.0)

    def add(self, count: float, values: Mapping[str, float | Tensor]) -> None:
        """Adds values that belong to `count` pairs or tokens, a tensor's elements summed in fp64;
        a key that is absent gets sum and count 0."""
        for key, value in values.items():
            assert key in self.sums, f"{key} is not among the registered keys {self.keys}"
            self.sums[key] += value.detach().double().sum() if isinstance(value, Tensor) else value
            self.counts[key] += count

    def mean(self, **totals: float) -> dict[str, float]:
        """Global mean of every key (NaN where the count is 0) and global sum of `totals`.

        Every rank calls it: one all_reduce of one fp64 vector, sums | counts | totals.
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
        """`mean`, then start anew."""
        means = self.mean(**totals)
        self.sums = dict.fromkeys(self.keys, 0.0)
        self.counts = dict.fromkeys(self.keys, 0.0)
        return means
