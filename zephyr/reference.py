"""The reference policy's log-probs: computed once with the starting weights and cached on disk, or
from a second, frozen model.

Cached, training needs no second model. The cache lies beside the token arrays under a key that
covers the weights' content, the data (with tokenizer and lengths), and how and what computes.

P pairs
"""

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import kernels
from zephyr import attention, files
from zephyr.data.batching import PairSteps, packed_ahead
from zephyr.data.cache import CHOOSE, cache_folder
from zephyr.distributed import group, signals
from zephyr.distributed.group import Ranks
from zephyr.errors import Preempted, Storage, shared
from zephyr.model import Mistral
from zephyr.packing import Batch

SUM = 32  # bytes: the SHA-256 behind a table
ARITHMETIC = 2  # raised when the same forward gives other last bits than the version before
SAVE_EVERY = 16  # steps whose log-probs a killed run can lose


@dataclass(frozen=True)
class Reference:
    """Called with a batch, the reference's summed log-probs of its responses [2P].

    `exact`: those of step 0 were computed in this process and in the step's own micro-batches, so
    that the policy, before any update, must give the same bits. `seconds` is what its pass over the
    pairs took, 0 where it was cached before, or is live.
    """

    sums: Callable[[Batch], Tensor]
    exact: bool
    seconds: float = 0.0

    def __call__(self, batch: Batch) -> Tensor:
        return self.sums(batch)


def live(model: Mistral) -> Reference:
    """Return a reference that computes the log-probs of `model` again for every batch."""

    @torch.no_grad()
    def sums_2P(batch: Batch) -> Tensor:
        return kernels.response_sums(model(batch), batch.response_N, 2 * len(batch.pairs))

    return Reference(sums_2P, exact=True)


def cached(
    model: Mistral, plan: PairSteps, steps: int, weights: str, bits: str, ranks: Ranks
) -> Reference:
    """Return a reference that looks its log-probs up in a table, which is computed now as far as
    the cache lacks it.

    `model` still has the starting weights, and `weights` is their digest. `bits` names the
    numerical settings (precision, masters, compile) that change the last bits of a log-prob; both
    are part of the cache's key. Only pairs that the first `steps` steps visit are computed. The
    pass uses the very micro-batches of epoch 0, so at step 0 policy and reference are equal in
    every bit and every margin is exactly 0.
    """
    device = ranks.device
    computed_by = [bits, device.type, kernels.implementation(device), attention.back_end()]
    key = [weights, plan.data.digest, *computed_by, ARITHMETIC]
    name = sha256(json.dumps(key).encode()).hexdigest()[:20]
    path = cache_folder() / f"reference-{name}.npy"
    # one rank's file decides, so that all agree on what is missing
    table_P2 = group.on_first(lambda: _read(path, len(plan.data))).to(device)
    missing = [
        s
        for s in range(min(steps, plan.steps_per_epoch))
        if table_P2[torch.from_numpy(plan.step(s)).to(device)].isnan().any()
    ]
    reference, began = live(model), time.perf_counter()
    hidden = True if ranks.rank else None  # None: shown on a terminal only
    with tqdm(
        total=len(missing), desc="reference log-probs", delay=3, leave=False, disable=hidden
    ) as bar:
        for k in range(0, len(missing), SAVE_EVERY):
            _fill(table_P2, reference, plan, missing[k : k + SAVE_EVERY], ranks)
            group.on_first(lambda: _write(path, table_P2))
            bar.update(SAVE_EVERY)
            if group.agree(signals.stop_wanted()):
                raise shared(
                    Preempted(
                        f"asked to stop: {path} has the reference log-probs so far; "
                        "the same command goes on from there"
                    )
                )
    seconds = (time.perf_counter() - began) * bool(missing)
    exact = reference.exact and 0 in missing
    return Reference(lambda batch: table_P2[batch.pairs].flatten(), exact, seconds)


def _read(path: Path, pairs: int) -> Tensor:
    """Return the table on the disk [P, 2], NaN where a pair is missing. It is all NaN if the file
    is absent or damaged; damage is reported."""
    table_P2 = torch.full((pairs, 2), torch.nan)
    try:
        content = path.read_bytes()
        if sha256(content[:-SUM]).digest() == content[-SUM:]:
            return torch.from_numpy(np.load(io.BytesIO(content)))
        why = "it is not as it was written"
    except FileNotFoundError:
        return table_P2
    except OSError as error:
        why = error.strerror
    with contextlib.suppress(OSError):  # nobody may be reading
        print(f"{path} is damaged: {why}; it is made again", file=sys.stderr)
    return table_P2


def _write(path: Path, table_P2: Tensor) -> None:
    np.save(content := io.BytesIO(), table_P2.cpu().numpy())
    try:
        with files.atomic(path) as file:
            file.write(content.getvalue() + sha256(content.getvalue()).digest())
    except Storage as error:
        raise Storage(f"{error}; {CHOOSE}, with room for it") from None


def _fill(
    table_P2: Tensor, reference: Reference, plan: PairSteps, steps: list[int], ranks: Ranks
) -> None:
    """Write the pairs of `steps` into the table, on every rank."""
    sums_P2, done_P = torch.zeros_like(table_P2), torch.zeros_like(table_P2[:, 0])
    for batches in packed_ahead(plan, steps, ranks.device):
        for batch in (batch.to(ranks.device) for batch in batches):
            sums_P2[batch.pairs] = reference(batch).view(len(batch.pairs), 2)
            done_P[batch.pairs] = 1
    dist.all_reduce(sums_P2)
    dist.all_reduce(done_P)
    table_P2.copy_(torch.where(done_P[:, None] > 0, sums_P2, table_P2))
