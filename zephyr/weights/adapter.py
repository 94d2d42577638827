"""LoRA adapters in PEFT's files, in and out: adapter_config.json, adapter_model.safetensors.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, in]
base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [out, r]

The config has no key but those that every version of PEFT knows; the base is named by its folder.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from zephyr import files, lora
from zephyr.architecture import PROJECTIONS
from zephyr.files import shown
from zephyr.model import Mistral
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json, locate, safetensor_files
from zephyr.weights.locate import Parts
from zephyr.weights.masters import full_master, resharded_parameters

PREFIX = "base_model.model."
SERVED = (16, 32, 64, 128, 256, 512)  # ranks that vLLM can be told to serve; 16 untold
# what PEFT has in a config that changes nothing of what an adapter computes
SILENT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
ONLY = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


class Pair(NamedTuple):
    """What is added to a weight: B A, where B has the scale in it."""

    a: Tensor  # [r, in], fp32
    b: Tensor  # [out, r], fp32


def read(folder: Path) -> dict[str, Pair]:
    """Return what an adapter adds to the weights of its base, by their names.

    lora_dropout is of training; no adapter is applied with it. Raises ValueError for a kind of
    adapter that is not W + s B A on projections of the blocks, and for files that lack or do not
    fit each other: what PEFT would leave out or scale in another way is not added.
    """
    path = folder / locate.ADAPTER
    raw = files.read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {shown(raw.get('peft_type'))}; it must be 'LORA'")
    for key, value in raw.items():
        if value and key not in SILENT and value not in ONLY.get(key, ()):
            rule = " or ".join(map(repr, ONLY.get(key, (None,))))
            name = files.plain(key)
            raise ValueError(f"{path}: {name} is {shown(value)}; only {rule} is implemented")
    if (rslora := raw.get("use_rslora")) not in (None, False, True) or type(rslora) is int:
        raise ValueError(f"{path}: use_rslora is {shown(rslora)}; it must be true or false")
    alpha = raw.get("lora_alpha")
    if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise ValueError(f"{path}: lora_alpha is {shown(alpha)}; it must be a positive number")
    ranks, tensors = _ranks(path, raw), _tensors(folder)
    pairs = {}
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        a, b = tensors.get(name + lora.A), tensors.get(name + lora.B)
        whole = a is not None and b is not None and a.dim() == b.dim() == 2
        if not whole or len(a) != b.shape[1] or not len(a):
            had = [None if x is None else list(x.shape) for x in (a, b)]
            raise ValueError(
                f"{folder / locate.ADAPTER_WEIGHTS}: lora_A and lora_B of {files.plain(name)} are "
                f"{had[0]} and {had[1]}; they must be [r, in] and [out, r], and r above 0"
            )
        if len(a) not in ranks:
            had = " or ".join(map(str, sorted(ranks)))
            raise ValueError(
                f"{folder / locate.ADAPTER_WEIGHTS}: {name} has rank {len(a)}, and "
                f"{path.name} says {had} (r, rank_pattern): the scale depends on it; take two "
                "files of one adapter"
            )
        spec = lora.Spec(len(a), alpha, (), bool(rslora))
        pairs[f"{name}.weight"] = Pair(a.float(), spec.scale * b.float())
    _check_names(path, raw, {name.removesuffix(".weight") for name in pairs})
    return pairs


def _ranks(path: Path, raw: dict) -> set[int]:
    """Return the ranks that a config gives to its adapters."""
    pattern = raw.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{path}: rank_pattern is {shown(pattern)}; it must be an object")
    ranks = {"r": raw.get("r")} | {f"rank_pattern of {k}": r for k, r in pattern.items()}
    for key, r in ranks.items():
        if type(r) is not int or r < 1:
            must = "it must be a whole number above 0"
            raise ValueError(f"{path}: {files.plain(key)} is {shown(r)}; {must}")
    return set(ranks.values())


def _check_names(path: Path, raw: dict, names: set[str]) -> None:
    """Raise ValueError unless the projections with tensors are those that the config's lists name.

    A name in a list is the end of a projection's, as PEFT has it. Where there is a pattern instead,
    the tensors alone say what has adapters: a pattern from outside may take for ever to match.
    """
    targets, excluded, layers = (
        raw.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    layers = layers if isinstance(layers, list) or layers is None else [layers]

    def among(name: str, listed: list) -> bool:
        return any(f".{name}".endswith(f".{end}") for end in listed)

    for name in sorted(names):
        left_out = {
            "target_modules": isinstance(targets, list) and not among(name, targets),
            "exclude_modules": isinstance(excluded, list) and among(name, excluded),
            "layers_to_transform": bool(layers) and int(name.split(".")[2]) not in layers,
        }
        if key := next((key for key, out in left_out.items() if out), None):
            raise ValueError(
                f"{path}: {key} {shown(raw[key])} leaves out {name}, which has an adapter in "
                f"{locate.ADAPTER_WEIGHTS}, so PEFT would not add it; take two files of one adapter"
            )
    if isinstance(targets, list) and not excluded:
        found = {name.split(".")[-1] for name in names}
        if lacking := [x for x in PROJECTIONS if x in targets and x not in found]:
            raise ValueError(
                f"{path}: target_modules names {files.some(lacking)}, of which "
                f"{locate.ADAPTER_WEIGHTS} has no tensor; fetch it again, or take the name out"
            )


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file under the names that they have in a model."""
    path = folder / locate.ADAPTER_WEIGHTS
    if not path.exists():
        pickle = " but adapter_model.bin, a pickle, and reading that can run code"
        other = pickle * (folder / "adapter_model.bin").exists()
        raise ValueError(f"{folder} has no {path.name}{other}; save it as safetensors with PEFT")
    for name, (_, _, _, dtype) in safetensor_files.stored([path]).items():
        if dtype not in safetensor_files.FLOATS:
            kinds = ", ".join(safetensor_files.FLOATS)
            raise ValueError(f"{path}: {files.plain(name)} is {dtype}; adapters are one of {kinds}")
    projection = rf"model\.layers\.[0-9]{{1,4}}\.(self_attn|mlp)\.({'|'.join(PROJECTIONS)})"
    found = {}
    for name, x in load_file(path).items():
        ours = name.removeprefix(PREFIX).replace(".default.", ".")
        if not re.fullmatch(rf"{projection}\.lora_[AB]\.weight", ours):
            raise ValueError(
                f"{path}: {files.plain(name)} is no adapter of a projection, one of "
                f"{', '.join(PROJECTIONS)}"
            )
        if ours in found:
            raise ValueError(f"{path} has {ours} twice, once as {name}")
        found[ours] = x
    if not found:
        raise ValueError(f"{path} holds no tensor")
    return found


def stacked(first: dict[str, Pair], second: dict[str, Pair]) -> dict[str, Pair]:
    """Return the adapter that is the sum of two: B₁A₁ + B₂A₂ = [B₁ B₂] [A₁; A₂]. Its rank is the
    sum of their largest; what one of them lacks is zeros."""
    ranks = [max(len(pair.a) for pair in pairs.values()) for pairs in (first, second)]
    both = {}
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name) or second[name]
        none = Pair(a[:0], b[:, :0])
        parts = [pairs.get(name, none) for pairs in (first, second)]
        rows = [F.pad(a, (0, 0, 0, r - len(a))) for r, (a, _) in zip(ranks, parts, strict=True)]
        columns = [F.pad(b, (0, r - b.shape[1])) for r, (_, b) in zip(ranks, parts, strict=True)]
        both[name] = Pair(torch.cat(rows), torch.cat(columns, 1))
    return both


def gathered(model: Mistral, keep: bool) -> dict[str, Tensor]:
    """Return the masters of a model's adapters by name, whole and on the host. Every rank calls it;
    who does not `keep` them gets none."""
    tensors = {}
    for name, p in resharded_parameters(model).items():
        if lora.is_adapter(name):
            whole = full_master(p)
            tensors |= {name: whole.cpu()} if keep else {}
    return tensors


def paired(tensors: dict[str, Tensor], spec: lora.Spec) -> dict[str, Pair]:
    """Return what adapters of a model add to its weights, from `gathered`."""
    names = [name.removesuffix(lora.A) for name in tensors if name.endswith(lora.A)]
    return {
        f"{name}.weight": Pair(tensors[name + lora.A], spec.scale * tensors[name + lora.B])
        for name in names
    }


def write(
    folder: Path, tensors: dict[str, Tensor], spec: lora.Spec, start: Parts, empty_system: bool
) -> lora.Spec:
    """Write the adapters of a run that began with `start`, with the tokenizer; return their spec.

    If the run began with an adapter, it is in the new one too, see `stacked`: their sum is an
    adapter of the same base, and no model between the two need be kept.
    """
    if start.adapter:
        both = stacked(read(start.adapter), paired(tensors, spec))
        rank = len(next(iter(both.values())).a)
        targets = {name.split(".")[-2] for name in both}
        spec = lora.Spec(rank, rank, tuple(x for x in PROJECTIONS if x in targets))
        ends = lora.A, lora.B
        tensors = {
            name.removesuffix(".weight") + end: x
            for name, pair in both.items()
            for end, x in zip(ends, pair, strict=True)
        }
    if odd := [name for name, x in tensors.items() if not x.isfinite().all()]:
        raise ValueError(f"NaN or infinity in {files.some(odd)}; the adapters are not saved")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(start.model.absolute()),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(spec.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    config |= {"use_rslora": True} if spec.rslora else {}  # younger than the others
    tokenizer = Tokenizer(start.tokenizer)
    with files.new_folder(folder, sum(x.nbytes for x in tensors.values())) as temp:
        files.write_json(temp / locate.ADAPTER, config)
        config_json.write_tokenizer(temp, tokenizer, config_json.chat_template(empty_system))
        named = {PREFIX + name: x.contiguous() for name, x in tensors.items()}
        save_file(named, temp / locate.ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return spec


def serving(folder: Path, spec: lora.Spec) -> list[str]:
    """Return a line on how to serve an adapter with vLLM, if its rank is above what that takes
    untold."""
    if spec.rank <= SERVED[0]:
        return []
    most = next((n for n in SERVED if n >= spec.rank), None)
    if most is None:
        return [f"{folder} has rank {spec.rank}; vLLM serves {SERVED[-1]} at most: serve model/"]
    command = f"vllm serve BASE --enable-lora --max-lora-rank {most} --lora-modules NAME={folder}"
    return [f"{folder} has rank {spec.rank}: {command}"]
