"""The client of chat endpoints, against a local server that misbehaves: what is tried again and
when, what is paid twice (nothing), what is kept, and what a user is told."""

import collections
import email.utils
import errno
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers import ROOT, WORKERS
from zephyr.client.budget import Budget, BudgetReached, read_prices
from zephyr.client.store import AnswerFile
from zephyr.endpoint import Answer, Endpoint, Failure, Request, ask, key_of
from zephyr.errors import Storage

KEY = "sk-do-not-show-me-0123456789"


def request(text, **parameters):
    return Request([{"role": "user", "content": text}], parameters)


def reply(body, **more):
    """What a server that behaves answers: a prompt of as many tokens as it has characters."""
    text = body["messages"][-1]["content"]
    choice = {"message": {"role": "assistant", "content": f"answer to {text}"}}
    usage = {"prompt_tokens": len(text), "completion_tokens": 7}
    return {"choices": [choice | {"finish_reason": "stop"} | more], "usage": usage}


def error(message="no", **more):
    return {"error": {"message": message, **more}}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = body["messages"][-1]["content"], self.server
        with server.lock:
            server.asked[text] += 1
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            times = server.asked[text]
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            # a behaviour sends something itself and gives None, or gives (status, headers, body)
            try:
                given = server.behave(self, body, times)
            finally:
                with server.lock:  # before the client has the answer and sends its next request
                    server.busy -= 1
            if given is not None:
                self.give(*given)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed or did not wait

    def give(self, status, headers, body, cut=0):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])

    def reset(self, begun):
        if begun:
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\n{")
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.released = threading.Lock(), threading.Event()
        self.asked = collections.Counter()
        self.bodies, self.headers, self.paths, self.busy, self.busiest = [], [], [], 0, 0
        self.behave = lambda handler, body, times: (200, {}, reply(body))
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


class Asking:
    """Calls `ask` and remembers how long it would have slept, and what it said."""

    def __init__(self, server, path, model="m", **options):
        self.endpoint = Endpoint(server.url, model, **options)
        self.path, self.slept, self.said = path, [], []

    def __call__(self, requests, **options):
        options = {"sleep": self.slept.append, "say": self.said.append} | options
        return list(ask(self.endpoint, requests, self.path, **options))

    def lines(self):
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]


@pytest.fixture
def asking(server, tmp_path):
    return Asking(server, tmp_path / "answers.jsonl")


def once(first):
    """A behaviour: `first` at the first time a text is asked, and then as it should be."""

    def behave(handler, body, times):
        return first(handler, body) if times == 1 else (200, {}, reply(body))

    return behave


def test_a_thousand_requests_are_asked_once_each_and_answered_in_order(server, asking):
    rng = random.Random(0)

    def behave(handler, body, times):
        time.sleep(rng.random() * 0.01)
        return 200, {}, reply(body)

    server.behave = behave
    texts = [f"question {k}" for k in range(1000)]
    requests = [request(text, max_tokens=50) for text in texts + texts[:50]]
    answers = asking(requests, concurrency=16)
    assert [answer.text for answer in answers] == [f"answer to {t}" for t in texts + texts[:50]]
    assert answers[0] == Answer(
        "answer to question 0", "stop", {"prompt_tokens": 10, "completion_tokens": 7}, None
    )
    assert server.asked == dict.fromkeys(texts, 1)
    assert 8 < server.busiest <= 16
    assert set(server.paths) == {"/v1/chat/completions"}
    assert asking.said == [
        f"m: 1000 requests to ask, 0 are in {asking.path}; about 2,972 tokens of prompts, at "
        "most 50,000 of answers, 52,972 tokens"
    ]
    assert asking(requests) == answers  # from the file
    assert sum(server.asked.values()) == len(asking.lines()) == 1000
    assert asking.said[1:] == [f"m: all 1000 answers are in {asking.path}, of an earlier run"]


def test_other_parameters_or_another_model_are_another_request(server, asking):
    requests = [request("a", seed=1), request("a", seed=2), request("a")]
    asking(requests)
    assert server.asked["a"] == 3
    Asking(server, asking.path, "other")(requests[:1])
    assert server.asked["a"] == 4
    assert len({line["key"] for line in asking.lines()}) == 4
    assert key_of("m", request("a", x=1, y=2)) == key_of("m", request("a", y=2, x=1))


def test_an_answer_may_come_in_chunks(server, asking):
    def behave(handler, body, times):
        data = json.dumps(reply(body)).encode()
        handler.wfile.write(CHUNKED % (9, data[:9] + b"\r\n"))
        handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data) - 9, data[9:]))

    server.behave = behave
    assert asking([request("a")])[0].text == "answer to a"
    assert "answers without max_tokens, so more than 0 tokens" in asking.said[0]


def test_logprobs_and_what_else_an_answer_may_be(server, asking):
    tokens = [{"token": "m", "logprob": -0.1, "top_logprobs": [{"token": "M", "logprob": -2.4}]}]
    kinds = {
        "with": {"logprobs": {"content": tokens}},
        "empty": {"message": {"content": None}, "finish_reason": "length"},
        "half": {"message": {"content": "a\ud800b"}},
    }
    server.behave = lambda h, body, n: (
        200,
        {},
        reply(body, **kinds[body["messages"][-1]["content"]]),
    )
    requests = [request(kind, logprobs=True) for kind in kinds]
    answers = asking(requests)
    assert answers[0].logprobs == tokens
    assert (answers[1].text, answers[1].finish_reason) == ("", "length")
    assert answers[2].text == "a\ufffdb"
    assert asking(requests) == answers


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"retry-after-ms": "250"}, 0.25, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9, 9),
        ({"retry-after": "1.5"}, 1.5, 1.5),
        ({"retry-after": "120"}, 120, 120),
        ({"retry-after": "DATE"}, 27, 30),
        ({"retry-after": "PAST"}, 0.375, 0.5),
        ({"retry-after": "0"}, 0.375, 0.5),
        ({"retry-after": "-1"}, 0.375, 0.5),
        ({"retry-after": "nan"}, 0.375, 0.5),
        ({"retry-after": "when it suits"}, 0.375, 0.5),
        ({}, 0.375, 0.5),
    ],
)
def test_a_server_that_names_a_time_is_obeyed(server, asking, headers, least, most):
    dates = {"DATE": 30, "PAST": -30}
    headers = {
        name: email.utils.formatdate(time.time() + dates[x], usegmt=True) if x in dates else x
        for name, x in headers.items()
    }
    server.behave = once(lambda handler, body: (429, headers, error("slow down")))
    assert asking([request("a")])[0].text == "answer to a"
    assert len(asking.slept) == 1 and least <= asking.slept[0] <= most


def test_without_a_time_the_wait_doubles_up_to_eight_seconds(server, asking):
    server.behave = lambda handler, body, times: (
        (503, {}, b"<html>busy</html>") if times < 8 else (200, {}, reply(body))
    )
    asking([request("a")], attempts=8)
    assert len(asking.slept) == 7
    for slept, most in zip(asking.slept, (0.5, 1, 2, 4, 8, 8, 8), strict=True):
        assert 0.75 * most <= slept <= most


def hang(handler, body):
    handler.server.released.wait(20)


def drip(handler, body):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    while not handler.server.released.wait(0.1):
        handler.wfile.write(b" ")


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s"
TROUBLES = {
    **{
        f"status {status}": lambda h, b, s=status: (s, {}, error())
        for status in (408, 409, 429, 500, 502, 503, 529)
    },
    "a 500 of HTML": lambda h, b: (500, {}, b"<html>Internal Server Error</html>"),
    "truncated": lambda h, b: h.give(200, {}, reply(b), cut=9),
    "truncated, and no length": lambda h, b: (
        200,
        {"Content-Length": "x"},
        json.dumps(reply(b)).encode()[:-9],
    ),
    "truncated chunks": lambda h, b: h.wfile.write(CHUNKED % (99, json.dumps(reply(b)).encode())),
    "empty": lambda h, b: (200, {}, b""),
    "malformed": lambda h, b: (200, {}, b'{"choices": [{"message": {content}}]}'),
    "no text": lambda h, b: (200, {}, b"\xff\xfe\x00"),
    "nested": lambda h, b: (200, {}, b"[" * 100_000),
    "an error as 200": lambda h, b: (200, {}, error("overloaded")),
    "HTML": lambda h, b: (200, {}, b"<html>one moment</html>"),
    "hangs": hang,
    "drips": drip,
    "no HTTP": lambda h, b: h.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "says nothing": lambda h, b: None,
    "reset": lambda h, b: h.reset(False),
    "reset in mid-answer": lambda h, b: h.reset(True),
    "x-should-retry": lambda h, b: (400, {"x-should-retry": "true"}, error()),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_passing_trouble_is_tried_again(server, tmp_path, trouble):
    server.behave = once(TROUBLES[trouble])
    asking = Asking(
        server, tmp_path / "a.jsonl", timeout=0.5 if trouble in ("hangs", "drips") else 20
    )
    assert [answer.text for answer in asking([request("a"), request("b")])] == [
        "answer to a",
        "answer to b",
    ]
    assert server.asked == {"a": 2, "b": 2}
    assert len(asking.slept) == len(asking.lines()) == 2


@pytest.mark.parametrize("trouble", ["status 500", "truncated", "reset in mid-answer"])
def test_a_failure_is_told_and_is_no_answer(server, asking, trouble):
    def behave(handler, body, times):
        bad = body["messages"][-1]["content"] == "bad"
        return TROUBLES[trouble](handler, body) if bad else (200, {}, reply(body))

    server.behave = behave
    requests = [request("a"), request("bad"), request("b")]
    first, failure, last = asking(requests, attempts=3)
    assert (first.text, last.text) == ("answer to a", "answer to b")
    assert isinstance(failure, Failure) and server.url in failure.why
    assert server.asked == {"a": 1, "bad": 3, "b": 1}
    assert asking.said[1].startswith("m: 1 of 3 requests have no answer, the last: http")
    assert len(asking.lines()) == 2
    server.behave = lambda handler, body, times: (200, {}, reply(body))
    assert asking(requests)[1].text == "answer to bad"
    assert server.asked == {"a": 1, "bad": 4, "b": 1}


@pytest.mark.parametrize(
    "given",
    [
        (500, {"x-should-retry": "false"}, error("no use")),
        (400, {}, error("the prompt is too long")),
        (413, {}, b"<html>too large</html>"),
    ],
)
def test_what_concerns_one_request_is_not_tried_again(server, asking, given):
    server.behave = lambda h, body, n: (
        given if body["messages"][-1]["content"] == "bad" else (200, {}, reply(body))
    )
    failure, answer = asking([request("bad"), request("a")])
    assert isinstance(failure, Failure) and str(given[0]) in failure.why
    assert answer.text == "answer to a"
    assert server.asked["bad"] == 1 and not asking.slept


def test_a_server_that_only_fails_ends_the_call(server, asking):
    server.behave = lambda handler, body, times: (500, {}, error("on fire"))
    with pytest.raises(ValueError, match="10 requests in a row failed, the last: http.*on fire"):
        asking([request(str(k)) for k in range(100)], attempts=2, concurrency=2)
    assert sum(server.asked.values()) <= 24
    assert not asking.lines()


def refusing(message, name, param=True):
    def behave(handler, body, times):
        if name in body:
            return 400, {}, error(message, param=name if param else None)
        return 200, {}, reply(body)

    return behave


@pytest.mark.parametrize(
    ("name", "message", "param"),
    [
        (
            "max_tokens",
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            False,
        ),
        (
            "temperature",
            "Unsupported value: 'temperature' does not support 0 with this model. "
            "Only the default (1) value is supported.",
            True,
        ),
        ("temperature", "temperature: no", True),
        ("logprobs", "You are not allowed to request logprobs from this model.", False),
        ("top_logprobs", "This model does not support top_logprobs", False),
    ],
)
def test_a_parameter_that_the_model_refuses_is_renamed_or_dropped(
    server, asking, name, message, param
):
    server.behave = refusing(message, name, param)
    given = dict(max_tokens=50, temperature=0, logprobs=True, top_logprobs=5)
    requests = [request(str(k), **given) for k in range(40)]
    answers = asking(requests, concurrency=8)
    assert [answer.text for answer in answers] == [f"answer to {k}" for k in range(40)]
    assert 41 <= sum(server.asked.values()) <= 48 and not asking.slept
    rest = given.copy()
    rest.pop(name)
    if name == "max_tokens":
        rest["max_completion_tokens"] = 50
        line = "m refuses max_tokens, which is sent as max_completion_tokens from now on"
    else:
        line = f"m refuses {name}, which is left out from now on"
    if name == "logprobs":
        rest.pop("top_logprobs")
    assert asking.said[1:] == [line]
    assert all(line["parameters"] == rest for line in asking.lines())
    assert asking(requests) == answers  # filed under what was asked for
    asked = sum(server.asked.values())
    asking([request("another", **given)])  # a later call knows it
    assert sum(server.asked.values()) == asked + 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "max_tokens",
            "'max_tokens' or 'max_completion_tokens' is too large: 50. This model's maximum "
            "context length is 40 tokens",
        ),
        ("temperature", "temperature must be between 0 and 2"),
        ("max_tokens", "max_tokens is odd"),
    ],
)
def test_a_bad_value_is_not_hidden_by_dropping_it(server, asking, name, message):
    server.behave = refusing(message, name, "odd" not in message)
    (failure,) = asking([request("a", max_tokens=50, temperature=3)])
    assert message[:20] in failure.why and server.asked["a"] == 1


def test_killed_at_random_moments_nothing_is_paid_twice_or_lost(server, tmp_path):
    rng, path, count, kills = random.Random(1), tmp_path / "answers.jsonl", 400, []
    command = [sys.executable, WORKERS / "asking.py", server.url, path, str(count)]
    answered = collections.Counter()

    def behave(handler, body, times):
        time.sleep(rng.random() * 0.08)
        if rng.random() < 0.02:
            return 500, {}, error()
        with server.lock:
            answered[body["messages"][-1]["content"]] += 1
        return 200, {}, reply(body)

    server.behave = behave
    while True:
        before = sum(server.asked.values())
        with subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            # counted from the first request on: a process that only starts is no test
            while process.poll() is None and sum(server.asked.values()) == before:
                time.sleep(0.005)
            try:
                _, told = process.communicate(timeout=rng.random() * 0.4)
                break
            except subprocess.TimeoutExpired:
                process.kill()
        time.sleep(0.15)  # until the server has nothing in hand
        kept = {row["text"].removeprefix("answer to ") for row in whole_lines(path)}
        kills.append((kept, server.asked.copy()))
    assert process.returncode == 0, told.decode()
    assert len(kills) >= 3
    for (kept, asked), (later, _) in itertools.pairwise([*kills, (set(answered), None)]):
        assert kept <= later  # nothing is lost
        assert all(server.asked[text] == asked[text] for text in kept)  # or asked again
    assert sum(answered.values()) <= count + 16 * len(kills)
    texts = [row["text"] for row in whole_lines(path)]
    assert sorted(texts) == sorted(f"answer to question {k}" for k in range(count))


def whole_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines(True) if line[-1:] == b"\n"]


def test_a_torn_last_line_is_asked_again_and_nothing_is_glued_to_it(server, asking):
    requests = [request("a"), request("b"), request("c")]
    asking(requests[:2], concurrency=1)
    whole = asking.path.read_bytes()
    first = whole.index(b"\n") + 1
    server.asked.clear()
    cuts = [first + 1, first + 5, first + 20, len(whole) - 9, len(whole) - 2]
    for cut in cuts:
        asking.path.write_bytes(whole[:cut])
        assert [a.text[-1] for a in asking(requests, concurrency=1)] == ["a", "b", "c"]
        assert [line["text"][-1] for line in asking.lines()] == ["a", "b", "c"]
    assert server.asked == {"b": len(cuts), "c": len(cuts)}
    asking.path.write_bytes(whole[:-1])  # only the newline is missing
    asking(requests)
    assert [line["text"][-1] for line in asking.lines()] == ["a", "b", "c"]
    assert server.asked == {"b": len(cuts), "c": len(cuts) + 1}


@pytest.mark.parametrize("content", [b"not ours", b"not ours\n", b'{"prompt": "a"}\n', b"3\n"])
def test_a_file_of_something_else_is_not_touched(server, asking, content):
    asking.path.write_bytes(content)
    with pytest.raises(ValueError, match="jsonl:1 is no answer of an endpoint; name another file"):
        asking([request("a")])
    assert asking.path.read_bytes() == content and not server.asked


def test_a_file_has_one_writer(server, asking):
    requests = [request("a"), request("b")]
    answers = ask(asking.endpoint, requests, asking.path, say=asking.said.append)
    next(answers)
    with pytest.raises(ValueError, match="another process is writing it"):
        asking(requests)
    answers.close()
    asking(requests)
    assert server.asked == {"a": 1, "b": 1}  # what was in flight when it was closed is kept


def test_a_full_disk_leaves_whole_lines(server, asking, monkeypatch):
    asking([request("a")])
    whole, opened = asking.path.read_bytes(), AnswerFile.__init__

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full(self, *args):
        opened(self, *args)
        self.file = Full(self.file)

    monkeypatch.setattr(AnswerFile, "__init__", full)
    with pytest.raises(Storage, match="cannot write: No space left on device; the same command"):
        asking([request("b"), request("c")])
    assert asking.path.read_bytes() == whole


PRICES = {"m": {"prompt": 2.0, "completion": 8.0}}


@pytest.mark.parametrize("unit", ["tokens", "money"])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_never_exceeded_over_all_starts(server, asking, unit, seed):
    rng, lock, paid = random.Random(seed), threading.Lock(), [0.0]
    price = (1, 1) if unit == "tokens" else (2e-6, 8e-6)

    def behave(handler, body, times):
        answer = reply(body)
        used = answer["usage"] | {"completion_tokens": rng.randint(1, body["max_tokens"])}
        answer["usage"] = used
        with lock:
            paid[0] += used["prompt_tokens"] * price[0] + used["completion_tokens"] * price[1]
        if rng.random() < 0.1:  # paid for, and lost
            handler.give(200, {}, answer, cut=30)
        elif rng.random() < 0.1:
            handler.reset(True)
        else:
            return 200, {}, answer

    server.behave = behave
    requests = [
        request("Wörter " * rng.randint(1, 40), seed=k, max_tokens=rng.randint(1, 300))
        for k in range(150)
    ]
    whole = 40_000 * price[1]
    for share in (0.05, 0.05, 0.15, 0.3):
        limit = share * whole
        budget = Budget(**{unit: limit}, prices=PRICES if unit == "money" else None)
        lost = paid[0] - sum(
            line["usage"]["prompt_tokens"] * price[0]
            + line["usage"]["completion_tokens"] * price[1]
            for line in (asking.lines() if asking.path.exists() else [])
        )
        with pytest.raises(BudgetReached) as stop:
            asking(requests, concurrency=8, budget=budget)
        # what an earlier start paid for and lost is in no file
        assert paid[0] - lost <= limit * (1 + 1e-9) and budget.spent <= limit * (1 + 1e-9)
        left = len(requests) - len(asking.lines())
        assert f"; {left} requests are left; the same command with a larger" in str(stop.value)
        assert "\n" not in str(stop.value)
    asking(requests, budget=Budget())
    assert len(asking.lines()) == len(requests)


def test_a_budget_counts_what_is_in_flight_and_waits_for_it(server, asking):
    server.behave = lambda h, body, n: (time.sleep(0.02), (200, {}, reply(body)))[1]
    requests = [request(f"question {k:02}", max_tokens=1000) for k in range(20)]
    # a request may cost 1,048 tokens and costs 18: two are never in flight, and all fit in
    asking(requests, concurrency=8, budget=Budget(tokens=1500))
    assert server.busiest == 1 and len(asking.lines()) == 20


def test_a_budget_serves_several_calls_and_counts_an_answer_once(server, asking):
    budget = Budget(tokens=5000)
    asking([request("a", max_tokens=10)], budget=budget)
    asking([request("a", max_tokens=10), request("bb", max_tokens=10)], budget=budget)
    assert budget.spent == 8 + 9
    with pytest.raises(BudgetReached) as stop:
        asking([request("c", max_tokens=6000)], budget=budget)
    assert str(stop.value) == (
        "m: 17 tokens of 5,000 are spent, and the next request could cost 6,034 tokens; 1 requests "
        "are left; the same command with a larger budget goes on from here"
    )


def test_prices_are_read_from_toml_and_json(tmp_path, server, asking):
    (tmp_path / "p.json").write_text(json.dumps(PRICES))
    (tmp_path / "p.toml").write_text('["m"]\nprompt = 2.0\ncompletion = 8\n')
    assert read_prices(tmp_path / "p.json") == read_prices(tmp_path / "p.toml") == PRICES
    budget = Budget(prices=tmp_path / "p.toml")
    asking([request("a" * 40, max_tokens=50)], budget=budget)
    assert budget.spent == pytest.approx((40 * 2 + 7 * 8) / 1e6)
    assert asking.said[0].endswith(
        "about 10 tokens of prompts, at most 50 of answers, 0.0004 by the price table"
    )


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.toml", "[m", "p.toml: malformed TOML"),
        ("p.toml", "m = 3", "p.toml: 'm' is 3; a model has `prompt` and `completion`"),
        ("p.toml", "[m]\nprompt = 1.0", "p.toml: 'm' is {'prompt': 1.0}; a model has"),
        ("p.toml", "[m]\nprompt = 1\ncompletion = -1", "0 or more"),
        ("p.toml", "[m]\nprompt = 1\ncompletion = inf", "0 or more"),
        ("p.json", "[1]", "holds a JSON list"),
        ("p.json", "{", "p.json: malformed JSON"),
        ("p.json", '{"m": {"prompt": "1", "completion": 2}}', "0 or more"),
        ("p.csv", "m,1,2", "p.csv: a price table is a .toml or a .json file"),
        ("p.toml", None, "p.toml: cannot read: No such file"),
        ("p.toml", "", "the price table has no 'm', only nothing; add it"),
        ("p.toml", "[x]\nprompt = 1\ncompletion = 1", "has no 'm', only x; add it, with 0"),
    ],
)
def test_a_bad_price_table_costs_one_line(tmp_path, server, asking, name, text, told):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as mistake:
        asking([request("a", max_tokens=5)], budget=Budget(money=1, prices=tmp_path / name))
    assert told in str(mistake.value) and "\n" not in str(mistake.value)
    assert not server.asked


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"tokens": 1, "money": 1}, "give one of them"),
        ({"money": 1}, "needs a price table"),
        ({"tokens": -1}, "0 or more"),
        ({"tokens": float("nan")}, "0 or more"),
    ],
)
def test_a_budget_that_means_nothing(limits, told):
    with pytest.raises(ValueError, match=told):
        Budget(**limits)


def test_a_budget_needs_an_end_to_every_answer(server, asking):
    with pytest.raises(ValueError, match="without max_tokens has no highest cost"):
        asking([request("a")], budget=Budget(tokens=1000))


def stopped(asking, **options):
    with pytest.raises(ValueError) as stop:
        asking([request(str(k)) for k in range(30)], concurrency=4, **options)
    assert "\n" not in str(stop.value) and KEY not in str(stop.value)
    return str(stop.value)


ENDS = {
    "a wrong key": (401, {}, error(f"Incorrect API key provided: {KEY}"), "401: the key is ref"),
    "a key without rights": (403, {}, error(f"{KEY} is not for you"), "403: *** is not for you"),
    "no such model": (404, {}, error("The model `m` does not exist"), "404: no model 'm': The"),
    "no such page": (404, {}, b"<html>Not Found</html>", "does its URL end in /v1?"),
    "not for POST": (405, {}, {"detail": "Method Not Allowed"}, "does its URL end in /v1?"),
    "elsewhere": (307, {"Location": "http://x/v2"}, b"", "307 to http://x/v2: it is no chat"),
    "a page": (200, {}, b"<!doctype html>", "it is no chat-completions endpoint"),
    "another API": (200, {}, {"data": []}, "it is no chat-completions endpoint"),
    "no money": (429, {"retry-after": "1"}, error("pay", code="insufficient_quota"), "quota"),
    "no money, again": (
        429,
        {"x-should-retry": "true"},
        error("pay", type="insufficient_quota"),
        "the quota is at its end: pay; pay, then go on",
    ),
    "a long wait": (429, {"retry-after": "3600"}, error("later"), "asks to wait for 3600 seconds"),
}


@pytest.mark.parametrize("case", ENDS)
def test_what_every_request_would_meet_ends_the_call(server, asking, case):
    status, headers, body, told = ENDS[case]
    server.behave = lambda handler, _, times: (status, headers, body)
    assert told in stopped(asking, attempts=2)
    assert sum(server.asked.values()) <= (8 if status == 200 else 4)
    assert not asking.lines()


def test_an_endpoint_that_nobody_serves(asking):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    asking.endpoint = Endpoint(url, "m")
    told = stopped(asking)
    assert told.startswith(f"{url} cannot be reached") and told.endswith("running there?")
    assert os.strerror(errno.ECONNREFUSED) in told


def test_answers_that_are_in_flight_at_an_end_are_kept(server, asking):
    ready = threading.Event()

    def behave(handler, body, times):
        if body["messages"][-1]["content"] == "0":
            ready.wait(5)
            return 401, {}, error()
        ready.set()
        time.sleep(0.1)
        return 200, {}, reply(body)

    server.behave = behave
    stopped(asking)
    assert len(asking.lines()) == sum(server.asked.values()) - 1 >= 1


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://a/v1", "http://", "http://a b/v1", "http://a:x/v1", "http://ä/"]
    + [f"http://{KEY}@a/v1", f"http://u:{KEY}@a/v1", f"http://a/v1?key={KEY}", f"http://a/#{KEY}"],
)
def test_a_bad_url_costs_one_line_without_a_key_in_it(url):
    with pytest.raises(ValueError) as mistake:
        Endpoint(url, "m")
    assert KEY not in str(mistake.value) and "\n" not in str(mistake.value)


def test_urls_are_taken_with_and_without_their_end():
    for end in ("", "/", "/chat/completions", "/chat/completions/"):
        assert Endpoint(f"http://a:1/v1{end}", "m").url == "http://a:1/v1"


def test_the_key_goes_to_the_server_and_nowhere_else(server, asking, capfd, monkeypatch):
    def behave(handler, body, times):
        kind = body["messages"][-1]["content"]
        told = error(f"with {KEY} you may not")
        return (
            (400 if kind == "bad" else 500, {}, told)
            if times < 9 and kind != "good"
            else (200, {}, reply(body))
        )

    server.behave = behave
    answers = asking([request(kind) for kind in ("good", "bad", "worse")])
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert "with *** you may not" in answers[1].why and "***" in answers[2].why
    list(ask(asking.endpoint, [request("bad")], asking.path, attempts=1))
    seen = [*map(repr, answers), *asking.said, repr(asking.endpoint), *capfd.readouterr()]
    assert "1 of 1 requests have no answer" in seen[-1]
    assert KEY not in "".join(seen) + asking.path.read_text()

    monkeypatch.setenv("OTHER", "sk-other\n")  # as a file of secrets leaves it
    asking.endpoint = Endpoint(server.url, "m", "OTHER")
    asking([request("good", seed=1)])
    assert server.headers[-1]["Authorization"] == "Bearer sk-other"
    monkeypatch.delenv("OTHER")
    asking([request("good", seed=2)])
    assert "Authorization" not in server.headers[-1]
    server.behave = lambda handler, body, times: (401, {}, error())
    assert "401: no key was sent; OTHER is not set" in stopped(asking)
    asking.endpoint = Endpoint(server.url, "m", "")
    told = f"401: no key was sent; give --key-from {asking.endpoint.host}=NAME"
    assert told in stopped(asking)
    server.behave = lambda handler, body, times: (403, {}, error())
    assert stopped(asking).endswith("; no key was sent")
    asking.endpoint = Endpoint(server.url, "m", "OTHER")
    for bad in ("sk\nX-Evil: 1", "sk-ü"):
        monkeypatch.setenv("OTHER", bad)
        told = stopped(asking)
        assert told == "OTHER has characters that no key has; set it again"


def test_a_redirect_takes_the_key_nowhere(server, asking):
    with Server() as elsewhere:
        thread = threading.Thread(target=elsewhere.serve_forever, args=(0.01,))
        thread.start()
        server.behave = lambda h, b, n: (
            302,
            {"Location": f"{elsewhere.url}/chat/completions"},
            b"",
        )
        stopped(asking)
        elsewhere.shutdown()
        thread.join()
    assert not elsewhere.asked and not elsewhere.headers


def test_without_torch():
    code = "import sys, zephyr.endpoint; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
