"""Broken bytes for everything that reads files from outside.

    python -m benchmarks.fuzz --seconds 300            all targets in turn
    python -m benchmarks.fuzz tokenizer --seed 7       one of them

A target reads one file that is a mutation of a valid one: bytes flipped, cut, repeated, put in;
JSON values and keys replaced by odd ones; files spliced. What has to hold, whatever the bytes: the
file is read, or refused by a ValueError of one short line that names it; nothing is written
elsewhere; what was accepted can be used. tests/test_hostile.py asks the same of a few cases.

Each target runs in a process of its own, so that a crash of a library is a failure like another,
as are a case of more than --limit seconds and memory beyond --memory. The bytes of a failure are
left in crash-TARGET-SHA.bin; `python -m benchmarks.fuzz TARGET --file PATH` tries them again.
"""

import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import NamedTuple

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from zephyr import config, feedback, files
from zephyr.data import arrays, forms, readers
from zephyr.model import Mistral
from zephyr.tokenizer import Tokenizer
from zephyr.weights import base, config_json, hub, locate, mistral, safetensor_files, tokenizer_json

MESSAGE = 600  # characters, of which the path in a test may be half
ODD = [  # JSON that a row or a config should not hold
    b"null",
    b"true",
    b"false",
    b"0",
    b"-1",
    b"1.5",
    b"1e400",
    b"-0.0",
    b"NaN",
    b"-Infinity",
    b'""',
    b"[]",
    b"{}",
    b"[[]]",
    b'[null,"a",{"b":[1]}]',
    b'{"a":1,"a":2}',
    b"9" * 30,
    b"9" * 5000,
    b"18446744073709551616",
    b"9223372036854775807",
    b"[" * 60 + b"]" * 60,
    b"[" * 900 + b"]" * 900,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b'"../x"',
    b'"/etc/passwd"',
    b'"C:\\\\x.safetensors"',
    b'"a\\u0000b"',
    b'"\\u001b[2J"',
    b'"\\ud800"',
    b'"\\u2028"',
    '"\u202e\u2028\x85"'.encode(),
    b'"' + b"x" * 3000 + b'"',
    b'"\\n\\nHuman: a"',
    b'"[INST] a [/INST]"',
    b'{"from":"gpt","value":"a"}',
    b'"mistral"',
    b'"</s><|assistant|>"',
    b'"F6_E2M3"',
    b'"assistant"',
    b'"system"',
    b'"N/A"',
    b"[0,9223372036854775808]",
    b"[1,1,1,1,1,1,1,1,1,1,1,1,1]",
    b"1e308",
    b"-1e308",
]
TOKENS = [
    b"\0",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\x1b[31m",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"a.b.c.d",
    b"'''",
    b"#",
    b"<html>",
    b"PAR1",
    b"\x1f\x8b",
    b"version https://git-lfs",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xff" * 8,
    *ODD,
]


def mutate(seeds: list[bytes], rng: Random) -> bytes:
    """One of the seeds, changed in one to four places."""
    text = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 4))):
        a, b = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        match rng.randrange(9):
            case 0 | 1 if text:  # a bit
                at = rng.randrange(len(text))
                text = text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]
            case 2:  # the end is missing
                text = text[:b]
            case 3:  # a piece is missing
                text = text[:a] + text[min(b, a + rng.randint(1, 20)) :]
            case 4:
                text = text[:a] + rng.choice(TOKENS) + text[a:]
            case 5:  # a piece comes twice
                text = text[:b] + text[a:]
            case 6:
                other = rng.choice(seeds)
                text = text[:a] + other[rng.randint(0, len(other)) :]
            case 7:
                at = rng.randint(0, len(text))
                text = text[:at] + rng.randbytes(rng.randint(1, 8)) + text[at + 8 :]
            case 8:
                text = odd_json(text, rng)
    return text


def odd_json(text: bytes, rng: Random) -> bytes:
    """The text with one line, which should be JSON, written anew: a value or key or so made odd."""
    rows = text.split(b"\n")
    at = rng.randrange(len(rows))
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(rows[at])
        rows[at] = _written(value, rng, 1.5 / _size(value))
    return b"\n".join(rows)


def _size(value: object) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, parts))


def _written(value: object, rng: Random, odds: float) -> bytes:
    if rng.random() < odds:
        return rng.choice(ODD)
    if isinstance(value, list):
        return b"[" + b",".join(_written(x, rng, odds) for x in value) + b"]"
    if not isinstance(value, dict):
        return json.dumps(value).encode()
    parts = []
    for key, x in value.items():
        if rng.random() > odds / 2:
            parts.append(json.dumps(key).encode() + b":" + _written(x, rng, odds))
        if rng.random() < odds / 2:
            parts.append(json.dumps(rng.choice([*value, "\x1b[31m"])).encode() + b":1")
    return b"{" + b",".join(parts) + b"}"


class Target(NamedTuple):
    """`read` uses the file `name` of a folder; `seeds` are valid contents of it."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    shape: Callable[[list[bytes], Random], bytes] = mutate
    around: Callable[[Path], None] = lambda folder: None  # what else lies in the folder


CONFIG = {
    "model_type": "mistral",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": [2],
    "initializer_range": 0.02,
    "rope_scaling": None,
    "auto_map": {"AutoModel": "evil.Model"},
}
BASE = CONFIG | {"vocab_size": 302, "max_position_embeddings": 160}  # of `pieces`
PARAMS = {
    "dim": 8,
    "n_layers": 1,
    "head_dim": 4,
    "hidden_dim": 12,
    "n_heads": 2,
    "n_kv_heads": 1,
    "norm_eps": 1e-5,
    "vocab_size": 300,
    "sliding_window": 16,
}
TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yo."}]
ROWS = [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "messages": TURNS},
    {"chosen": TURNS, "rejected": [TURNS[0], TURNS[1] | {"content": "No."}], "messages": TURNS},
    {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: c",
        "messages": [{"role": "system", "content": "Be kind."}, *TURNS],
    },
    {
        "system": "Be kind.",
        "question": "Why?",
        "chosen": "Because.",
        "rejected": "No.",
        "messages": TURNS,
    },
    {
        "instruction": "Add.",
        "input": "1 and 2",
        "output": "3",
        "chosen": "3",
        "rejected": "4",
        "score_chosen": 1,
        "score_rejected": 2.5,
        "history": [],
        "tools": "[]",
    },
    {
        "conversations": [
            {"from": "human", "value": "a", "weight": None},
            {"from": "gpt", "value": "b"},
            {"from": "user", "value": "c"},
        ],
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    {
        "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        "chosen": " d",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        "messages": TURNS,
    },
]


def scored(count: int) -> list[dict]:
    return [
        {
            "source": "flan",
            "instruction": f"Why {i}?",
            "completions": [
                {
                    "model": "m",
                    "response": "a",
                    "overall_score": 9,
                    "annotations": {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}},
                },
                {"model": "n", "response": "b", "overall_score": 2.5, "annotations": {}},
            ],
        }
        for i in range(count)
    ]


SCORED = scored(3)


SETTINGS = config.DPOConfig(
    model="m", data=("d",), out="o", max_length=160, max_prompt_length=120, on_bad_row="skip"
)


@cache
def pieces() -> bytes:
    """A tokenizer.model."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Why? Because I can.", "a user and an assistant <|user|>"]),
        model_writer=out,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def ok(holds: bool, what: str) -> None:
    """An assert that -O leaves in."""
    if not holds:
        raise AssertionError(what)


def check_message(error: ValueError, folder: Path) -> None:
    """What holds of each refusal of a file in the folder."""
    text = str(error)
    ok(text.isprintable(), f"more than one line, or not text: {text[:2000]!r}")
    ok(str(folder) in text, f"the file is not named: {text[:2000]!r}")
    ok(len(text) < MESSAGE, f"{len(text)} characters: {text[:2000]!r}")


def read_weights(path: Path) -> None:
    found = safetensor_files.stored(*locate.weight_files(path.parent))
    for name, tensor in found.items():
        ok(files.inside(tensor.path), "a tensor from another folder")
        with safe_open(tensor.path, "pt") as file:
            x = file.get_tensor(name)
        bits = 2 if tensor.dtype == "F4" else 1  # torch counts pairs of four-bit numbers
        ok(x.numel() * bits == torch.Size(tensor.shape).numel(), "another size than the header's")


def read_config(path: Path) -> None:
    raw = files.read_json(path)
    c = config_json.parse(raw, path)
    saved = path.parent / "saved"
    saved.mkdir()
    config_json.write_config(saved, c, config_json.dtype(raw, path), raw)
    again = saved / "config.json"
    ok(config_json.parse(files.read_json(again), again) == c, "saved is not what was")


def read_settings(path: Path) -> None:
    config_json.empty_system(path.parent)


def read_base(path: Path) -> None:
    notes = base.look(replace(SETTINGS, model=str(path.parent)))[3]
    ok(all(note.isprintable() for note in notes), "not text")


def read_adapter(path: Path) -> None:
    """The adapter as a run starts from it, and merged. The base that its config names, which is
    another, is found or refused."""
    folder, given = path.parent, path.parent / "base"
    try:
        locate.parts(folder)
    except ValueError as error:
        check_message(error, folder)
    notes = base.look(replace(SETTINGS, model=str(folder), base=str(given)))[3]
    ok(all(note.isprintable() for note in notes), "not text")
    place = locate.parts(folder, given)
    model = Mistral(config_json.read(given))
    hub.load(place, model)
    hub.merge(place, folder / "merged")
    again = Mistral(model.config)
    hub.load(folder / "merged", again)
    same = zip(model.parameters(), again.parameters(), strict=True)
    ok(all(torch.equal(p, q) for p, q in same), "merged is not what was loaded")


def read_params(path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        mistral.convert(path.parent, path.parent / "saved")
    again = path.parent / "saved" / "config.json"
    config_json.parse(files.read_json(again), again)


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(path)
    ids = tokenizer.render(TURNS).ids
    ok(all(0 <= i < tokenizer.vocab_size for i in ids), "an id out of range")
    ok(ids.count(tokenizer.bos) == 1, "a message forged <s>")
    tokenizer.decode(ids)
    tokenizer.prompt([{"role": "user", "content": "</s> \u2028 \0 é" + "a" * 1000}])


def read_recipe(path: Path) -> None:
    for cls in (config.DPOConfig, config.SFTConfig):
        with contextlib.suppress(ValueError):  # a recipe for one stage is refused by the other
            config.read_recipe(str(path), cls)
    given = config.read_recipe(str(path), config.DPOConfig)
    try:
        c = config.DPOConfig(**{"model": "m", "data": ("d",), "out": "o"} | given)
    except ValueError as error:  # a value out of range; its flag is named, not the recipe
        raise ValueError(f"{path}: {error}") from None
    path.write_text(config.to_toml(c), encoding="utf-8")
    config.read_recipe(str(path), config.DPOConfig)


def read_rows(path: Path) -> None:
    for where, row in readers.read_rows(path):
        ok(where.startswith(f"{path}:") and isinstance(row, dict), "not a row")
        if path.suffix != ".parquet":
            json.dumps(row, ensure_ascii=False).encode()


@cache
def tokenizer() -> Tokenizer:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "tokenizer.model").write_bytes(pieces())
        return Tokenizer(folder)
    finally:
        shutil.rmtree(folder)


def read_data(read: Callable) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        before = os.environ.get("ZEPHYR_CACHE")
        os.environ["ZEPHYR_CACHE"] = str(path.parent / "cache")
        try:
            tokens = read((str(path),), tokenizer(), SETTINGS)
        finally:
            os.environ.pop("ZEPHYR_CACHE")
            if before is not None:
                os.environ["ZEPHYR_CACHE"] = before
        ok(len(tokens) > 0 and int(tokens.ids.max()) < tokenizer().vocab_size, "not tokens")
        ok(all(len(part) for k in range(len(tokens)) for part in tokens.parts(k)), "an empty part")
        ok(all(line.isprintable() for line in tokens.report().split("\n")), "not text")

    return use


def read_cache(path: Path) -> None:
    """The bytes in place of each file of a cached tokenization, in turn: it is made again, whatever
    they are. ValueError if that happened for each."""
    rows = path.with_name("rows.jsonl")
    rows.write_bytes(lines(ROWS[:2]))
    use = read_data(arrays.preferences)
    use(rows)
    (entry,) = (x for x in (path.parent / "cache").iterdir() if x.is_dir())
    right = {file.name: file.read_bytes() for file in entry.iterdir()}
    for name in right:
        (entry / name).write_bytes(path.read_bytes())
        with contextlib.redirect_stderr(io.StringIO()) as said:
            use(rows)
        anew = path.read_bytes() != right[name]
        if name == arrays.SUMS and sums_in(path.read_bytes()) == sums_in(right[name]):
            anew = False  # other bytes are the same sums: with another line break, say
            (entry / name).write_bytes(right[name])
        ok(("is made again" in said.getvalue()) == anew, f"{name}: said {said.getvalue()!r}")
        ok({file.name: file.read_bytes() for file in entry.iterdir()} == right, f"{name} stays")
    if path.read_bytes() not in right.values():
        raise ValueError(f"{path}: every file was made again")


def sums_in(data: bytes) -> dict[str, str | None] | None:
    """The sum that a list has for each file of an entry; None if it is malformed."""
    try:
        lines = data.decode("ascii").splitlines()
        found = dict(line.split("  ", 1)[::-1] for line in lines)
    except ValueError:
        return None
    return {name: found.get(name) for name in arrays.ARRAYS}


def cache_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_bytes(lines(ROWS[:2]))
        read_data(arrays.preferences)(rows)
        return [file.read_bytes() for file in sorted(Path(folder).glob("cache/*/*"))]


def run_feedback(path: Path) -> None:
    """The command: exit code 0, or 2 and one line."""
    out, told, said = path.with_name("pairs.jsonl"), io.StringIO(), io.StringIO()
    argv = [str(path), "--out", str(out), "--on-bad-row", "skip"]
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(said):
        try:
            feedback.main(argv)
            code = 0
        except SystemExit as end:
            code = end.code
    ok(code in (0, 2) and out.exists() == (code == 0), f"exit code {code}")
    ok(all(line.isprintable() for line in said.getvalue().split("\n")), "not text")
    if code:
        line = told.getvalue()
        ok(line.startswith("zephyr.feedback: ") and line.endswith("\n"), f"told {line!r}")
        raise ValueError(line[:-1])
    ok(not told.getvalue(), f"told {told.getvalue()!r}")
    for _, pair in readers.read_rows(out):
        forms.preference(pair)


def header_json(seeds: list[bytes], rng: Random) -> bytes:
    """A safetensors file: half of the time its header is made odd, and its length told right."""
    text = rng.choice(seeds)
    if rng.random() < 0.5:
        return mutate(seeds, rng)
    size = struct.unpack("<Q", text[:8])[0]
    head, rest = odd_json(text[8 : 8 + size], rng), text[8 + size :]
    return struct.pack("<Q", len(head)) + head + rest


def zipped(seeds: list[bytes], rng: Random) -> bytes:
    """Broken text well compressed, or broken gzip."""
    if rng.random() < 0.5:
        return gzip.compress(mutate([gzip.decompress(seed) for seed in seeds], rng), 1, mtime=0)
    return mutate(seeds, rng)


def two_shards(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder.parent / "x.safetensors")


def beside_params(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(pieces())
    raw = {mistral.PARAMS[key]: value for key, value in PARAMS.items()}
    raw |= mistral.ASSUMED | {"model_type": "mistral"}
    torch.manual_seed(0)
    model = Mistral(config_json.parse(raw, folder / "params.json"))
    tensors = {mistral._original(name): p.detach() for name, p in model.named_parameters()}
    save_file(tensors, folder / "consolidated.safetensors")


@cache
def base_weights() -> bytes:
    torch.manual_seed(0)
    model = Mistral(config_json.parse(BASE, Path("config.json")))
    return save({name: p.detach() for name, p in model.named_parameters()}, {"format": "pt"})


def a_whole_base(folder: Path) -> None:
    (base := folder / "base").mkdir()
    a_base(base)
    (base / locate.SINGLE).write_bytes(base_weights())


def beside_adapter_config(folder: Path) -> None:
    a_whole_base(folder)
    (folder / locate.ADAPTER_WEIGHTS).write_bytes(adapter_weights_seeds()[0])


def beside_adapter_weights(folder: Path) -> None:
    a_whole_base(folder)
    (folder / locate.ADAPTER).write_bytes(adapter_seeds()[0])


def adapter_seeds() -> list[bytes]:
    """Ours, and one that PEFT could have written."""
    ours = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a/b",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    others = {"use_rslora": True, "lora_dropout": 0.05, "alpha_pattern": {}, "use_dora": False}
    return [json.dumps(value).encode() for value in (ours, ours | others)]


def adapter_weights_seeds() -> list[bytes]:
    """The second has the names that PEFT gives its parameters in memory, and another dtype."""
    widths = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (56, 32)}
    tensors = {}
    for name, (into, out) in widths.items():
        name = f"base_model.model.model.layers.1.{name}"
        tensors[f"{name}.lora_A.weight"] = torch.full((2, into), 0.5)
        tensors[f"{name}.lora_B.weight"] = torch.full((out, 2), 0.25)
    older = {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}
    return [
        save(tensors, {"format": "pt"}),
        save({name: x.bfloat16() for name, x in older.items()}),
    ]


def weights_seeds() -> list[bytes]:
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4).bfloat16(), "c": torch.zeros(0, 2)}
    return [save(tensors, {"format": "pt"}), save({"x": torch.tensor(1.0)})]


def index_seeds() -> list[bytes]:
    a, b = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = {"metadata": {"total_size": 20}, "weight_map": {"a": a, "b": b}}
    out = {"weight_map": {"a": a, "b": "../x.safetensors"}}
    return [json.dumps(value).encode() for value in (index, out)]


def config_seeds() -> list[bytes]:
    other = CONFIG | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    return [json.dumps(value).encode() for value in (CONFIG, other | {"model_type": "llama"})]


def recipe_seeds() -> list[bytes]:
    recipes = [path.read_bytes() for path in sorted(config.RECIPES.glob("*.toml"))]
    return [recipe for recipe in recipes if b"[dpo]" in recipe]


@cache
def parquet_seeds() -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    seeds = []
    for rows in (ROWS[:1], ROWS[3:5], SCORED, [{"when": 0, "n": [1, 2], "x": b"a"}]):
        for compression in ("none", "snappy"):
            out = io.BytesIO()
            parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression=compression)
            seeds.append(out.getvalue())
    return seeds


def row_seeds() -> list[bytes]:
    # one row of the longest may be bad
    windows = b"\xef\xbb\xbf" + lines(ROWS[1:]).replace(b"\n", b"\r\n")
    return [lines(ROWS), windows, lines(ROWS * 40)]


def gzip_seeds() -> list[bytes]:
    return [gzip.compress(seed, 1, mtime=0) for seed in row_seeds()]


def tokenizer_json_seeds() -> list[bytes]:
    value = tokenizer_json.build(tokenizer())
    pairs = [pair.split(" ") for pair in value["model"]["merges"]]
    newer = value | {"model": value["model"] | {"merges": pairs}}
    return [json.dumps(value).encode(), json.dumps(newer, ensure_ascii=False).encode()]


def a_base(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(pieces())
    files.write_json(folder / "config.json", BASE)


def list_seeds() -> list[bytes]:
    return [json.dumps(ROWS).encode(), json.dumps(SCORED, indent=1).encode()]


TARGETS = {
    "weights": Target("model.safetensors", weights_seeds, read_weights, header_json),
    "index": Target(locate.INDEX, index_seeds, read_weights, around=two_shards),
    "config": Target("config.json", config_seeds, read_config),
    "settings": Target(
        "tokenizer_config.json",
        lambda: [b'{"add_eos_token": false, "chat_template": "{{ x }}"}'],
        read_settings,
    ),
    "tokenizer.json": Target("tokenizer.json", tokenizer_json_seeds, read_base, around=a_base),
    "added": Target(
        "added_tokens.json",
        lambda: [b'{"<|im_start|>": 300, "<pad>": 301}'],
        read_base,
        around=a_base,
    ),
    "adapter": Target(locate.ADAPTER, adapter_seeds, read_adapter, around=beside_adapter_config),
    "adapter-model": Target(
        locate.ADAPTER_WEIGHTS,
        adapter_weights_seeds,
        read_adapter,
        header_json,
        beside_adapter_weights,
    ),
    "params": Target(
        "params.json", lambda: [json.dumps(PARAMS).encode()], read_params, around=beside_params
    ),
    "tokenizer": Target("tokenizer.model", lambda: [pieces()], read_tokenizer),
    "recipe": Target("recipe.toml", recipe_seeds, read_recipe),
    "jsonl": Target("rows.jsonl", row_seeds, read_rows),
    "json": Target("rows.json", list_seeds, read_rows),
    "gzip": Target("rows.jsonl.gz", gzip_seeds, read_rows, zipped),
    "parquet": Target("rows.parquet", parquet_seeds, read_rows),
    "pairs": Target("rows.jsonl", row_seeds, read_data(arrays.preferences)),
    "conversations": Target("rows.jsonl", row_seeds, read_data(arrays.conversations)),
    "cache": Target("bytes", cache_seeds, read_cache),
    "feedback": Target("raw.jsonl", lambda: [lines(SCORED), lines(scored(120))], run_feedback),
}


def attempt(target: Target, content: bytes, parent: Path) -> bool:
    """Whether the target accepts the file. AssertionError if a promise of this module is broken."""
    folder = parent / "case"
    folder.mkdir()
    target.around(folder)
    path = folder / target.name
    path.write_bytes(content)
    before = sorted(os.listdir(parent))
    accepted = True
    try:
        target.read(path)
    except ValueError as error:
        accepted = False
        check_message(error, folder)
    ok(sorted(os.listdir(parent)) == before, "a file was written outside the folder")
    shutil.rmtree(folder)
    return accepted


def work(name: str, seed: int, seconds: float, limit: int, memory: int, box: Path, pipe) -> None:
    """In a process of its own: cases until the time is over, then the counts."""
    target, rng = TARGETS[name], Random(f"{name} {seed}")
    seeds = target.seeds()
    (box.parent / f"{name}.bin").write_bytes(seeds[0])
    attempt(target, seeds[0], box)  # what it imports and caches is no case's memory
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (memory << 20),) * 2)
    counts, end = [0, 0], time.monotonic() + seconds
    while time.monotonic() < end:
        content = target.shape(seeds, rng)
        (box.parent / f"{name}.bin").write_bytes(content)
        signal.setitimer(signal.ITIMER_REAL, limit)  # SIGALRM without a handler ends the process
        counts[attempt(target, content, box)] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send((*counts, (peak - start) / 1024))


def fuzz(name: str, seed: int, seconds: float, limit: int, memory: int) -> bool:
    """Run one target; print its line. Returns whether all went well."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        box = Path(folder) / "box"
        box.mkdir()
        ours, theirs = context.Pipe(duplex=False)
        errors = Path(folder) / "errors"

        def child() -> None:
            with open(errors, "w", buffering=1) as file:
                os.dup2(file.fileno(), 2)  # a library that dies says why
            try:
                work(name, seed, seconds, limit, memory, box, theirs)
            except BaseException:
                traceback.print_exc()
                os._exit(1)

        process = context.Process(target=child)
        process.start()
        process.join()
        if process.exitcode == 0:
            rejected, accepted, peak = ours.recv()
            print(
                f"{name:<14} {rejected + accepted:>8,} cases {rejected:>8,} rejected with one "
                f"line {accepted:>8,} accepted, 0 failures; memory + {peak:,.0f} MiB",
                flush=True,
            )
            return True
        if not (Path(folder) / f"{name}.bin").exists():
            print(
                f"{name:<14} FAILED before its first case: {errors.read_text()[-3000:]}", flush=True
            )
            return False
        content = (Path(folder) / f"{name}.bin").read_bytes()
        crash = Path(f"crash-{name}-{sha256(content).hexdigest()[:12]}.bin")
        crash.write_bytes(content)
        cause = (
            signal.Signals(-process.exitcode).name
            if process.exitcode < 0
            else errors.read_text()[-3000:]
        )
        print(f"{name:<14} FAILED on {crash}: {cause}", flush=True)
        return False


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(TARGETS)} [all]")
    add("--seconds", type=float, default=60, help="in all, shared evenly [60]")
    add("--seed", type=int, default=0)
    add("--limit", type=int, default=20, help="seconds that one case may take [20]")
    add("--memory", type=int, default=2048, help="MiB that a target may take on top [2048]")
    add("--file", type=Path, help="try these bytes only")
    options = parser.parse_args(argv)
    names = options.targets or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if options.file:
        with tempfile.TemporaryDirectory() as box:
            for name in names:
                accepted = attempt(TARGETS[name], options.file.read_bytes(), Path(box))
                print(name, "accepted" if accepted else "rejected")
        return
    share = options.seconds / len(names)
    rest = options.seed, share, options.limit, options.memory
    sys.exit(0 if all([fuzz(name, *rest) for name in names]) else 1)


if __name__ == "__main__":
    main()
