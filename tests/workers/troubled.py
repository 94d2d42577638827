"""train_dpo.py in a process of test_faults.py's, with trouble of a kind at a moment that is chosen.

A process that is to be killed hangs from that moment on, for the kill to come there.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import train_dpo
from zephyr import optim
from zephyr.metrics import log
from zephyr.run import checkpoint, exits
from zephyr.weights import safetensor_files


def hang(*_, **__) -> None:
    print("it hangs", flush=True)
    time.sleep(60)


def hang_in_a_step() -> None:
    schedule = optim.schedule

    def until(kind: str, step: int, *rest) -> float:
        if step == 8:
            hang()
        return schedule(kind, step, *rest)

    optim.schedule = until


def hang_in_a_save() -> None:
    finish = checkpoint.Writer.finish

    def until(self, *rest, **named):
        return hang() if self.state["step"] == 4 else finish(self, *rest, **named)

    checkpoint.Writer.finish = until


def hang_in_an_evaluation() -> None:
    log.Log.evaluation = hang


def hang_in_the_export() -> None:
    write = safetensor_files.write_shards
    safetensor_files.write_shards = lambda *rest: (write(*rest), hang())


def no_reader() -> None:
    """Make stdout and stderr a pipe that nobody reads."""
    end, pipe = os.pipe()
    os.close(end)
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)


def no_file_beyond(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def train(
    said: Path, environment: dict[str, str], argv: list[str], trouble: Callable[[], None] | None
) -> None:
    """Run the script after `trouble`; what it says is in the file `said`."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= environment
    sys.argv = argv
    if trouble:
        trouble()
    exits.call(train_dpo.main)
