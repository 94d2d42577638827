"""Checkpoints: sharded, complete or not there, and never code.

One holds weights and AdamW's moments as safetensors, each rank's shard written by itself;
state.json, what else a run needs to go on; and SHA256SUMS over all of them, which `sha256sum -c`
reads too. It is written into step-000100.part, and gets its name in one rename once every rank has
its bytes on the disk: a folder with the name is complete, whatever happened. Nothing in it is
unpickled, and nothing is believed before its sum is checked.

The order of the data is a function of (seed, step), so the step's number is the position in it.
"""

import contextlib
import functools
import hashlib
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from zephyr import files, lora, optim
from zephyr.errors import BadCheckpoint, shared
from zephyr.model import Mistral
from zephyr.weights import adapter, config_json, hub, locate, masters, safetensor_files

STATE, SUMS = "state.json", "SHA256SUMS"
# of a rank's file: one more in memory while it is written. While safetensors copies one, 0.3 s of
# 256 MiB, no other thread runs Python, so training queues nothing for a GPU
FILE_BYTES = 1 << 28


class Writer(dcp.HuggingFaceStorageWriter):
    """DCP's writer of sharded safetensors; sums every file, and seals the folder at the end."""

    def __init__(self, part: Path, state: dict, tensors: dict[str, Tensor], ranks: int, keep: int):
        sizes = {name: x.nbytes // ranks for name, x in tensors.items()}
        groups = safetensor_files.group_by_size(sizes, FILE_BYTES)
        index = {name: k for k, names in enumerate(groups, 1) for name in names}
        super().__init__(str(part), fqn_to_index_mapping=index, save_distributed=True)
        self.part, self.state, self.keep = part, state, keep
        # DCP's writer would wait for the GPU every 10 MB, host copies or not: some 870 times in a
        # save of 7 B, each time for all that training has queued by then
        self.per_thread_copy_ahead = 0

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
        files.settle(self.part)
        folder = self.part.with_suffix("")
        self.part.rename(folder)
        files.settle(folder.parent)
        # the checkpoint is complete: what comes after it is a convenience, and ends no run
        link = folder.with_name(".latest")
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            link.replace(folder.with_name("latest"))
        except OSError as error:  # links cannot be made here, or a copy made a folder of it
            _mention(
                f"{folder.with_name('latest')} does not link to the newest checkpoint, "
                f"{folder.name}: {error.strerror}"
            )
            with contextlib.suppress(OSError):
                link.unlink()
        for old in complete(folder.parent.parent)[: -self.keep] if self.keep else ():
            trash = old.with_name(f".trash-{old.name}")  # out of sight: deleting takes a while
            try:
                old.rename(trash)
            except OSError as error:
                _mention(f"{old} stays, as it cannot be removed: {error.strerror}")
            shutil.rmtree(trash, ignore_errors=True)


@functools.cache
def _mention(text: str) -> None:
    """Print a line, once."""
    with contextlib.suppress(OSError):  # nobody may be reading
        print(text, file=sys.stderr)


class HostCopies:
    """What `dcp.async_save` calls a stager: host memory that a state is copied to, so that training
    may go on while the copy is written.

    The memory is made at the first save and used again by the next, which must not begin before the
    one under way has ended. Beside a GPU it is pinned: 58 GB at 7 B take seconds to pin, once, and
    64 GB of memory, as torch rounds each pinned tensor up to a power of two. The copies are queued
    one behind the other and waited for together.
    """

    should_synchronize_after_execute = False  # `stage` returns once everything is there

    def __init__(self, pinned: bool):
        self.pinned, self.copies = pinned, {}

    def missing(self, tensors: dict[str, Tensor]) -> int:
        """Return how many bytes of host memory `stage` would make for these tensors: none but at
        the first save."""
        sizes = [_mine(x).nbytes for name, x in tensors.items() if name not in self.copies]
        return sum(1 << (n - 1).bit_length() for n in sizes if n) if self.pinned else sum(sizes)

    def stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors on the host; of one that is sharded, this rank's shard as it lies in the
        whole."""
        staged = {}
        for name, x in tensors.items():
            mine = _mine(x)
            if name not in self.copies:
                about = {"dtype": mine.dtype, "pin_memory": self.pinned}
                self.copies[name] = torch.empty(mine.shape, **about)
            staged[name] = self.copies[name].copy_(mine, non_blocking=True)
            if isinstance(x, DTensor):
                staged[name] = DTensor(self.copies[name], x._spec, requires_grad=False)
        if self.pinned:
            torch.cuda.current_stream().synchronize()
        return staged


def _mine(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Reader(dcp.HuggingFaceStorageReader):
    """DCP's reader, of the files that the sums name; it would read all that are there."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        names = [str(folder / name) for name in sorted(_sums(folder))]
        self.fs.ls = lambda path: names


def complete(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = (out / "checkpoints").glob("step-*")
    numbered = [(int(p.name[5:]), p) for p in found if re.fullmatch(r"step-\d+", p.name)]
    return [p for _, p in sorted(numbered)]


def verified(folder: Path, shards: slice = slice(None)) -> dict:
    """Return a checkpoint's state.json, after its files were compared with SHA256SUMS: state.json
    itself, and of the ranks' shards those in the slice. Raises BadCheckpoint if one differs.

    A file that SHA256SUMS does not list, such as a file manager's .DS_Store, is never read, so it
    is no damage. A shard that is there and is not listed is damage, as the list is then incomplete.
    """
    try:
        sums = _sums(folder)
        if odd := {p.name for p in folder.glob("[!.]*.safetensors")} - sums.keys():
            raise ValueError(f"{SUMS} does not name {files.some(odd)}")
        if odd := [name for name in sums if not _is_plain(folder / name)]:
            raise ValueError(f"{files.some(odd)} is missing, or not a plain file")
        if STATE not in sums:
            raise ValueError(f"{SUMS} does not name {STATE}")
        parts = {name: name.split("-model-")[0] for name in sums if name != STATE}
        wanted = {STATE, *sorted(set(parts.values()))[shards]}
        for name in sorted(sums):
            if parts.get(name, STATE) in wanted and _sum(folder / name) != f"{sums[name]}  {name}":
                size = (folder / name).stat().st_size
                raise ValueError(f"{name}, {size} bytes, is not what {SUMS} says")
        state = files.read_json(folder / STATE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadCheckpoint(
            f"{folder} is damaged: {reason}; --resume previous goes back to the last intact one"
        ) from None
    return state


def export(folder: Path | str, target: Path | str, base: Path | str | None = None) -> None:
    """Write the Hugging Face folder of a checkpoint, of any number of ranks, a tensor at a time.

    `base` has the config and the tokenizer; without it, the folder that the run started from. The
    checkpoint of a LoRA run is added to that folder's weights: raises ValueError if those are not
    the bytes that the run started from.
    """
    state = verified(folder := Path(folder))
    try:
        settings = state["run"]["settings"]
        under = None if base else settings.get("base")
        base, empty_system = base or settings["model"], settings["empty_system"] is not False
        spec = lora.spec(SimpleNamespace(**{"lora_rank": 0} | settings))
        digest = state["run"]["model"] if spec else None
    except (KeyError, TypeError, AttributeError):
        raise BadCheckpoint(f"{folder}/{STATE} does not say whose run this is") from None
    if not Path(base).is_dir():
        raise ValueError(
            f"{folder} was trained from {base}, which is not there; give --base, a "
            "folder with its config.json and tokenizer.model"
        )
    place = locate.parts(base, under)
    shape = config_json.read(place.model)
    with torch.device("meta"):
        model = Mistral(shape)
        if spec:
            lora.attach(model, spec, "fp32", torch.device("cpu"))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if spec:
        if hub.digest(place) != digest:
            raise ValueError(
                f"{folder} holds adapters of another model than {base}: they were trained beside "
                "other bytes; give --base, the folder that their run started from"
            )
        tensors = {
            name: torch.empty(size) for name, size in shapes.items() if lora.is_adapter(name)
        }
        read(folder, tensors, alone=True)
        added = adapter.paired(tensors, spec)
        if place.adapter:
            added = adapter.stacked(adapter.read(place.adapter), added)
        return hub.merge(place, target, added, empty_system)

    def whole() -> Iterator[Tensor]:
        for name, size in shapes.items():
            parts = masters.empty_parts(name, size, settings.get("masters") == "split")
            read(folder, parts, alone=True)
            yield masters.joined(name, parts)

    hub.write(target, shape, shapes, whole(), place, empty_system=empty_system)


def read(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors from a checkpoint's files: each rank its own slices, or this process alone."""
    reader = Reader(folder)
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
        raise shared(BadCheckpoint(f"{folder} does not fit: the dtype of {files.some(odd)}"))


def _sums(folder: Path) -> dict[str, str]:
    """The files that a checkpoint has, and their sums."""
    lines = (folder / SUMS).read_bytes().decode("ascii").splitlines()
    sums = dict(line.split("  ", 1)[::-1] for line in lines)
    if odd := [name for name in sums if name in ("", "..") or "/" in name]:
        raise ValueError(f"{SUMS} names {files.some(odd)}, which is no file of the folder")
    return sums


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}"


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Masters and moments of what is trained, by name; moments that no step has made yet are
    zeros."""
    tensors: dict[str, Tensor] = {}
    optim.fill_state(optimizer)
    for name, p in masters.resharded_parameters(model).items():
        if not p.requires_grad:
            continue
        kept = optimizer.state[p]
        tensors |= masters.parts(name, p) | {
            f"{name}.exp_avg": kept["exp_avg"],
            f"{name}.exp_avg_sq": kept["exp_avg_sq"],
        }
        tensors["optimizer.step"] = kept["step"]  # the same for all
    return tensors
