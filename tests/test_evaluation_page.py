"""Every command of docs/evaluation.md, in the page's order, against a judge of our own."""

import csv
import json
import re
import shlex

import pytest
from judge_helpers import judging

from helpers import ROOT
from model_helpers import folder_of, model
from zephyr import feedback
from zephyr.data.readers import write_rows
from zephyr.evals import __main__ as evals_command
from zephyr.evals import alpaca_prompt, answer, mt_bench_prompts

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)).replace("\\\n", "")
# the village's judge, which serves until it is stopped, is test_toy_serve.py's
COMMANDS = [line for line in SHELL.splitlines() if "zephyr.toy serve" not in line]
WORDS = "Name a bird.", "Say hi.", "Add 1 and 2.", "What is tea?"


def says(body):
    asked = json.dumps(body["messages"])
    if "Rating: N" in asked:
        return f"Good.\nRating: {1 + len(asked) % 10}"
    if "one letter" in asked:
        return "m"
    return "[[A]]" if "[[A]]" in asked else "[[7]]"


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


TABLES = {
    "instruction_difficulty": [
        ["instruction", "instruction_difficulty"],
        *([text, k - 2] for k, text in enumerate(WORDS)),
    ],
    "df_gamed": [
        ["std_delta_len", "instruction_difficulty", "not_gamed_baseline", "preference"],
        *([k - 1.5, k - 2, False, k / 4] for k in range(4)),
    ],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with all that the page's commands read."""
    monkeypatch.chdir(tmp_path)
    for benchmark in answer.NEW:  # models of random weights end no answer
        monkeypatch.setitem(answer.NEW, benchmark, 8)
    for k, name in enumerate(("sft", "dpo")):
        (folder := tmp_path / "runs" / "tiny" / name).mkdir(parents=True)
        folder_of(model(k, max_position_embeddings=300), folder / "model")
    questions = [(81, "writing"), (82, "writing"), (101, "math")]
    rows = [{"question_id": k, "category": c, "turns": ["Hi?", "Bye?"]} for k, c in questions]
    write_rows("question.jsonl", rows)
    choice = {"index": 0, "turns": ["two", "three"]}
    write_rows("gpt-4.jsonl", [{"question_id": 101, "model_id": "g", "choices": [choice]}])
    prompts = mt_bench_prompts.read(None)
    rows = [
        {"name": name, "system_prompt": prompt.system, "prompt_template": prompt.template}
        for name, prompt in prompts.items()
    ]
    write_rows("judge_prompts.jsonl", rows)
    (tmp_path / "alpaca_eval_clf.txt").write_text(alpaca_prompt.OWN)
    who = "gpt4_1106_preview"
    rows = [{"instruction": text, "output": "Yes.", "generator": who} for text in WORDS]
    for name in ("alpaca_eval", who):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "DIR").mkdir()
    for name, table in TABLES.items():
        with open(tmp_path / "DIR" / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(table)
    write_rows("prompts.jsonl", [{"prompt": text} for text in WORDS])
    sides = [[user("Hi."), said(text)] for text in ("Hello!", "No.")]
    write_rows("pairs.test.jsonl.gz", [dict(zip(("chosen", "rejected"), sides, strict=True))] * 3)
    answers = [{"model": m, "response": m, "overall_score": k} for k, m in enumerate("abcd", 1)]
    rows = [{"source": "s", "instruction": "Hi.", "completions": answers}]
    write_rows("ultrafeedback.jsonl", rows)
    return tmp_path


def test_every_command_of_the_page_runs(place, capsys):
    mains = {"zephyr.evals": evals_command.main, "zephyr.feedback": feedback.main}
    assert len(COMMANDS) > 12
    with judging() as server:
        server.says, server.knows = says, lambda body: {"m": -0.1, "M": -2.3}
        for command in COMMANDS:
            command = re.sub(r"@https?://\S+", f"@{server.url}", command)
            python, flag, module, *argv = shlex.split(command)
            assert (python, flag) == ("python", "-m")
            mains[module](argv)
    for name in re.findall(r"--(?:out|json|html) (\S+)", SHELL):
        assert (place / name).stat().st_size > 0, name
    assert "prompts are our own" not in capsys.readouterr().out


def test_the_front_page_s_commands_are_the_page_s():
    """So that they run, too."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    shown = [" ".join(line.split()) for line in text.splitlines() if "-m zephyr.evals" in line]
    assert len(shown) == 5 and set(shown) <= {" ".join(line.split()) for line in COMMANDS}
