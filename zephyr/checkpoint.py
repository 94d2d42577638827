"""The run folder, and the checkpoints a run resumes from.

    config.toml     a recipe that reproduces the run
    run.json        versions, git commit, ranks, what shapes the trajectory
    metrics.jsonl   one line per logged step
    checkpoints/    step-000100/, ...; `latest` links to the newest
    model/          the result, a Hugging Face folder

A checkpoint holds weights and AdamW's moments as safetensors, each rank's shard written by itself;
state.json, what else a run needs to go on; and SHA256SUMS over all of them, which `sha256sum -c`
reads too. It is written into step-000100.part, and gets its name in one rename once every rank has
its bytes on the disk: a folder with the name is complete, whatever happened. Nothing in it is
unpickled, and nothing is read before its sum is checked.

The order of the data is a function of (seed, step), so the step's number is the position in it.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import kernels
from zephyr import config, disk, files, parallel, weights
from zephyr.config import Training
from zephyr.exits import BadCheckpoint, Preempted, Storage, shared
from zephyr.model import Mistral
from zephyr.parallel import Ranks

# settings that may change between a run and its continuation: they leave the trajectory as it is
FREE = {
    "out", "log_every", "eval_every", "save_every", "keep", "save_async", "resume", "timeout",
    "replicas", "microbatch_tokens", "recompute", "on_nonfinite",
}  # fmt: skip
STATE, SUMS = "state.json", "SHA256SUMS"
# what a kill in the middle of writing leaves in the run folder
LEFTOVERS = [f".{name}.????????" for name in ("config.toml", "run.json", "metrics.jsonl", "model")]
FILE_BYTES = 1 << 30  # of a rank's file: one more in memory while it is written


class Part(Protocol):
    """What a rank keeps besides tensors, as JSON: the sums of a log, the history of a guard."""

    def state(self) -> dict: ...


class Run:
    """A run folder, held by this process; opens, fills and writes its checkpoints."""

    def __init__(self, c: Training, digests: dict[str, str], ranks: Ranks):
        """Make the folder, or find the checkpoint to continue from; every rank calls it.

        `digests` are of what shapes the trajectory besides the settings. Raises ValueError if
        another process holds the folder, or if its run's settings or digests differ: then
        `--resume fresh` moves it aside. A finished run is not touched.
        """
        self.c, self.ranks, self.out = c, ranks, Path(c.out)
        free = {name: value for name, value in asdict(c).items() if name not in FREE}
        self.identity = json.loads(json.dumps({"script": c.table, "settings": free, **digests}))
        self.held = ExitStack()
        weakref.finalize(self, self.held.close)
        try:
            self.folder, self.finished = parallel.on_first(self._open)
        except ValueError:
            self.held.close()
            raise
        if self.finished:
            ranks.say(f"{self.out} is finished; --resume fresh starts anew and keeps it")
        parallel.shared_folder(self.out)
        self.group = dist.new_group(backend="gloo")  # a background save's own
        pinned = ranks.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self.under_way: Future | None = None

    def _open(self) -> tuple[Path | None, bool]:
        c, out = self.c, self.out
        self.held.enter_context(_hold(out))
        if c.resume == "fresh" and any(p.name != ".lock" for p in out.iterdir()):
            k = 1
            while (aside := out.with_name(f"{out.name}.{k}")).exists():
                k += 1
            out.rename(aside)
            self.held.enter_context(_hold(out))
        left = [path for pattern in (*LEFTOVERS, ".seen-*") for path in out.glob(pattern)]
        left += [*out.glob("checkpoints/.trash"), *out.glob("checkpoints/step-*.part")]
        for path in left:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if (out / "model").exists():
            self._same(out / "run.json")
            return None, True
        saved = complete(out)
        while saved and c.resume == "previous":
            try:
                verified(saved[-1])
                break
            except BadCheckpoint:
                damaged = saved.pop()
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
                if not saved:
                    raise BadCheckpoint(f"{out} has no intact checkpoint; --resume fresh starts "
                                        "anew and keeps what is there") from None  # fmt: skip
        if saved:
            verified(saved[-1], slice(0))  # all that is read of it here
            self._same(saved[-1] / STATE)
            return saved[-1], False
        about = json.dumps(_about(self.ranks) | {"run": self.identity}, indent=1) + "\n"
        recipe = config.to_toml(replace(c, resume="auto"))  # run as a recipe, it moves nothing
        for name, text in (("config.toml", recipe), ("run.json", about)):
            with files.atomic(out / name) as file:
                file.write(text.encode())
        return None, False

    def _same(self, record: Path) -> None:
        """Raise ValueError unless the recorded run is this one."""
        try:
            before = disk.read_json(record)["run"]
            old, new = before.pop("settings"), dict(self.identity)
            settings = new.pop("settings")
            changed = [
                f"{config.flag(name)} was {old.get(name)!r}, is {settings.get(name)!r}"
                for name in sorted(old.keys() | settings.keys())
                if old.get(name) != settings.get(name)
            ]
            changed += [
                f"{name} changed" for name in sorted(before.keys() | new.keys())
                if before.get(name) != new.get(name)
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadCheckpoint(f"{record} does not say whose run this is; --resume previous goes "
                                "back to the last intact checkpoint, fresh starts anew") from None
        if changed:
            raise ValueError(f"{self.out} holds another run: {'; '.join(changed)}. Continue it as "
                             "it was, or --resume fresh starts anew and keeps it")  # fmt: skip

    def load(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, list[dict]]]:
        """Fill model and optimizer from the checkpoint; its step, and of each part the states that
        the ranks had, one after the other. Without a checkpoint: (0, {}).

        Each rank reads its own slices, whatever number of ranks wrote them. Raises BadCheckpoint if
        a byte of it differs from what was written.
        """
        if self.folder is None:
            return 0, {}
        # of a run without replicas on as many ranks, each checks what it will read itself
        mine = slice(self.ranks.rank, None, self.ranks.size)
        state = parallel.together(lambda: verified(self.folder, mine))
        tensors = _tensors(model, optimizer)
        _read(self.folder, tensors)
        steps = tensors["optimizer.step"]
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["step"].copy_(steps)
        try:
            kept = {name: [rank[name] for rank in state["ranks"]] for name in state["ranks"][0]}
            if len(state["ranks"]) == self.ranks.size:
                rng = bytes.fromhex(kept["rng"][self.ranks.rank])
                torch.set_rng_state(torch.tensor(list(rng), dtype=torch.uint8))
            if self.folder.name != f"step-{state['step']:06d}":
                raise ValueError("of another step")
        except (LookupError, TypeError, ValueError, RuntimeError):
            raise shared(BadCheckpoint(f"{self.folder / STATE} is malformed; --resume previous "
                                       "goes back to the last intact one")) from None  # fmt: skip
        return state["step"], kept

    def after(self, step: int, last: bool, model, optimizer, log, **parts: Part) -> None:
        """Save if it is time to, or if a signal asks; then raises Preempted once that is done."""
        stop = parallel.agree(parallel.stop_wanted())
        due = self.c.save_every and (last or step % self.c.save_every == 0)
        if due or stop:
            with log.paused():
                self.save(step, model, optimizer, log=log, **parts)
        if stop:
            self.wait()
            raise shared(Preempted(f"asked to stop: saved after step {step} in {self.out}; the "
                                   "same command goes on from there"))  # fmt: skip

    def save(self, step: int, model, optimizer, **parts: Part) -> None:
        """Start writing checkpoints/step-XXXXXX on all ranks; `wait` ends it.

        With --save-async the state is copied to host memory and written behind training's back.
        """
        self.wait()
        self.part = part = self.out / "checkpoints" / f"step-{step:06d}.part"
        mine = {name: part.state() for name, part in parts.items()}
        mine["rng"] = bytes(torch.get_rng_state().tolist()).hex()
        every: list[dict | None] = [None] * self.ranks.size
        dist.all_gather_object(every, mine, group=self.group)
        state = {"step": step, "ranks": every, "run": self.identity}
        tensors = _tensors(model, optimizer)
        parallel.on_first(lambda: self._room(part, tensors))
        writer = _Writer(part, state, tensors, self.ranks.size, self.c.keep)
        if self.c.save_async:
            self.under_way = dcp.async_save(
                tensors, storage_writer=writer, process_group=self.group, async_stager=self.stager
            )
        else:
            with self._written():
                dcp.save(tensors, storage_writer=writer, process_group=self.group)

    def _room(self, part: Path, tensors: dict[str, Tensor]) -> None:
        """Raise Storage if the disk cannot take a checkpoint, or the folder cannot be made."""
        size = sum(x.nbytes for x in tensors.values())
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            free = shutil.disk_usage(part.parent).free
        except OSError as error:
            raise Storage(f"{part}: cannot write: {error.strerror}; the checkpoints before are "
                          "intact") from None  # fmt: skip
        if free < 1.05 * size:
            raise Storage(f"{part} takes {size:,} bytes and the disk has {free:,} left; the "
                          "checkpoints before are intact")  # fmt: skip

    def wait(self) -> None:
        """Until the checkpoint under way is complete; every rank raises Storage if it failed."""
        future, self.under_way = self.under_way, None
        if future is not None:
            with self._written():
                future.result()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except dcp.CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            if not isinstance(reason, (OSError, Storage)):
                raise
            if self.ranks.rank == 0:
                shutil.rmtree(self.part, ignore_errors=True)
            text = str(reason) if isinstance(reason, Storage) else (
                f"{self.part}: cannot write: {reason.strerror or reason}")  # fmt: skip
            raise shared(Storage(f"{text}; the checkpoints before are intact")) from None


    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Waits for the checkpoint under way, unless this rank fails alone."""
        if error is None or hasattr(error, "shared"):
            self.wait()


class _Writer(dcp.HuggingFaceStorageWriter):
    """DCP's writer of sharded safetensors; sums every file, and seals the folder at the end."""

    def __init__(
        self, part: Path, state: dict, tensors: dict[str, Tensor], ranks: int, keep: int
    ):  # fmt: skip
        sizes = {name: x.nbytes // ranks for name, x in tensors.items()}
        groups = disk.split(sizes, FILE_BYTES)
        index = {name: k for k, names in enumerate(groups, 1) for name in names}
        super().__init__(str(part), fqn_to_index_mapping=index, save_distributed=True)
        self.part, self.state, self.keep = part, state, keep

    def write_data(self, plan, planner) -> torch.futures.Future:
        """Write this rank's files, already synced; returns a line of SHA256SUMS for each."""
        written = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in written})
        lines = torch.futures.Future()
        lines.set_result([_sum(self.part / name) for name in names])
        return lines

    def finish(self, metadata, results: list[list[str]]) -> None:
        """On the first rank, once all ranks have written: the checkpoint appears."""
        with files.atomic(self.part / STATE) as file:
            file.write(json.dumps(self.state).encode())
        lines = sorted([_sum(self.part / STATE), *(line for lines in results for line in lines)])
        with files.atomic(self.part / SUMS) as file:
            file.write("".join(line + "\n" for line in lines).encode())
        disk.settle(self.part)
        folder = self.part.with_suffix("")
        self.part.rename(folder)
        disk.settle(folder.parent)
        link = folder.with_name(".latest")
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(folder.with_name("latest"))
        if self.keep:
            for old in complete(folder.parent.parent)[: -self.keep]:
                trash = old.with_name(".trash")  # first out of sight, as deleting takes a while
                shutil.rmtree(trash, ignore_errors=True)
                old.rename(trash)
                shutil.rmtree(trash, ignore_errors=True)


def complete(out: Path) -> list[Path]:
    """The run's checkpoints by step."""
    found = (out / "checkpoints").glob("step-*")
    numbered = [(int(p.name[5:]), p) for p in found if re.fullmatch(r"step-\d+", p.name)]
    return [p for _, p in sorted(numbered)]


def verified(folder: Path, shards: slice = slice(None)) -> dict:
    """A checkpoint's state.json, once its files are what their sums say: state.json, and of the
    ranks' shards those in the slice. Raises BadCheckpoint."""
    try:
        lines = (folder / SUMS).read_bytes().decode("ascii").splitlines()
        sums = dict(line.split("  ", 1)[::-1] for line in lines)
        if odd := [p.name for p in folder.iterdir() if p.is_symlink() or not p.is_file()]:
            raise ValueError(f"{disk.some(odd)} is not a plain file")
        there = {p.name for p in folder.iterdir()} - {SUMS}
        if odd := sorted(there ^ sums.keys()):
            raise ValueError(f"{SUMS} and the files differ in {disk.some(odd)}")
        parts = {name: name.split("-model-")[0] for name in sums if name != STATE}
        wanted = {STATE, *sorted(set(parts.values()))[shards]}
        for name in sorted(sums):
            if parts.get(name, STATE) in wanted and _sum(folder / name) != f"{sums[name]}  {name}":
                size = (folder / name).stat().st_size
                raise ValueError(f"{name}, {size} bytes, is not what {SUMS} says")
        state = disk.read_json(folder / STATE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadCheckpoint(f"{folder} is damaged: {reason}; --resume previous goes back to the "
                            "last intact one") from None  # fmt: skip
    return state


def export(folder: Path | str, target: Path | str, base: Path | str | None = None) -> None:
    """Write the Hugging Face folder of a checkpoint, of any number of ranks, a tensor at a time.

    `base` has the config and the tokenizer; without it, the folder that the run started from.
    """
    state = verified(folder := Path(folder))
    try:
        settings = state["run"]["settings"]
        base, empty_system = base or settings["model"], settings["empty_system"]
    except (KeyError, TypeError):
        raise BadCheckpoint(f"{folder}/{STATE} does not say whose run this is") from None
    if not Path(base).is_dir():
        raise ValueError(f"{folder} was trained from {base}, which is not there; give --base, a "
                         "folder with its config.json and tokenizer.model")  # fmt: skip
    shape = weights.config(base)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Mistral(shape).named_parameters()}

    def tensors() -> Iterator[Tensor]:
        for name, size in shapes.items():
            whole = {name: torch.empty(size)}
            _read(folder, whole, alone=True)
            yield whole[name]

    weights.write(target, shape, shapes, tensors(), base, empty_system=empty_system)


def _read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors from a checkpoint's files: each rank its own slices, or this process alone."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        text = f"{type(reason).__name__}: {reason}".splitlines()[0].partition(". ")[0]
        raise shared(BadCheckpoint(f"{folder} does not fit: {text}")) from None
    found = reader.read_metadata().state_dict_metadata
    if odd := [name for name, x in tensors.items() if found[name].properties.dtype != x.dtype]:
        raise shared(BadCheckpoint(f"{folder} does not fit: the dtype of {disk.some(odd)}"))


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}"


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name; moments that no step has made yet are zeros."""
    tensors: dict[str, Tensor] = {}
    for name, p in weights.masters(model).items():
        kept = optimizer.state[p]
        if not kept:
            kept["step"] = torch.zeros((), device=p.device)
            kept["exp_avg"], kept["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors |= {name: p.detach(), f"{name}.exp_avg": kept["exp_avg"],
                    f"{name}.exp_avg_sq": kept["exp_avg_sq"]}  # fmt: skip
        tensors["optimizer.step"] = kept["step"]  # the same for all
    return tensors


def _hold(out: Path) -> TextIO:
    """Lock the run folder until the file or the process is gone; ValueError if it is in use."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a+")
    except OSError as error:
        raise Storage(f"{out}: cannot write: {error.strerror}; change --out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with lock:
            lock.seek(0)
            who = lock.read() or "another process"
        raise ValueError(f"{out} is in use by {who}; wait for it, or change --out") from None
    except OSError:
        pass  # a file system without locks
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def _about(ranks: Ranks) -> dict:
    """What is worth knowing about a run besides its settings."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cuda = ranks.device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
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
