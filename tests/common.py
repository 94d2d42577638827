"""The fixtures that test files share."""

import random
from pathlib import Path

import pytest
import torch
from torch.nn.attention import varlen
from transformers import MistralConfig as TheirConfig
from transformers import MistralForCausalLM

import train_dpo
from benchmarks import fuzz, tiny
from helpers import trained_tokenizer
from model_helpers import SMALL, flash, flash_backward, folder_of, model
from run_helpers import DPO, SHAPE, run, sentence, weights_of
from zephyr import attention
from zephyr.architecture import MistralConfig
from zephyr.data.readers import write_rows
from zephyr.distributed import group
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json, hub


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """Tests never touch the user's cache."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer():
    """A small one of byte pairs."""
    return fuzz.tokenizer()


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """base/ (model and tokenizer), pairs.jsonl, test.jsonl, chats.jsonl"""
    place, rng = tmp_path_factory.mktemp("train"), random.Random(0)
    base = place / "base"
    base.mkdir()
    tiny.tokenizer(base)
    torch.manual_seed(0)
    vocab = Tokenizer(base).vocab_size
    model = MistralForCausalLM(TheirConfig(vocab_size=vocab, **SHAPE))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)  # sharp enough that every difference would show
    model.save_pretrained(base)

    def pair() -> dict:
        ask = {"role": "user", "content": sentence(rng, 3, 14)}
        sides = {
            side: [ask, {"role": "assistant", "content": sentence(rng, 1, 12)}]
            for side in ("chosen", "rejected")
        }
        return {"prompt": ask["content"], **sides}

    write_rows(place / "pairs.jsonl", [pair() for _ in range(8)])
    write_rows(place / "test.jsonl", [pair() for _ in range(5)])
    write_rows(place / "chats.jsonl", [{"messages": pair()["chosen"]} for _ in range(7)])
    return place


@pytest.fixture(scope="session")
def baseline(place, tmp_path_factory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("baseline") / "run"
    held_out = ("--eval-data", str(place / "test.jsonl"), "--eval-every", "3")
    return run(train_dpo, place, out, *DPO, *held_out), weights_of(out)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    text = "the cat sat on a mat <|user|> <|assistant|> one two three of some small words"
    return trained_tokenizer(tmp_path_factory.mktemp("sp") / "tokenizer.model", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole model folder: pieces with byte fallback, random weights, 150 positions."""
    out = tmp_path_factory.mktemp("chat")
    lines = "the cat sat on the mat", "<|user|> <|assistant|>"
    pieces = trained_tokenizer(out / "tokenizer.model", *lines).vocab_size
    shape = MistralConfig(**SMALL | {"vocab_size": pieces, "max_position_embeddings": 150})
    config_json.write_config(out, shape, "float32", {})
    hub.fresh(out, 0)
    return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Attention is the op that runs on CUDA, with its own rule of what to save for the backward; on
    a CPU it has no kernel, so that it gets one which only has the shapes."""

    varlen._varlen_attn.register_kernel("cpu")(flash)
    varlen._varlen_attn_backward.register_kernel("cpu")(flash_backward)
    monkeypatch.setattr(attention, "in_one_call", lambda _: True)


@pytest.fixture(scope="module")
def ranks():
    yield group.start()
    group.finish()


@pytest.fixture
def good(tmp_path):
    """A model folder with which nothing is wrong."""
    return folder_of(model(), tmp_path / "good")
