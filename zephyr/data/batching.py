"""Which pairs or documents run in which optimizer step, micro-batch and rank.

What a step holds depends on (seed, step) alone; the token budget and the number of ranks only cut
it into micro-batches (gradient accumulation)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from zephyr.config import DPOConfig, SFTConfig
from zephyr.data.arrays import Tokens
from zephyr.distributed.group import Ranks
from zephyr.packing import Batch, nothing, pack_documents, pack_pairs


class Journal(Protocol):
    """What `prefetch` tells: see zephyr/metrics/journal.py."""

    def begin(self, step: int) -> None: ...
    def phase(self, name: str) -> AbstractContextManager: ...


def prefetch(
    data: "PairSteps | DocumentSteps", steps: range, device: torch.device, journal: Journal
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield (step, this rank's micro-batches of it) for each of `steps`, packed ahead. Time spent
    waiting for them is the phase `data`."""
    packed = packed_ahead(data, steps, device)
    for step in steps:
        with journal.phase("data"):
            batches = next(packed)
        journal.begin(step + 1)
        yield step, batches


def packed_ahead(
    data: "PairSteps | DocumentSteps", steps: Sequence[int], device: torch.device
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each of `steps`, for a GPU in pinned memory. While those
    of one step are used, a thread packs the next one's."""

    def make(step: int) -> list[Batch]:
        made = data.microbatches(step)
        return [batch.pinned() for batch in made] if cuda else made

    cuda = device.type == "cuda"
    # a thread starts on the first GPU, and pinning there would take memory of it
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if cuda else {}
    with ThreadPoolExecutor(1, **start) as pool:
        coming = None
        for step in [*steps, None]:
            made, coming = coming, None if step is None else pool.submit(make, step)
            if made is not None:
                yield made.result()


def epoch(data: "PairSteps | DocumentSteps", device: torch.device) -> Iterator[Batch]:
    """Yield this rank's micro-batches of one pass over the data, on `device`."""
    for batches in packed_ahead(data, range(data.steps_per_epoch), device):
        yield from (batch.to(device) for batch in batches)


def bins(lengths: np.ndarray, budget: int, multiple: int = 1) -> list[list[int]]:
    """Return item numbers in bins of at most `budget` tokens. The number of bins is a multiple of
    `multiple`; some may be empty.

    First-fit decreasing finds how many bins are needed. Then the items are dealt again, longest
    first, each to the emptiest bin, so that no rank waits for another; if that breaks the budget,
    the first result stands.
    """
    order = np.argsort(-lengths, kind="stable")
    loads: list[int] = []
    first_fit: list[list[int]] = []
    for item in order.tolist():
        size = int(lengths[item])
        fit = next((b for b, load in enumerate(loads) if load + size <= budget), len(loads))
        if fit == len(loads):
            loads.append(0)
            first_fit.append([])
        loads[fit] += size
        first_fit[fit].append(item)
    count = -(-len(first_fit) // multiple) * multiple
    even: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for item in order.tolist():
        emptiest = loads.index(min(loads))
        loads[emptiest] += int(lengths[item])
        even[emptiest].append(item)
    if max(loads, default=0) <= budget:
        return even
    return first_fit + [[] for _ in range(count - len(first_fit))]


@dataclass(frozen=True)
class PairSteps:
    """Which pairs run in which step, micro-batch and rank.

    Epoch e visits the pairs in the order of permutation(seed, e). Step s takes the next `batch` of
    them; the last step of an epoch takes what is left. Without `shuffle` the order is that of the
    data.
    """

    data: Tokens
    batch: int
    budget: int
    seed: int
    rank: int
    world: int
    shuffle: bool = True

    @classmethod
    def of(cls, data: Tokens, c: DPOConfig, ranks: Ranks, shuffle: bool = True) -> "PairSteps":
        """Return the steps of this rank: the settings say how many items are in a step and how many
        tokens in a micro-batch. Without `shuffle` (held-out data) the order is that of the data."""
        return cls(data, c.batch, c.microbatch_tokens, c.seed, ranks.rank, ranks.size, shuffle)

    def __post_init__(self) -> None:
        _enough(self.batch, self.world)
        longest = int(self.data.pair_lengths().max())
        if longest > self.budget:
            raise ValueError(
                f"--microbatch-tokens {self.budget} is less than the longest pair, {longest} "
                "packed tokens; raise it or lower --max-length"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data) // self.batch)

    def step(self, step: int) -> np.ndarray:
        """Return the numbers of the pairs in optimizer step `step`, counted from 0 through all
        epochs."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = permutation(len(self.data), self.seed, epoch) if self.shuffle else None
        numbers = np.arange(len(self.data)) if order is None else order
        return numbers[k * self.batch : (k + 1) * self.batch]

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's share of a step. Every rank gets the same number of micro-batches; some may
        be empty."""
        numbers = self.step(step)
        groups = bins(self.data.pair_lengths()[numbers], self.budget, self.world)
        mine = [numbers[group].tolist() for group in groups[self.rank :: self.world]]
        return [pack_pairs([self.data.pair(k) for k in m], m) if m else nothing() for m in mine]


@dataclass(frozen=True)
class DocumentSteps:
    """Which chunks of tokens run in which step, micro-batch and rank.

    Epoch e lays the documents end to end in the order of permutation(seed, e) and cuts them into
    chunks of `length` inputs, as Zephyr did, but a chunk's pieces never see each other. Each token
    but a document's first is predicted exactly once: a piece cut off at a chunk's end still
    predicts the id that opens the next chunk. Step s takes the next `batch` chunks."""

    data: Tokens
    batch: int
    length: int
    budget: int
    seed: int
    rank: int
    world: int
    train_on: str = "all"
    shuffle: bool = True

    @classmethod
    def of(cls, data: Tokens, c: SFTConfig, ranks: Ranks, shuffle: bool = True) -> "DocumentSteps":
        """The steps of this rank by the settings."""
        cut = c.max_length, c.microbatch_tokens
        return cls(data, c.batch, *cut, c.seed, ranks.rank, ranks.size, c.train_on, shuffle)

    def __post_init__(self) -> None:
        _enough(self.batch, self.world)

    @property
    def chunks_per_epoch(self) -> int:
        inputs = len(self.data.ids) - len(self.data)
        return -(-inputs // self.length)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.chunks_per_epoch // self.batch)

    def chunk(self, epoch: int, number: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """The pieces (ids, trained, document) of one chunk."""
        order, ends = _stream(self.data, self.seed, epoch, self.shuffle)
        start, stop = number * self.length, min((number + 1) * self.length, int(ends[-1]))
        pieces = []
        k = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document = int(order[k])
            end = int(self.data.ends[document, 0])
            a = end - 1 - (int(ends[k]) - start)  # in the flat arrays, where the piece starts
            taken = min(int(ends[k]), stop) - start
            ids = self.data.ids[a : a + taken + 1]
            everything = self.train_on == "all"
            trained = np.ones(taken + 1, bool) if everything else self.data.mask[a : a + taken + 1]
            pieces.append((ids, trained, document))
            start += taken
            k += 1
        return pieces

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's share of a step. Every rank gets the same number of micro-batches; some may
        be empty."""
        epoch, k = divmod(step, self.steps_per_epoch)
        numbers = np.arange(k * self.batch, min((k + 1) * self.batch, self.chunks_per_epoch))
        groups = bins(np.full(len(numbers), self.length), self.budget, self.world)
        return [
            pack_documents([p for number in numbers[group] for p in self.chunk(epoch, int(number))])
            if group
            else nothing()
            for group in groups[self.rank :: self.world]
        ]


def _enough(batch: int, world: int) -> None:
    if batch < world:
        raise ValueError(f"--batch {batch} is less than the {world} ranks; each needs a share")


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of n items in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


@lru_cache(maxsize=2)
def _stream(data: Tokens, seed: int, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the documents in an epoch, and for each the count of inputs up to its
    end."""
    order = permutation(len(data), seed, epoch) if shuffle else np.arange(len(data))
    inputs = np.diff(data.ends[:, 0], prepend=0) - 1
    return order, np.cumsum(inputs[order])
