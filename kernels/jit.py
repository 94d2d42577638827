"""Triton where it is installed. Without it (macOS) a kernel stays a plain function that nothing
calls, and the ops run in torch."""

import os

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:
    triton = tl = None

    def jit(function):
        return function


# read when the kernels are defined, as Triton does
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
