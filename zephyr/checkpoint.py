"""The run folder and the state a run resumes from.

    config.toml     a recipe that reproduces the run
    run.json        versions, git commit, world size, fingerprint of the data
    metrics.jsonl   one line per logged step
    checkpoints/    step-000100/: sharded model and optimizer, visible once complete
    model/          the result, a Hugging Face folder

The order of the data is a function of (seed, step) and the model has no dropout, so weights,
optimizer state and the step's number are all there is to restore.
"""

import json
import platform
import shutil
import subprocess
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import kernels
from zephyr import config, disk, files, parallel
from zephyr.config import Training
from zephyr.parallel import Ranks

# settings that may change between a run and its continuation: they leave the trajectory as it is
FREE = {"out", "log_every", "eval_every", "save_every", "resume", "microbatch_tokens", "recompute"}


def open_run(c: Training, digest: str, ranks: Ranks) -> Path | None:
    """Make the run folder; returns the checkpoint to continue from, None for a fresh start.

    Raises ValueError if the folder holds a finished run, or one whose settings differ in what
    shapes the trajectory; `--resume fresh` moves such a folder aside.
    """
    return parallel.on_first(lambda: _open(c, digest, ranks))


def _open(c: Training, digest: str, ranks: Ranks) -> Path | None:
    out = Path(c.out)
    if c.resume == "fresh" and out.exists():
        k = 1
        while (aside := out.with_name(f"{out.name}.{k}")).exists():
            k += 1
        out.rename(aside)
    if (out / "model").exists():
        raise ValueError(f"{out} holds a finished run; --resume fresh moves it aside, or change "
                         "--out")  # fmt: skip
    if saved := sorted((out / "checkpoints").glob("step-??????")):
        _same_trajectory(c, digest, out)
        return saved[-1]
    about = json.dumps(_about(digest, ranks), indent=1) + "\n"
    recipe = config.to_toml(replace(c, resume="auto"))  # run as a recipe, it moves nothing aside
    for name, text in (("config.toml", recipe), ("run.json", about)):
        with files.atomic(out / name) as file:
            file.write(text.encode())
    return None


def _same_trajectory(c: Training, digest: str, out: Path) -> None:
    try:
        before = tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))[c.table]
        data = disk.read_json(out / "run.json")["data"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{out} has checkpoints, but no config.toml and run.json of a [{c.table}] "
                         "run; --resume fresh moves it aside, or change --out") from None
    now = tomllib.loads(config.to_toml(c))[c.table]
    changed = [
        f"{config.flag(name)} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - FREE)
        if before.get(name) != now.get(name)
    ]
    if data != digest:
        changed.append("the content of --data changed")
    if changed:
        raise ValueError(f"{out} has checkpoints of another run: {'; '.join(changed)}. Continue it "
                         "as it was, or use --resume fresh")  # fmt: skip


def _about(digest: str, ranks: Ranks) -> dict:
    """What is worth knowing about a run besides its settings."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cuda = ranks.device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": digest,
        "ranks": ranks.size,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "kernels": kernels.implementation(ranks.device),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "sentencepiece", "safetensors")},
    }


def _commit() -> str | None:
    """The commit of this code, with -dirty if files differ; None without git or a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save(out: str, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write checkpoints/step-XXXXXX on all ranks; the folder gets its name when it is complete."""
    folder = Path(out) / "checkpoints" / f"step-{step:06d}"
    part = folder.with_suffix(".part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=part)
    except dcp.CheckpointException as error:
        raise ValueError(f"{part}: cannot write: {_first(error)}") from None
    dist.barrier()
    if dist.get_rank() == 0:
        part.rename(folder)
    dist.barrier()


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill model and optimizer from a checkpoint of any number of ranks; returns its step."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        raise ValueError(f"{folder} is damaged: {_first(error)}; remove it, and the run continues "
                         "from the checkpoint before") from None  # fmt: skip
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(folder.name.removeprefix("step-"))


def _first(error: dcp.CheckpointException) -> str:
    """The first sentence of the first rank's failure."""
    reason, _ = next(iter(error.failures.values()))
    return f"{type(reason).__name__}: {reason}".splitlines()[0].partition(". ")[0]
