"""The small files of a Hugging Face model folder: config.json in and out, tokenizer settings out.

What is written has the form of transformers 4, which 4 and 5, vLLM and llama.cpp all read right;
of the form that 5 writes, 4 silently ignores rope_theta.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType

from zephyr import disk
from zephyr.files import shown

CLASSES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
SIZES = {  # whole numbers, and the largest that is believed
    "vocab_size": 1_000_000, "hidden_size": 1 << 20, "intermediate_size": 1 << 20,
    "num_hidden_layers": 1_000, "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16,
    "max_position_embeddings": 1 << 30, "head_dim": 1 << 16, "sliding_window": 1 << 30,
}  # fmt: skip
CARRIED = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}
TOKENIZER_CONFIG = "tokenizer_config.json"
COPIED = ("tokenizer.json", "special_tokens_map.json")

EMPTY_SYSTEM = r"{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n</s>\n' }}{% endif %}"
TURNS = (
    r"{% for message in messages %}"
    r"{{ '<|' + message['role'] + '|>\n' + message['content'] + '</s>\n' }}"
    r"{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = {  # what a base without tokenizer_config.json means
    "add_eos_token": False, "clean_up_tokenization_spaces": False, "unk_token": "<unk>",
    "tokenizer_class": "LlamaTokenizer",
}  # fmt: skip
PINNED = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "legacy": True}


@dataclass(frozen=True, kw_only=True)
class MistralConfig:
    """The architecture, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None  # keys each query sees, its own included; None is all
    tie_word_embeddings: bool = False
    model_type: str = "mistral"


def parse(raw: dict, path: Path) -> MistralConfig:
    """The architecture that the content of a config.json describes; `path` is where it lies.

    Where the key is absent, Mistral's sliding_window is 4096 (transformers' default) and a Llama's
    rope_theta 10000 (Llama-2's files lack it). `auto_map` is ignored: no code comes from a model.
    Raises ValueError for any other architecture, for what transformers would guess, and for what a
    save could not take over from this folder.
    """
    kind = raw.get("model_type")
    if kind not in list(CLASSES):
        raise ValueError(f"{path}: model_type is {shown(kind)}; known are {' and '.join(CLASSES)}")
    for key, only in ONLY.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{path}: {key} is {shown(raw[key])}; only {only!r} is implemented")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings is {shown(tied)}; it must be true or false")
    # what saving takes from the base, checked here: the end of a training is too late
    dtype(raw, path)
    _carried(raw, path)
    _settings(path.parent)
    values = {"sliding_window": 4096} | raw | {"rope_theta": _rope_theta(raw, path)}
    if kind == "llama":
        values["sliding_window"] = None
    return MistralConfig(
        **_sizes(values, path), tie_word_embeddings=tied, model_type=kind,
        **{key: _positive(values, key, path) for key in ("rms_norm_eps", "rope_theta")},
    )  # fmt: skip


def _carried(raw: dict, path: Path) -> dict:
    """What a saved config takes from its base: the special tokens' ids, the initialiser's range."""
    carried = {key: raw.get(key, usual) for key, usual in CARRIED.items()}
    for key, value in carried.items():
        kinds = (int, float) if key == "initializer_range" else (int, NoneType)
        several = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if not all(type(x) in kinds and 0 <= (x or 0) < 1_000_000 for x in several):
            raise ValueError(f"{path}: {key} is {shown(value)}; a saved model could not be read")
    return carried


def _settings(folder: Path) -> dict:
    """The base's tokenizer_config.json, {} where it has none.

    Raises ValueError if it is malformed, and for a link out of the folder among the files that a
    saved folder gets copies of: whoever made the base would choose which of the user's files.
    """
    for path in (folder / name for name in (*COPIED, TOKENIZER_CONFIG)):
        if path.exists() and not disk.inside(path):
            raise ValueError(f"{path} links out of the folder; hf download --local-dir copies it")
    path = folder / TOKENIZER_CONFIG
    return disk.read_json(path, finite=True) if path.exists() else {}


def _sizes(values: dict, path: Path) -> dict[str, int | None]:
    sizes = {key: values.get(key) for key in SIZES}
    for key, value in sizes.items():
        if value is None and key in ("head_dim", "sliding_window"):
            continue
        _given(value, key, path)
        if type(value) is not int or not 1 <= value <= SIZES[key]:
            rule = f"it must be from 1 to {SIZES[key]}"
            raise ValueError(f"{path}: {key} is {shown(value)}; {rule}")
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if heads % sizes["num_key_value_heads"]:
        raise ValueError(f"{path}: num_attention_heads {heads} is not a multiple of "
                         f"num_key_value_heads {sizes['num_key_value_heads']}")  # fmt: skip
    if sizes["head_dim"] is None and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads "
                         f"{heads}, and there is no head_dim")  # fmt: skip
    sizes["head_dim"] = sizes["head_dim"] or hidden // heads
    if sizes["head_dim"] % 2:
        raise ValueError(f"{path}: head_dim is {sizes['head_dim']}; RoPE needs it even")
    return sizes


def _positive(values: dict, key: str, path: Path) -> float:
    value = _given(values.get(key), key, path)
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise ValueError(f"{path}: {key} is {shown(value)}; it must be a positive number")
    return float(value)


def _given(value: object, key: str, path: Path) -> object:
    if value is None:
        raise ValueError(f"{path} has no {key}, and programs differ in what they assume; write it")
    return value


def _rope_theta(raw: dict, path: Path) -> object:
    """`rope_theta` on top (transformers 4), in `rope_parameters` (5), or in both if they agree."""
    thetas = [raw.get("rope_theta")]
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        known = isinstance(rope, dict) and rope.keys() <= {"rope_theta", "rope_type", "type"}
        if not known or any(rope.get(k, "default") != "default" for k in ("rope_type", "type")):
            rule = "only the default RoPE is implemented"
            raise ValueError(f"{path}: {key} is {shown(rope)}; {rule}")
        thetas.append(rope.get("rope_theta"))
    thetas = [_positive({"rope_theta": x}, "rope_theta", path) for x in thetas if x is not None]
    if thetas and thetas.count(thetas[0]) < len(thetas):
        raise ValueError(f"{path}: rope_theta is both {thetas[0]} and {thetas[-1]}; keep one")
    return thetas[0] if thetas else 10000.0 if raw["model_type"] == "llama" else None


def dtype(base: dict, path: Path) -> str:
    """The name of a base's dtype: "float32", "bfloat16" or "float16"."""
    name = base.get("torch_dtype") or base.get("dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{path}: torch_dtype is {shown(name)}; use float32, bfloat16 or float16")
    return name


def write_config(folder: Path, c: MistralConfig, dtype: str, base: dict) -> None:
    """config.json and generation_config.json; ids of special tokens are the base's."""
    carried = _carried(base, folder / "config.json")
    tokens = {key: carried[key] for key in ("bos_token_id", "eos_token_id")}
    disk.write_json(folder / "config.json", {
        "architectures": [CLASSES[c.model_type]], **asdict(c), **tokens, "hidden_act": "silu",
        "attention_dropout": 0.0, "initializer_range": carried["initializer_range"],
        "torch_dtype": dtype, "use_cache": True,
    })  # fmt: skip
    disk.write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def chat_template(empty_system: bool) -> str:
    """The template, as Jinja, of the text zephyr.tokenizer trains on."""
    return EMPTY_SYSTEM * empty_system + TURNS


def write_tokenizer(folder: Path, tokenizer: Path, template: str | None) -> None:
    """tokenizer.model and what lies beside it, byte for byte; tokenizer_config.json with the chat
    template, if there is one."""
    base, value = tokenizer.parent, PLAIN | _settings(tokenizer.parent) | PINNED
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    for name in COPIED:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    if template:
        value |= {"pad_token": "</s>", "chat_template": template}
        (folder / "chat_template.jinja").write_text(template)
    disk.write_json(folder / TOKENIZER_CONFIG, value)
