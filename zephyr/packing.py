"""Sequences to one packed micro-batch: Batch, pack_pairs, pack_documents.

Everything is packed and nothing is padded (sequence packing): a micro-batch is one pack of tokens,
without a batch axis.

T tokens of the pack  N predicting tokens  G gathered keys"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zephyr.attention import Layout


class Pair(NamedTuple):
    """Token ids. Both responses continue the same prompt, which ends in the assistant's header."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


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
