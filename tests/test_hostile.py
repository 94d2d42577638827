"""Whatever the bytes of a file are, it is read or refused in one line: benchmarks/fuzz.py, briefly.

And what its mutations would take long to find, on the command lines and in recipes.
"""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from helpers import ROOT, WORKERS, Limits
from zephyr import config
from zephyr.data import arrays, readers

pytestmark = pytest.mark.tools

NAMES = pytest.mark.parametrize("name", fuzz.TARGETS)


@cache
def seeds(name: str) -> list[bytes]:
    return fuzz.TARGETS[name].seeds()


def attempt(name: str, content: bytes) -> bool:
    with tempfile.TemporaryDirectory() as box:
        return fuzz.attempt(fuzz.TARGETS[name], content, Path(box))


@NAMES
def test_the_valid_files_are_accepted(name):
    for seed in seeds(name):
        assert attempt(name, seed) != (b'"../x.safetensors"' in seed)


@NAMES
@settings(max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_a_broken_file_is_read_or_refused_in_one_line(name, rng):
    attempt(name, fuzz.TARGETS[name].shape(seeds(name), rng))


@NAMES
@settings(max_examples=15)
@given(content=st.binary(max_size=100))
def test_any_bytes_are_read_or_refused_in_one_line(name, content):
    attempt(name, content)


def test_the_mutations_reach_both_ends():
    """Else these properties would say little."""
    for name in fuzz.TARGETS:
        rng, found = Random(0), set()
        for _ in range(300):
            found.add(attempt(name, fuzz.TARGETS[name].shape(seeds(name), rng)))
            if len(found) == 2:
                break
        assert found == {True, False}, name


def test_the_long_run_keeps_the_bytes_of_a_failure(tmp_path):
    about = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 100}
    done = subprocess.run(
        [sys.executable, WORKERS / "failing_parsers.py"],
        env=os.environ | {"PYTHONPATH": ROOT},
        **about,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("no_seeds       FAILED before its first case: Traceback")
    assert "KeyError: 'no seed'" in done.stdout
    *failed, passed = done.stdout.split("FAILED on crash-")[1:]
    for line, what in zip(
        [*failed, passed],
        [
            "KeyError",
            "the file is not named",
            "SIGSEGV",
            "SIGALRM",
            "MemoryError",
            "written outside",
        ],
        strict=True,
    ):
        assert what in line, done.stdout
    assert "0 failures" in done.stdout.splitlines()[-1]
    crashes = sorted(tmp_path.iterdir())
    assert len(crashes) == 6 and all(path.read_bytes() == b"xy" for path in crashes)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a = " + "[" * 5000 + "]" * 5000, ".*recursion"),
        ("[dpo]\nseed = " + "9" * 5000, "Exceeds the limit"),
        ("[dpo]\nlr = '" + "x" * 9000 + "'", r"\[dpo\] argument --lr: invalid float value: 'x+"),
        ('[dpo]\n"\\u001b[2J" = 1', r"\[dpo\] has an unknown key '\\x1b\[2J'$"),
        ('[dpo]\nloss = "\\u001b[2J"', r"\[dpo\] argument --loss: invalid choice: '\\x1b\[2J'"),
        (f"['{'a' * 1000}']\n" * 2, "Cannot declare"),
        ("a = \0", "Invalid value"),
        ("", r"has no \[dpo\] table"),
        ("dpo = [1]", r"has no \[dpo\] table"),
    ],
)
def test_a_hostile_recipe_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {message}") as raised:
        config.read_recipe(str(path), config.DPOConfig)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_a_recipe_may_open_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("\ufeff[dpo]\r\nlr = 1e-6\r\n")
    assert config.read_recipe(str(path), config.DPOConfig) == {"lr": 1e-6}
    path.chmod(0o000)
    if not os.access(path, os.R_OK):
        with pytest.raises(ValueError, match="r.toml: cannot read: Permission denied"):
            config.read_recipe(str(path), config.DPOConfig)


@pytest.mark.parametrize(
    "row",
    [
        '{"messages": [{"role": "\\u001b[2J", "content": "a"}]}',
        '{"messages": ["\\u001b[2J\\n"]}',
        '{"messages": "\\u001b]0;x\\u0007"}',
        '{"messages": ' + "[" * 900 + "]" * 900 + "}",
        '{"\\u001b[2J": 1}',
        '{"messages": ' + "9" * 4000 + "}",
        '{"chosen": "\\u001b[2J", "rejected": "\\u001b[2J"}',
        '{"prompt": {"\\u001b[2J": 1}, "chosen": "a", "rejected": "b"}',
        "\x1b[2J",
        '{"messages": \x1b[2J}',
    ],
)
def test_no_escape_sequence_in_a_row_reaches_the_terminal(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(row)
    for read in (arrays.conversations, arrays.preferences):
        with pytest.raises(ValueError, match=f"^{path}:1: ") as raised:
            read((str(path),), fuzz.tokenizer(), Limits())
        assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_two_megabytes_of_one_word_are_a_row(tmp_path):
    """With a NUL and a line separator inside, which end neither the text nor the line."""
    word = "\0\u2028" + "a" * 2_000_000
    path = tmp_path / "a.jsonl"
    readers.write_rows(path, [{"prompt": "Why?", "chosen": word, "rejected": "No."}])
    tokens = arrays.preferences((str(path),), fuzz.tokenizer(), Limits(max_length=3_000_000))
    assert fuzz.tokenizer().decode(tokens.pair(0).chosen.tolist()[:-1]) == word
