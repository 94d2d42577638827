"""AlpacaEval judged at an endpoint: what is asked, what is read from it, and the annotations."""

import json
import math
import re

import pytest
from judge_helpers import judging, not_there

from helpers import shared
from zephyr.data.readers import read_rows, write_rows
from zephyr.evals import __main__ as evals_command
from zephyr.evals import alpaca, alpaca_prompt, judge_alpaca

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
ASKED = re.compile(
    r"\[Instruction\]\n(.*?)\n\n\[Answer m\]\n(.*?)\n\n\[Answer M\]\n(.*?)\n\nWhich", re.S
)


def output(instruction, text, generator="ours", **more):
    return {"instruction": instruction, "output": text, "generator": generator} | more


@pytest.fixture
def files(tmp_path):
    """Twelve instructions; the model's answer is longer for the first half, then shorter."""
    ours = [output(w, "x" * (20 if k < 6 else 5), dataset="koala") for k, w in enumerate(WORDS)]
    theirs = [output(w, "y" * 10, "base", dataset="koala") for w in WORDS]
    write_rows(tmp_path / "ours.jsonl", ours)
    (tmp_path / "base.json").write_text(json.dumps(theirs))
    return tmp_path


@pytest.fixture
def server():
    with judging() as httpd:
        yield httpd


def command(files, server, *more):
    argv = ["judge", "alpaca", files / "ours.jsonl", "--against", files / "base.json"]
    argv += ["--judge", f"gpt-x@{server.url}", "--out", files / "out.json", *more]
    evals_command.main(list(map(str, argv)))


def annotations(files):
    return json.loads((files / "out.json").read_text())


def shown(body):
    """What the judge was shown: instruction, first and second answer."""
    return ASKED.search(body["messages"][-1]["content"]).groups()


def test_the_own_prompt_is_what_its_readers_parse():
    _, blocks = alpaca_prompt.read(None)
    assert alpaca_prompt.fill(blocks, "I {output_2}", "{output_2} {x", "B") == [
        {
            "role": "user",
            "content": "[Instruction]\nI {output_2}\n\n[Answer m]\n{output_2} {x\n\n"
            "[Answer M]\nB\n\nWhich of the two answers is better? "
            "Reply with one letter, m or M, and nothing else.",
        }
    ]


def test_a_template_of_alpaca_eval(files, server, capsys):
    template = (
        '<|im_start|>system\nYou are fair.\n<|im_end|>\n<|im_start|>user\n{\n    {"instruction": '
        '"""{instruction}"""}, "m": """{output_1}""", "M": """{output_2}"""\n}\n<|im_end|>'
    )
    (files / "clf.txt").write_text(template)
    server.says, server.knows = lambda body: "m", lambda body: {"m": -0.1, "M": -2.4}
    command(files, server, "--prompt", files / "clf.txt", "--order", "alpaca")
    system, user = server.asked[1]["messages"]
    assert system == {"role": "system", "content": "You are fair."}
    assert user["content"].startswith('{\n    {"instruction": """')
    said = " ".join(capsys.readouterr().out.split())
    assert "clf.txt (sha256 " in said and "prompts are our own" not in said
    assert {row["prompt"][:7] for row in annotations(files)} == {"clf.txt"}


def test_log_probs_weigh_the_preference(files, server):
    """Both orders, with AlpacaEval 2's parameters; a letter that is missing has probability 0."""
    top = {"one": {"m": -0.5, "M": -1.5}, "two": {"M": -0.2, "The": -3}, "three": {"Both": -0.1}}
    server.says, server.knows = lambda body: "m", lambda body: top.get(shown(body)[0], {"m": -0.1})
    command(files, server)
    assert len(server.asked) == 24  # the probe is one of them
    asked = {name: server.asked[-1][name] for name in judge_alpaca.BY_TOKEN}
    assert asked == {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    rows = annotations(files)
    p = math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1.5))
    first, second = alpaca.ORDERS
    assert rows[0][first] == pytest.approx(1 + p) and rows[0][second] == pytest.approx(2 - p)
    assert rows[0]["preference"] == pytest.approx(1.5)
    assert (rows[1][first], rows[1][second]) == (1, 2)
    assert rows[2]["preference"] is rows[2][first] is None
    assert (rows[3][first], rows[3][second]) == (2, 1)


def test_annotations_have_alpaca_evals_columns(files, server):
    data = [row for _, row in read_rows(shared("alpaca_eval/annotations.claude-2.1.json.gz"))]
    server.says, server.knows = lambda body: "m", lambda body: {"m": -0.1, "M": -2.4}
    (files / "prices.json").write_text('{"gpt-x": {"prompt": 1e6, "completion": 1e6}}')
    command(files, server, "--order", "alpaca", "--prices", files / "prices.json")
    row = annotations(files)[0]
    assert row.keys() - {"prompt"} == data[0].keys()
    assert row["raw_completion"].keys() <= data[0]["raw_completion"].keys()
    assert (row["generator_1"], row["generator_2"], row["annotator"]) == ("base", "ours", "gpt-x")
    assert row["price_per_example"] == 15 and row["dataset"] == "koala"


def test_the_order_is_the_published_one(files, server):
    """On all 805 instructions, without repeating those whose outputs are equal."""
    data = [row for _, row in read_rows(shared("alpaca_eval/annotations.claude-2.1.json.gz"))]
    write_rows(files / "ours.jsonl", [output(r["instruction"], r["output_2"]) for r in data])
    theirs = [output(r["instruction"], r["output_1"], "base") for r in data]
    (files / "base.json").write_text(json.dumps(theirs))
    by_text = {r["instruction"]: r for r in data}

    def knows(body):
        """The published log-probs, if the published first answer is shown first."""
        text = ASKED.search(body["messages"][-1]["content"])[1]
        content = by_text[text]["raw_completion"]["logprobs"]["content"][0]
        return {top["token"]: top["logprob"] for top in content["top_logprobs"]}

    server.says, server.knows = lambda body: "m", knows
    command(files, server, "--order", "alpaca")
    rows = annotations(files)
    assert len(rows) == len(data) == 805
    assert len(server.asked) == sum(r["output_1"] != r["output_2"] for r in data)
    for row, published in zip(rows, data, strict=True):
        assert row["preference"] == pytest.approx(published["preference"], abs=1e-9)


def test_a_judge_without_log_probs_is_read_by_its_text(files, server, capsys):
    said = {"one": "I think\n**M**", "two": "m.", "three": "Hard to say."}
    server.says = lambda body: said.get(shown(body)[0], "m")
    command(files, server)
    rows = annotations(files)
    first, second = alpaca.ORDERS
    assert (rows[0][first], rows[0][second], rows[0]["preference"]) == (1, 2, 1.5)
    assert (rows[1][first], rows[1][second]) == (2, 1)
    assert rows[2]["preference"] is None
    assert sum(shown(body)[0] == "three" for body in server.asked) == 6  # thrice, in both orders
    asked = [body for body in server.asked if "logprobs" not in body]
    assert len(asked) == 28 and len(server.asked) == 29
    assert {(b["temperature"], b.get("seed"), b["max_tokens"]) for b in asked} == {
        (0, None, 256),
        (1, 1, 256),
        (1, 2, 256),
    }
    page = " ".join(capsys.readouterr().out.split())
    assert page.endswith("cost: 435 tokens")
    assert "by its text" in page and "1 verdicts could not be read" in page


def test_a_judge_that_refuses_log_probs(files, server, capsys):
    server.why = "logprobs is not supported with this model"
    server.says = lambda body: 400 if "logprobs" in body else "M"
    command(files, server)
    assert all(row["preference"] == 1.5 for row in annotations(files))
    assert "gpt-x refuses logprobs" in capsys.readouterr().err


def test_a_judge_that_always_says_first(files, server, capsys):
    server.says = lambda body: "m"
    command(files, server, "--json", files / "f.json", "--html", files / "f.html")
    page = (files / "f.html").read_text()
    for said in (page, capsys.readouterr().out):
        assert "AlpacaEval: ours" in said and "prompts are our own" in said
    evals_command.main(["show", str(files / "out.json")])
    said = capsys.readouterr().out
    assert "prompts are our own" in said and "the judge favours what it is shown first" in said
    figures = json.loads((files / "f.json").read_text())
    assert figures["win_rate"] == 50 and figures["n_draws"] == 12
    assert figures["consistency"]["consistent"] == 0
    assert figures["consistency"]["first_slot_preferred"] == 12
    assert figures["slots"]["first"]["mean"] == 100 and figures["slots"]["second"]["mean"] == 0


def test_a_judge_that_prefers_length_is_exposed(files, server):
    server.says = lambda body: "m" if len(shown(body)[1]) > len(shown(body)[2]) else "M"
    command(files, server, "--json", files / "f.json")
    figures = json.loads((files / "f.json").read_text())
    assert figures["win_rate"] == 50 and figures["consistency"]["consistent"] == 100
    quarters = [(q["shortest"], q["longest"], q["mean"]) for q in figures["length_quarters"]]
    assert quarters == [(-5, -5, 0), (10, 10, 100)]


def test_equal_outputs_are_a_draw_without_a_call(files, server):
    rows = [row for _, row in read_rows(files / "ours.jsonl")]
    write_rows(files / "ours.jsonl", [rows[0] | {"output": "y" * 10}, *rows[1:]])
    server.says = lambda body: "m"
    command(files, server)
    row = annotations(files)[0]
    assert row["preference"] == 1.5 and row["raw_completion"] is None
    assert all(shown(body)[0] != "one" for body in server.asked)


def test_nothing_is_asked_twice_and_failures_are(files, server, capsys):
    server.why = "the filter has refused"
    server.says = lambda body: 400 if shown(body)[:2] == ("six", "y" * 10) else "m"
    command(files, server)
    rows = annotations(files)
    assert rows[5]["preference"] is None and rows[5]["preference_model_first"] == 2
    said = capsys.readouterr()
    assert "1 requests have no answer; the same command asks them again" in said.out
    server.asked.clear()
    server.says = lambda body: "M"
    command(files, server)
    assert len(server.asked) == 1 and annotations(files)[5]["preference"] == 2


def test_a_budget_ends_it_and_a_larger_one_goes_on(files, server, capsys):
    """Each answer takes 15 tokens, and the next could take more than are left."""
    server.says = lambda body: "m"
    with pytest.raises(SystemExit) as ended:
        command(files, server, "--budget-tokens", 600, "--concurrency", 1)
    assert ended.value.code == 2 and "a larger budget goes on" in capsys.readouterr().err
    before = len(server.asked)
    assert 1 < before < 20 and not (files / "out.json").exists()
    command(files, server, "--budget-tokens", 20000)
    assert len(server.asked) == 25 and len(annotations(files)) == 12


def test_an_empty_output_is_judged_and_told(files, server, capsys):
    rows = [row for _, row in read_rows(files / "ours.jsonl")]
    write_rows(files / "ours.jsonl", [rows[0] | {"output": " "}, *rows[1:]])
    server.says = lambda body: "m"
    command(files, server)
    assert len(annotations(files)) == 12
    name = rows[0]["instruction"]
    assert f"1 outputs are empty, the first to {name!r}; the judge saw" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (
            [output("one", "x")],
            "11 instructions stand in one of .*base.json and .*ours.jsonl alone",
        ),
        ([output("one", "x")] * 2, "ours.jsonl:2: 'one' is answered before; delete one"),
        ([{"instruction": "one", "output": "x"}], "ours.jsonl:1 is no output, with instruction"),
        (
            [output("a", "x"), output("b", "x", "z")],
            "ours.jsonl:2: it is 'z''s output in a file of",
        ),
        ([{"question_id": 1, "choices": []}], "ours.jsonl:1 is an answer to MT-Bench; ask with"),
    ],
)
def test_mistakes_cost_one_line(change, message, files, server, capsys):
    write_rows(files / "ours.jsonl", change)
    refused(message, files, server, capsys)


def refused(message, files, server, capsys, *more):
    asked = len(server.asked)
    with pytest.raises(SystemExit) as ended:
        command(files, server, *more)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
    assert len(server.asked) == asked and not (files / "out.json").exists()


def test_wrong_flags_cost_one_line(files, server, capsys):
    (files / "x.txt").write_text("Which is better: {output_1} or {output_2}?")
    refused("x.txt has no <|im_start|> blocks", files, server, capsys, "--prompt", files / "x.txt")
    refused("--concurrency 0: give 1 or more", files, server, capsys, "--concurrency", 0)
    refused("annotations are written as .json", files, server, capsys, "--out", files / "o.csv")
    refused("alpaca-data .*: no such folder", files, server, capsys, "--alpaca-data", files / "n")
    refused("x.txt: a file; give the", files, server, capsys, "--alpaca-data", files / "x.txt")
    refused(f"{files}: cannot read: Is a dir", files, server, capsys, "--prompt", files)
    (files / "x.gz").write_bytes(b"\x1f\x8b")
    refused("x.gz is no text in UTF-8; give", files, server, capsys, "--prompt", files / "x.gz")
    refused("--prompt is empty; is a variable not", files, server, capsys, "--prompt", "")
    (files / "a.json").write_text('[{"instruction": "x", "output": "y", "generator": "z"}]')
    told = "--out would overwrite .*/a.json, which holds no annotations; name another"
    refused(told, files, server, capsys, "--out", files / "a.json")
    write_rows(files / "ours.jsonl", [output(w, "x", "") for w in WORDS])
    refused("ours.jsonl:1 is no output, with", files, server, capsys)
    write_rows(files / "ours.jsonl", [output(w, "x", "base") for w in WORDS])
    refused("both files are of 'base'; change a generator", files, server, capsys)
    refused("unrecognized arguments: --questions", files, server, capsys, "--questions", "q")


@pytest.mark.parametrize(
    "says, why, message",
    [
        (401, "sk-123 is wrong", "401: no key was sent; OPENAI_API_KEY is not set"),
        (404, "no such model", "404: no model 'gpt-x': no such model"),
        (
            "Both are good.",
            "",
            "none of its 24 verdicts can be read, the first is 'Both are good.'",
        ),
        (400, "the filter has refused", "gpt-x: no request is answered, the last: "),
    ],
)
def test_a_judge_that_gives_no_verdict(says, why, message, files, server, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.says, server.why = lambda body: says, why
    with pytest.raises(SystemExit) as ended:
        command(files, server)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and message in err.splitlines()[-1]
    assert not (files / "out.json").exists() and "sk-123" not in err


def test_an_endpoint_that_is_not_there(files, server, capsys, monkeypatch):
    not_there(command, files, server, capsys, monkeypatch)


def test_a_judge_without_a_url_is_a_folder(files, capsys):
    argv = ["judge", "alpaca", files / "ours.jsonl", "--against", files / "base.json"]
    with pytest.raises(SystemExit):
        evals_command.main([*map(str, argv), "--judge", "gpt-4", "--out", str(files / "out.json")])
    assert "gpt-4" in capsys.readouterr().err
