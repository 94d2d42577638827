"""A server that nobody here wrote, `transformers serve`, asked by our client."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_exported import save

from zephyr.endpoint import Request
from zephyr.source import ask, open_source
from zephyr.toy import birds

PACKAGES = ["openai", "pydantic", "uvicorn", "fastapi", "starlette", "rich", "psutil"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved folder with random weights and the village's tokenizer."""
    base, saved = (tmp_path_factory.mktemp("served") / name for name in ("base", "chat"))
    base.mkdir()
    birds.build(base.parent / "toy")
    words = (base.parent / "toy" / "base" / "tokenizer.model").read_bytes()
    (base / "tokenizer.model").write_bytes(words)
    save(base, saved)
    return saved


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory) -> str:
    """Where `transformers serve` answers, which is installed for this; it loads what it is asked
    for."""
    place = tmp_path_factory.mktemp("serve")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place)]
    subprocess.run([*pip, *PACKAGES], check=True)
    subprocess.run(
        [*pip, "--no-deps", "accelerate"], check=True
    )  # else it brings a torch of its own
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", start, "serve", "--port", str(port), "--host", "127.0.0.1"],
        env=os.environ | {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"},
    )
    try:
        for _ in range(120):
            assert server.poll() is None, "it ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def test_its_greedy_answers_are_ours(folder, url, tmp_path):
    """The template, the ids and the logits of two programs: one conversation a time on theirs, all
    in one batch on ours."""
    texts = [
        "Who sells bread?",
        "Where is Ada?",
        "Greet Finn in the morning.",
        "When can I buy tea?",
    ]
    requests = [
        Request([{"role": "user", "content": text}], {"max_tokens": 12, "temperature": 0})
        for text in texts
    ]
    served = open_source(f"{folder}@{url}")
    theirs = list(ask(served, requests, tmp_path / "served.jsonl", concurrency=2))
    ours = list(ask(open_source(str(folder)), requests, tmp_path / "ours.jsonl"))
    # an answer that begins with a space loses it there, as with every Llama tokenizer
    assert [a.text for a in theirs] == [a.text.removeprefix(" ") for a in ours]
    assert all(a.text for a in ours)
    assert [a.usage["prompt_tokens"] for a in theirs] == [a.usage["prompt_tokens"] for a in ours]
