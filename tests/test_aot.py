"""The compiler's report: complete, and wrong where a kernel is.

Kernels are compiled in other processes, since the tests of this one run them interpreted.
"""

import os
import subprocess
import sys

import pytest

from helpers import ROOT, WORKERS

pytestmark = pytest.mark.tools


def python(*arguments, **env) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ZEPHYR", "TRITON"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=kept | env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("triton"))


def test_every_kernel_compiles_for_every_chip(cache):
    ran = python("-m", "kernels.aot", TRITON_CACHE_DIR=cache)
    assert ran.returncode == 0, ran.stderr
    table = {tuple(line.split()[:2]) for line in ran.stdout.splitlines()[1:]}
    source = "".join(file.read_text() for file in (ROOT / "kernels").rglob("*.py"))
    kernels = [name for name in source.replace("(", " ").split() if name.endswith("_kernel")]
    defined = {name for name in kernels if f"@jit\ndef {name}(" in source}
    known = "row gradient sums dpo tile adamw attention dq dkdv"
    assert {f"{name}_kernel" for name in known.split()} <= defined
    assert table == {(name, chip) for name in defined for chip in ("sm_80", "sm_90", "sm_100")}


def test_what_is_wrong_is_named(cache):
    """A spill on every chip, too much shared memory, and what does not compile."""
    ran = python(
        "-W", "ignore", WORKERS / "bad_launches.py", TRITON_CACHE_DIR=cache, PYTHONPATH=ROOT
    )
    table, wrong = ran.stdout.splitlines()[1:], ran.stderr.splitlines()
    assert (ran.returncode, len(table), len(wrong)) == (0, 4, 5), ran.stderr
    for arch, line, error in zip((80, 90, 100), table, wrong, strict=False):
        spilled = int(line.split()[7])
        assert spilled > 0
        assert error == (
            f"row_kernel sm_{arch} V=32000 G bf16 spills {spilled} bytes of each thread's registers"
        )
    shared = int(table[3].split()[8])
    assert wrong[3] == (
        f"tile_kernel sm_90 h, w bf16 needs {shared} bytes of shared memory; the chip has 232448"
    )
    assert wrong[4].startswith("sums_kernel sm_80 does not compile with Triton ")


def test_no_compiler_chooses_the_order_of_a_responses_sum(cache):
    """Two kernels form it, and must get equal bits: what is reduced in them has two numbers or one,
    whatever the layout that the compiler gives it."""
    ran = python(WORKERS / "reductions.py", TRITON_CACHE_DIR=cache, PYTHONPATH=str(ROOT))
    assert ran.returncode == 0, ran.stderr
    found = [line.split() for line in ran.stdout.splitlines()]
    assert {name for name, _ in found} == {"sums_kernel", "dpo_kernel"}
    assert {size for _, size in found} == {"1", "2"}


def test_it_must_not_be_interpreted():
    ran = python("-m", "kernels.aot", TRITON_INTERPRET="1")
    assert ran.returncode == 2
    assert ran.stderr == "kernels.aot: no compiler; TRITON_INTERPRET=1 is set: unset it\n"
