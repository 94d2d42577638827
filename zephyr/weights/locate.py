"""Model folders on the disk: which files are a model's, and if it is another thing, what it is.

Whoever opens a model folder asks here for its config.json, its weights and its tokenizer.model.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from zephyr.files import home, inside, read_json, shown, size_of, some

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = 1000  # of weights, in a folder

CONVERT = (
    "from transformers import AutoModelForCausalLM as A; A.from_pretrained({0}, "
    "dtype='auto', use_safetensors=False).save_pretrained({1})"
)


class Parts(NamedTuple):
    """Where the parts of a model lie: a folder of its own, or a LoRA adapter and its base."""

    model: Path  # config.json and the weights
    adapter: Path | None = None  # what is added to them

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer and the chat template: the adapter's if it has them."""
        own = self.adapter and (self.adapter / "tokenizer.model").is_file()
        return self.adapter if own else self.model


def parts(folder: Path | str | Parts, base: Path | str | None = None) -> Parts:
    """Return the parts of a model folder or a LoRA adapter. An adapter's base is `base`, or else
    the folder that its config names.

    Raises ValueError if that is no folder or an adapter too, if the folder is a model and an
    adapter at once, and if there is a `base` for what is no adapter.
    """
    if isinstance(folder, Parts):
        return folder
    folder = Path(folder)
    if not (folder / ADAPTER).exists():
        if base is not None:
            raise ValueError(f"--base {base} is for a LoRA adapter, and {folder} is none; leave it")
        return Parts(folder)
    if weights := [name for name in (SINGLE, INDEX) if (folder / name).exists()]:
        raise ValueError(
            f"{folder} is a LoRA adapter ({ADAPTER}) and a model ({weights[0]}) at once, and "
            "programs differ in whether they add the two; put them in folders of their own"
        )
    named_there = read_json(folder / ADAPTER).get("base_model_name_or_path")
    text = named_there if base is None else str(base)
    named = _folder(text)
    if named is None:
        raise ValueError(
            f"{folder} is a LoRA adapter ({ADAPTER}) of {shown(text)}, which is no folder here; "
            "give --base, the folder of that model"
        )
    if (named / ADAPTER).exists():
        raise ValueError(
            f"{folder} is a LoRA adapter of another, {named}; make a model of that one first: "
            f"python -m zephyr.weights {shlex.quote(str(named))} NEW; then give --base NEW"
        )
    return Parts(named, folder)


def _folder(named: object) -> Path | None:
    """Return the folder that a value names; None if it names none."""
    if not isinstance(named, str) or not named:
        return None
    try:
        path = Path(home(named))
        return path if path.is_dir() else None
    except (ValueError, OSError):  # no such home, no text, too long
        return None


def config_file(folder: Path) -> Path:
    """Return the config.json of a model folder.

    Raises ValueError if it has none or cannot be trained as it is; the message says what the folder
    is and what to do.
    """
    if not folder.is_dir():
        raise ValueError(_no_folder(folder))
    if other := _other(folder):
        raise ValueError(f"{folder} {other}")
    return folder / "config.json"


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the folder's safetensors files, and its index {tensor: file name} if it has one.

    A file that the index names must lie in the folder itself, or be a link into Hugging Face's
    cache; see `files.inside`. Raises ValueError if there are none; the message says what there is.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder} has both {SINGLE} and {INDEX}; remove the one not meant")
    if single.exists():
        size_of(single)
        return [single], None
    if not index.exists():
        raise ValueError(f"{folder} {_no_weights(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map must be an object of tensor: file name")
    names = sorted(set(weight_map.values()))
    if len(names) > FILES:
        raise ValueError(f"{index} lists {len(names)} files; {FILES} is the limit")
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.A):
            raise ValueError(f"{index}: {shown(name)} is not the plain name of a safetensors file")
        path = folder / name
        if not inside(path):
            raise ValueError(f"{path} links out of the folder; hf download --local-dir copies it")
        if not path.is_file():
            raise ValueError(f"{index}: {name} is missing from the folder; fetch it")
    return [folder / name for name in names], weight_map


def tokenizer_file(path: Path) -> Path:
    """Return the tokenizer.model of a folder; of a file, the file itself. Raises ValueError if it
    is missing; the message says what there is instead."""
    if not path.is_dir():
        if path.is_file():
            return path
        raise ValueError(f"{path}: no such file; a model folder needs its tokenizer.model")
    file = path / "tokenizer.model"
    if file.is_file():
        return file
    versions = sorted(p.name for p in path.glob("tokenizer.model.v*"))
    if file.is_symlink():
        why = f"links to {file.readlink()}, which is not there; fetch it again"
    elif versions:
        why = f"no such file, but {versions[-1]}: copy it under this name"
    elif (path / "tekken.json").exists():
        why = (
            "no such file, but tekken.json, which is not sentencepiece and not implemented; "
            "Mistral's models up to 7B v0.3 have a tokenizer.model"
        )
    elif (path / "tokenizer.json").exists() or (path / "vocab.json").exists():
        there = "tokenizer.json" if (path / "tokenizer.json").exists() else "vocab.json"
        why = (
            f"no such file, but {there}, which does not say all that training needs; fetch the "
            f"other from the model's repository (hf download REPO tokenizer.model --local-dir "
            f"{shlex.quote(str(path))}); a model that has none is not implemented"
        )
    else:
        why = "no such file; a model folder needs its tokenizer.model"
    raise ValueError(f"{file}: {why}")


def _no_folder(path: Path) -> str:
    """Say what a path is that is no folder."""
    if path.is_symlink():
        return f"{path} links to {path.readlink()}, which is not there"
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, for llama.cpp; take what it was made from"
    if path.exists():
        return f"{path} is a file; give the model's folder, as {path.parent}"
    hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path))
    fetch = f"; from the Hub: hf download {path} --local-dir {path}" if hub else ""
    return f"{path}: no such folder{fetch}"


def _other(folder: Path) -> str | None:
    """Say what a folder is, and what to do, if it is not a model in floating point."""

    def has(*names: str) -> bool:
        return all((folder / name).exists() for name in names)

    if has(ADAPTER):
        whole = folder.with_name(f"{folder.name}-merged")
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        where = " ".join(shlex.quote(str(path)) for path in (folder, whole))
        return (
            f"is a LoRA adapter ({ADAPTER}) of {shown(base)}, not a model; merge the two: "
            f"python -m zephyr.weights {where}"
        )
    if has("SHA256SUMS", "state.json"):
        return f"is a run's checkpoint; make a model of it: python -m zephyr.weights {folder} NEW"
    if quantized := [n for n in ("quantize_config.json", "quant_config.json") if has(n)]:
        return f"holds quantized weights ({quantized[0]}); take the model that they were made from"
    if has("config.json"):
        return None
    if has("config.toml", "run.json"):
        if has("model"):
            return f"is a run; its model is {folder / 'model'}"
        saved = sorted((folder / "checkpoints").glob("step-*[0-9]"), key=lambda p: (len(p.name), p))
        export = f", or python -m zephyr.weights {saved[-1]} NEW" if saved else ""
        return f"is a run that has not ended, so it has no model; continue it{export}"
    if has("params.json"):
        return (
            f"has no config.json, but params.json: convert it with python -m zephyr.weights "
            f"{folder} TARGET"
        )
    if found := _cached(folder):
        return f"is Hugging Face's cache; the folder of the model is {found}"
    inner = [
        p
        for p in sorted(folder.iterdir())[:1000]
        if (p / "config.json").exists() or (p / "state.json").exists()
    ]
    if inner:
        return f"has no config.json; did you mean {some(p.name for p in inner)} in it?"
    if gguf := next(folder.glob("*.gguf"), None):
        return f"has no config.json, but {gguf.name}, for llama.cpp; take what it was made from"
    return "has no config.json, and no params.json, which Mistral's own layout has"


def _cached(folder: Path) -> Path | None:
    """Return the newest snapshot of a model in Hugging Face's cache of which this folder is a
    part."""
    found = [
        p
        for pattern in ("snapshots/*", "models--*/snapshots/*", "hub/models--*/snapshots/*")
        for p in folder.glob(f"{pattern}/config.json")
    ]
    return max((p.parent for p in found), key=lambda p: p.stat().st_mtime, default=None)


def _no_weights(folder: Path) -> str:
    """Say what a folder has that has no weights to be read."""
    for path in (folder / SINGLE, folder / INDEX):
        if path.is_symlink():
            return f"has {path.name} as a link to {path.readlink()}, which is not there; fetch it"
    names = sorted(p.name for p in folder.iterdir())
    shards = [n for n in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)]
    if shards:
        of = int(shards[0].split("-of-")[1].partition(".")[0])
        return (
            f"has {len(shards)} of {of} shards and no {INDEX}, which says what is in them; "
            f"fetch it: hf download REPO {INDEX} --local-dir {shlex.quote(str(folder))}"
        )
    if (folder / "params.json").exists() and any(n.startswith("consolidated") for n in names):
        return (
            f"has weights in Mistral's own layout; convert them with python -m zephyr.weights "
            f"{folder} TARGET"
        )
    if "zero_to_fp32.py" in names:
        where, script = (shlex.quote(str(p)) for p in (folder, folder / "zero_to_fp32.py"))
        return (
            f"has DeepSpeed's shards; join them: python {script} {where} {where} "
            "--safe_serialization"
        )
    if pickles := [n for n in names if n.endswith((".bin", ".pth", ".pt"))]:
        new = folder.with_name(f"{folder.name}-safetensors")
        return (
            f"has no {SINGLE}, only {some(pickles)}, and reading a pickle can run code; if you "
            f"trust it, {_python(CONVERT, folder, new)}; cp "
            f"{shlex.quote(str(folder / 'tokenizer.model'))} {shlex.quote(str(new))}"
        )
    others = [n for n in names if n.endswith((".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"))]
    return f"has no {SINGLE} and no {INDEX}" + (f", but {some(others)}" if others else "")


def _python(code: str, *paths: Path) -> str:
    """Return a command line that runs code with paths in it."""
    return f"python -c {shlex.quote(code.format(*(repr(str(path)) for path in paths)))}"
