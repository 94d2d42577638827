"""Token arrays to packed batches, and the plan of which batch runs when and on which rank.

Everything is packed and nothing is padded: a micro-batch is one row of tokens without a batch
axis. What an optimizer step holds depends on (seed, step) alone; the token budget and the number
of ranks only cut it into micro-batches.

T rows  N predicting rows  G gathered keys
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from zephyr.attention import Layout
from zephyr.data import Pair, Tokens


@dataclass(frozen=True)
class Batch:
    """One packed row and the rows of it that predict.

    For pairs, `response_N` counts over the micro-batch's responses: its pair k's chosen is 2k, its
    rejected 2k + 1, and `pairs[k]` is that pair's number in the data. For documents it is all 0,
    and `documents` has the number of each piece's.
    """

    tokens_T: Tensor
    layout: Layout
    predict_N: Tensor
    targets_N: Tensor
    response_N: Tensor
    pairs: Tensor
    documents: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In memory from which a GPU copies while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        keep = self.layout
        layout = Layout(
            move(keep.position_T),
            move(keep.cu_q),
            move(keep.cu_k),
            move(keep.kv_rows_G),
            keep.max_q,
            keep.max_k,
        )
        names = ("tokens_T", "predict_N", "targets_N", "response_N", "pairs")
        return replace(self, layout=layout, **{n: move(getattr(self, n)) for n in names})


def pack_pairs(pairs: list[Pair], numbers: list[int]) -> Batch:
    """Pairs as one row in which each prompt is stored, and computed, once.

    Prompt `a b c`, chosen `p q`, rejected `x y z`; a response's last token predicts nothing:
        row        0 1 2 3 4 5
        tokens     a b c p x y
        position   0 1 2 3 3 4
        cu_q       0 4 6             queries 0..3, a causal document; 4..5, the rejected branch
        cu_k       0 4 9
        kv_rows    0 1 2 3 | 0 1 2 4 5
        predict    2 3 | 2 4 5
        targets    p q | x y z
        response   0 0 | 1 1 1
    """
    tokens, position, queries, keys, rows = [], [], [0], [0], []
    predict, targets, response = [], [], []
    at = 0  # the row where the next pair starts
    for k, (prompt, chosen, rejected) in enumerate(pairs):
        p, c, r = len(prompt), len(chosen), len(rejected)
        branch = at + p + c - 1  # the row where the rejected branch starts
        end = branch + r - 1
        tokens += [prompt, chosen[:-1], rejected[:-1]]
        position += [np.arange(p + c - 1), np.arange(p, p + r - 1)]
        rows.append(np.arange(at, branch))
        queries.append(branch)
        keys.append(keys[-1] + p + c - 1)
        if r > 1:
            rows += [np.arange(at, at + p), np.arange(branch, end)]
            queries.append(end)
            keys.append(keys[-1] + p + r - 1)
        last = [at + p - 1]  # the prompt's last row predicts both responses' first tokens
        predict += [last, np.arange(at + p, branch), last, np.arange(branch, end)]
        targets += [chosen, rejected]
        response += [np.full(c, 2 * k), np.full(r, 2 * k + 1)]
        at = end
    return _batch(tokens, position, queries, keys, rows, predict, targets, response, numbers)


def pack_documents(pieces: list[tuple[np.ndarray, np.ndarray, int]]) -> Batch:
    """Pieces of documents (ids, trained, the document's number) as one row; each is causal and sees
    only itself.

    A piece of n + 1 ids has n input rows: row i predicts id i + 1, and is trained on if
    trained[i + 1]. Pieces `a b c` and `d e`: tokens a b d, targets b c e, positions 0 1 0.
    """
    tokens, position, queries, predict, targets = [], [], [0], [], []
    for ids, trained, _ in pieces:
        tokens.append(ids[:-1])
        position.append(np.arange(len(ids) - 1))
        rows = np.flatnonzero(trained[1:])
        predict.append(queries[-1] + rows)
        targets.append(ids[1:][rows])
        queries.append(queries[-1] + len(ids) - 1)
    response = [np.zeros(sum(map(len, targets)), np.int64)]
    batch = _batch(tokens, position, queries, queries, None, predict, targets, response, [])
    return replace(batch, documents=tuple(number for _, _, number in pieces))


def ahead(
    microbatches: Callable[[int], list[Batch]],
    steps: range,
    device: torch.device,
    phase: Callable[[str], AbstractContextManager],
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, its micro-batches) for each of `steps`; while one is used, a thread packs the next.
    What it takes to wait for the thread is the phase `data`."""

    def make(step: int) -> list[Batch]:
        made = microbatches(step)
        return [batch.pinned() for batch in made] if cuda else made

    cuda = device.type == "cuda"
    # a thread starts on the first GPU, and pinning there would take memory of it
    start = {"initializer": torch.cuda.set_device, "initargs": (device,)} if cuda else {}
    with ThreadPoolExecutor(1, **start) as pool:
        coming = pool.submit(make, steps.start) if steps else None
        for step in steps:
            with phase("data"):
                batches = coming.result()
            if step + 1 in steps:
                coming = pool.submit(make, step + 1)
            yield step, batches


def nothing() -> Batch:
    """The micro-batch of a rank that has none left: one token that predicts nothing, so that
    every rank takes part in the same collectives. Its gradient is exactly zero."""
    return _batch([[0]], [[0]], [0, 1], [0, 1], None, [], [], [], [])


def _batch(tokens, position, queries, keys, rows, predict, targets, response, pairs) -> Batch:
    def flat(parts: list, dtype: torch.dtype = torch.int64) -> Tensor:
        whole = np.concatenate([np.asarray(p, np.int64) for p in parts] or [np.zeros(0, np.int64)])
        return torch.from_numpy(whole).to(dtype)

    layout = Layout(
        position_T=flat(position),
        cu_q=flat([queries], torch.int32),
        cu_k=flat([keys], torch.int32),
        kv_rows_G=None if rows is None else flat(rows),
        max_q=int(np.diff(queries).max()),
        max_k=int(np.diff(keys).max()),
    )
    return Batch(flat(tokens), layout, flat(predict), flat(targets), flat(response), flat([pairs]))


def bins(lengths: np.ndarray, budget: int, multiple: int = 1) -> list[list[int]]:
    """Item numbers in bins of at most `budget` tokens; the number of bins is a multiple of
    `multiple`, and some may be empty.

    First-fit decreasing finds how many bins are needed; then, so that no rank waits for another,
    the items are dealt again, longest first, to the emptiest bin, if that keeps the budget.
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
class PairPlan:
    """Which pairs run in which step, micro-batch and rank.

    Epoch e visits the pairs in the order of permutation(seed, e); step s takes the next `batch` of
    them, the last of an epoch what is left. With `shuffle` false the order is the data's own.
    """

    data: Tokens
    batch: int
    budget: int
    seed: int
    rank: int
    world: int
    shuffle: bool = True

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
        """The pairs of optimizer step `step`, counted from 0 through all epochs."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = permutation(len(self.data), self.seed, epoch) if self.shuffle else None
        numbers = np.arange(len(self.data)) if order is None else order
        return numbers[k * self.batch : (k + 1) * self.batch]

    def microbatches(self, step: int) -> list[Batch]:
        """This rank's share of a step; every rank gets as many, some perhaps of nothing."""
        numbers = self.step(step)
        groups = bins(self.data.pair_lengths()[numbers], self.budget, self.world)
        mine = [numbers[group].tolist() for group in groups[self.rank :: self.world]]
        return [pack_pairs([self.data.pair(k) for k in m], m) if m else nothing() for m in mine]

    def epoch(self) -> Iterator[Batch]:
        """This rank's micro-batches of one whole pass."""
        return (b for step in range(self.steps_per_epoch) for b in self.microbatches(step))


@dataclass(frozen=True)
class DocumentPlan:
    """Which rows of tokens run in which step, micro-batch and rank.

    Epoch e lays the documents end to end in the order of permutation(seed, e) and cuts them into
    rows of `length` inputs, as Zephyr did, but a row's pieces never see each other. Each token but
    a document's first is predicted exactly once: a piece cut off at a row's end still predicts the
    id that opens the next row. Step s takes the next `batch` rows.
    """

    data: Tokens
    batch: int
    length: int
    budget: int
    seed: int
    rank: int
    world: int
    train_on: str = "all"
    shuffle: bool = True

    def __post_init__(self) -> None:
        _enough(self.batch, self.world)

    @property
    def rows_per_epoch(self) -> int:
        inputs = len(self.data.ids) - len(self.data)
        return -(-inputs // self.length)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.batch)

    def row(self, epoch: int, row: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """The pieces (ids, trained, document) of one row."""
        order, ends = _stream(self.data, self.seed, epoch, self.shuffle)
        start, stop = row * self.length, min((row + 1) * self.length, int(ends[-1]))
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
        """This rank's share of a step; every rank gets as many, some perhaps of nothing."""
        epoch, k = divmod(step, self.steps_per_epoch)
        rows = np.arange(k * self.batch, min((k + 1) * self.batch, self.rows_per_epoch))
        groups = bins(np.full(len(rows), self.length), self.budget, self.world)
        return [
            pack_documents([p for row in rows[group] for p in self.row(epoch, int(row))])
            if group
            else nothing()
            for group in groups[self.rank :: self.world]
        ]

    def epoch(self) -> Iterator[Batch]:
        """This rank's micro-batches of one whole pass."""
        return (b for step in range(self.steps_per_epoch) for b in self.microbatches(step))


def _enough(batch: int, world: int) -> None:
    if batch < world:
        raise ValueError(f"--batch {batch} is less than the {world} ranks; each needs a share")


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


@lru_cache(maxsize=2)
def _stream(data: Tokens, seed: int, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """The epoch's order of documents, and the count of inputs up to each one's end."""
    order = permutation(len(data), seed, epoch) if shuffle else np.arange(len(data))
    inputs = np.diff(data.ends[:, 0], prepend=0) - 1
    return order, np.cumsum(inputs[order])
