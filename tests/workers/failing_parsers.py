"""benchmarks/fuzz.py on parsers that fail, each in its own way, and then on one that does not."""

import os
import signal
import sys
import time

from benchmarks import fuzz


def traceback(path):
    if path.read_bytes()[:1] == b"x":
        {}["key"]


def verbose(path):
    if path.read_bytes()[:1] == b"x":
        int("x" * 1000)


def killed(path):
    if path.read_bytes()[:1] == b"x":
        os.kill(os.getpid(), signal.SIGSEGV)


def endless(path):
    if path.read_bytes()[:1] == b"x":
        time.sleep(60)


def greedy(path):
    if path.read_bytes()[:1] == b"x":
        bytes(1 << 30)


def astray(path):
    if path.stat().st_size > 1:
        (path.parent.parent / "other").touch()


def no_seeds():
    {}["no seed"]


codes = []
for target in (no_seeds, traceback, verbose, killed, endless, greedy, astray, None):
    name = target.__name__ if target else "recipe"
    if target:
        valid = no_seeds if target is no_seeds else lambda: [b"a"]
        fuzz.TARGETS[name] = fuzz.Target(
            "file", valid, target, lambda seeds, rng: rng.choice([b"a", b"xy"])
        )
    try:
        fuzz.main([name, "--seconds", "1", "--limit", "1", "--memory", "100"])
    except SystemExit as end:
        codes.append(end.code)
sys.exit(codes != [1] * 7 + [0])
