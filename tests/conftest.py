"""What every test file shares."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from zephyr.run import exits

# a shared machine may pause anywhere, so no property is held to a time
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run small tensors, and subprocesses beside
# here too, where torch has read it already: a matmul's last bits may depend on it
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure() -> None:
    if hidden := exits.hidden_kernels():
        pytest.exit(hidden, 2)


pytest_plugins = ["common"]
