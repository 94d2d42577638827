"""MT-Bench graded by a judge at an endpoint: its prompts against FastChat's own, and its file."""

import gzip
import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers import shared
from zephyr.data.readers import read_rows, write_rows
from zephyr.evals import __main__ as evals_command
from zephyr.evals import judge

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."]},
    {"question_id": 101, "category": "math", "turns": ["1 + 1?", "And {x}?"]},
]
KINDS = ("single-v1", "single-math-v1")
ANSWERS = {81: ["Roses are red.", "Red."], 101: ["2", "3"]}


def answer_line(number, turns, model="ours"):
    return {
        "question_id": number,
        "answer_id": "a",
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
    }


@pytest.fixture
def files(tmp_path):
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    write_rows(tmp_path / "a.jsonl", [answer_line(*item) for item in ANSWERS.items()])
    write_rows(tmp_path / "r.jsonl", [answer_line(101, ["two", "three"], "gpt-4")])
    return tmp_path


@pytest.fixture
def server():
    """A judge that says what `says` makes of the messages, and the bodies that it got."""

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.asked.append(body)
            said = httpd.says(body)
            reply = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
            reply |= {"usage": {"prompt_tokens": 10, "completion_tokens": 5}}
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    httpd.asked, httpd.says = [], lambda body: "Fine. [[7]]"
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def command(files, server, *more, references=True):
    argv = ["judge", "mt-bench", files / "a.jsonl", "--questions", files / "q.jsonl"]
    argv += ["--references", files / "r.jsonl"] if references else []
    argv += ["--url", server.url, "--judge", "gpt-x", "--out", files / "out.jsonl", *more]
    evals_command.main(list(map(str, argv)))


def test_the_prompts_are_fastchats_to_the_letter():
    """Of 320 published judgments, of both turns, with and without references; FastChat's own file
    has what its judge was sent."""
    data = shared("mt_bench")
    questions = judge.read_questions(str(data / "question.jsonl"))
    references = judge.read_answers(str(data / "reference_answer_gpt-4.jsonl"))[1]
    prompts = judge.read_prompts(str(data / "judge_prompts.jsonl"))
    with gzip.open(data / "judgment.mistral-orpo-mix.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    answers = {}
    said = re.compile(r"### Assistant A:\n(.*?)\n\n### User:\n", re.S)
    for row in rows:
        if row["turn"] == 2:
            number, text = row["question_id"], row["user_prompt"]
            text = text[text.index("<|The Start of Assistant A's Conversation") :]
            second = "### User:\n" + questions[number]["turns"][1]
            last = text[text.index(second) :].split("### Assistant A:\n", 1)[1]
            last = last.rsplit("\n\n<|The End of Assistant A's", 1)[0]
            answers[number] = [said.search(text)[1], last]
    found = {
        (g.question, g.turn): g
        for g in judge.gradings(questions, "m", answers, references, prompts)
    }
    assert len(found) == len(rows) == 160
    for row in rows:
        grading = found[row["question_id"], row["turn"]]
        assert grading.prompt == row["judge"][1] and grading.user == row["user_prompt"]


def test_judgments_are_written_as_fastchat_has_them(files, server, capsys):
    server.says = lambda body: f"So. [[{8 if 'poem' in str(body) else 3}]]"
    command(files, server, "--feedback", "gpt-4")
    rows = [row for _, row in read_rows(files / "out.jsonl")]
    assert [(r["question_id"], r["turn"], r["score"]) for r in rows] == [
        (81, 1, 8.0),
        (81, 2, 8.0),
        (101, 1, 3.0),
        (101, 2, 3.0),
    ]
    assert rows[3]["judge"] == ["gpt-x", "zephyr-single-math-v1-multi-turn"]
    assert "three" in rows[3]["user_prompt"] and "And {x}?" in rows[3]["user_prompt"]
    assert all(body["temperature"] == 0 and body["model"] == "gpt-x" for body in server.asked)
    said = capsys.readouterr().out
    assert re.search(r"ours +5\.50000 +5\.50000 +5\.50000", said)
    assert "prompts are our own" in said and "family gpt" in said


def test_an_empty_answer_is_graded(files, server):
    write_rows(files / "a.jsonl", [answer_line(81, ["", "x"])])
    command(files, server)
    rows = [row for _, row in read_rows(files / "out.jsonl")]
    assert [row["turn"] for row in rows] == [1, 2] and len(server.asked) == 2


def test_fastchats_prompts_are_used_unchanged(files, server, capsys):
    data = shared("mt_bench")
    command(files, server, "--prompts", data / "judge_prompts.jsonl")
    names = {row["judge"][1] for _, row in read_rows(files / "out.jsonl")}
    assert names == {kind + turn for kind in KINDS for turn in ("", "-multi-turn")}
    assert "prompts are our own" not in capsys.readouterr().out
    system = next(b for b in server.asked if "Shorter." in str(b))["messages"][0]["content"]
    assert system.startswith("Please act as an impartial judge")


def test_nothing_is_asked_twice(files, server):
    command(files, server)
    before = (files / "out.jsonl").read_text()
    assert len(server.asked) == 4
    (files / "out.jsonl").unlink()
    command(files, server)
    assert len(server.asked) == 4
    same = re.compile(r'"tstamp":[^}]*')
    assert same.sub("", (files / "out.jsonl").read_text()) == same.sub("", before)


def test_an_answer_without_a_grade_is_asked_for_again(files, server, capsys):
    """With another seed, twice; then it is a failure, counted and in no mean."""
    server.says = lambda body: "[[6]]" if body.get("seed") == 1 else "Hard to say."
    command(files, server)
    assert len(server.asked) == 8
    server.says = lambda body: "Hard to say."
    write_rows(files / "a.jsonl", [answer_line(81, ["Else.", "Other."])])
    server.asked.clear()
    capsys.readouterr()
    command(files, server)
    assert len(server.asked) == 6
    assert "2 judgments have no score and are in no mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": [answer_line(81, [None, "x"])]}, "a.jsonl:1: an answer to question 81 is no text: "),
        ({"a": [answer_line(81, ["x", "y"])] * 2}, "a.jsonl:2: question 81 is answered before"),
        ({"a": [answer_line(7, ["x"])]}, "question 7 is answered and is none of --questions"),
        ({"a": [answer_line(81, ["x"])]}, "question 81 has 2 turns and 1 answers"),
        ({"a": [{"instruction": "x"}]}, "a.jsonl:1 is no line of an answer file|a.jsonl:1: it is"),
        ({"r": [answer_line(81, ["x", "y"])]}, "question 101 is graded beside a reference answer"),
        ({"q": [{"x": 1}]}, "q.jsonl:1 is no question with question_id and turns"),
    ],
)
def test_mistakes_cost_one_line(change, message, files, server, capsys):
    for name, rows in change.items():
        write_rows(files / f"{name}.jsonl", rows)
    with pytest.raises(SystemExit) as ended:
        command(files, server)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not server.asked and not (files / "out.jsonl").exists()


def test_an_endpoint_that_is_not_there(files, server, capsys, monkeypatch):
    monkeypatch.setattr(judge, "ask", partial(judge.ask, sleep=lambda seconds: None))
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(SystemExit) as ended:
        command(files, server)
    assert ended.value.code == 2 and "cannot be reached" in capsys.readouterr().err
