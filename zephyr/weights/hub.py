"""Hugging Face folders to and from a (sharded) model: read a tensor at a time, written a file at a
time.

transformers fills in what a folder lacks and loads what is broken; here both are errors.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from tqdm import tqdm

from zephyr import files, lora
from zephyr.architecture import MistralConfig
from zephyr.model import Mistral
from zephyr.tokenizer import Tokenizer
from zephyr.weights import adapter, config_json, locate, safetensor_files
from zephyr.weights.adapter import Pair
from zephyr.weights.locate import Parts
from zephyr.weights.masters import fill, full_master, resharded_parameters

SHARD_BYTES = 1_000_000_000  # a file, which is in memory while it is written
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
QUANTIZED = (  # how the names end that GPTQ, AWQ, bitsandbytes, fp8 and compressed-tensors add
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".scales",
    ".biases",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".weight_scale",
    ".weight_scale_inv",
    ".input_scale",
    ".weight_packed",
    ".weight_zero_point",
)


@torch.no_grad()
def load(folder: Path | str | Parts, model: Mistral, seed: int = 0) -> None:
    """Fill the model's parameters in place; each rank reads only its own slices of the files.

    Weights are cast to the dtype of the parameters; if the folder is an adapter's, after it was
    added to its base in fp32. Adapters that the model itself has start by `seed`, see
    `lora.initial`. A tied model is tied again, as `to_empty` unties it. Raises ValueError unless
    the files hold exactly the model's tensors and all are finite; of NaN and infinity a rank sees
    only its own slices.
    """
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    place, parameters = locate.parts(folder), dict(model.named_parameters())
    added = adapter.read(place.adapter) if place.adapter else {}
    stored = {name: p for name, p in parameters.items() if not lora.is_adapter(name)}
    values = opened(place, stored, model.config.tie_word_embeddings, added)
    broken = []
    hidden = True if dist.is_initialized() and dist.get_rank() else None  # on a terminal only
    bar = tqdm(parameters.items(), "weights", delay=3, leave=False, disable=hidden)
    for name, parameter in bar:
        local, part = _share(parameter)
        if not local.numel():  # fewer rows than ranks
            continue
        if name in stored:
            fill(parameter, local, values(name, part))
        else:
            fill(parameter, local, lora.initial(name, parameter.shape, seed)[part])
        # the extremes carry any NaN or infinity, and need no second tensor as isfinite() does
        if not all(math.isfinite(x) for x in torch.aminmax(local)):
            broken.append(f"{name} as {local.dtype}")
    if broken:
        raise ValueError(f"{place.adapter or place.model}: NaN or infinity in {files.some(broken)}")


def opened(
    place: Parts, wanted: dict[str, Tensor], tied: bool, added: dict[str, Pair]
) -> Callable[[str, tuple[slice, ...]], Tensor]:
    """Return a function that gives a part of a stored tensor, with B A of what is `added` to it, in
    fp32. Raises ValueError unless the files hold exactly the tensors wanted, and `added` fits
    them."""
    folder = place.model
    found = safetensor_files.stored(*locate.weight_files(folder))
    if tied:
        check_tied(folder, found)
    check(folder, found, wanted)
    for name, (a, b) in added.items():
        shape = wanted[name].shape if name in wanted else None
        if shape != (len(b), a.shape[1]):
            there = "has none" if shape is None else f"has {list(shape)}"
            raise ValueError(
                f"{place.adapter}: the adapter of {name} is for {[len(b), a.shape[1]]}, and "
                f"{folder} {there}: it is another model's; give --base"
            )

    def values(name: str, part: tuple[slice, ...]) -> Tensor:
        # opened for each tensor, so that no more than one is mapped at a time
        with safe_open(found[name].path, "pt") as file:
            w = file.get_slice(name)[part]
        if name not in added:
            return w
        a, b = added[name]
        return w.float() + b[part[0]] @ a[:, part[1]]

    return values


def _share(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """Return this rank's part of a parameter, and which slices of the whole it is."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, n) for n in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    part = tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))
    return parameter.to_local(), part


def check_tied(folder: Path | str, found: dict[str, safetensor_files.Stored]) -> None:
    """Remove a tied model's head, which may be stored too, from what was found. Raises ValueError
    if it differs from the embeddings, as one of the two would be lost."""
    head, embeddings = found.pop(HEAD, None), found.get(EMBEDDINGS)
    if head is None or embeddings is None:
        return
    with safe_open(head.path, "pt") as first, safe_open(embeddings.path, "pt") as second:
        a, b = first.get_tensor(HEAD), second.get_tensor(EMBEDDINGS)
        if a.shape != b.shape or not (a == b).all():
            raise ValueError(
                f"{folder}: its config says tie_word_embeddings, yet {HEAD} is another than "
                f"{EMBEDDINGS}; write tie_word_embeddings false, or leave {HEAD} out of the file"
            )


def check(
    folder: Path | str, found: dict[str, safetensor_files.Stored], wanted: dict[str, Tensor]
) -> None:
    """Raise ValueError unless the tensors found are those wanted: by name, by shape, and in
    floating point."""
    if odd := [name for name in found if name.endswith(QUANTIZED)]:
        raise ValueError(
            f"{folder} has {files.some(odd)}: quantized weights cannot be trained; "
            "take the model that they were made from"
        )
    if odd := [name for name in found if ".lora_" in name or ".base_layer." in name]:
        raise ValueError(
            f"{folder} has {files.some(odd)}: a LoRA adapter beside the weights; merge "
            "them with peft's merge_and_unload, and save that"
        )
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"{folder} lacks {files.some(missing)}, which its config asks for")
    if surplus := found.keys() - wanted.keys():
        raise ValueError(f"{folder} has {files.some(surplus)}, unknown to its config")
    for name, (path, inside, shape, dtype) in found.items():
        if shape != (right := tuple(wanted[name].shape)):
            raise ValueError(f"{path}: {inside} is {list(shape)}; its config says {list(right)}")
        if dtype not in safetensor_files.FLOATS:
            kinds = ", ".join(safetensor_files.FLOATS)
            raise ValueError(f"{path}: {inside} is {dtype}; weights are one of {kinds}")


def digest(folder: Path | str | Parts) -> str:
    """Return the SHA-256 over config.json and the weight files, and an adapter's two, read at about
    the disk's speed."""
    place = locate.parts(folder)
    paths = [place.model / "config.json", *locate.weight_files(place.model)[0]]
    if place.adapter:
        paths += [place.adapter / name for name in (locate.ADAPTER, locate.ADAPTER_WEIGHTS)]

    def line(path: Path) -> str:
        with open(path, "rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"

    with ThreadPoolExecutor(2) as pool:
        return hashlib.sha256("".join(pool.map(line, paths)).encode()).hexdigest()


@torch.no_grad()
def save(
    model: Mistral,
    folder: Path | str,
    base: Path | str | Parts,
    dtype: torch.dtype | None = None,
    empty_system: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a (sharded) model without adapters as a Hugging Face folder; see `write`.

    Every rank calls it, and one tensor at a time is gathered; rank 0 writes, a file at a time.
    Raises its errors on rank 0 only; no other rank is left waiting."""
    parameters = resharded_parameters(model)
    tensors = (full_master(p) for p in parameters.values())
    try:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shapes = {name: tuple(p.shape) for name, p in parameters.items()}
            write(folder, model.config, shapes, tensors, base, dtype, empty_system, shard_bytes)
    finally:
        for _ in tensors:  # gathering takes every rank, so an error here must not end it early
            pass


def write(
    folder: Path | str,
    config: MistralConfig,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterator[Tensor],
    base: Path | str | Parts,
    dtype: torch.dtype | None = None,
    empty_system: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder: weights, config, the base's tokenizer, the chat template.

    `tensors` come in the order of `shapes`, and are cast to `dtype`, or else to the base's. The
    template inserts an empty system message if training did. Raises ValueError if the folder exists
    or cannot be written; then there is none.
    """
    place = locate.parts(base)
    path = place.model / "config.json"
    raw = files.read_json(path)
    dtype = dtype or getattr(torch, config_json.dtype(raw, path))
    tokenizer = Tokenizer(place.tokenizer)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    groups = safetensor_files.group_by_size(sizes, shard_bytes)
    with files.new_folder(Path(folder), sum(sizes.values())) as temp:
        config_json.write_config(
            temp, config, str(dtype).removeprefix("torch."), raw, tokenizer.bos, tokenizer.eos
        )
        config_json.write_tokenizer(temp, tokenizer, config_json.chat_template(empty_system))
        safetensor_files.write_shards(temp, groups, dtype, tensors)


@torch.no_grad()
def merge(
    place: Parts,
    target: Path | str,
    added: dict[str, Pair] | None = None,
    empty_system: bool | None = None,
) -> None:
    """Write the Hugging Face folder of a model with an adapter added in fp32, then cast to the
    base's dtype, a tensor at a time. Without `added` it is the adapter of `place`; without
    `empty_system` the chat template has such a message if that of `place` does."""
    shape = config_json.read(place.model)
    with torch.device("meta"):
        wanted = dict(Mistral(shape).named_parameters())
    added = adapter.read(place.adapter) if added is None else added
    values = opened(place, wanted, shape.tie_word_embeddings, added)
    shapes = {name: tuple(p.shape) for name, p in wanted.items()}
    whole = (values(name, tuple(map(slice, size))) for name, size in shapes.items())
    if empty_system is None:
        empty_system = config_json.empty_system(place.tokenizer) is not False
    write(target, shape, shapes, whole, place, empty_system=empty_system)


def initialise(model: Mistral, seed: int, std: float = 0.02) -> None:
    """Fill with fresh weights: N(0, std²) for matrices, ones for norms (Hugging Face's default)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        else:
            torch.nn.init.ones_(parameter)


def fresh(folder: Path | str, seed: int) -> None:
    """Write random weights, fp32, into a folder that has a config.json. Their spread is the
    config's initializer_range (0.02 where it has none)."""
    path = Path(folder) / locate.SINGLE
    if path.exists() or path.with_name(locate.INDEX).exists():
        raise ValueError(f"{folder} has weights already; choose another folder")
    model = Mistral(config_json.read(folder))
    raw = files.read_json(Path(folder) / "config.json")
    initialise(model, seed, std=raw.get("initializer_range", 0.02))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    with files.atomic(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
