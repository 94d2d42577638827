"""The journal of a run: what each step was, and whether it could be taken."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from zephyr.architecture import MistralConfig
from zephyr.data.batching import DocumentSteps, PairSteps
from zephyr.metrics.log import BAR, Log
from zephyr.metrics.means import Means, work
from zephyr.packing import Batch
from zephyr.plan import costs
from zephyr.run.folder import Run
from zephyr.run.guard import Guard


class Journal:
    """What a training loop tells of itself, in this order in each step:

        begin(step)                  the step's number, counted from 1
        saw(batch, values, count)    after each micro-batch
        broken()                     for the optimizer: a loss was not finite
        end(norm, rate)              after the update

    and `phase` around what is timed. It writes metrics.jsonl (log.py) and stops the run, or says
    so, when a loss or a gradient is not finite (guard.py). Build it on every rank, right before the
    loop: the clock of the throughput starts here.
    """

    def __init__(
        self,
        run: Run,
        shape: MistralConfig,
        keys: Sequence[str],
        data: PairSteps | DocumentSteps,
        steps: int,
        bar: Sequence[str] = BAR,
    ):
        c, ranks = run.c, run.ranks
        self.shape, self.keys, self.ranks, self.per_epoch = shape, keys, ranks, data.steps_per_epoch
        self.adapters = costs.adapters(c)
        self.log = Log(
            c.out,
            steps,
            keys,
            start_step=run.start,
            every=c.log_every,
            rank=ranks.rank,
            world=ranks.size,
            device=ranks.device,
            bar=bar,
            kept=run.kept.get("log", ()),
            profile=c.profile,
        )
        self.guard = Guard(c.on_nonfinite, data.data.where, ranks, run.kept.get("guard", ()))
        self.phase, self.paused, self.evaluated = self.log.phase, self.log.paused, []

    def begin(self, step: int) -> None:
        """Start optimizer step `step`, counted from 1."""
        self.step = step
        self.log.begin(step)

    def saw(self, batch: Batch, values: Mapping[str, Tensor], count: int) -> None:
        """Add a micro-batch: `values` belong to `count` pairs or tokens, and `loss` is one of
        them."""
        self.guard.saw(batch.documents or batch.pairs, values["loss"])
        self.log.add(count, values, **work(self.shape, batch, self.adapters))

    def means(self) -> dict[str, float]:
        """The global means of what was seen since the last line; every rank calls it."""
        return self.log.means.mean()

    def broken(self) -> Tensor:
        """1.0 if a loss of this step is not finite on any rank, else 0.0, on the device: nothing
        waits for it."""
        self.flag = self.guard.broken()
        return self.flag

    def end(self, norm: Tensor, rate: float) -> None:
        """End the step, given its gradient norm and learning rate. Raises NonFinite, or says that
        the step was not taken, if the norm or a loss is not finite."""
        self.guard.report(self.step, norm, self.flag)
        epoch = self.step / self.per_epoch
        self.log.step(self.step, grad_norm=norm, learning_rate=rate, epoch=epoch)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[Means]:
        """Means to add held-out batches to, without gradients; their line is written at the end.
        Its time counts as no training time."""
        means, began = Means(self.keys, self.ranks.device), time.perf_counter()
        with self.log.paused(), torch.no_grad():
            yield means
            self.log.evaluation(self.step, means.reduce())
        self.evaluated.append(time.perf_counter() - began)

    def summary(self, reference: float = 0.0) -> str:
        """What a finished run ends with: see `Log.summary`; and how long the passes without an
        update took beside an epoch of training: the `reference` pass, in seconds, and the median
        evaluation."""
        epoch = self.log.seconds_per_step() * self.per_epoch
        evaluation = statistics.median(self.evaluated) if self.evaluated else 0.0
        passes = {"reference pass": reference, "evaluation": evaluation}
        parts = [f"{name} {s:.3g} s, {s / epoch:.0%}" for name, s in passes.items() if s and epoch]
        text = f"{epoch:.3g} s of training; beside it {', '.join(parts)}"
        return self.log.summary({"an epoch": text} if parts else {})

    def state(self) -> dict[str, dict]:
        """What a checkpoint keeps of this rank's share, as JSON."""
        return {"log": self.log.state(), "guard": self.guard.state()}

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the bar and the files."""
        self.log.__exit__(*error)
