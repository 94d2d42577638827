"""dSFT: supervised fine-tuning on a teacher's conversations, the first stage of Zephyr.

python train_sft.py                                  the tiny recipe, on whatever there is
torchrun --nproc-per-node 8 train_sft.py zephyr-7b-sft --model PATH --data PATH --out RUN
"""

from pathlib import Path

import numpy as np
import torch

from zephyr import config, losses, optim
from zephyr.config import SFTConfig
from zephyr.data import arrays
from zephyr.data.batching import DocumentSteps, prefetch
from zephyr.distributed import fsdp, group
from zephyr.metrics.log import Log
from zephyr.metrics.means import Means, work
from zephyr.run import settings
from zephyr.run.exits import call
from zephyr.run.folder import Run
from zephyr.run.guard import Guard
from zephyr.run.settings import precise
from zephyr.toy import birds
from zephyr.weights import base, hub


def main() -> None:
    c, recipe = config.parse(SFTConfig, doc=__doc__)
    ranks = group.start(c.replicas, c.masters, c.deterministic)
    if recipe == "tiny":
        group.once_per_node(ranks, newborn)

    c, shape, tokenizer, notes = group.together(lambda: base.look(c))
    ranks.say(*notes)
    c = precise(c, ranks)

    c = settings.fitted(c, shape, ranks, np.array([c.max_length]))

    def plan(paths: tuple[str, ...], shuffle: bool) -> DocumentSteps:
        documents = group.once_per_node(ranks, lambda: arrays.conversations(paths, tokenizer, c))
        ranks.say(documents.report("documents"))
        return group.together(
            lambda: DocumentSteps(
                documents,
                c.batch,
                c.max_length,
                c.microbatch_tokens,
                c.seed,
                ranks.rank,
                ranks.size,
                c.train_on,
                shuffle,
            )
        )

    train = plan(c.data, shuffle=True)
    held_out = plan(c.eval_data, shuffle=False) if c.eval_data else None
    steps, notes = group.together(
        lambda: optim.steps(
            c, train.steps_per_epoch, train.rows_per_epoch, "packed row", ranks.size
        )
    )
    ranks.say(*notes)

    origin = group.on_first(lambda: hub.digest(c.model))
    with Run(c, {"data": train.data.digest, "model": origin}, ranks) as run:
        if run.finished:
            return group.finish()
        model = fsdp.build(shape, ranks, c.precision, c.recompute, c.masters, c.compile, c.reshard)
        group.together(lambda: hub.load(c.model, model))
        optimizer = optim.adamw(model, c.weight_decay, c.adam_state)
        start, kept = run.load(model, optimizer)
        log = Log(
            c.out,
            steps,
            ["loss"],
            start_step=start,
            every=c.log_every,
            rank=ranks.rank,
            world=ranks.size,
            device=ranks.device,
            bar=["loss", "tokens_per_second"],
            kept=kept.get("log", ()),
            profile=c.profile,
        )
        guard = Guard(c.on_nonfinite, train.data.where, ranks, kept.get("guard", ()))
        group.set_timeout(c.timeout)

        def evaluate(step: int) -> None:
            means = Means(["loss"], ranks.device)
            with log.paused(), torch.no_grad():
                for batch in held_out.epoch():
                    loss = losses.sft(model(batch.to(ranks.device)))
                    means.add(len(batch.targets_N), {"loss": loss})
                log.evaluation(step, means.reduce())

        with log:
            coming = range(start, steps)
            for step, batches in prefetch(train.microbatches, coming, ranks.device, log.phase):
                log.begin(step + 1)
                lr = c.lr * optim.schedule(c.schedule, step, steps, c.warmup)
                trained = group.total(sum(len(batch.targets_N) for batch in batches))
                for batch in batches:
                    with log.phase("forward"):
                        loss = losses.sft(model(batch.to(ranks.device)))
                    with log.phase("backward"):
                        # a mean over the step's tokens; FSDP averages over ranks, which this undoes
                        (loss * ranks.size / max(trained, 1)).backward()
                    guard.saw(batch.documents, loss)
                    log.add(len(batch.targets_N), {"loss": loss}, **work(shape, batch))
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
                run.after(done, done == steps, model, optimizer, log=log, guard=guard)

        run.wait()
        group.set_timeout(group.PATIENCE)  # while the first rank writes, the others wait
        group.together(
            lambda: hub.save(
                model, Path(c.out) / "model", base=c.model, empty_system=c.empty_system
            )
        )
        ranks.say(log.summary())
    group.finish()


def newborn() -> None:
    """The tiny recipe starts from random weights."""
    folder = birds.ensure() / "base"
    if not (folder / "model.safetensors").exists():
        hub.fresh(folder, seed=0)


if __name__ == "__main__":
    call(main)
