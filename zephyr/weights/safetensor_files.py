"""Tensors in safetensors files: what is there, and writing them in shards with an index."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zephyr.files import JSON_BYTES, plain, read_json, recognise_weights, size_of, write_json
from zephyr.weights.locate import INDEX, SINGLE

TENSORS, DIMENSIONS = 10_000, 8
DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it: F32, BF16, ...


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
            recognise_weights(path, head + file.read(500))
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


def group_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
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
