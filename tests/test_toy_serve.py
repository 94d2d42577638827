"""The village's judge at its endpoint says what the judge says, and refuses what it cannot read."""

import json
import math
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from helpers import ROOT
from zephyr.client.exchange import Answer, Endpoint
from zephyr.endpoint import Failure, Request, ask
from zephyr.evals import alpaca_prompt, judge_alpaca, mt_bench, mt_bench_prompts
from zephyr.toy import birds, serve, village

BY_LETTER = {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
RATING = "[Instruction]\n{}\n\n[Response]\n{}\n\nRate the response from 1 to 10 for being helpful."


def started(*flags: str) -> tuple[subprocess.Popen, str]:
    """Return a server, and its name@URL."""
    command = [sys.executable, "-m", "zephyr.toy", "serve", *flags]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    server = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    return server, server.stdout.readline().strip()


@pytest.fixture(scope="module")
def url():
    server, name = started("--until-eof")
    with server:
        model, _, url = name.partition("@")
        assert model == serve.NAME and url.startswith("http://127.0.0.1:")
        yield url
    assert server.returncode == 0, "it ends when its stdin does"


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, list[str]]]:
    """Prompts, and what the birds answer to each."""
    rng = birds.Random(1)
    prompts = birds.draw(village.questions(), 40, rng)
    rows = (birds.scored(prompt, rng) for prompt in prompts)
    return [(row["instruction"], [c["response"] for c in row["completions"]]) for row in rows]


def user(text: str, **parameters) -> Request:
    return Request([{"role": "user", "content": text}], parameters)


def said(url: str, requests: list[Request], path) -> list[Answer | Failure]:
    return list(
        ask(Endpoint(url, serve.NAME), requests, path, concurrency=16, say=lambda text: None)
    )


def test_grades_and_ratings_are_the_verdicts(url, cases, tmp_path):
    """Of all answers, sixteen at a time, by the prompts of zephyr.evals and zephyr.feedback."""
    grading = mt_bench_prompts.read(None)["single-v1"]
    both = [(prompt, answer) for prompt, answers in cases for answer in answers]
    asked = [Request(grading.fill({"question": q, "answer": a}), {}) for q, a in both]
    graded = said(url, asked, tmp_path / "grades.jsonl")
    rated = said(url, [user(RATING.format(*pair)) for pair in both], tmp_path / "ratings.jsonl")
    assert len({village.judge(*pair).score for pair in both}) > 10
    for pair, grade, rating in zip(both, graded, rated, strict=True):
        verdict = village.judge(*pair)
        assert mt_bench.score_in(grade.text) == verdict.score
        assert verdict.critique in grade.text and verdict.critique in rating.text
        assert rating.text.splitlines()[-1] == f"Rating: {round(verdict.score)}"
        assert grade.usage["completion_tokens"] == len(grade.text.split())
        assert grade.logprobs is None


def test_a_comparison_is_the_difference_of_two_verdicts(url, cases, tmp_path):
    _, blocks = alpaca_prompt.read(None)
    games = [(q, first, second) for q, answers in cases for first in answers for second in answers]
    asked = [Request(alpaca_prompt.fill(blocks, *game), BY_LETTER) for game in games]
    answers = said(url, asked, tmp_path / "games.jsonl")
    ties = 0
    for (prompt, first, second), answer in zip(games, answers, strict=True):
        gap = village.judge(prompt, first).score - village.judge(prompt, second).score
        assert answer.text == answer.logprobs[0]["token"] == ("M" if gap < 0 else "m")
        chance = {t["token"]: math.exp(t["logprob"]) for t in answer.logprobs[0]["top_logprobs"]}
        assert set(chance) == {"m", "M"} and sum(chance.values()) == pytest.approx(1)
        assert chance["m"] == pytest.approx(1 / (1 + math.exp(-10 * gap)))
        assert judge_alpaca.by_token(answer) == pytest.approx(2 - chance["m"])
        ties += gap == 0
    assert len(cases) * 4 <= ties < len(games) / 2
    plain = said(url, [user(asked[0].messages[0]["content"])], tmp_path / "plain.jsonl")[0]
    assert plain.text == answers[0].text and plain.logprobs is None, "log-probs if asked for"


def test_what_it_cannot_read_is_refused_in_one_line(url, cases, tmp_path):
    prompt, answers = cases[0]
    france = RATING.format("What is the capital of France?", "Paris.")
    for text, why in (
        ("Which is better?", "is no prompt of judge alpaca, judge mt-bench, feedback collect"),
        (france, "is not of this world"),
        (RATING.replace("10", "5").format(prompt, answers[0]), "is no prompt of"),
    ):
        failure = said(url, [user(text)], tmp_path / "refused.jsonl")[0]
        assert isinstance(failure, Failure) and "400" in failure.why and why in failure.why
    good = {"model": serve.NAME, "messages": [{"role": "user", "content": france}]}
    for body, why in (
        (b"{", "Expecting"),
        (b"[]", "a request has a model, and messages whose content is text"),
        (json.dumps(good | {"messages": []}).encode(), "a request has a model, and messages"),
        (json.dumps(good | {"messages": [{"content": 1}]}).encode(), "content is text"),
        (json.dumps(good | {"model": "gpt-4"}).encode(), "the model is larkmere-judge"),
        (json.dumps(good | {"n": 2}).encode(), "one choice"),
        (json.dumps(good | {"stream": True}).encode(), "does not stream"),
        (b" " * (serve.LARGEST + 1), "Content-Length is 1 to"),
        (b" " * (8 * serve.LARGEST), "Content-Length is 1 to"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}/chat/completions", body)
        assert caught.value.code == 400
        assert why in json.loads(caught.value.read())["error"]["message"]
    with urllib.request.urlopen(f"{url}/models") as response:
        assert [model["id"] for model in json.load(response)["data"]] == [serve.NAME]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to(number, tmp_path):
    server, name = started("--port-file", str(tmp_path / "port"))
    assert name.endswith(f":{(tmp_path / 'port').read_text().strip()}/v1")
    server.send_signal(number)
    out, err = server.communicate(timeout=60)
    assert (server.returncode, out, err) == (0, "", "")


def test_it_does_not_outlive_who_started_it():
    """Even if that is killed, and cannot stop it."""
    code = (
        "import os, signal, subprocess, sys;"
        "server = subprocess.Popen([sys.executable, '-m', 'zephyr.toy', 'serve', '--until-eof'],"
        " stdin=subprocess.PIPE); sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as parent:
        assert parent.stdout.readline().startswith(serve.NAME)
        rest, _ = parent.communicate("die\n", timeout=60)  # its end: nobody holds the pipe
    assert (parent.returncode, rest) == (-signal.SIGKILL, "")


def test_a_port_that_is_taken_is_one_line(url):
    port = url.split(":")[2].split("/")[0]
    server, name = started("--port", port)
    assert name == "" and "Address already in use" in server.communicate(timeout=60)[1]
    assert server.returncode == 2
