"""Memory of hosts and containers, arithmetic for bf16, and how --precision auto is settled."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_dpo
import train_sft
from benchmarks import facts
from run_helpers import DPO, launch, run, weights_of
from zephyr.config import DPOConfig
from zephyr.distributed import machine
from zephyr.distributed.group import leave, start
from zephyr.metrics import phases
from zephyr.run.settings import precise

CPU = torch.device("cpu")
GIB = 2**30


def machine_of(root: Path, **files: str) -> Path:
    """A folder like / with these files, `__` in a name for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(root: Path, where: str, **files: object) -> None:
    """A control group's folder with these files."""
    (root / where).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / where / name.replace("memory_", "memory.")).write_text(f"{text}\n")


def v2(root: Path, where: str, limit: object, used: int, inactive: int, high: object = "max"):
    stat = f"anon {used}\ninactive_file {inactive}\nactive_file 5"
    group(
        root,
        f"sys/fs/cgroup/{where}",
        memory_max=limit,
        memory_high=high,
        memory_current=used,
        memory_stat=stat,
    )


def v1(root: Path, where: str, limit: int, used: int, inactive: int) -> None:
    stat = f"cache 7\ninactive_file 3\ntotal_inactive_file {inactive}"
    group(
        root,
        f"sys/fs/cgroup/memory/{where}",
        memory_limit_in_bytes=limit,
        memory_usage_in_bytes=used,
        memory_stat=stat,
    )


def cgroups(root: Path, *lines: str) -> Path:
    return machine_of(root, proc__self__cgroup="".join(f"{line}\n" for line in lines))


def test_a_container_of_version_2(tmp_path):
    """Its own group is what is mounted; files it would drop first count as free."""
    cgroups(tmp_path, "0::/")
    v2(tmp_path, "", 4 * GIB, 3 * GIB, GIB)
    assert machine._containers(tmp_path) == [2 * GIB]
    v2(tmp_path, "", "max", 3 * GIB, GIB)
    assert machine._containers(tmp_path) == []
    v2(tmp_path, "", 4 * GIB, 3 * GIB, GIB, high=5 * GIB // 2)
    assert machine._containers(tmp_path) == [GIB // 2]
    v2(tmp_path, "", GIB, 3 * GIB, GIB)
    assert machine._containers(tmp_path) == [0], "never below 0"


def test_groups_in_groups_of_version_2(tmp_path):
    """A Slurm step: the job's limit holds too, where the step has none."""
    cgroups(tmp_path, "0::/system.slice/slurm/job_7/step_0")
    v2(tmp_path, "system.slice/slurm/job_7/step_0", "max", 2 * GIB, 0)
    v2(tmp_path, "system.slice/slurm/job_7", 16 * GIB, 5 * GIB, GIB)
    v2(tmp_path, "system.slice", 64 * GIB, 10 * GIB, 0)
    assert machine._containers(tmp_path) == [12 * GIB, 54 * GIB]


def test_version_1_and_both_at_once(tmp_path):
    cgroups(tmp_path, "12:cpu,cpuacct:/a", "5:memory:/a/b", "1:name=systemd:/z", "0::/unified")
    v1(tmp_path, "a/b", 8 * GIB, 6 * GIB, 2 * GIB)
    v1(tmp_path, "a", 2**63 - 4096, 6 * GIB, 0)  # what version 1 says for no limit
    found = machine._containers(tmp_path)
    assert min(found) == 4 * GIB and len(found) == 2


def test_a_container_of_version_1_sees_its_own_group_as_the_root(tmp_path):
    """The path is the host's, and not to be found here."""
    cgroups(tmp_path, "5:memory:/docker/0123abc")
    v1(tmp_path, "", 3 * GIB, GIB, 0)
    assert machine._containers(tmp_path) == [2 * GIB]


@pytest.mark.parametrize("lines", [[], ["0::/gone"], ["5:memory:/"], ["4:cpu:/x"]])
def test_without_groups_or_limits_nothing_is_less(tmp_path, lines):
    assert machine._containers(tmp_path) == []
    cgroups(tmp_path, *lines)
    assert machine._containers(tmp_path) == []


def test_odd_files_are_no_limit(tmp_path):
    cgroups(tmp_path, "0::/")
    v2(tmp_path, "", "", 1, 0)
    assert machine._containers(tmp_path) == []
    v2(tmp_path, "", GIB, 1, 0)
    (tmp_path / "sys/fs/cgroup/memory.current").unlink()
    assert machine._containers(tmp_path) == []


def test_the_host(tmp_path):
    text = "MemTotal:       24645312 kB\nMemFree:  1 kB\nMemAvailable:   20971520 kB\nSwap: 1 kB\n"
    machine_of(tmp_path, proc__meminfo=text)
    assert machine._host(tmp_path) == 20 * GIB
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine._host(tmp_path / "none") == total, "macOS has no /proc"
    assert 0 < machine._host() <= total


def test_a_rank_has_its_share_of_half_of_the_least(monkeypatch):
    monkeypatch.setattr(machine, "_host", lambda: 12 * GIB)
    monkeypatch.setattr(machine, "_containers", lambda: [])
    assert machine.memory(CPU) == 6 * GIB
    monkeypatch.setattr(machine, "_containers", lambda: [8 * GIB, 9 * GIB])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.memory(CPU) == GIB


def test_auto_fits_the_container(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(machine, "_host", lambda: 64 * GIB)
    sizes = []
    for free in (40 * GIB, GIB):
        monkeypatch.setattr(machine, "_containers", lambda free=free: [free])
        run(train_dpo, place, tmp_path / str(free), *DPO, "--microbatch-tokens", "auto")
        said = re.search(r"--microbatch-tokens (\d+) .*, by (\S+) GiB", capfd.readouterr().err)
        assert float(said[2]) == pytest.approx(free / 2 / GIB, abs=0.06)
        sizes.append(int(said[1]))
    assert sizes[0] > sizes[1]


def test_training_starts_where_linux_is_not(place, tmp_path, monkeypatch):
    """As on macOS: no /proc, no control groups, no count of free pages, no mallopt."""
    sysconf, names = os.sysconf, dict(os.sysconf_names)
    del names["SC_AVPHYS_PAGES"]

    def other(name):
        if name not in names:
            raise ValueError("unrecognized configuration name")
        return sysconf(name)

    monkeypatch.setattr(os, "sysconf", other)
    monkeypatch.setattr(os, "sysconf_names", names)
    monkeypatch.setattr(sys, "platform", "darwin")
    nowhere = tmp_path / "no such folder"
    for name in ("_host", "_containers"):
        found = getattr(machine, name)
        monkeypatch.setattr(machine, name, lambda found=found: found(nowhere))
    monkeypatch.setattr(machine, "ctypes", None)
    used = SimpleNamespace(ru_maxrss=3 * GIB)  # macOS counts bytes
    monkeypatch.setattr(phases.resource, "getrusage", lambda _: used)
    rows = run(train_dpo, place, tmp_path / "run", *DPO, "--microbatch-tokens", "auto")
    assert len(rows) == 6 and rows[-1]["memory/peak"] == 3
    flags = "--steps 2 --batch 2 --max-length 64 --microbatch-tokens auto".split()
    assert len(run(train_sft, place, tmp_path / "sft", *flags)) == 2


# --- a GPU's allocator, without a GPU


@pytest.fixture
def settings(monkeypatch):
    """What the allocator was told, nothing of it by the environment."""
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_segments_grow(settings, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "empty", lambda *size, **about: made.append((size, about)))
    assert machine.grow_segments() == [] and settings == ["expandable_segments:True"]
    assert made == [((1,), {"device": "cuda"})], "one allocation tells whether it works"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_whoever_sets_the_allocator_is_left_to_it(settings, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    assert machine.grow_segments() == [] and settings == []


def test_a_driver_that_maps_no_memory_costs_a_line(settings, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", refuse)
    (line,) = machine.grow_segments()
    assert line.startswith("this GPU's driver maps no memory") and "\n" not in line
    assert settings == ["expandable_segments:True", "expandable_segments:False"]

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):  # another program has the GPU; nothing to do here
        machine.grow_segments()


def test_less_of_a_gpu_is_planned_with_where_segments_do_not_grow(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (110 * GIB, 140 * GIB))
    for grow, right in ((True, 110 * GIB), (False, 104 * GIB)):
        about = {"expandable_segments": grow}
        monkeypatch.setattr(machine, "allocator", lambda about=about: about)
        assert machine.memory(torch.device("cuda")) == pytest.approx(right)


@pytest.fixture
def as_before():
    """Torch's switches, whatever a test does to them."""
    matmul = torch.backends.cuda.matmul
    names = "allow_tf32", "allow_bf16_reduced_precision_reduction"
    before = {name: getattr(matmul, name) for name in names}
    yield
    for name, value in before.items():
        setattr(matmul, name, value)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_makes_a_gpus_sums_exact_and_the_same(as_before, monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cuda.matmul.allow_tf32 = True  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE has it
    machine.tune_arithmetic(deterministic)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory != deterministic


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", ["", "--masters split --recompute elementwise"])
def test_on_a_gpu_two_deterministic_runs_are_one(place, tmp_path, as_before, flags):
    """And before the first update the margins are 0 in every bit."""
    flags = (*without(DPO), "--precision", "bf16", "--deterministic", *flags.split())
    one, two = (run(train_dpo, place, tmp_path / name, *flags) for name in ("one", "two"))
    assert [r["loss"] for r in one] == [r["loss"] for r in two]
    assert one[0]["rewards/margins"] == one[0]["rewards/accuracies"] == 0
    for name, weight in weights_of(tmp_path / "one").items():
        assert torch.equal(weight, weights_of(tmp_path / "two")[name]), name


@pytest.mark.gpu
def test_on_a_gpu_attentions_gradients_are_the_same_in_every_run(as_before, monkeypatch):
    """Where a query's keys are many blocks. The parts of dQ that two blocks have add up to one sum
    in either order, and the run above has no longer sequences."""
    monkeypatch.delenv("ZEPHYR_ATTENTION", raising=False)
    machine.tune_arithmetic(deterministic=True)
    packed = facts.layout(facts.LENGTHS, torch.device("cuda"))
    assert packed.max_k > 1000
    tensors = facts.attention(packed, 32, 8, 128)
    first, *others = (
        facts.trained(partial(packed.attend, layer=0, window=4096), *tensors) for _ in range(5)
    )
    for found in others:
        assert all(map(torch.equal, found, first))


@pytest.mark.parametrize("ranks, seen, plural", [(2, 1, "GPU,"), (8, 4, "GPUs,")])
def test_more_ranks_than_gpus_cost_a_line(monkeypatch, ranks, seen, plural):
    """On every rank, the first one too, which has a GPU; none waits for the others."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    told = rf"{ranks} ranks on a .* sees {seen} {plural} .* --nproc-per-node {seen}"
    for rank in (0, ranks - 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(ValueError, match=told):
            start()


@pytest.mark.parametrize(
    "error, why",
    [
        (RuntimeError("Failed to find C compiler. Set CC"), "Failed to find C compiler. Set CC"),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "/usr/bin/gcc failed"),
        (FileNotFoundError(2, "No such file", "cc"), "[Errno 2] No such file: 'cc'"),
        (AssertionError("libcuda.so cannot be found!\nFiles"), "libcuda.so cannot be found!"),
        (AssertionError(), "AssertionError"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_gpu_without_a_c_compiler_costs_a_line(monkeypatch, error, why):
    def active(driver):
        raise error

    monkeypatch.setattr(type(machine.triton.runtime.driver), "active", property(active))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(machine, "tune_arithmetic", lambda deterministic: None)
    monkeypatch.delenv("ZEPHYR_KERNELS", raising=False)
    with pytest.raises(ValueError) as told:
        start()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f": {why}. It needs" in str(told.value) and f"gcc python{version}-dev" in str(told.value)
    assert "\n" not in str(told.value)


# --- bf16


@pytest.mark.parametrize(
    "able, right",
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, True),
        ({"avx2": True, "avx512_bw": True}, False),
        ({}, False),
    ],
)
def test_which_cpus_multiply_bf16(monkeypatch, able, right):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert machine.multiplies_bf16(CPU) == right
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not machine.multiplies_bf16(CPU), "nothing makes use of it"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists what a CPU can")
def test_this_cpu_is_judged_by_what_linux_says_of_it():
    flags = re.findall(r"avx512_bf16|amx_bf16|\bbf16\b", Path("/proc/cpuinfo").read_text())
    assert machine.multiplies_bf16(CPU) == bool(flags)


def settled(out: Path) -> str:
    about = json.loads((out / "run.json").read_text())["run"]["settings"]["precision"]
    assert f'precision = "{about}"' in (out / "config.toml").read_text()
    return about


def without(flags: tuple[str, ...]) -> list[str]:
    """The flags without --precision."""
    k = flags.index("--precision")
    return [*flags[:k], *flags[k + 2 :]]


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_bf16_where_that_is_multiplied(place, tmp_path, monkeypatch, capfd, able):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: able)
    name = "bf16" if able else "fp32"
    auto = run(train_dpo, place, tmp_path / "auto", *without(DPO))
    line = f"--precision {name}: this CPU {'multiplies' if able else 'does not multiply'} bf16"
    said = capfd.readouterr().err.splitlines()
    assert said.count(line) == 1 and not any("is emulated here" in x for x in said)
    assert settled(tmp_path / "auto") == name
    same = run(train_dpo, place, tmp_path / "given", *without(DPO), "--precision", name)
    assert [r["loss"] for r in auto] == [r["loss"] for r in same]
    for key, weight in weights_of(tmp_path / "given").items():
        assert torch.equal(weight, weights_of(tmp_path / "auto")[key])
    assert line not in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["--precision bf16", "--masters split"])
def test_a_gpu_that_does_not_multiply_bf16_trains_in_fp32_alone(monkeypatch, flag):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    ranks = start()
    try:
        old = ranks._replace(device=torch.device("cuda"))
        about = {"model": "m", "data": ("d",), "out": "no-such-run"}
        assert precise(DPOConfig(**about), old).precision == "fp32"
        name, value = flag.removeprefix("--").split()
        with pytest.raises(ValueError, match=f"^{flag} is for GPUs that multiply bf16, from"):
            precise(DPOConfig(**about, **{name: value}), old)
    finally:
        leave()


def test_a_cpu_that_emulates_bf16_says_what_it_costs(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    flags = [*without(DPO), "--steps", "2"]
    run(train_dpo, place, tmp_path / "asked", *flags, "--precision", "bf16")
    assert (
        "--precision bf16 is emulated here, as this CPU does not multiply it: it is tens of "
        "times slower than --precision fp32\n"
    ) in capfd.readouterr().err
    run(train_dpo, place, tmp_path / "split", *flags, "--masters", "split")
    assert settled(tmp_path / "split") == "bf16", "masters are halves of bf16"
    assert "is emulated here" in capfd.readouterr().err
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: True)
    run(train_dpo, place, tmp_path / "able", *flags, "--precision", "bf16")
    assert "--precision" not in capfd.readouterr().err


def test_a_run_goes_on_in_the_precision_that_it_began_in(place, tmp_path, monkeypatch, capfd):
    flags = [*without(DPO), "--save-every", "2", "--no-save-async"]
    straight = run(train_dpo, place, tmp_path / "straight", *flags, "--precision", "bf16")
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: True)
    out = tmp_path / "run"
    run(train_dpo, place, out, *flags)
    for left in ("model", "checkpoints/step-000006"):
        (out / left).rename(tmp_path / Path(left).name)
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    capfd.readouterr()
    rows = run(train_dpo, place, out, *flags)
    said = capfd.readouterr().err
    assert "--precision bf16: as the run began\n" in said and "is emulated here" in said
    assert [r["loss"] for r in rows] == [r["loss"] for r in straight]
    for key, weight in weights_of(tmp_path / "straight").items():
        assert torch.equal(weight, weights_of(out)[key]), key
    with pytest.raises(ValueError, match="--precision was 'bf16', is 'fp32'"):
        run(train_dpo, place, out, *flags, "--precision", "fp32")
    run(train_dpo, place, out, *flags, "--resume", "fresh")
    assert settled(out) == "fp32", "a new run has what this machine is for"
    (out / "run.json").write_text('{"run": 5}')
    with pytest.raises(ValueError, match="run.json does not say whose run this is"):
        run(train_dpo, place, out, *flags)


def test_the_ranks_have_one_precision(place, tmp_path, monkeypatch):
    """The second of two cannot multiply bf16, so neither does."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch\n"
        "    torch.cpu.get_capabilities = lambda: {}\n"
        "elif 'RANK' in os.environ:\n"
        "    import torch\n"
        "    torch.cpu.get_capabilities = lambda: {'avx512_bf16': True}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    done = launch("train_dpo.py", place, tmp_path / "run", 2, *without(DPO), "--steps", "2")
    assert settled(tmp_path / "run") == "fp32"
    assert done.stderr.count("--precision fp32: ") == 1
