"""dDPO: distilled direct preference optimization on AI feedback, the second stage of Zephyr.

python train_dpo.py                                  the tiny recipe, on whatever there is
torchrun --nproc-per-node 8 train_dpo.py zephyr-7b-dpo --model PATH --data PATH --out RUN
"""

from functools import partial

from zephyr import config, lora, losses, optim, reference
from zephyr.data import arrays
from zephyr.data.batching import PairSteps, epoch, prefetch
from zephyr.distributed import fsdp, group
from zephyr.metrics.journal import Journal
from zephyr.run import exits, folder, settings
from zephyr.toy import birds


def main() -> None:
    c, recipe = config.parse(config.DPOConfig, doc=__doc__)
    ranks = group.start(c.replicas, c.masters, c.deterministic)
    if recipe == "tiny":
        group.once_per_node(ranks, partial(birds.ensure_pairs, c.model))

    # the model to start from, the pairs as token ids, and which of them are in which step
    c, shape, tokenizer = settings.look(c, ranks)
    pairs = arrays.read(arrays.preferences, c.data, tokenizer, c, ranks)
    unseen = arrays.read(arrays.preferences, c.eval_data, tokenizer, c, ranks)
    c = settings.fitted(c, shape, ranks, *[x.pair_lengths() for x in (pairs, unseen) if x])
    with group.together():
        train = PairSteps.of(pairs, c, ranks)
        held_out = PairSteps.of(unseen, c, ranks, shuffle=False) if unseen else None
        steps = optim.steps(c, train.steps_per_epoch, len(pairs), "pair", ranks)

    origin = settings.origin(c)
    with folder.Run(c, {"data": pairs.digest, "model": origin}, ranks) as run:
        if run.finished:
            return group.finish()
        policy = fsdp.load(c, shape, ranks)
        optimizer = optim.adamw(policy, c.weight_decay, c.adam_state)  # before any forward
        # the reference is the policy as it is now: frozen in memory, or its log-probs in a table
        if c.reference == "live":
            frozen = lora.without(policy) if c.lora_rank else fsdp.load(c, shape, ranks)
            on_train = on_held_out = reference.live(frozen)
        else:
            cached = partial(reference.cached, policy, weights=origin, bits=c.bits, ranks=ranks)
            on_train = cached(train, steps)
            on_held_out = cached(held_out, held_out.steps_per_epoch) if held_out else None
        loss = partial(losses.preference, c.loss, beta=c.beta, smoothing=c.label_smoothing)
        start, moves = run.load(policy, optimizer), optim.first_moved(c, steps)

        with Journal(run, shape, losses.METRICS, train, steps) as journal:
            for step, batches in prefetch(train, range(start, steps), ranks.device, journal):
                count = len(train.step(step))
                for batch in batches:
                    with journal.phase("forward"):
                        here = batch.to(ranks.device)
                        per_pair = loss(policy(here), here.response_N, on_train(here))
                    with journal.phase("backward"):
                        # a mean over the step's pairs; FSDP averages over ranks, which this undoes
                        (per_pair["loss"].sum() * ranks.size / count).backward()
                    journal.saw(batch, per_pair, len(batch.pairs))
                if step == 0 or (step == moves and not journal.guard.skipped):
                    losses.check_start(c, journal.means(), step > 0, on_train.exact)
                rate = c.lr * optim.schedule(c.schedule, step, steps, c.warmup)
                with journal.phase("optimizer"):
                    norm = optim.step(optimizer, rate, c.clip, skip_if=journal.broken())
                journal.end(norm, rate)
                if held_out and folder.due(step + 1, c.eval_every, steps):
                    with journal.evaluation() as means:
                        for here in epoch(held_out, ranks.device):
                            values = loss(policy(here), here.response_N, on_held_out(here))
                            means.add(len(here.pairs), values)
                run.after(step + 1, steps, policy, optimizer, journal)
        run.export(policy)
        ranks.say(journal.summary(on_train.seconds))
    group.finish()


if __name__ == "__main__":
    exits.call(main)
