"""A server that nobody here wrote, `transformers serve`, asked by our client."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from test_exported import save

from zephyr import feedback
from zephyr.data.readers import read_rows, write_rows
from zephyr.endpoint import Request
from zephyr.evals.__main__ import main
from zephyr.model import Mistral
from zephyr.source import ask, open_source
from zephyr.tokenizer import Tokenizer
from zephyr.toy import birds
from zephyr.weights import config_json, hub

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


def test_answers_judged_from_end_to_end(folder, url, tmp_path, capsys):
    """Its model answers MT-Bench and AlpacaEval, and as a judge says nothing that can be read: each
    verdict is asked for three times, and none is made up."""
    served = f"{folder}@{url}"
    asked = [{"question_id": 81, "category": "writing", "turns": ["Who sells bread?", "And tea?"]}]
    write_rows(tmp_path / "q.jsonl", asked)
    write_rows(tmp_path / "set.jsonl", [{"instruction": "Where is Ada?"}, {"instruction": "Tea?"}])
    few = ["--max-new", "8", "--budget-tokens", "100000"]
    main(
        ["answer", "mt-bench", served, "--questions", f"{tmp_path}/q.jsonl"]
        + ["--out", f"{tmp_path}/a.jsonl", *few]
    )
    ((_, answered),) = read_rows(tmp_path / "a.jsonl")
    assert len(answered["choices"][0]["turns"]) == 2 and all(answered["choices"][0]["turns"])
    for model, name in ((served, "theirs"), (str(folder), "ours")):
        main(
            ["answer", "alpaca", model, "--instructions", f"{tmp_path}/set.jsonl", "--name", name]
            + [
                "--out",
                f"{tmp_path}/{name}.json",
                "--temperature",
                "0",
                *few[: 2 if name == "ours" else 4],
            ]
        )
    theirs, ours = (
        [row["output"] for _, row in read_rows(tmp_path / f"{name}.json")]
        for name in ("theirs", "ours")
    )
    assert theirs == ours and all(ours)
    # equal outputs need no judge, and so the rate is one half
    judge = ["--judge", served, "--max-new", "8"]
    main(
        ["judge", "alpaca", f"{tmp_path}/ours.json", "--against", f"{tmp_path}/theirs.json"]
        + ["--out", f"{tmp_path}/same.json", *judge]
    )
    assert "2 times the two answers are equal" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(
            ["judge", "mt-bench", f"{tmp_path}/a.jsonl", "--questions", f"{tmp_path}/q.jsonl"]
            + ["--out", f"{tmp_path}/j.jsonl", *judge]
        )
    assert "none of its 2 verdicts can be read" in capsys.readouterr().err
    assert len((tmp_path / "j.jsonl.answers").read_text().splitlines()) == 6


def test_a_judge_there_that_always_names_the_first(folder, url, tmp_path, capsys):
    """A model of which every token is `m` gives one half, with a consistency of 0."""
    tokenizer = Tokenizer(folder)
    model = Mistral(config_json.read(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight[tokenizer.encode("m")[-1]] = 1
    hub.save(model, tmp_path / "judge", folder)
    for name in ("ours", "theirs"):
        rows = [
            {"instruction": f"{k}?", "output": name + "!" * k, "generator": name} for k in (1, 2)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    main(
        ["judge", "alpaca", f"{tmp_path}/ours.jsonl", "--against", f"{tmp_path}/theirs.jsonl"]
        + ["--judge", f"{tmp_path}/judge@{url}", "--max-new", "1", "--out", f"{tmp_path}/a.json"]
        + ["--json", f"{tmp_path}/figures.json"]
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["win_rate"] == 50 and figures["consistency"]["consistent"] == 0
    assert figures["consistency"]["first_slot_preferred"] == 2
    assert "the judge was read by its text" in " ".join(capsys.readouterr().out.split())


def test_feedback_from_end_to_end(folder, url, tmp_path, capsys):
    """Its model completes prompts; none of its ratings can be read, so all are kept apart."""
    write_rows(tmp_path / "p.jsonl", [{"prompt": "Who sells bread?"}])
    with pytest.raises(SystemExit):
        feedback.main(
            ["collect", f"{tmp_path}/p.jsonl", "--models", f"{folder}@{url}", "--judge"]
            + [f"{folder}@{url}", "--out", f"{tmp_path}/raw.jsonl", "--completions", "2"]
            + ["--max-new", "8", "--judge-max-new", "8"]
        )
    assert "no prompt has two rated completions" in capsys.readouterr().err
    kept = [row for _, row in read_rows(tmp_path / "raw.jsonl.failed.jsonl")]
    assert len(kept) == 2 and all(row["response"] for row in kept)
    assert [len(row["judge"]["overall"]["said"]) for row in kept] == [3, 3]
