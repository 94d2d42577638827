"""Ctrl-C while answers are in flight: they are paid, so the first asks no more and waits for them,
and the second leaves at once."""

import os
import signal

running: list = []  # the calls of `endpoint.ask` that are under way in this process


def heed() -> None:
    """Take Ctrl-C so from now on; while no call is under way, it is Python's. One that is ignored,
    as of a command in a shell's background, stays so. The main thread calls this."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _first)


def _first(*_: object) -> None:
    if runs := list(running):
        signal.signal(signal.SIGINT, _second)
        if flying := sum(run.halt() for run in runs):
            many = "answers are" if flying > 1 else "answer is"
            runs[0].say(
                f"Ctrl-C: no more is asked; {flying} {many} in flight and waited for, to be kept; "
                "a second Ctrl-C leaves at once"
            )
        if any(run.interrupted for run in runs):
            return  # what it does must not be broken off: answers would be lost
    raise KeyboardInterrupt


def _second(*_: object) -> None:
    for run in running:
        run.file.lock.acquire(timeout=1)  # so that no line is half written
    os._exit(130)  # a plain exit would wait for the threads
