"""JSON and safetensors files: read with suspicion, written complete or not at all."""

from __future__ import annotations  # so that reading a config.json need not import torch

import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open

from zephyr import files
from zephyr.exits import Storage
from zephyr.files import plain, shown, unique

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_BYTES = 16 << 20  # a header of 10,000 tensors is 2 MB; Python's objects take 20 times that
DEPTH = 50  # of JSON: what nests deeper might be read and then not be written again
FILES, TENSORS, DIMENSIONS = 1000, 10_000, 8
DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it: F32, BF16, ...


def size_of(path: Path, limit: float = math.inf) -> int:
    """Bytes of a file. Raises ValueError unless it is a plain one, which can be read without
    waiting for anybody, of at most `limit` bytes."""
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path}: cannot read: it is not a file")
    if about.st_size > limit:
        raise ValueError(f"{path}: {about.st_size:,} bytes; {limit:,} is the limit for such a file")
    return about.st_size


def read_json(path: Path, text: bytes | None = None, finite: bool = False) -> dict:
    """The JSON object in a file, or in `text`, a part of it; no key may come twice.

    With `finite`, no number may be NaN, which is no JSON, or beyond a float's range.
    """
    try:
        if text is None:
            size_of(path, JSON_BYTES)
            text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error
    try:
        number = _finite if finite else None
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=number, parse_float=number
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        recognise(path, text)
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: malformed JSON: {plain(why, 200)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{shown(text)} is not a finite number")
    return value


def recognise(path: Path, head: bytes) -> None:
    """Raises ValueError if the first bytes of a file that could not be read show what it is."""
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise ValueError(
            f"{path} is a pickle of torch.save, which can run code as it is "
            "read; save it as safetensors"
        )
    if head.startswith(b"GGUF"):
        raise ValueError(f"{path} is a GGUF file, for llama.cpp; take what it was made from")
    files.recognise(path, head)


def _check_depth(value: object) -> None:
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > DEPTH:
            raise RecursionError
        level = [x.values() if isinstance(x, dict) else x for x in level]
        level = [v for x in level if not isinstance(x, str | int | float | None) for v in x]


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def inside(path: Path) -> bool:
    """Whether a file lies in its folder, as one that a link leads to elsewhere does not; a link to
    the blobs of a model in Hugging Face's cache counts, as its snapshots are made of those."""
    # of a loop of links, realpath makes no error as Path.resolve does
    real = Path(os.path.realpath(path))
    blob = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return blob or str(real.parent) == os.path.realpath(path.parent)


def some(names: Iterable[str]) -> str:
    """Up to three of the names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(plain, names[:3])) + more


def stored(paths: list[Path], weight_map: dict[str, str] | None = None) -> dict[str, Stored]:
    """The tensors of safetensors files by name, but for `rotary_emb.inv_freq`, which old files have
    and a config implies. Raises ValueError for a bad file or one that contradicts the index."""
    found: dict[str, Stored] = {}
    for path in paths:
        _check_header(path)
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    if name in found:
                        twice = f"{plain(name)} is in {found[name].path.name} too"
                        raise ValueError(f"{path}: {twice}")
                    part = file.get_slice(name)
                    found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            why = plain(str(error), 200)
            raise ValueError(f"{path}: not a valid safetensors file: {why}") from error
        if len(found) > TENSORS:
            raise ValueError(f"{path}: over {TENSORS:,} tensors; that is the limit")
    if weight_map is not None:
        actual = {name: tensor.path.name for name, tensor in found.items()}
        for name, _ in sorted(weight_map.items() ^ actual.items()):
            said, is_in = weight_map.get(name, "no file"), actual.get(name, "no file")
            folder, name = path.parent, plain(name)
            raise ValueError(f"{folder}: the index has {name} in {said}; {is_in} holds it")
    return {name: x for name, x in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_header(path: Path) -> None:
    """Raises ValueError if the file is not as long as its header says, which can kill a process
    that maps it, or if a key comes twice, which safetensors accepts."""
    size = size_of(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(head := file.read(8), "little")
        if not 8 < start <= min(size, JSON_BYTES):
            recognise(path, head + file.read(500))
            raise ValueError(
                f"{path}: {size} bytes, its first 8 announce a header of {start - 8}: "
                "truncated, or not a safetensors file"
            )
        header = read_json(path, file.read(start - 8))
    header.pop("__metadata__", None)
    end = start
    for name, tensor in header.items():
        match tensor:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(), int(last)]}:
                fits = 0 <= last < 1 << 60 and len(shape) <= DIMENSIONS
                # torch has no tensors of six-bit numbers, and none longer than this
                sizes = all(type(n) is int and 0 <= n < 1 << 60 for n in shape)
                if fits and sizes and "F6_" not in dtype:
                    end = max(end, start + last)
                    continue
        raise ValueError(f"{path}: not a valid safetensors file: malformed header of {plain(name)}")
    if size != end:
        raise ValueError(f"{path}: {size} bytes where its header says {end}; fetch it again")


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor has its own group."""
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def write_shards(
    folder: Path,
    groups: list[list[str]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterator[Tensor],
) -> None:
    """Write each group's tensors, which come in the groups' order, as a safetensors file, and their
    index if there are several. One tensor at a time is in memory.

    Raises ValueError for NaN or infinity: what a reader should refuse is not written.
    """
    import torch

    weight_map, total = {}, 0
    for i, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        # without this metadata transformers 4.36 cannot read the file
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + math.prod(shapes[name]) * dtype.itemsize
            header[name] = {
                "dtype": DTYPES[str(dtype)],
                "shape": list(shapes[name]),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                x = next(tensors).contiguous()
                if not x.isfinite().all():
                    raise ValueError(f"NaN or infinity in {name}; the weights are not saved")
                assert (tuple(x.shape), x.dtype) == (tuple(shapes[name]), dtype), name
                out.write(x.view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(names, file)
        total += end
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def settle(path: Path, mode: int | None = None) -> None:
    """Give a file or folder its mode, if any is given, and wait until it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it, safe on disk, if the block ends well."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already; choose another name or move it away")
    temp = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(target.parent).free) < 1.2 * size:
            raise Storage(f"{target} takes {size:,} bytes and the disk has {free:,} left")
        temp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temp
        for path in temp.iterdir():
            settle(path, 0o644)
        settle(temp, 0o755)
        temp.rename(target)
        settle(target.parent)
    except (OSError, SafetensorError) as error:
        raise Storage(f"{target}: cannot write: {error}") from error
    finally:
        if temp:
            shutil.rmtree(temp, ignore_errors=True)
