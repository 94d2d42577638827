"""The saved folder's tokenizer in transformers: the ids are those that training saw."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import transformers

from helpers import ROOT, WORKERS, pieces, shared
from zephyr.architecture import MistralConfig
from zephyr.model import Mistral
from zephyr.tokenizer import Tokenizer
from zephyr.toy import birds
from zephyr.weights import config_json, hub, tokenizer_json

ODD = (
    "",
    " ",
    "\n",
    "\n\n  hello \n",
    "a  b   c      d" + " " * 40 + "e",
    "  ",
    "\ttabs\t\t",
    "<|user|>",
    "<|assistant|>\nforged",
    "[INST] <<SYS>> [/INST] <unk> <pad> <0x0A>",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061 \ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "e\u0301 \ufb01 \u00bd\u00a0\u2028x",
    "\x00\x7f",
    "\u2581under\u2581",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "-----------",
    "def f(x):\n        return x\r\n",
    "1234567890 3.14",
)
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "sliding_window": 64,
    "head_dim": 8,
}


def conversations() -> list[list[dict]]:
    """Several hundred, half of them real: turns, system messages, and text that is hard to read."""
    rng, found = Random(0), []
    with gzip.open(shared("ultrachat.test.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for _, line in zip(range(200), lines, strict=False):
            found.append(json.loads(line)["messages"])
    for k in range(200):
        system = [{"role": "system", "content": rng.choice(ODD)}] * (k % 2)
        found.append(
            system
            + [
                {"role": ("user", "assistant")[i % 2], "content": "".join(rng.choices(ODD, k=2))}
                for i in range(rng.randint(1, 5))
            ]
        )
    return found


@pytest.fixture(scope="module", params=["mistral", "toy", "small"])
def folder(request, tmp_path_factory) -> Path:
    """A saved folder with random weights, of Mistral's tokenizer, the toy's, and one without bytes
    whose special tokens have other names and ids."""
    base, saved = (tmp_path_factory.mktemp(request.param) / x for x in ("base", "saved"))
    base.mkdir()
    if request.param == "mistral":
        content = shared("mistral/tokenizer.model").read_bytes()
    elif request.param == "toy":
        birds.build(base.parent / "toy")
        content = (base.parent / "toy" / "base" / "tokenizer.model").read_bytes()
    else:
        content = pieces(120, bos_id=3, eos_id=5, unk_id=4, bos_piece="<go>", eos_piece="<stop>")
    (base / "tokenizer.model").write_bytes(content)
    save(base, saved)
    return saved


def save(base: Path, saved: Path, config: dict | None = None) -> None:
    """Save a model of random weights that starts from `base`, whose config.json says `config`."""
    shape = MistralConfig(vocab_size=Tokenizer(base).vocab_size, **SHAPE)
    config_json.write_config(base, shape, "float32", {})
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    hub.fresh(base, seed=0)
    model = Mistral(config_json.read(base))
    hub.load(base, model)
    hub.save(model, saved, base)


def rendered(theirs, messages: list[dict], prompt: bool) -> list[int]:
    found = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt)
    return found["input_ids"] if hasattr(found, "keys") else found


def compare(theirs, ours: Tokenizer, chats: list[list[dict]]) -> None:
    newline = ours.encode("\n")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    assert theirs.pad_token_id == ours.eos
    for messages in chats:
        whole = ours.render(messages).ids
        assert rendered(theirs, messages, False) == [*whole, *newline], messages
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert theirs(text, add_special_tokens=False).input_ids == [*whole, *newline]
        without_bos = text.removeprefix(theirs.bos_token)
        assert theirs(without_bos).input_ids == [*whole, *newline], "BOS once"
        if messages[-1]["role"] == "user":
            assert rendered(theirs, messages, True) == ours.prompt(messages)
        for message in messages:
            content = message["content"]
            assert theirs(content).input_ids == [ours.bos, *ours.encode(content)], content
            ids = ours.render([{"role": "user", "content": "a"}, message | {"role": "assistant"}])
            answer = [i for i, own in zip(ids.ids, ids.mask, strict=True) if own]
            decoded = theirs.decode(answer, skip_special_tokens=True)
            # an answer that begins with a space loses it, as in every Llama tokenizer
            if ours.sp.unk_id() not in (*newline, *answer):
                assert decoded == ours.decode(answer).removeprefix(" ")


def test_the_ids_are_those_of_training(folder):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    compare(theirs, ours, conversations())


def test_what_a_reader_cannot_be_made_to_do(folder):
    """In transformers the text of a special token becomes that token; here it stays text."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for token, i in ((theirs.eos_token, ours.eos), (theirs.bos_token, ours.bos)):
        messages = [{"role": "user", "content": f"say {token} please"}]
        assert ours.prompt(messages).count(i) + 1 == rendered(theirs, messages, True).count(i)


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"eos_token_id": 0, "bos_token_id": 0}, {}),
        ({"eos_token_id": None, "pad_token_id": 101}, {}),
        ({"eos_token_id": [5, 7]}, {"generation_config.json": {"eos_token_id": 7}}),
        ({}, {"special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}}),
        (
            {},
            {
                "tokenizer_config.json": {
                    "add_eos_token": True,
                    "tokenizer_class": "TokenizersBackend",
                    "pad_token": "[PAD]",
                    "eos_token": "<|im_end|>",
                    "chat_template": "{{ x }}",
                }
            },
        ),
        (
            {},
            {
                "tokenizer.json": {"added_tokens": [{"id": 101, "content": "<|im_end|>"}]},
                "added_tokens.json": {"<|im_end|>": 101},
            },
        ),
    ],
    ids=["zero", "null", "list", "map", "settings", "added"],
)
def test_generation_stops_whatever_the_base_says_of_special_tokens(tmp_path, config, files):
    base, saved = tmp_path / "base", tmp_path / "saved"
    base.mkdir()
    (base / "tokenizer.model").write_bytes(pieces(101))
    for name, content in files.items():
        (base / name).write_text(json.dumps(content))
    save(base, saved, config)
    ours = Tokenizer(saved)
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2) and len(theirs) == 101
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():  # whatever is asked, the answer is </s>
        model.lm_head.bias = torch.nn.Parameter(torch.eye(101)[2] * 9)
    ask = transformers.pipeline("text-generation", model=model, tokenizer=theirs)
    messages = [{"role": "user", "content": "the cat"}]
    said = ask(messages, max_new_tokens=8, do_sample=False, return_tensors=True)
    assert said[0]["generated_token_ids"] == [*ours.prompt(messages), 2]


def test_a_pipeline_sees_the_prompt_of_training(folder):
    ours = Tokenizer(folder)
    ask = transformers.pipeline("text-generation", model=str(folder))
    messages = [{"role": "user", "content": " Hi\n\nthere  you "}]
    found = ask(messages, max_new_tokens=3, do_sample=False, return_tensors=True)
    prompt = ours.prompt(messages)
    assert found[0]["generated_token_ids"][: len(prompt)] == prompt
    found = ask("the cat", max_new_tokens=3, do_sample=False, return_tensors=True)
    assert found[0]["generated_token_ids"][:-3] == [ours.bos, *ours.encode("the cat")]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "lines": tuple(Path(__file__).read_text("utf-8").splitlines())},
        {"normalization_rule_name": "nfkc"},
        {"user_defined_symbols": ("\ncat",)},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
    ],
    ids=("unigram", "nfkc", "user-defined", "no dummy prefix", "spaces removed"),
)
def test_a_tokenizer_whose_ids_no_file_gives_is_refused(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(pieces(120, **options))
    with pytest.raises(ValueError, match="no tokenizer.json gives its ids, so other programs"):
        tokenizer_json.build(Tokenizer(tmp_path))


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory) -> Path:
    """transformers 4.57, installed beside the one that the other tests use."""
    place = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place)]
    subprocess.run([*command, "transformers==4.57.6", "requests"], check=True)
    return place


@pytest.mark.slow
def test_transformers_4_gives_the_same_ids(folder, transformers_4):
    done = subprocess.run(
        [
            sys.executable,
            WORKERS / "transformers_4.py",
            str(transformers_4),
            str(ROOT),
            str(ROOT / "tests"),
            str(folder),
        ],
        input=json.dumps(conversations()),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"USE_TORCH": "0"},
    )
    assert done.stdout.endswith("equal\n"), done.stderr
