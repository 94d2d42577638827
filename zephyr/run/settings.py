"""Settings that are left to the machine: precision, token budget, what is computed again."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from zephyr import files
from zephyr.architecture import MistralConfig
from zephyr.config import Training
from zephyr.distributed import group, machine
from zephyr.distributed.group import Ranks
from zephyr.errors import shared
from zephyr.plan import fit
from zephyr.tokenizer import Tokenizer
from zephyr.weights import base, hub, locate


def look(c: Training, ranks: Ranks) -> tuple[Training, MistralConfig, Tokenizer]:
    """Return the settings with precision and system message decided, and the architecture and the
    tokenizer of the folder that the run starts from. Tells the user what is worth knowing of that
    folder."""
    with group.together():
        c, shape, tokenizer, notes = base.look(c)
        locate.weight_files(locate.parts(c.model, c.base).model)  # before the data is tokenized
    ranks.say(*notes)
    return precise(c, ranks), shape, tokenizer


def origin(c: Training) -> str:
    """Return the SHA-256 of the model that the run starts from, which rank 0 computes for all."""
    return group.on_first(lambda: hub.digest(locate.parts(c.model, c.base)))


def fitted(c: Training, shape: MistralConfig, ranks: Ranks, *lengths: np.ndarray) -> Training:
    """Return the settings with values for what they leave to auto: what fits the least memory that
    a rank has, given the packed lengths of the pairs or chunks; see zephyr/plan/fit.py."""
    memory = torch.tensor(machine.memory(ranks.device))
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    packed = np.concatenate(lengths)
    step = float(packed.mean()) * c.batch
    tokens, recompute = fit.choose(shape, c, int(memory), ranks.size, int(packed.max()), step)
    free = fit.reshard(shape, c, int(memory), ranks.size, tokens, recompute)
    if "auto" in (c.microbatch_tokens, c.recompute):
        ranks.say(
            f"--microbatch-tokens {tokens} --recompute {recompute}, by "
            f"{int(memory) / 2**30:.1f} GiB a rank"
        )
    return replace(
        c, microbatch_tokens=tokens, recompute=recompute, reshard="always" if free else "never"
    )


def precise(c: Training, ranks: Ranks) -> Training:
    """Return the settings with a value for --precision auto, the same on every rank.

    A run that is resumed keeps its own value. A new run has bf16 if every rank's device multiplies
    it, or if its masters are split; else fp32, in which a CPU without such instructions is much
    faster. Raises ValueError for bf16 on a GPU that does not multiply it.
    """
    able = not group.agree(not machine.multiplies_bf16(ranks.device))
    what = "GPU" if ranks.device.type == "cuda" else "CPU"
    if c.precision == "auto":
        before = group.on_first(lambda: _begun(c))
        chosen = before or ("bf16" if able or c.masters == "split" else "fp32")
        with group.together():
            c = replace(c, precision=chosen)
        why = (
            "as the run began"
            if before
            else (f"this {what} {'multiplies' if able else 'does not multiply'} bf16")
        )
        ranks.say(f"--precision {chosen}: {why}")
    if c.precision == "bf16" and not able:
        if what == "GPU":
            flags = "--masters split" if c.masters == "split" else "--precision bf16"
            raise shared(
                ValueError(
                    f"{flags} is for GPUs that multiply bf16, from Ampere on; FlashAttention runs "
                    "on no other: leave it out, and the run is in fp32"
                )
            )
        ranks.say(
            "--precision bf16 is emulated here, as this CPU does not multiply it: it is tens of "
            "times slower than --precision fp32"
        )
    return c


def _begun(c: Training) -> str | None:
    """Return the precision of the run that `c.out` holds and that is to be resumed; None if there
    is none."""
    if c.resume == "fresh" and not restarted():
        return None
    try:
        precision = files.read_json(Path(c.out) / "run.json")["run"]["settings"]["precision"]
    except (ValueError, KeyError, TypeError):  # there is none, or Run says what is wrong with it
        return None
    return precision if precision in ("bf16", "fp32") else None


def restarted() -> bool:
    """Return True if torchrun or Slurm has started this command again: then the run that is there
    is its own."""
    names = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"
    return any(int(os.environ.get(name) or 0) for name in names)
