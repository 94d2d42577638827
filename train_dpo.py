"""dDPO: direct preference optimization on AI feedback, the second stage of Zephyr.

python train_dpo.py                                  the tiny recipe, on whatever there is
torchrun --nproc-per-node 8 train_dpo.py zephyr-7b-dpo --model PATH --data PATH --out RUN
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zephyr import anchor, base, config, data, losses, metrics, optim, parallel, toy, weights
from zephyr.config import DPOConfig
from zephyr.exits import call
from zephyr.guard import Guard
from zephyr.packing import Batch, PairPlan, ahead
from zephyr.run import Run, precise


def main() -> None:
    c, recipe = config.parse(DPOConfig, doc=__doc__)
    if recipe == "tiny" and not Path(c.model).exists():
        raise ValueError(f"{c.model} is not there yet; run train_sft.py first, it makes it")
    ranks = parallel.start(c.replicas, c.masters, c.deterministic)
    if recipe == "tiny":
        parallel.once_per_node(ranks, toy.ensure_pairs)

    c, shape, tokenizer, notes = parallel.together(lambda: base.look(c))
    ranks.say(*notes)
    c = precise(c, ranks)

    def read(paths: tuple[str, ...]) -> data.Tokens:
        pairs = parallel.once_per_node(ranks, lambda: data.preferences(paths, tokenizer, c))
        ranks.say(pairs.report("pairs"))
        return pairs

    def plan(pairs: data.Tokens, shuffle: bool) -> PairPlan:
        return parallel.together(
            lambda: PairPlan(
                pairs, c.batch, c.microbatch_tokens, c.seed, ranks.rank, ranks.size, shuffle
            )
        )

    pairs, unseen = read(c.data), read(c.eval_data) if c.eval_data else None
    lengths = [x.pair_lengths() for x in (pairs, unseen) if x]
    c = parallel.fitted(c, shape, ranks, np.concatenate(lengths))
    train, held_out = plan(pairs, shuffle=True), unseen and plan(unseen, shuffle=False)
    steps, notes = parallel.together(
        lambda: optim.steps(c, train.steps_per_epoch, len(pairs), "pair", ranks.size)
    )
    ranks.say(*notes)

    origin = parallel.on_first(lambda: weights.digest(c.model))
    with Run(c, {"data": train.data.digest, "model": origin}, ranks) as run:
        if run.finished:
            return parallel.finish()
        build = partial(
            parallel.build, shape, ranks, c.precision, c.recompute, c.masters, c.compile, c.reshard
        )
        policy = build()
        parallel.together(lambda: weights.load(c.model, policy))
        # before any forward: see optim.adamw
        optimizer = optim.adamw(policy, c.weight_decay, c.adam_state)
        if c.reference == "live":
            frozen = build()
            parallel.together(lambda: weights.load(c.model, frozen))
            anchors = [anchor.live(frozen)] * 2
        else:
            cached = partial(anchor.cached, policy, weights=origin, bits=c.bits, ranks=ranks)
            unseen_steps = held_out and held_out.steps_per_epoch
            anchors = [cached(train, steps), held_out and cached(held_out, unseen_steps)]
        start, kept = run.load(policy, optimizer)
        log = metrics.Log(
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
        parallel.tighten(c.timeout)

        def forward(batch: Batch, reference: anchor.Reference) -> dict[str, Tensor]:
            """Loss and metrics of each pair of a micro-batch."""
            batch = batch.to(ranks.device)
            return losses.preference(
                c.loss, policy(batch), batch.response_N, reference(batch), c.beta, c.label_smoothing
            )

        def evaluate(step: int) -> None:
            means = metrics.Means(losses.METRICS, ranks.device)
            with log.paused(), torch.no_grad():
                for batch in held_out.epoch():
                    means.add(len(batch.pairs), forward(batch, anchors[1]))
                log.evaluation(step, means.reduce())

        with log:
            coming = range(start, steps)
            for step, batches in ahead(train.microbatches, coming, ranks.device, log.phase):
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
                    log.add(len(batch.pairs), per_pair, **metrics.work(shape, batch))
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
        parallel.tighten(parallel.PATIENCE)  # while the first rank writes, the others wait
        parallel.together(
            lambda: weights.save(
                policy, Path(c.out) / "model", base=c.model, empty_system=c.empty_system
            )
        )
        ranks.say(log.summary())
    parallel.finish()


if __name__ == "__main__":
    call(main)
