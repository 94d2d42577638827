"""JSON and safetensors files: read with suspicion, written complete or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zephyr.exits import Storage
from zephyr.files import unique

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100 << 20  # safetensors' own limit
FILES = 1000


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it: F32, BF16, ...


def read_json(path: Path, text: bytes | None = None) -> dict:
    """The JSON object in a file, or in `text`, a part of it; no key may come twice."""
    try:
        value = json.loads(path.read_bytes() if text is None else text, object_pairs_hook=unique)
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def some(names: Iterable[str]) -> str:
    """Up to three of the names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The folder's safetensors files, and its index {tensor: file name} if it has one.

    A file that the index names must lie in the folder itself: no path and no link leads elsewhere.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder} has both {SINGLE} and {INDEX}; remove the one not meant")
    if single.exists():
        return [single], None
    if not index.exists():
        pickles = [p.name for end in ("bin", "pth", "pt") for p in folder.glob(f"*.{end}")]
        why = f", only {some(pickles)}: reading a pickle can run code" if pickles else ""
        raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}{why}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map must be an object of tensor: file name")
    names = sorted(set(weight_map.values()))
    if len(names) > FILES:
        raise ValueError(f"{index} lists {len(names)} files; {FILES} is the limit")
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index}: {name!r} is not the plain name of a safetensors file")
        path = folder / name
        if path.resolve().parent != folder.resolve():
            raise ValueError(f"{path} links out of the folder; hf download --local-dir copies it")
        if not path.is_file():
            raise ValueError(f"{index}: {name} is missing from the folder; fetch it")
    return [folder / name for name in names], weight_map


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
                        raise ValueError(f"{path}: {name} is in {found[name].path.name} too")
                    part = file.get_slice(name)
                    found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path}: not a valid safetensors file: {error}") from error
    if weight_map is not None:
        actual = {name: tensor.path.name for name, tensor in found.items()}
        for name, _ in sorted(weight_map.items() ^ actual.items()):
            said, is_in = weight_map.get(name, "no file"), actual.get(name, "no file")
            raise ValueError(f"{paths[0].parent}: the index has {name} in {said}; {is_in} holds it")
    return {name: x for name, x in found.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_header(path: Path) -> None:
    """Raises ValueError if the file is not as long as its header says, which can kill a process
    that maps it, or if a key comes twice, which safetensors accepts."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= min(size, HEADER_BYTES):
            raise ValueError(f"{path}: {size} bytes, its first 8 announce a header of {start - 8}: "
                             "truncated, or not a safetensors file")  # fmt: skip
        header = read_json(path, file.read(start - 8))
    header.pop("__metadata__", None)
    try:
        end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (TypeError, LookupError):
        raise ValueError(f"{path}: not a valid safetensors file: malformed header") from None
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


def write_shards(folder: Path, shards: Iterator[dict[str, Tensor]], count: int) -> None:
    """Write `count` groups of tensors as safetensors files, and their index if there are several.

    Raises ValueError for NaN or infinity: what a reader should refuse is not written.
    """
    weight_map, size = {}, 0
    for i, tensors in enumerate(shards, 1):
        if broken := [name for name, x in tensors.items() if not x.isfinite().all()]:
            raise ValueError(f"NaN or infinity in {some(broken)}; the weights are not saved")
        file = SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
        # without this metadata transformers 4.36 cannot read the file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(x.nbytes for x in tensors.values())
    if count > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _settle(path: Path, mode: int | None = None) -> None:
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
            _settle(path, 0o644)
        _settle(temp, 0o755)
        temp.rename(target)
        _settle(target.parent)
    except (OSError, SafetensorError) as error:
        raise Storage(f"{target}: cannot write: {error}") from error
    finally:
        if temp:
            shutil.rmtree(temp, ignore_errors=True)
