"""A run that other ranks go on with, for test_checkpoint.py: python resharded.py FOLDER"""

import sys
from pathlib import Path

import torch

from zephyr import losses, optim
from zephyr.config import DPOConfig
from zephyr.distributed import fsdp, group
from zephyr.run.folder import Run
from zephyr.weights import config_json, hub

where = Path(sys.argv[1])
settings = torch.load(where / "settings.pt")
ranks = group.start(settings["replicas"])
batches = torch.load(where / "batches.pt", weights_only=False)
m = fsdp.build(config_json.read(where / "base"), ranks, "fp32")
hub.load(where / "base", m)
optimizer = optim.adamw(m, 0.1)


class Notes:
    def state(self):
        return {"notes": {"rank": ranks.rank}}


def opened(**changes):
    c = DPOConfig(**settings | changes)
    try:
        return Run(c, {"data": "digest", "model": "another"}, ranks)
    except ValueError as error:
        return f"{error.code} {error}"


run = opened()
step = run.load(m, optimizer)
run.save(3, m, optimizer, Notes())
for batch in batches:
    weight = ranks.size * (ranks.rank == 1)  # all of the gradient is the second rank's
    (losses.sft(m(batch)) * weight).backward()
    optim.step(optimizer, 1e-3 / (1 + step), 1.0)
    step += 1
run.save(step, m, optimizer, Notes())
run.wait()
(where / "file").touch()
refused = opened(out=str(where / "file" / "run"))
torch.save(
    {"step": step, "refused": refused, "kept": run.kept["notes"]}, where / f"{ranks.rank}.pt"
)
group.finish()
