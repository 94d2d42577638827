"""How many numbers each reduction of the preference kernels adds, by Triton's compiler, for
test_aot.py."""

import re

from kernels import aot

for launch in aot.launches():
    if launch.kernel.__name__ in ("sums_kernel", "dpo_kernel") and launch.arch == 90:
        text = aot.compiled(launch).asm["ttir"]
        for axis, shape in re.findall(
            r'"tt\.reduce".*?axis = (\d).*?: \(tensor<([\dx]+)xf32>\)', text, re.S
        ):
            print(launch.kernel.__name__, shape.split("x")[int(axis)])
