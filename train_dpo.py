"""dDPO: direct preference optimization on AI feedback, the second stage of Zephyr.

python train_dpo.py                                  the tiny recipe, on whatever there is
torchrun --nproc-per-node 8 train_dpo.py zephyr-7b-dpo --model PATH --data PATH --out RUN
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zephyr import config, losses, optim
from zephyr import reference as wanted
from zephyr.config import DPOConfig
from zephyr.data import arrays
from zephyr.data.batching import PairSteps, prefetch
from zephyr.distributed import fsdp, group
from zephyr.metrics.log import Log
from zephyr.metrics.means import Means, work
from zephyr.packing import Batch
from zephyr.reference import Reference
from zephyr.run import settings
from zephyr.run.exits import call
from zephyr.run.folder import Run
from zephyr.run.guard import Guard
from zephyr.run.settings import precise
from zephyr.toy import birds
from zephyr.weights import base, hub


def main() -> None:
    c, recipe = config.parse(DPOConfig, doc=__doc__)
    if recipe == "tiny" and not Path(c.model).exists():
        raise ValueError(f"{c.model} is not there yet; run train_sft.py first, it makes it")
    ranks = group.start(c.replicas, c.masters, c.deterministic)
    if recipe == "tiny":
        group.once_per_node(ranks, birds.ensure_pairs)

    c, shape, tokenizer, notes = group.together(lambda: base.look(c))
    ranks.say(*notes)
    c = precise(c, ranks)

    def read(paths: tuple[str, ...]) -> arrays.Tokens:
        pairs = group.once_per_node(ranks, lambda: arrays.preferences(paths, tokenizer, c))
        ranks.say(pairs.report("pairs"))
        return pairs

    def plan(pairs: arrays.Tokens, shuffle: bool) -> PairSteps:
        return group.together(
            lambda: PairSteps(
                pairs, c.batch, c.microbatch_tokens, c.seed, ranks.rank, ranks.size, shuffle
            )
        )

    pairs, unseen = read(c.data), read(c.eval_data) if c.eval_data else None
    lengths = [x.pair_lengths() for x in (pairs, unseen) if x]
    c = settings.fitted(c, shape, ranks, np.concatenate(lengths))
    train, held_out = plan(pairs, shuffle=True), unseen and plan(unseen, shuffle=False)
    steps, notes = group.together(
        lambda: optim.steps(c, train.steps_per_epoch, len(pairs), "pair", ranks.size)
    )
    ranks.say(*notes)

    origin = group.on_first(lambda: hub.digest(c.model))
    with Run(c, {"data": train.data.digest, "model": origin}, ranks) as run:
        if run.finished:
            return group.finish()
        build = partial(
            fsdp.build, shape, ranks, c.precision, c.recompute, c.masters, c.compile, c.reshard
        )
        policy = build()
        group.together(lambda: hub.load(c.model, policy))
        # before any forward: see optim.adamw
        optimizer = optim.adamw(policy, c.weight_decay, c.adam_state)
        if c.reference == "live":
            frozen = build()
            group.together(lambda: hub.load(c.model, frozen))
            anchors = [wanted.live(frozen)] * 2
        else:
            cached = partial(wanted.cached, policy, weights=origin, bits=c.bits, ranks=ranks)
            unseen_steps = held_out and held_out.steps_per_epoch
            anchors = [cached(train, steps), held_out and cached(held_out, unseen_steps)]
        start, kept = run.load(policy, optimizer)
        log = Log(
            c.out,
            steps,
            losses.METRICS,
            start_step=start,
            every=c.log_every,
            rank=ranks.rank,
            world=ranks.size,
            device=ranks.device,
            kept=kept.get("log", ()),
            profile=c.profile,
        )
        guard = Guard(c.on_nonfinite, train.data.where, ranks, kept.get("guard", ()))
        group.set_timeout(c.timeout)

        def forward(batch: Batch, reference: Reference) -> dict[str, Tensor]:
            """Loss and metrics of each pair of a micro-batch."""
            batch = batch.to(ranks.device)
            return losses.preference(
                c.loss, policy(batch), batch.response_N, reference(batch), c.beta, c.label_smoothing
            )

        def evaluate(step: int) -> None:
            means = Means(losses.METRICS, ranks.device)
            with log.paused(), torch.no_grad():
                for batch in held_out.epoch():
                    means.add(len(batch.pairs), forward(batch, anchors[1]))
                log.evaluation(step, means.reduce())

        with log:
            coming = range(start, steps)
            for step, batches in prefetch(train.microbatches, coming, ranks.device, log.phase):
                log.begin(step + 1)
                lr = c.lr * optim.schedule(c.schedule, step, steps, c.warmup)
                count = len(train.step(step))
                for batch in batches:
                    with log.phase("forward"):
                        per_pair = forward(batch, anchors[0])
                    with log.phase("backward"):
                        # a mean over the step's pairs; FSDP averages over ranks, which this undoes
                        (per_pair["loss"].sum() * ranks.size / count).backward()
                    guard.saw(batch.pairs, per_pair["loss"])
                    log.add(len(batch.pairs), per_pair, **work(shape, batch))
                if step == 0:
                    means = log.means.mean()
                    losses.check_start(
                        c.loss, c.beta, c.label_smoothing, means, c.precision, anchors[0].exact
                    )
                done = step + 1
                with log.phase("communication"):
                    broken = guard.broken()
                with log.phase("optimizer"):
                    norm = optim.step(optimizer, lr, c.clip, broken)
                guard.allows(done, norm, broken)
                epoch = done / train.steps_per_epoch
                log.step(done, grad_norm=norm, learning_rate=lr, epoch=epoch)
                if held_out and (done == steps or (c.eval_every and done % c.eval_every == 0)):
                    evaluate(done)
                run.after(done, done == steps, policy, optimizer, log=log, guard=guard)

        run.wait()
        group.set_timeout(group.PATIENCE)  # while the first rank writes, the others wait
        group.together(
            lambda: hub.save(
                policy, Path(c.out) / "model", base=c.model, empty_system=c.empty_system
            )
        )
        ranks.say(log.summary())
    group.finish()


if __name__ == "__main__":
    call(main)
