"""dSFT: supervised fine-tuning on a teacher's conversations, the first stage of Zephyr.

python train_sft.py                                  the tiny recipe, on whatever there is
torchrun --nproc-per-node 8 train_sft.py zephyr-7b-sft --model PATH --data PATH --out RUN
"""

from pathlib import Path

import numpy as np
import torch

from zephyr import base, config, data, losses, metrics, optim, parallel, toy, weights
from zephyr.config import SFTConfig
from zephyr.exits import call
from zephyr.guard import Guard
from zephyr.packing import DocumentPlan, ahead
from zephyr.run import Run, precise


def main() -> None:
    c, recipe = config.parse(SFTConfig, doc=__doc__)
    ranks = parallel.start(c.replicas, c.masters, c.deterministic)
    if recipe == "tiny":
        parallel.once_per_node(ranks, newborn)

    c, shape, tokenizer, notes = parallel.together(lambda: base.look(c))
    ranks.say(*notes)
    c = precise(c, ranks)

    c = parallel.fitted(c, shape, ranks, np.array([c.max_length]))

    def plan(paths: tuple[str, ...], shuffle: bool) -> DocumentPlan:
        documents = parallel.once_per_node(ranks, lambda: data.conversations(paths, tokenizer, c))
        ranks.say(documents.report("documents"))
        return parallel.together(
            lambda: DocumentPlan(
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
    steps, notes = parallel.together(
        lambda: optim.steps(
            c, train.steps_per_epoch, train.rows_per_epoch, "packed row", ranks.size
        )
    )
    ranks.say(*notes)

    origin = parallel.on_first(lambda: weights.digest(c.model))
    with Run(c, {"data": train.data.digest, "model": origin}, ranks) as run:
        if run.finished:
            return parallel.finish()
        model = parallel.build(
            shape, ranks, c.precision, c.recompute, c.masters, c.compile, c.reshard
        )
        parallel.together(lambda: weights.load(c.model, model))
        optimizer = optim.adamw(model, c.weight_decay, c.adam_state)
        start, kept = run.load(model, optimizer)
        log = metrics.Log(
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
        parallel.tighten(c.timeout)

        def evaluate(step: int) -> None:
            means = metrics.Means(["loss"], ranks.device)
            with log.paused(), torch.no_grad():
                for batch in held_out.epoch():
                    loss = losses.sft(model(batch.to(ranks.device)))
                    means.add(len(batch.targets_N), {"loss": loss})
                log.evaluation(step, means.reduce())

        with log:
            coming = range(start, steps)
            for step, batches in ahead(train.microbatches, coming, ranks.device, log.phase):
                log.begin(step + 1)
                lr = c.lr * optim.schedule(c.schedule, step, steps, c.warmup)
                trained = parallel.total(sum(len(batch.targets_N) for batch in batches))
                for batch in batches:
                    with log.phase("forward"):
                        loss = losses.sft(model(batch.to(ranks.device)))
                    with log.phase("backward"):
                        # a mean over the step's tokens; FSDP averages over ranks, which this undoes
                        (loss * ranks.size / max(trained, 1)).backward()
                    guard.saw(batch.documents, loss)
                    log.add(len(batch.targets_N), {"loss": loss}, **metrics.work(shape, batch))
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
        parallel.tighten(parallel.PATIENCE)  # while the first rank writes, the others wait
        parallel.together(
            lambda: weights.save(
                model, Path(c.out) / "model", base=c.model, empty_system=c.empty_system
            )
        )
        ranks.say(log.summary())
    parallel.finish()


def newborn() -> None:
    """The tiny recipe starts from random weights."""
    folder = toy.ensure() / "base"
    if not (folder / "model.safetensors").exists():
        weights.fresh(folder, seed=0)


if __name__ == "__main__":
    call(main)
