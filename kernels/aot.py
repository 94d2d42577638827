"""Compile every kernel for three chips on a machine without one: python -m kernels.aot

One line per kernel, chip and variant: warps, registers of a thread, bytes that a thread spills to
memory, shared memory and its limit, size. The exit status is 1 if a kernel does not compile, if it
spills, or if it needs more shared memory than the chip has. Shapes are Mistral-7B's; launch
settings are the launch code's own, which runs here with a recorder in the place of each kernel.

N predicting rows  V vocabulary  B block of the vocabulary  P pairs  2P responses
T tokens  H query heads  K key heads  E head width
"""

import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kernels import elementwise, fused_adamw, fused_attention, fused_dpo, fused_logprob, reference
from kernels.bench import fused_forward
from kernels.jit import INTERPRETED, triton

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a program may have on sm_80, ...
MODULES = (fused_logprob, fused_dpo, fused_forward, fused_adamw, fused_attention, elementwise)


class Launch(NamedTuple):
    kernel: "triton.JITFunction"
    arch: int
    variant: str
    args: tuple
    options: dict  # of the launch: constants, num_warps, num_stages


class Recorder:
    """Stands in a module in place of a kernel, and notes launches instead of making them."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def calls(arch: int) -> Iterator[tuple]:
    """Yield for each variant its name, a function that launches it, and the arguments of that
    function."""
    token_N = torch.zeros(1, dtype=torch.int64)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    # read once, once without alignment (Mistral's with two tokens added), and twice
    for V, names in ((32_000, dtypes), (32_002, ["bf16"]), (128_256, ["bf16"])):
        z_NV = torch.empty(1, V)
        for name in names:
            g_NV = z_NV.to(dtypes[name])
            yield f"V={V} G {name}", fused_logprob.row_step, z_NV, token_N, g_NV, True
    z_NB = torch.empty(1, 16_384)
    for name, dtype in dtypes.items():
        lse_N, g_NB = torch.empty(1), z_NB.to(dtype)
        yield f"G {name}", fused_logprob.gradient_step, z_NB, token_N, lse_N, 0, g_NB, True
    logprob_N, response_N = torch.empty(8191), torch.zeros(8191, dtype=torch.int64)
    yield "", fused_dpo.response_sums, logprob_N, response_N, 32
    for name in ("dpo", "ipo"):
        reference_2P = torch.empty(32)
        yield name, fused_dpo.dpo_loss, logprob_N, response_N, reference_2P, 0.01, 0.0, name
    for name in ("bf16", "fp32"):
        h_ND, w_VD = (torch.empty(n, 4096, dtype=dtypes[name]) for n in (1, 32_000))
        yield f"h, w {name}", fused_forward.launch, h_ND, w_VD, token_N, arch, 132
    gate_up, g_TF = (torch.empty(1, n, dtype=torch.bfloat16) for n in (2 * 14_336, 14_336))
    yield "bf16", elementwise.swiglu_gradient, gate_up, g_TF, True
    one, grad = torch.ones(()), torch.empty(4096)
    for weight, low in ((grad, None), (grad.bfloat16(), grad.to(torch.int16))):
        for name in ("bf16", "fp32"):
            m = v = grad.to(dtypes[name])
            step = reference.adamw_step(one, 5e-7, (0.9, 0.999), 1e-8, one, one)
            variant = f"{'fp32' if low is None else 'split'} m, v {name}"
            yield variant, fused_adamw.in_triton, weight, low, m, v, grad, 0.0, step
    ends, lse_HT = torch.zeros(2, dtype=torch.int32), torch.empty(32, 1)
    for name in ("bf16", "fp32"):
        q_THE, k_TKE = (torch.empty(1, heads, 128, dtype=dtypes[name]) for heads in (32, 8))
        where = ends, ends, token_N, 1, 4096, arch
        yield name, fused_attention.launch_forward, q_THE, k_TKE, k_TKE, *where
        tensors = q_THE, q_THE, k_TKE, k_TKE, q_THE, lse_HT
        yield name, fused_attention.launch_backward, *tensors, *where


def launches() -> list[Launch]:
    """Yield every launch that this package makes at Mistral-7B's shapes."""
    found = []
    with contextlib.ExitStack() as stack:
        made = []
        for module in MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                recorder = Recorder(getattr(module, name), made)
                stack.enter_context(mock.patch.object(module, name, recorder))
        for arch in SHARED:
            for variant, function, *args in calls(arch):
                made.clear()
                function(*args)
                found += [Launch(kernel, arch, variant, *rest) for kernel, *rest in made]
    return sorted(found, key=lambda launch: launch.kernel.__name__)


def compiled(launch: Launch) -> "triton.compiler.CompiledKernel":
    """Return the kernel compiled as Triton would specialise it for such arguments: by their types,
    and by which numbers 16 divides."""
    kernel, arch, _, args, options = launch
    names, options = kernel.arg_names, dict(options)
    constants = {(i,): options.pop(name) for i, name in enumerate(names) if name in options}
    types = [*map(triton.runtime.jit.mangle_type, args), *["constexpr"] * len(constants)]
    aligned = [isinstance(x, Tensor) or isinstance(x, int) and x % 16 == 0 for x in args]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    source = triton.compiler.ASTSource(
        kernel, dict(zip(names, types, strict=True)), constants, attributes
    )
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    with contextlib.redirect_stdout(io.StringIO()):  # where ptxas fails, Triton prints its input
        return triton.compile(source, target, options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of memory that it uses because registers run
    out (spills)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    use = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return use["REG"], use["STACK"] + use["LOCAL"]


def check(found: Iterable[Launch]) -> list[str]:
    """Print the table, and return a line for each thing that is wrong."""
    wrong = []
    print(
        f"{'kernel':<16} {'chip':<7} {'variant':<16} warps registers spilled "
        f"{'shared / limit':>16} {'size':>7}"
    )
    for launch in found:
        limit = SHARED[launch.arch]
        name = f"{launch.kernel.__name__:<16} sm_{launch.arch:<4} {launch.variant:<16}"
        try:
            binary = compiled(launch)
        except Exception as error:  # Triton's compiler raises nearly any
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            wrong.append(f"{name} does not compile with Triton {triton.__version__}: {reason}")
            continue
        cubin, shared = binary.asm["cubin"], binary.metadata.shared
        registers, spilled = resources(cubin)
        print(
            f"{name} {binary.metadata.num_warps:>5} {registers:>9} {spilled:>7} "
            f"{shared:>7} / {limit} {len(cubin):>7}"
        )
        if spilled:
            wrong.append(f"{name} spills {spilled} bytes of each thread's registers")
        if shared > limit:
            wrong.append(f"{name} needs {shared} bytes of shared memory; the chip has {limit}")
    return [" ".join(line.split()) for line in wrong]


def main() -> int:
    if triton is None or INTERPRETED:
        why = "TRITON_INTERPRET=1 is set: unset it" if INTERPRETED else "pip install triton"
        print(f"kernels.aot: no compiler; {why}", file=sys.stderr)
        return 2
    wrong = check(launches())
    for line in wrong:
        print(f"kernels.aot: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
