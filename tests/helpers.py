"""What the tests build their small models, batches and runs with."""

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece

from zephyr.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
WORKERS = Path(__file__).parent / "workers"


@dataclass
class Limits:
    """What of a config `zephyr.data` reads; the lengths are recipe B's."""

    max_length: int = 1024
    max_prompt_length: int = 512
    empty_system: bool = True
    on_bad_row: str = "stop"


LETTERS = " ".join(map(chr, range(0xA1, 0xE8)))


LINES = (LETTERS, "<|user|> <|system|> <|assistant|>", "the cat sat on the mat")


@functools.cache
def pieces(size: int, lines: tuple[str, ...] = LINES, **options) -> bytes:
    """A tokenizer.model of `size` pieces in the manner of Mistral's, trained here."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "minloglevel": 2,
        "num_threads": 1,
        "byte_fallback": size > 256,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, **settings | options
    )
    return model.getvalue()


SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def shared(name: str) -> Path:
    """A file of real data that lies beside the checkout; where it is absent the test is skipped."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def gpt(*contents, system=None):
    head = [] if system is None else [{"from": "system", "value": system}]
    return head + [{"from": ("human", "gpt")[k % 2], "value": c} for k, c in enumerate(contents)]


def human(*contents):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[k % 2]}: {text}" for k, text in enumerate(contents))


def scored(prompt="Why?", **more):
    return {
        "source": "flan",
        "instruction": prompt,
        "completions": [
            {"model": "m", "response": "a", "overall_score": 9, "annotations": None},
            {"model": "n", "response": "b", "overall_score": 2, "annotations": None},
        ],
    } | more


GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def chat(*contents, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[k % 2], "content": c} for k, c in enumerate(contents)]


def save(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def trained_tokenizer(path: Path, *lines: str, size: int = 300) -> Tokenizer:
    """A tokenizer of `size` pieces with byte fallback, trained on the lines into `path`."""
    path.write_bytes(pieces(size, lines))
    return Tokenizer(path)
