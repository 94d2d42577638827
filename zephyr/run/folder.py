"""The run folder: whose it is, what it resumes from, and when it is saved.

config.toml     a recipe that reproduces the run
run.json        versions, git commit, ranks, what shapes the trajectory
metrics.jsonl   one line per logged step
checkpoints/    step-000100/, ...; `latest` links to the newest: see zephyr/run/checkpoint.py
model/          the result, a Hugging Face folder
adapter/        with LoRA: what is added to the base, in PEFT's files; see zephyr/weights/adapter.py
"""

import fcntl
import json
import os
import platform
import shutil
import socket
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TextIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import kernels
from kernels.provenance import commit, installed
from zephyr import attention, config, files, lora
from zephyr.config import Training
from zephyr.distributed import machine, signals
from zephyr.distributed.group import (
    PATIENCE,
    Ranks,
    agree,
    on_first,
    set_timeout,
    shared_folder,
    together,
)
from zephyr.errors import BadCheckpoint, Preempted, Storage, shared
from zephyr.model import Mistral
from zephyr.run import checkpoint
from zephyr.run.checkpoint import STATE
from zephyr.run.settings import restarted
from zephyr.weights import adapter, hub, locate
from zephyr.weights.locate import Parts

# settings that may change between a run and its continuation: they leave the trajectory as it is
FREE = {
    "out",
    "eval_data",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "save_async",
    "resume",
    "timeout",
    "replicas",
    "microbatch_tokens",
    "recompute",
    "on_nonfinite",
    "compile",
    "reshard",
    "profile",
    "deterministic",
    "merge",
}
NAMES = "config.toml", "run.json", "metrics.jsonl", "model", "adapter"
# what a kill in the middle of writing leaves in the run folder
LEFTOVERS = [f".{name}.????????" for name in NAMES]


class Journal(Protocol):
    """What a rank keeps besides tensors: see zephyr/metrics/journal.py."""

    def state(self) -> dict[str, dict]: ...
    def paused(self) -> AbstractContextManager: ...
    def phase(self, name: str) -> AbstractContextManager: ...


def due(step: int, every: int, last: int) -> bool:
    """True at step `last` and at each multiple of `every`, which may be 0."""
    return step == last or bool(every and step % every == 0)


class Run:
    """A run folder, held by this process until its `with` ends; opens, fills and writes its
    checkpoints."""

    def __init__(self, c: Training, digests: dict[str, str], ranks: Ranks):
        """Make the folder, or find the checkpoint to continue from; every rank calls it.

        `digests` are of what shapes the trajectory besides the settings. Raises ValueError if
        another process holds the folder, or if its run's settings or digests differ: then
        `--resume fresh` moves it aside. A finished run is not touched.
        """
        self.c, self.ranks, self.out = c, ranks, Path(c.out)
        fixed = {name: value for name, value in asdict(c).items() if name not in FREE}
        self.identity = json.loads(json.dumps({"script": c.table, "settings": fixed, **digests}))
        self.save_async = c.save_async
        self.under_way: Future | None = None
        with ExitStack() as self.held:  # the lock is let go if anything here fails
            self.folder, self.finished = on_first(self._open)
            if self.finished:
                ranks.say(f"{self.out} is finished; --resume fresh starts over and keeps it")
                if c.merge and not (self.out / "model").exists():
                    where = f"{self.out / 'adapter'} {self.out / 'model'}"
                    ranks.say(f"its adapter is not merged yet: python -m zephyr.weights {where}")
            shared_folder(self.out)
            self.group = dist.new_group(backend="gloo")  # a background save's own
            self.copies = checkpoint.HostCopies(pinned=ranks.device.type == "cuda")
            self.held = self.held.pop_all()
        weakref.finalize(self, self.held.close)  # of one that nobody enters

    def _open(self) -> tuple[Path | None, bool]:
        c, out = self.c, self.out
        self.held.enter_context(_hold(out))
        used = any(p.name != ".lock" for p in out.iterdir())
        if c.resume == "fresh" and used and not restarted():
            whole = _real(out)  # of a link what it leads to is moved, and not the link
            whole.rename(files.unused(whole, 1))
            self.held.enter_context(_hold(out))
        left = [path for pattern in (*LEFTOVERS, ".seen-*") for path in out.glob(pattern)]
        left += [*out.glob("checkpoints/.trash*"), *out.glob("checkpoints/step-*.part")]
        for path in left:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if (out / "model").exists() or (out / "adapter").exists():
            self._same(out / "run.json")
            return None, True
        saved = checkpoint.complete(out)
        while saved and c.resume == "previous":
            try:
                checkpoint.verified(saved[-1])
                break
            except BadCheckpoint:
                damaged = saved.pop()
                damaged.rename(files.unused(damaged.with_name(f"damaged-{damaged.name}")))
                if not saved:
                    raise BadCheckpoint(
                        f"{out} has no intact checkpoint; --resume fresh starts "
                        "over and keeps what is there"
                    ) from None
        if saved:
            checkpoint.verified(saved[-1], slice(0))  # all that is read of it here
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
            before = files.read_json(record)["run"]
            old, new = before.pop("settings"), dict(self.identity)
            settings = new.pop("settings")
            # of what has a digest the content counts, wherever it lies and however it is spelt
            settled = FREE | {"base"} | (before.keys() & new.keys())
            changed = [
                f"{config.flag(name)} was {old.get(name)!r}, is {settings.get(name)!r}"
                for name in sorted((old.keys() | settings.keys()) - settled)
                if old.get(name) != settings.get(name)
            ]
            changed += [
                f"the content of --{name} changed" if name != "script" else "the script changed"
                for name in sorted(before.keys() & new.keys())
                if before[name] != new[name]
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadCheckpoint(
                f"{record} does not say whose run this is; --resume previous goes "
                "back to the last intact checkpoint, fresh starts over"
            ) from None
        if changed:
            raise ValueError(
                f"{self.out} holds another run: {'; '.join(changed)}. Continue it as "
                "it was, or --resume fresh starts over and keeps it"
            )

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Fill model and optimizer from the checkpoint, if there is one, and return its step, else
        0.

        `start` is then that step, and `kept` has, by name, the states that the ranks' journals had.
        Each rank reads its own slices, whatever number of ranks wrote them. Raises BadCheckpoint if
        a byte of it differs from what was written. From here on a rank that does not answer within
        --timeout ends the run.
        """
        self.start, self.kept = self._loaded(model, optimizer)
        if self.folder:
            self.ranks.say(f"continues from {self.folder}")
        set_timeout(self.c.timeout)
        return self.start

    def _loaded(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, list[dict]]]:
        if self.folder is None:
            return 0, {}
        # of a run without replicas on as many ranks, each checks what it will read itself
        mine = slice(self.ranks.rank, None, self.ranks.size)
        with together():
            state = checkpoint.verified(self.folder, mine)
        tensors = checkpoint.tensors_of(model, optimizer)
        checkpoint.read(self.folder, tensors)
        steps = tensors["optimizer.step"]
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["step"].copy_(steps)
        try:
            kept = {name: [rank[name] for rank in state["ranks"]] for name in state["ranks"][0]}
            if len(state["ranks"]) == self.ranks.size:
                rng = bytearray.fromhex(kept["rng"][self.ranks.rank])
                torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8))
            if self.folder.name != f"step-{state['step']:06d}":
                raise ValueError("of another step")
        except (LookupError, TypeError, ValueError, RuntimeError):
            raise shared(
                BadCheckpoint(
                    f"{self.folder / STATE} is malformed; --resume previous "
                    "goes back to the last intact one"
                )
            ) from None
        return state["step"], kept

    def after(self, step: int, last: int, model, optimizer, journal: Journal) -> None:
        """Save after step `step` of `last` if it is time to, or if a signal asks for it; in that
        case raise Preempted once the state is saved."""
        stop = agree(signals.stop_wanted())
        if stop or (self.c.save_every and due(step, self.c.save_every, last)):
            with journal.paused(), journal.phase("checkpoint"):
                self.save(step, model, optimizer, journal)
        if stop:
            self.wait()
            raise shared(
                Preempted(
                    f"asked to stop: saved after step {step} in {self.out}; the "
                    "same command goes on from there"
                )
            )

    def save(self, step: int, model, optimizer, journal: Journal | None = None) -> None:
        """Start writing checkpoints/step-XXXXXX on all ranks; `wait` ends it.

        With --save-async the state is copied to host memory and written behind training's back, if
        the host has the memory.
        """
        self.wait()
        self.part = part = self.out / "checkpoints" / f"step-{step:06d}.part"
        mine = journal.state() if journal else {}
        mine["rng"] = torch.get_rng_state().numpy().tobytes().hex()
        every: list[dict | None] = [None] * self.ranks.size
        dist.all_gather_object(every, mine, group=self.group)
        state = {"step": step, "ranks": every, "run": self.identity}
        tensors = checkpoint.tensors_of(model, optimizer)
        on_first(lambda: self._room(part, tensors))
        writer = checkpoint.Writer(part, state, tensors, self.ranks.size, self.c.keep)
        if self._behind(tensors):
            self.under_way = dcp.async_save(
                tensors, storage_writer=writer, process_group=self.group, async_stager=self.copies
            )
        else:
            with self._written():
                dcp.save(tensors, storage_writer=writer, process_group=self.group)

    def _behind(self, tensors: dict[str, Tensor]) -> bool:
        """Return True if training goes on while these tensors are written; say so, once, if it
        should and the host has no memory for their copy."""
        if self.save_async:
            need, free = self.copies.missing(tensors), machine.host_memory()
            if agree(need > free):
                self.save_async = False
                self.ranks.say(
                    f"training waits while a checkpoint is written, as with --no-save-async: a "
                    f"copy of its state takes {need:,} bytes of host memory a rank, and {free:,} "
                    "are free"
                )
        return self.save_async

    def _room(self, part: Path, tensors: dict[str, Tensor]) -> None:
        """Raise Storage if the disk cannot take a checkpoint, or the folder cannot be made."""
        size = sum(x.nbytes for x in tensors.values())
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            free = shutil.disk_usage(part.parent).free
        except OSError as error:
            raise Storage(
                f"{part}: cannot write: {error.strerror}; the checkpoints before are intact"
            ) from None
        if free < 1.05 * size:
            raise Storage(
                f"{part} takes {size:,} bytes and the disk has {free:,} left; the "
                "checkpoints before are intact"
            )

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete. Every rank raises Storage if it
        failed."""
        future, self.under_way = self.under_way, None
        if future is not None:
            with self._written():
                future.result()

    def export(self, model: Mistral) -> None:
        """Write the finished model as a Hugging Face folder, RUN/model; every rank calls it. With
        LoRA write the adapters, RUN/adapter, and of those and their base RUN/model."""
        self.wait()
        set_timeout(PATIENCE)  # while the first rank writes, the others wait
        start, empty = locate.parts(self.c.model, self.c.base), self.c.empty_system is not False
        spec, path = lora.spec(self.c), self.out / "adapter"
        if not spec:
            with together():
                hub.save(model, self.out / "model", base=start, empty_system=empty)
            return
        tensors = adapter.gathered(model, keep=self.ranks.rank == 0)
        written = on_first(lambda: adapter.write(path, tensors, spec, start, empty))
        self.ranks.say(*adapter.serving(path, written))
        if self.c.merge:
            on_first(lambda: hub.merge(Parts(start.model, path), self.out / "model"))

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
            text = (
                str(reason)
                if isinstance(reason, Storage)
                else (f"{self.part}: cannot write: {reason.strerror or reason}")
            )
            raise shared(Storage(f"{text}; the checkpoints before are intact")) from None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Waits for the checkpoint under way, unless this rank fails alone; lets go of the lock."""
        with self.held:
            if error is None or hasattr(error, "shared"):
                self.wait()


def _real(path: Path) -> Path:
    """Return where a path leads by all its links. For a loop of links, at which Path.resolve
    raises, it returns some path."""
    return Path(os.path.realpath(path))


def _hold(out: Path) -> TextIO:
    """Lock the run folder until the file or the process is gone. Raises ValueError if another
    process holds it."""
    try:
        _real(out).mkdir(parents=True, exist_ok=True)  # also where a link leads to nothing yet
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
    """Return what is worth knowing about a run besides its settings."""
    cuda = ranks.device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": ranks.size,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        **({"allocator": machine.allocator()["PYTORCH_CUDA_ALLOC_CONF"]} if cuda else {}),
        "kernels": kernels.implementation(ranks.device),
        "attention": attention.back_end(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # which names the build, as installed() does not
        **{name: installed(name) for name in ("triton", "sentencepiece", "safetensors")},
    }
