"""Sequences to one packed micro-batch (sequence packing): Batch, pack_pairs, pack_documents.

Everything is packed and nothing is padded: a micro-batch is one pack of T tokens, without a batch
axis. Its pairs store and compute each prompt once (prefix sharing).

T tokens of the pack  N predicting places  G gathered keys
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from zephyr.attention import Layout

Record = TypeVar("Record")
NOWHERE = np.arange(0)


class Pair(NamedTuple):
    """Token ids. Both responses continue the same prompt, which ends in the assistant's header."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One pack of tokens, and what is predicted at which of its places.

    For pairs, `response_N` counts over the micro-batch's responses: its pair k's chosen is 2k, its
    rejected 2k + 1, and `pairs[k]` is that pair's number in the data. For documents it is all 0,
    and `documents` has the number of each piece's document.
    """

    tokens_T: Tensor
    layout: Layout
    predict_N: Tensor  # the places whose hidden states predict
    targets_N: Tensor  # the tokens to be predicted there
    response_N: Tensor
    pairs: Tensor
    documents: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; a copy to a GPU is queued, and the host goes on."""
        return map_tensors(self, lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in pinned memory, from which a GPU copies while the host goes on."""
        return map_tensors(self, Tensor.pin_memory)


def map_tensors(record: Record, f: Callable[[Tensor], Tensor]) -> Record:
    """The same frozen dataclass with `f` applied to every tensor in it, at any depth."""
    changed = {}
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            changed[name] = f(value)
        elif is_dataclass(value):
            changed[name] = map_tensors(value, f)
    return replace(record, **changed)


class PackBuilder:
    """A pack under construction, segment by segment. A segment is a run of tokens with the keys
    that they may see: `attention.Layout` shows one."""

    def __init__(self, shares_prompts: bool):
        self.shares_prompts = shares_prompts
        self.tokens, self.position, self.kv_rows = [], [], []  # arrays, to be joined
        self.cu_seqlens_q, self.cu_seqlens_k = [0], [0]
        self.predicting, self.targets, self.response = [], [], []

    def segment(
        self, tokens: Sequence[int], first_position: int = 0, prefix: np.ndarray = NOWHERE
    ) -> np.ndarray:
        """Append tokens that see the places `prefix`, and then each other, causally. Returns their
        places; no tokens make no segment.

        A prefix is the beginning of the last segment that had none: kernels.attention needs that.
        """
        start, count = self.cu_seqlens_q[-1], len(tokens)
        own = np.arange(start, start + count)
        if count:
            self.tokens.append(tokens)
            self.position.append(np.arange(first_position, first_position + count))
            self.kv_rows += [prefix, own]
            self.cu_seqlens_q.append(start + count)
            self.cu_seqlens_k.append(self.cu_seqlens_k[-1] + len(prefix) + count)
        return own

    def predict(self, places: np.ndarray, targets: Sequence[int], response: int = 0) -> None:
        """Let the hidden state at each of `places` predict the target beside it."""
        self.predicting.append(places)
        self.targets.append(targets)
        self.response.append(np.full(len(targets), response))

    def batch(self, pairs: Sequence[int] = (), documents: Sequence[int] = ()) -> Batch:
        kv_rows_G = _joined(self.kv_rows) if self.shares_prompts else None
        layout = Layout(
            position_T=_joined(self.position),
            cu_seqlens_q=torch.tensor(self.cu_seqlens_q, dtype=torch.int32),
            cu_seqlens_k=torch.tensor(self.cu_seqlens_k, dtype=torch.int32),
            kv_rows_G=kv_rows_G,
            kv_inverse_2T=None if kv_rows_G is None else inverse(kv_rows_G),
            max_q=int(np.diff(self.cu_seqlens_q).max()),
            max_k=int(np.diff(self.cu_seqlens_k).max()),
        )
        return Batch(
            tokens_T=_joined(self.tokens),
            layout=layout,
            predict_N=_joined(self.predicting),
            targets_N=_joined(self.targets),
            response_N=_joined(self.response),
            pairs=torch.tensor(pairs, dtype=torch.int64),
            documents=tuple(documents),
        )


def inverse(kv_rows_G: Tensor) -> Tensor:
    """Return where each place stands in kv_rows [2, T]: the first time, and the second or -1.

    No place may stand there three times: `attention.gathered` would lose a gradient.
    """
    assert torch.bincount(kv_rows_G).max() <= 2, "a prompt is shared by two responses at most"
    places_G, order_G = kv_rows_G.sort(stable=True)
    first_T = torch.searchsorted(places_G, torch.arange(int(places_G[-1]) + 1))
    again_T = torch.full_like(first_T, -1)
    twice_G = places_G[1:] == places_G[:-1]
    again_T[places_G[1:][twice_G]] = order_G[1:][twice_G]
    return torch.stack([order_G[first_T], again_T])


def _joined(parts: list) -> Tensor:
    arrays = [np.asarray(part, np.int64) for part in parts]
    return torch.from_numpy(np.concatenate(arrays or [NOWHERE]))


def pack_pairs(pairs: list[Pair], numbers: list[int]) -> Batch:
    """One pack of the pairs, whose numbers in the data are `numbers`; each prompt is in it once.

    Prompt `a b c`, chosen `p q`, rejected `x y z`:

        place          0 1 2 3 4 5
        tokens         a b c p x y
        position       0 1 2 3 3 4
        cu_seqlens_q   0 4 6             queries 0..3, a causal document; 4..5, the rejected branch
        cu_seqlens_k   0 4 9
        kv_rows        0 1 2 3 | 0 1 2 4 5
        kv_inverse     0 1 2 3 7 8 / 4 5 6 - - -
        predict        2 3 | 2 4 5
        targets        p q | x y z
        response       0 0 | 1 1 1
    """
    pack = PackBuilder(shares_prompts=True)
    for k, (prompt, chosen, rejected) in enumerate(pairs):
        # a response's last token predicts nothing, so it is no input
        document = pack.segment(np.concatenate([prompt, chosen[:-1]]))
        shared, continued = document[: len(prompt)], document[len(prompt) :]
        branch = pack.segment(rejected[:-1], first_position=len(prompt), prefix=shared)
        # the prompt's last token predicts the first token of both responses
        pack.predict(np.append(shared[-1], continued), chosen, response=2 * k)
        pack.predict(np.append(shared[-1], branch), rejected, response=2 * k + 1)
    return pack.batch(pairs=numbers)


def pack_documents(pieces: list[tuple[np.ndarray, np.ndarray, int]]) -> Batch:
    """One pack of pieces of documents, each (ids, trained, the document's number). A piece is
    causal and sees only itself.

    A piece of n + 1 ids has n inputs: input i predicts id i + 1, and is trained on if
    trained[i + 1]. Pieces `a b c` and `d e`: tokens a b d, targets b c e, positions 0 1 0.
    """
    pack = PackBuilder(shares_prompts=False)
    for ids, trained, _ in pieces:
        own = pack.segment(ids[:-1])
        pack.predict(own[trained[1:]], ids[1:][trained[1:]])
    return pack.batch(documents=[number for _, _, number in pieces])


def nothing() -> Batch:
    """The micro-batch of a rank that has none left: one token that predicts nothing, so that
    every rank takes part in the same collectives. Its gradient is exactly zero."""
    pack = PackBuilder(shares_prompts=False)
    pack.segment([0])
    return pack.batch()
