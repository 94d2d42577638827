"""From the layout Mistral publishes (params.json, consolidated*.safetensors, interleaved RoPE) to a
Hugging Face folder; the command is `python -m zephyr.weights SOURCE TARGET`.

H query or key heads  E head width  D width
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from zephyr.files import inside, new_folder, read_json, some
from zephyr.model import Mistral
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json, hub, locate, safetensor_files, tokenizer_json

PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "rope_theta": "rope_theta",
}
ASSUMED = {"rope_theta": 10000.0, "max_position_embeddings": 32768}  # of Mistral-7B-v0.1
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def convert(source: Path | str, target: Path | str) -> None:
    """Write the Hugging Face folder of a model in Mistral's layout, in its own dtype.

    Raises ValueError for parameters other than those of a dense Mistral, and unless the tensors
    are exactly theirs.
    """
    source, path = Path(source), Path(source) / "params.json"
    if not path.exists():
        locate.config_file(source)  # which says what the folder is instead
        raise ValueError(f"{source} is a Hugging Face folder already: it has a config.json")
    params = read_json(path)
    if unknown := params.keys() - PARAMS.keys():
        raise ValueError(f"{path}: {some(unknown)}: only a dense Mistral can be converted")
    given = {PARAMS[key]: value for key, value in params.items()}
    for key in ASSUMED.keys() - given.keys():
        print(f"{path} has no {key}: {ASSUMED[key]}, as in Mistral-7B-v0.1")
    raw = {"model_type": "mistral", "sliding_window": None} | ASSUMED | given
    config = config_json.parse(raw, path)
    with torch.device("meta"):
        wanted = dict(Mistral(config).named_parameters())
    hugging = {_original(name): name for name in wanted}
    found = safetensor_files.stored(_files(source))
    found = {hugging.get(name, name): x for name, x in found.items()}
    hub.check(source, found, wanted)
    first = found["lm_head.weight"]
    with safe_open(first.path, "pt") as file:
        dtype = file.get_slice(first.name)[:0].dtype
    name = config_json.dtype({"torch_dtype": str(dtype).removeprefix("torch.")}, first.path)
    tokenizer = Tokenizer(_tokenizer(source))
    tokenizer_json.build(tokenizer)  # refused here, before gigabytes are written

    sizes = {name: p.numel() * dtype.itemsize for name, p in wanted.items()}
    groups = safetensor_files.group_by_size(sizes, hub.SHARD_BYTES)
    tensors = (_tensor(found[name], config.head_dim).to(dtype) for name in wanted)
    with new_folder(Path(target), sum(sizes.values())) as temp:
        config_json.write_config(temp, config, name, {}, tokenizer.bos, tokenizer.eos)
        config_json.write_tokenizer(temp, tokenizer, template=None)
        safetensor_files.write_shards(temp, groups, dtype, tensors)


def _original(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _files(source: Path) -> list[Path]:
    files = sorted(source.glob("consolidated*.safetensors"))
    if not files:
        raise ValueError(
            f"{source} has no consolidated*.safetensors; of a .pth, a pickle that can "
            "run code, fetch the safetensors version"
        )
    return files


def _tokenizer(source: Path) -> Path:
    for end in ("", ".v1", ".v2", ".v3"):
        if (path := source / f"tokenizer.model{end}").is_file():
            if not inside(path):
                raise ValueError(f"{path} links out of the folder; put a copy in its place")
            return path
    return locate.tokenizer_file(source)


def _tensor(stored: safetensor_files.Stored, head_dim: int) -> Tensor:
    """A tensor as Hugging Face has it: wq and wk with RoPE's pairs moved apart.

    Rows of a head:  x0 y0 x1 y1 -> x0 x1 y0 y1
    """
    with safe_open(stored.path, "pt") as file:
        w = file.get_tensor(stored.name)
    if stored.name.endswith(("wq.weight", "wk.weight")):
        w = w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
    return w
