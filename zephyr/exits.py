"""What ends a run, and the exit code that tells a script or a scheduler which it was.

    0    done
    2    bad input: a flag, a recipe, a data or a model file
    3    a checkpoint is damaged, or is another run's: `--resume previous` or `fresh`
    4    a loss or a gradient is not finite
    5    the storage refused: full, read-only, gone; the last checkpoint is intact
    6    another rank died or did not answer in time
    130  Ctrl-C
    143  preempted: SIGTERM or SIGUSR1 came, and the state was saved

torchrun exits with 1 whatever its ranks' codes were; its last lines show theirs.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


class BadCheckpoint(ValueError):
    code = 3


class NonFinite(ValueError):
    code = 4


class Storage(ValueError):
    code = 5


class LostRank(RuntimeError):
    code = 6


class Preempted(RuntimeError):
    code = 143


def run(main: Callable[[], None]) -> None:
    """Call `main`; what a user can cause or must know of becomes one line and an exit code.

    The first rank speaks for all where all raise the same (`parallel.together` marks such errors,
    and before there is a process group they have nothing else to raise); otherwise each rank.
    """
    rank = os.environ.get("RANK", "0")
    try:
        if any(importlib.metadata.distributions(name="kernels")):
            raise ValueError("the distribution `kernels` from PyPI hides this project's package of "
                             "that name: pip uninstall kernels")  # fmt: skip
        main()
    except (ValueError, OSError, LostRank, Preempted) as error:
        shared = getattr(error, "shared", not dist.is_initialized())
        if rank == "0" or not shared:
            place = "" if rank == "0" else f" (rank {rank})"
            print(f"{Path(sys.argv[0]).name}{place}: {error}", file=sys.stderr, flush=True)
        code = getattr(error, "code", 2)
        if isinstance(error, LostRank):
            os._exit(code)  # a background save would wait for the lost rank
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
