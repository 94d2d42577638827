"""What a lost rank looks like to the others."""

import re

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from zephyr.distributed import group

# what gloo, NCCL and torchrun's store say of a rank that is gone or silent
GONE = re.compile(
    r"closed by (remote )?peer|likely closed|reset by peer|broken pipe|unreachable|"
    r"connection refused|no route to host|ncclRemoteError|aborted",
    re.I,
)
SILENT = re.compile(r"timed out|time-?out", re.I)


def a_rank_is_lost(error: RuntimeError) -> bool:
    """True if the error says that another rank died or did not answer in time."""
    text = str(error)
    of_ranks = isinstance(error, dist.DistError) or "gloo" in text
    return of_ranks and bool(GONE.search(text) or SILENT.search(text))


def message(error: RuntimeError) -> str:
    """Return one line for such an error: which collective waited, for which rank or how long, and
    what to do."""
    text, where = str(error), error.__traceback__
    operation = "a collective"  # FSDP waits for some outside of the call that began them
    while where:
        code = where.tb_frame.f_code
        if code.co_filename == c10d.__file__ and code.co_name in c10d.__all__:
            operation = code.co_name
            break
        where = where.tb_next
    peer = re.search(r"\[([0-9a-f.:]+)\]:\d+", text)
    if SILENT.search(text):
        happened = (
            f"another rank did not answer within {group.limit} s: it hangs, or its node is gone"
        )
    else:
        happened = f"the rank at {peer[1]} died" if peer else "another rank died"
    return (
        f"{operation}: {happened}. Start the same command again: it goes on from the last "
        "checkpoint"
    )
