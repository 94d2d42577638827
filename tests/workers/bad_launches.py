"""The compiler on launches that are wrong, for test_aot.py; what is wrong goes to stderr."""

import sys

from kernels import aot


def bad(kernel, variant, arch, **options):
    wanted = (kernel, variant, arch)
    launch = next(x for x in launches if (x.kernel.__name__, x.variant, x.arch) == wanted)
    launch.options.update(options)
    return launch


launches = aot.launches()
# a row of 32768 in 4 warps is 256 registers a thread; there are 255
wrong = aot.check(
    [
        *(bad("row_kernel", "V=32000 G bf16", arch, num_warps=4) for arch in (80, 90, 100)),
        bad("tile_kernel", "h, w bf16", 90, num_stages=6),
        bad("sums_kernel", "", 80, STEPS="many"),
    ]
)
print(*wrong, sep="\n", file=sys.stderr)
