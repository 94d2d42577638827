"""What the machine under a rank has: memory to use, arithmetic for bf16, an allocator to mend."""

import ctypes
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from kernels.jit import triton

ROOT = Path("/")


def memory(device: torch.device) -> int:
    """Return how many bytes a rank may use: the free memory of its GPU; on a CPU, its share of half
    of what the host or its container has free, as the file cache needs the rest."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # zephyr/plan/fit.py counts on holes of 4 %, as there are where segments grow
        return free if allocator()["expandable_segments"] else int(free * 1.04 / 1.10)
    return host_memory() // 2


def host_memory() -> int:
    """Return this rank's share of the bytes that the host or its container has free."""
    return min([_host(), *_containers()]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _host(root: Path = ROOT) -> int:
    """Return the bytes of the host that are free or could be freed; where the system does not count
    them (macOS), all that it has."""
    with suppress(OSError, TypeError):
        text = (root / "proc/meminfo").read_text()
        return int(re.search(r"^MemAvailable: *(\d+) kB$", text, re.M)[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _containers(root: Path = ROOT) -> list[int]:
    """What each control group that this process is in leaves free: its limit, less what it holds
    without the files that it would drop first. Empty without limits, and where there are no groups.

    A line of /proc/self/cgroup is `number:controllers:path`; version 2's has no controllers. Groups
    lie in each other, and each has a limit of its own. In a container the path may be the host's:
    then what is mounted is the container's own group.
    """
    free = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, limit, used, cache = (
            (
                "sys/fs/cgroup/memory",
                ("memory.limit_in_bytes",),
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
            if controllers
            else ("sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file")
        )
        own = root / base / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(root / base):
                break
            try:
                most = min(
                    int(text)
                    for name in limit
                    if (file := group / name).exists()
                    and (text := file.read_text().strip()) != "max"
                )
                stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
                held = int((group / used).read_text()) - int(stat.get(cache, 0))
            except (OSError, ValueError):  # no such group here, or no limit
                continue
            free.append(max(0, most - held))
    return free


def multiplies_bf16(device: torch.device) -> bool:
    """Return True if the device has instructions that multiply bf16. Without them the products are
    emulated: a CPU is then tens of times slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # what x86 and ARM call them; only oneDNN makes use of them
    able = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16")
    return torch.backends.mkldnn.is_available() and any(able.get(name) for name in names)


def tune_arithmetic(deterministic: bool) -> None:
    """Let a GPU's sums be as exact as training wants them, and, if `deterministic`, the same in
    every run.

    Products of fp32 numbers are to be fp32's. Some containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE,
    with which torch would round the factors to TF32's 10 bits, and --precision fp32 would be none.

    cuBLAS may otherwise add the parts of a bf16 product in bf16, which small weights' gradients,
    sums over thousands of rows, would feel. Without `deterministic` the backward of attention adds
    dQ's parts in the order in which they come, so that last bits differ from run to run; cuBLAS
    gives equal bits on one stream with a workspace of fixed size. It costs a slower backward of
    attention. To be called before the first product.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # every byte is written


def start_triton() -> None:
    """Let Triton build what it launches kernels with; the first time it calls a C compiler.

    Raises ValueError if that fails, as on a machine without one, or without Python's headers. The
    first kernel would otherwise fail, with a traceback, when all data is read.
    """
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever the compiler, the linker or the driver have to say
        called = isinstance(error, subprocess.CalledProcessError)
        why = f"{error.cmd[0]} failed" if called else next(iter(str(error).splitlines()), "")
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        raise ValueError(
            f"Triton cannot build what launches its kernels: {why or type(error).__name__}. It "
            f"needs a C compiler, gcc or what CC names, and Python's headers: on Debian and Ubuntu "
            f"apt install gcc {python}-dev. ZEPHYR_KERNELS=torch with --compile off needs neither"
        ) from None


def tune_allocators() -> list[str]:
    """Set torch's allocators so that they keep what the next micro-batch will need. Call it before
    the first allocation. Returns lines for the user."""
    if torch.cuda.is_available():
        return grow_segments()
    keep_buffers()
    return []


def grow_segments() -> list[str]:
    """Let CUDA's caching allocator map more memory behind a segment instead of taking a new one.

    Micro-batches differ in size, and what one of them leaves in segments of fixed size is often no
    use to the next: at 7 B, 8 % of an H200 was held so and lost, against 4 % with segments that
    grow. Whoever has set PYTORCH_ALLOC_CONF is left to it. Returns a line where the driver cannot
    map memory.
    """
    if any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return []
    configure = torch._C._accelerator_setAllocatorSettings
    configure("expandable_segments:True")
    try:
        torch.empty(1, device="cuda")
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        configure("expandable_segments:False")
        return [
            "this GPU's driver maps no memory behind a segment: PYTORCH_ALLOC_CONF="
            "expandable_segments:True is left out, and more memory is lost between tensors"
        ]
    return []


def allocator() -> dict[str, object]:
    """Return the settings of CUDA's caching allocator."""
    return torch.cuda.memory._snapshot()["allocator_settings"]


def keep_buffers() -> None:
    """Stop glibc from giving every big buffer back to the kernel: page faults on the next
    operation's buffer otherwise take half of a CPU's training time."""
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # big buffers come from the heap, where they can be used again
