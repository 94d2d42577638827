"""Microbenchmarks of the kernels: `python -m kernels.bench`."""
