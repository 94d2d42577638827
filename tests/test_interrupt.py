"""Ctrl-C while answers are in flight: the first waits for them, to keep them; the second leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from test_endpoint import Server, reply

from helpers import ROOT
from zephyr.data.readers import write_rows

LIMIT = 120  # seconds after which a process that should have gone on hangs


@pytest.fixture
def server(monkeypatch):
    """A server that answers what begins with `quick`, and anything else once it is `released`.
    `arrived` counts what it was asked."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        server.arrived = threading.Semaphore(0)

        def behave(handler, body, times):
            server.arrived.release()
            if not body["messages"][-1]["content"].startswith("quick"):
                assert server.released.wait(LIMIT)
            return 200, {}, reply(body)

        server.behave = behave
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.released.set()
        server.shutdown()


class Command:
    """A command in a process of its own."""

    def __init__(self, *argv):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, argv)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # where the tests run in a shell's background, it would be ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.limit = threading.Timer(LIMIT, self.process.kill)

    def __enter__(self):
        self.limit.start()
        return self

    def __exit__(self, *_):
        self.limit.cancel()
        self.process.kill()
        self.process.communicate()

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def line(self):
        """The next line on stderr."""
        return self.process.stderr.readline()

    def ended(self):
        """The exit code, and what else is on stderr."""
        _, err = self.process.communicate()
        return self.process.returncode, err


@pytest.fixture
def answering(server, tmp_path):
    """The command that asks for answers to some first turns, three at a time."""

    def command(*texts):
        rows = [
            {"question_id": k, "category": "math", "turns": [text]} for k, text in enumerate(texts)
        ]
        write_rows(tmp_path / "q.jsonl", rows)
        argv = ["zephyr.evals", "answer", "mt-bench", f"m@{server.url}", "--concurrency", 3]
        return [*argv, "--questions", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl"]

    return command


def kept(path):
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return sorted(json.loads(line)["text"].removeprefix("answer to ") for line in data.splitlines())


def arrived(server, count):
    for _ in range(count):
        assert server.arrived.acquire(timeout=LIMIT)


TEXTS = [*(f"quick {k}" for k in range(4)), *(f"slow {k}" for k in range(9))]
TOLD = (
    "Ctrl-C: no more is asked; 3 answers are in flight and waited for, to be kept; a second Ctrl-C "
    "leaves at once\n"
)


def test_the_first_keeps_what_is_in_flight(server, answering, tmp_path):
    argv = answering(*TEXTS)
    with Command(*argv) as command:
        assert command.line().startswith("m: 13 requests to ask")
        arrived(server, 7)
        command.interrupt()
        assert command.line() == TOLD
        assert command.process.poll() is None
        server.released.set()
        assert command.ended() == (130, "")
    assert kept(tmp_path / "a.jsonl.answers") == TEXTS[:7]
    assert sum(server.asked.values()) == 7 and not (tmp_path / "a.jsonl").exists()
    with Command(*argv) as command:
        assert command.ended()[0] == 0
    assert server.asked == dict.fromkeys(TEXTS, 1)


def test_the_second_leaves_at_once(server, answering, tmp_path):
    with Command(*answering(*TEXTS)) as command:
        command.line()
        arrived(server, 7)
        command.interrupt()
        assert command.line() == TOLD
        command.interrupt()
        assert command.ended() == (130, "")  # the server still holds the answers
    assert kept(tmp_path / "a.jsonl.answers") == TEXTS[:4]
    assert {path.name for path in tmp_path.iterdir()} == {"q.jsonl", "a.jsonl.answers"}


def test_what_waits_for_another_attempt_is_not_sent_again(server, answering):
    read = threading.Event()

    def behave(handler, body, times):
        handler.give(503, {"retry-after": "100"}, {})
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_WR)
        handler.rfile.read(1)  # until the client has read all and closed
        read.set()

    server.behave = behave
    with Command(*answering("a")) as command:
        command.line()
        assert read.wait(LIMIT)
        command.interrupt()
        assert command.ended()[0] == 130
    assert server.asked == {"a": 1}


def test_what_another_end_waits_for_is_kept_too(server, answering, tmp_path):
    """A wrong key ends the call, which waits for two answers when Ctrl-C comes."""
    behave, refused = server.behave, threading.Event()

    def one_is_refused(handler, body, times):
        if body["messages"][-1]["content"] != "bad":
            return behave(handler, body, times)
        arrived(server, 2)
        handler.give(401, {}, {})
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_WR)
        handler.rfile.read(1)  # until the client has read all and closed
        refused.set()

    server.behave = one_is_refused
    with Command(*answering("bad", "slow 1", "slow 2", "slow 3")) as command:
        command.line()
        assert refused.wait(LIMIT)
        command.interrupt()
        assert command.line().startswith("Ctrl-C: no more is asked; ")
        server.released.set()
        assert command.ended() == (130, "")
    assert kept(tmp_path / "a.jsonl.answers") == ["slow 1", "slow 2"]


def test_no_model_of_a_pool_is_asked_more(server, tmp_path):
    write_rows(tmp_path / "p.jsonl", [{"prompt": f"slow {k}"} for k in range(6)])
    one, other = (f"{name}@{server.url}" for name in ("one", "other"))
    argv = ["collect", tmp_path / "p.jsonl", "--models", one, other, "--judge", one]
    argv += ["--out", tmp_path / "raw.jsonl", "--completions", 2, "--concurrency", 2]
    with Command("zephyr.feedback", *argv) as command:
        arrived(server, 4)
        command.interrupt()
        told = [command.line() for _ in range(4)][-1]
        assert told == TOLD.replace("3 answers", "4 answers")
        server.released.set()
        assert command.ended() == (130, "")
    for name in ("one", "other"):
        asked = [b["messages"][-1]["content"] for b in server.bodies if b["model"] == name]
        assert len(asked) == 2 and kept(tmp_path / f"raw.jsonl.completions.{name}") == sorted(asked)
