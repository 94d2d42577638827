"""The small files of a Hugging Face model folder: config.json in and out, tokenizer settings out.

What is written has the form of transformers 4, which 4 and 5, vLLM and llama.cpp all read right;
of the form that 5 writes, 4 silently ignores rope_theta.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from zephyr import files
from zephyr.architecture import MistralConfig
from zephyr.files import shown
from zephyr.tokenizer import Tokenizer
from zephyr.weights import locate, tokenizer_json

CLASSES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
SIZES = {  # whole numbers, and the largest that is believed
    "vocab_size": 1_000_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "max_position_embeddings": 1 << 30,
    "head_dim": 1 << 16,
    "sliding_window": 1 << 30,
}
TOKENIZER_CONFIG = "tokenizer_config.json"
# readers fill in bos_token and eos_token from tokenizer_config.json
EMPTY_SYSTEM = (
    r"{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n' + eos_token + '\n' }}{% endif %}"
)
TURNS = (
    r"{% for message in messages %}"
    r"{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    r"{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def read(folder: Path | str) -> MistralConfig:
    """The architecture that a model folder's config.json describes.

    Raises ValueError if the folder has none (it then says what the folder is), or for the first
    value that cannot be used.
    """
    path = locate.config_file(Path(folder))
    return parse(files.read_json(path), path)


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
    for key in ("quantization_config", "quantization", "compression_config"):
        if raw.get(key):
            how = raw[key].get("quant_method", raw[key]) if isinstance(raw[key], dict) else raw[key]
            raise ValueError(
                f"{path}: {key} says {shown(how, 40)}: quantized weights cannot be "
                "trained; take the model that they were made from"
            )
    for key, only in ONLY.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{path}: {key} is {shown(raw[key])}; only {only!r} is implemented")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings is {shown(tied)}; it must be true or false")
    # what saving takes from the base, checked here: the end of a training is too late
    dtype(raw, path)
    _spread(raw, path)
    values = {"sliding_window": 4096} | raw | {"rope_theta": _rope_theta(raw, path)}
    if kind == "llama":
        values["sliding_window"] = None
    return MistralConfig(
        **_sizes(values, path),
        tie_word_embeddings=tied,
        model_type=kind,
        **{key: _positive(values, key, path) for key in ("rms_norm_eps", "rope_theta")},
    )


def _spread(raw: dict, path: Path) -> float:
    """The initialiser's range, which a saved config takes from its base."""
    value = raw.get("initializer_range", 0.02)
    if type(value) not in (int, float) or not 0 <= value < 1_000_000:
        raise ValueError(
            f"{path}: initializer_range is {shown(value)}; it must be a number, 0 or more"
        )
    return value


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
        raise ValueError(
            f"{path}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {sizes['num_key_value_heads']}"
        )
    if sizes["head_dim"] is None and hidden % heads:
        raise ValueError(
            f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads "
            f"{heads}, and there is no head_dim"
        )
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
    """Return `rope_theta`: from the top level (transformers 4), from `rope_parameters` (5), or from
    both if they agree."""
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
    """Return the name of a base's dtype: "float32", "bfloat16" or "float16"."""
    name = base.get("torch_dtype") or base.get("dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{path}: torch_dtype is {shown(name)}; use float32, bfloat16 or float16")
    return name


def write_config(
    folder: Path, c: MistralConfig, dtype: str, base: dict, bos: int = 1, eos: int = 2
) -> None:
    """Write config.json and generation_config.json, with the special ids of the tokenizer that
    trained."""
    tokens = {"bos_token_id": bos, "eos_token_id": eos}
    files.write_json(
        folder / "config.json",
        {
            "architectures": [CLASSES[c.model_type]],
            **asdict(c),
            **tokens,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": _spread(base, folder / "config.json"),
            "torch_dtype": dtype,
            "use_cache": True,
        },
    )
    files.write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def empty_system(folder: Path) -> bool | None:
    """Return True if a folder's chat template puts an empty system message where there is none,
    False if it does not; None unless the template is Zephyr's as `chat_template` writes it, with or
    without BOS."""
    own = own_template(folder)
    plain = own and _plain(own)
    return {_plain(chat_template(x)): x for x in (True, False)}.get(plain)


def own_template(folder: Path) -> str | None:
    """Return a folder's chat template: that of chat_template.jinja, else of tokenizer_config.json;
    None without one."""
    path = folder / "chat_template.jinja"
    if path.exists():
        files.size_of(path)
        return path.read_text(encoding="utf-8", errors="replace")
    path = folder / TOKENIZER_CONFIG
    own = files.read_json(path).get("chat_template") if path.exists() else None
    return own if isinstance(own, str) else None


def _plain(template: str) -> str:
    """Return a template with its special tokens as text, however they are spelt."""
    text = template.strip().removeprefix("{{ bos_token }}")
    return text.replace("' + eos_token + '", "</s>").replace("eos_token + '", "'</s>")


def chat_template(empty_system: bool) -> str:
    """Return the template, as Jinja, of the text that zephyr.tokenizer trains on, with BOS at its
    start. To tokenize the text that it renders, ask for no special tokens: BOS is there already."""
    return "{{ bos_token }}" + EMPTY_SYSTEM * empty_system + TURNS


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str | None) -> None:
    """Write tokenizer.model byte for byte, a tokenizer.json made of it, and tokenizer_config.json
    with the chat template, if there is one. Nothing else of the base's tokenizer is taken over.
    Raises ValueError if no tokenizer.json gives this tokenizer's ids; see
    `tokenizer_json.build`."""
    text = json.dumps(tokenizer_json.build(tokenizer), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    bos, eos = map(tokenizer.sp.id_to_piece, (tokenizer.bos, tokenizer.eos))
    value = {
        # of LlamaTokenizer, transformers 5 replaces what tokenizer.json says of spaces
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    if template:
        value |= {"pad_token": eos, "padding_side": "left", "chat_template": template}
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    files.write_json(folder / TOKENIZER_CONFIG, value)
