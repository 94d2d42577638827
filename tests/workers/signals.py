"""Signals that a process sends to itself, for test_nodes.py"""

import os
import signal
import time

import torch.distributed as dist

from zephyr.distributed import group, signals

group.start()
me, seen = os.getpid(), []


def send(number):
    os.kill(me, number)
    time.sleep(0.1)
    seen.append(signals.stop_wanted())


assert not signals.stop_wanted()
send(signal.SIGUSR1)
send(signal.SIGTERM)
send(signal.SIGTERM)
assert seen == [True] * 3, seen
time.sleep(1)
try:
    os.kill(me, signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    os.write(2, b"Ctrl-C is Python's, now it hangs\n")
dist.distributed_c10d._get_default_store().get("what never comes")
