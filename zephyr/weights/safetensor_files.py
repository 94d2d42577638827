"""Tensors in safetensors files: what is there, and writing them in shards with an index."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zephyr.files import plain, recognise_weights, size_of, write_json
from zephyr.weights.locate import INDEX, SINGLE

FLOATS = ("F64", "F32", "F16", "BF16")  # what weights can be, in safetensors' names


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it: F32, BF16, ...


def stored(paths: list[Path], weight_map: dict[str, str] | None = None) -> dict[str, Stored]:
    """Return the tensors in safetensors files by name, without `rotary_emb.inv_freq`, which old
    files have and a config implies. Raises ValueError for a bad file, or for one that contradicts
    the index.

    The library itself refuses files that are cut, too long, or whose headers lie.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        size_of(path)
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    if name in found:
                        twice = f"{plain(name)} is in {found[name].path.name} too"
                        raise ValueError(f"{path}: {twice}")
                    part = file.get_slice(name)
                    found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            with open(path, "rb") as file:
                recognise_weights(path, file.read(500))
            why = plain(str(error), 200)
            raise ValueError(
                f"{path}: not a valid safetensors file: {why}; fetch it again"
            ) from error
    if weight_map is not None:
        actual = {name: tensor.path.name for name, tensor in found.items()}
        for name, _ in sorted(weight_map.items() ^ actual.items()):
            said, is_in = weight_map.get(name, "no file"), actual.get(name, "no file")
            folder, name = path.parent, plain(name)
            raise ValueError(f"{folder}: the index has {name} in {said}; {is_in} holds it")
    return {name: x for name, x in found.items() if not name.endswith("rotary_emb.inv_freq")}


def group_by_size(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Return the names in order, in groups of at most `limit` bytes; a larger tensor has its own
    group."""
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
    folder: Path, groups: list[list[str]], dtype: torch.dtype, tensors: Iterator[Tensor]
) -> None:
    """Write each group's tensors, which come in the groups' order, as a safetensors file, and their
    index if there are several files. One group at a time is in memory.

    Raises ValueError for NaN or infinity: what a reader should refuse is not written.
    """
    weight_map, total = {}, 0
    for i, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        total += _write(folder / file, names, dtype, tensors)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _write(path: Path, names: list[str], dtype: torch.dtype, tensors: Iterator[Tensor]) -> int:
    """Write the next tensors as one file, and return the number of their bytes."""
    file = {name: next(tensors).to("cpu", dtype).contiguous() for name in names}
    for name, x in file.items():
        if not x.isfinite().all():
            raise ValueError(f"NaN or infinity in {name}; the weights are not saved")
    # without this metadata transformers 4.36 cannot read the file
    save_file(file, path, metadata={"format": "pt"})
    return sum(x.nbytes for x in file.values())
