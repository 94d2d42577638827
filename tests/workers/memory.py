"""Bytes that reading a file adds to the peak: python memory.py MODEL ROWS"""

import sys

from zephyr import config
from zephyr.data import arrays
from zephyr.tokenizer import Tokenizer

model, rows = sys.argv[1:]
c = config.DPOConfig(model=model, data=(rows,), out="")
tokenizer = Tokenizer(model)
tokenizer.turns([(True, "user", "a")] * 100)


def peak():  # not ru_maxrss, which starts at the size of the process that started this one
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) << 10


before = peak()
assert len(arrays.preferences(c.data, tokenizer, c)) > 5000
print(peak() - before)
