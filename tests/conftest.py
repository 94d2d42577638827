"""What every test file shares."""

import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, settings

from zephyr import exits

# a shared machine may pause anywhere, so no property is held to a time
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run small tensors, and subprocesses beside
# here too, where torch has read it already: a matmul's last bits may depend on it
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_configure() -> None:
    if hidden := exits.hidden_kernels():
        pytest.exit(hidden, 2)


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
    from benchmarks import fuzz

    return fuzz.tokenizer()


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
        "model_type": "bpe", "remove_extra_whitespaces": False, "character_coverage": 1.0,
        "normalization_rule_name": "identity", "minloglevel": 2, "num_threads": 1,
        "byte_fallback": size > 256,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, **settings | options
    )
    return model.getvalue()


def shared(name: str) -> Path:
    """A file of real data that lies beside the checkout; where it is absent the test is skipped."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path
