"""Steps that must not be taken, and steps to look at: a loss or a gradient that is not finite, and
a gradient norm far above those before it."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import torch
import torch.distributed as dist
from torch import Tensor

from zephyr.distributed.group import Ranks
from zephyr.errors import NonFinite, shared
from zephyr.files import some

WINDOW, ENOUGH, SIGMAS = 128, 32, 6  # a norm is a spike 6 sigma above the last 128, as in OLMo
IN_A_ROW = 3  # steps left out one after the other: then the run has gone wrong, not a row


class Guard:
    """Watches each step's losses and gradient norm, on all ranks alike.

    `where(k)` names row k of the data, for the messages. `kept` is what `state` gave on the ranks
    of the run that this one continues, the same on all.
    """

    def __init__(
        self, policy: str, where: Callable[[int], str], ranks: Ranks, kept: Sequence[dict] = ()
    ):
        self.policy, self.where, self.ranks = policy, where, ranks
        before = kept[0] if kept else {"norms": [], "skipped": 0}
        self.norms, self.skipped = deque(before["norms"], WINDOW), before["skipped"]
        self.seen: list[tuple[Sequence[int] | Tensor, Tensor]] = []

    def state(self) -> dict:
        return {"norms": list(self.norms), "skipped": self.skipped}

    def saw(self, rows: Sequence[int] | Tensor, loss: Tensor) -> None:
        """Remember the losses of a micro-batch of this step: one for each row, or one for all."""
        self.seen.append((rows, loss.detach().expand(len(rows))))

    def broken(self) -> Tensor:
        """1.0 if a loss of this step is not finite on any rank, else 0.0. It stays on the device,
        where `optim.step` acts on it; nothing waits."""
        losses = torch.cat([loss for _, loss in self.seen])
        broken = 1.0 - losses.isfinite().all().float()
        dist.all_reduce(broken, dist.ReduceOp.MAX)
        return broken

    def report(self, step: int, norm: Tensor, broken: Tensor) -> bool:
        """Return True if step `step` was taken, given its gradient norm over all ranks and
        `broken()`: the optimizer took it if the norm and every loss of every rank are finite.

        If it was not, the policy "stop" raises NonFinite, which names the lines of the data; the
        policy "skip" prints such a line and returns False, and raises at the third step in a row. A
        spike is reported. Every rank calls this, and every rank gets the same answer. Here the host
        waits for the device: the only place in a step, when all of the step is queued.
        """
        seen, self.seen = self.seen, []
        norm, broken = torch.stack((norm, broken)).tolist()
        finite = not broken
        if finite and math.isfinite(norm):
            self.skipped = 0
            if self._spike(norm):
                self.ranks.say(
                    f"step {step}: the gradient norm {norm:.4g} is far above the last "
                    f"{len(self.norms)} steps', {fmean(self.norms):.4g} on average; "
                    f"largest losses: {', '.join(self._rows(seen)[:3])}"
                )
            self.norms.append(norm)
            return True
        self.skipped += 1
        if finite:
            rows = ", ".join(self._rows(seen)[:3])
            what = f"the gradient norm is {norm}; every loss is finite, the largest are of {rows}"
        else:
            what = f"the loss is not finite in {some(self._rows(seen, broken=True))}"
        text = f"step {step}: {what}; the step is not taken"
        if self.policy == "stop":
            raise shared(
                NonFinite(
                    f"{text}. Look at these rows, lower --lr, or leave such steps "
                    "out with --on-nonfinite skip"
                )
            )
        if self.skipped >= IN_A_ROW:
            raise shared(NonFinite(f"{text}, the third in a row: lower --lr, or look at the data"))
        self.ranks.say(text)
        return False

    def _spike(self, norm: float) -> bool:
        if len(self.norms) < ENOUGH:
            return False
        return norm > fmean(self.norms) + SIGMAS * stdev(self.norms)

    def _rows(self, seen: list, broken: bool = False) -> list[str]:
        """Where the step's rows of all ranks came from, largest losses first; or only those whose
        loss is not finite."""
        mine = [
            (-float(x), int(row))
            for rows, loss in seen
            for row, x in zip(rows, loss, strict=True)
            if not (broken and x.isfinite())
        ]
        everyone: list[list] = [[]] * self.ranks.size
        dist.all_gather_object(everyone, mine)
        return list(dict.fromkeys(self.where(row) for _, row in sorted(sum(everyone, []))))
