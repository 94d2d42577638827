"""dSFT: distilled supervised fine-tuning on a teacher's conversations, the first stage of Zephyr.

python train_sft.py                                  the tiny recipe, on whatever there is
torchrun --nproc-per-node 8 train_sft.py zephyr-7b-sft --model PATH --data PATH --out RUN
"""

import numpy as np

from zephyr import config, losses, optim
from zephyr.data import arrays
from zephyr.data.batching import DocumentSteps, epoch, prefetch
from zephyr.distributed import fsdp, group
from zephyr.metrics.journal import Journal
from zephyr.run import exits, folder, settings
from zephyr.toy import birds


def main() -> None:
    c, recipe = config.parse(config.SFTConfig, doc=__doc__)
    ranks = group.start(c.replicas, c.masters, c.deterministic)
    if recipe == "tiny":
        group.once_per_node(ranks, birds.ensure_base)

    # the model to start from, the conversations as token ids, and what of them is in which step
    c, shape, tokenizer = settings.look(c, ranks)
    c = settings.fitted(c, shape, ranks, np.array([c.max_length]))
    documents = arrays.read(arrays.conversations, c.data, tokenizer, c, ranks)
    unseen = arrays.read(arrays.conversations, c.eval_data, tokenizer, c, ranks)
    with group.together():
        train = DocumentSteps.of(documents, c, ranks)
        held_out = DocumentSteps.of(unseen, c, ranks, shuffle=False) if unseen else None
        chunks = train.chunks_per_epoch
        steps = optim.steps(c, train.steps_per_epoch, chunks, "chunk", ranks)

    origin = settings.origin(c)
    with folder.Run(c, {"data": documents.digest, "model": origin}, ranks) as run:
        if run.finished:
            return group.finish()
        model = fsdp.load(c, shape, ranks)
        optimizer = optim.adamw(model, c.weight_decay, c.adam_state)  # before any forward
        start = run.load(model, optimizer)

        shown = ("loss", "tokens_per_second")
        with Journal(run, shape, ["loss"], train, steps, shown) as journal:
            for step, batches in prefetch(train, range(start, steps), ranks.device, journal):
                trained = group.total(sum(len(batch.targets_N) for batch in batches))
                for batch in batches:
                    with journal.phase("forward"):
                        loss = losses.sft(model(batch.to(ranks.device)))
                    with journal.phase("backward"):
                        # a mean over the step's tokens; FSDP averages over ranks, which this undoes
                        (loss * ranks.size / max(trained, 1)).backward()
                    journal.saw(batch, {"loss": loss}, len(batch.targets_N))
                rate = c.lr * optim.schedule(c.schedule, step, steps, c.warmup)
                with journal.phase("optimizer"):
                    norm = optim.step(optimizer, rate, c.clip, skip_if=journal.broken())
                journal.end(norm, rate)
                if held_out and folder.due(step + 1, c.eval_every, steps):
                    with journal.evaluation() as means:
                        for here in epoch(held_out, ranks.device):
                            means.add(len(here.targets_N), {"loss": losses.sft(model(here))})
                run.after(step + 1, steps, model, optimizer, journal)
        run.export(model)
        ranks.say(journal.summary())
    group.finish()


if __name__ == "__main__":
    exits.call(main)
