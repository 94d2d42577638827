"""Sharding, mesh and memory of models and worlds that are not here, against the plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "model, ranks, replicas, recompute, lora",
    [
        ("mistral-7b", 8, 1, "elementwise", 0),
        ("mistral-7b", 2, 1, "full", 128),
        pytest.param("mistral-7b", 8, 2, "none", 16, marks=pytest.mark.slow),
        pytest.param("llama-2-70b", 512, 8, "full", 0, marks=pytest.mark.slow),
    ],
)
def test_a_rank_has_the_bytes_that_were_planned(model, ranks, replicas, recompute, lora):
    numbers = map(str, (ranks, replicas, recompute, lora))
    command = [sys.executable, "tests/simulate.py", model, *numbers]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    for name in ("masters", "gradients", "moments"):
        seen, planned = found[name]
        assert seen == planned, name
    seen, planned = found["activations"]
    assert seen == pytest.approx(planned, rel=1e-5)
    seen, planned = found["peak"]
    # of a first micro-batch, whose gradients may come after the peak
    assert 0.85 * (planned - found["gradients"][0]) < seen < planned, f"{seen}, {planned} planned"
