"""What ends a run, and the exit code that tells a script or a scheduler which it was.

    0    done
    2    bad input: a flag, a recipe, a data or a model file; or more than a GPU's memory holds
    3    a checkpoint is damaged: `--resume previous` or `fresh`
    4    a loss or a gradient is not finite
    5    the storage refused: full, read-only, gone; the last checkpoint is intact
    6    another rank died or did not answer in time
    130  Ctrl-C
    141  whoever read the output went away, as `| head -1` does
    143  preempted: SIGTERM or SIGUSR1 came, and the state was saved

torchrun exits with 1 whatever its ranks' codes were; its last lines show theirs.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from zephyr.errors import Preempted, kind

LOST_RANK = 6
NOBODY_READS = 141


class Parser(argparse.ArgumentParser):
    """A parser whose help shows `description` as it is written, and for which a wrong flag is a
    user's mistake like any other: a ValueError of one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")


def refuse_empty(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Raise ValueError for a name of the parsed command line that is empty, as it is where a
    script's variable is not set: it would be taken for a flag that is not given. A `--system` may
    be empty."""
    for name, value in vars(args).items():
        if name != "system" and (value == "" or isinstance(value, list) and "" in value):
            flag = f"--{name.replace('_', '-')}"
            given = any(text.partition("=")[0] == flag for text in argv)
            raise ValueError(f"{flag if given else name.upper()} is empty; is a variable not set?")


def call(main: Callable[[], None]) -> None:
    """Call `main`. What a user can cause, or must know, becomes one line and an exit code."""
    _streams()
    try:
        if hidden := hidden_kernels():
            raise ValueError(hidden)
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(NOBODY_READS)
    except (ValueError, OSError, Preempted) as error:
        dist = sys.modules.get("torch.distributed")  # a process without torch can raise these too
        many = dist is not None and dist.is_initialized() and dist.get_world_size() > 1
        _say(str(error), everywhere=many and not hasattr(error, "shared"))
        code = getattr(kind(error), "code", 2)
        if many:
            _flush()
            os._exit(code)  # gloo may abort a process whose peers have left, with its own code
        sys.exit(code)
    except RuntimeError as error:
        import torch  # here, as the planner does without

        from zephyr.distributed import lost

        if isinstance(error, torch.OutOfMemoryError):
            text, code = _too_much(str(error)), 2
        elif lost.a_rank_is_lost(error):
            text, code = lost.message(error), LOST_RANK
        else:
            raise
        _say(text, everywhere=True)
        _flush()
        os._exit(code)  # a save in the background would wait for a rank that is lost, or soon is
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        _flush()


def _streams() -> None:
    """Let no stream end a command: a closed one is nobody's, what stdout cannot encode is escaped,
    and bytes on stdin that are no text come as surrogates, for who reads them to refuse."""
    # in this order, so that each takes its own number, and no file that is opened later does
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # of one that leads nowhere any more
                stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")


def _flush() -> None:
    """Write what stdout still holds. If nobody reads it, keep Python from trying again when the
    process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def hidden_kernels() -> str | None:
    """What to do if `import kernels` gives the package of that name from PyPI, not this project's;
    where both are installed, that depends on the order of the folders that are searched."""
    found = importlib.util.find_spec("kernels")
    place = found and found.origin and Path(found.origin).resolve()
    for other in importlib.metadata.distributions(name="kernels"):
        if place == Path(other.locate_file("kernels/__init__.py")).resolve():
            return (
                f"{place}, of the distribution `kernels` from PyPI, hides this project's "
                "package of that name: pip uninstall kernels"
            )
    return None


def _too_much(text: str) -> str:
    """What a GPU's allocator says of how much was asked for and held, without its advice, and
    ours."""
    said = text.partition(" If reserved")[0]
    return (
        f"{said} In training a smaller --microbatch-tokens or --recompute full takes less; "
        "python -m zephyr.plan says what fits"
    )


def _say(text: str, everywhere: bool) -> None:
    rank = os.environ.get("RANK", "0")
    if rank == "0" or everywhere:
        place = "" if rank == "0" else f" (rank {rank})"
        with contextlib.suppress(OSError):  # nobody may be reading
            print(f"{Path(sys.argv[0]).name}{place}: {text}", file=sys.stderr, flush=True)
