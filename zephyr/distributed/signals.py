"""SIGTERM and SIGUSR1 ask a run to stop; zephyr/run/folder.py then saves at the end of a step."""

import os
import signal
import socket
import threading
import time

STOPS = (signal.SIGTERM, signal.SIGUSR1)
_asked: float | None = None  # when the first signal came
_ears: socket.socket | None = None


def stop_wanted() -> bool:
    """Return True if such a signal has come to this rank. Other ranks may not have it yet: see
    group.agree."""
    return _asked is not None


def listen() -> None:
    """From now on, note the first SIGTERM or SIGUSR1, and end the process at one that comes a
    second later or more.

    torchrun and Slurm may both send the signal, to all processes, so what comes within the second
    is the same signal. Python runs handlers between its own instructions, never while a collective
    waits. So a thread hears of signals through a socket instead: then the second signal ends a hung
    run too.
    """
    global _asked, _ears
    _asked = None
    if _ears is not None or threading.current_thread() is not threading.main_thread():
        return
    _ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
    for number in STOPS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_obey, args=(_ears,), daemon=True).start()


def _obey(ears: socket.socket) -> None:
    global _asked
    while number := ears.recv(1):
        if number[0] not in STOPS:  # Ctrl-C stays Python's
            continue
        if _asked is None:
            _asked = time.monotonic()
        elif time.monotonic() - _asked > 1:
            os._exit(143)
