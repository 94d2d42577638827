"""Answers to MT-Bench and AlpacaEval: what is asked, the files, and the best of N."""

import json
import re
import threading

import numpy as np
import pytest
import torch
from test_endpoint import Server
from transformers import MistralForCausalLM

from helpers import shared
from model_helpers import folder_of, model
from zephyr import generate
from zephyr.data.readers import read_rows, write_rows
from zephyr.endpoint import Request
from zephyr.evals import __main__ as evals_command
from zephyr.evals import judge_mt_bench, questions, show
from zephyr.evals.best_of import BestOf, samples
from zephyr.source import open_source

FASTCHAT = {  # llm_judge/common.py
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
QUESTIONS = [
    {"question_id": 101, "category": "math", "turns": ["the cat", "on the mat"]},
    {"question_id": 81, "category": "writing", "turns": ["sat", "the mat"]},
    {"question_id": 200, "category": "birds", "turns": ["a"]},
]


@pytest.fixture
def server(monkeypatch):
    """A server that answers ` answer to TEXT ` and keeps what it was sent, `bodies`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        server.says = lambda text: f" answer to {text}\n"
        server.finish = "stop"

        def behave(handler, body, times):
            said = server.says(body["messages"][-1]["content"])
            if isinstance(said, int):
                return said, {}, {"error": {"message": "no"}}
            choice = {"message": {"content": said}, "finish_reason": server.finish}
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            return 200, {}, {"choices": [choice], "usage": usage}

        server.behave = behave
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    (place := tmp_path / "tiny" / "dpo").mkdir(parents=True)
    return folder_of(model(max_position_embeddings=400), place / "model")


@pytest.fixture
def asked(tmp_path):
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    return tmp_path / "q.jsonl"


def mt_bench(source, asked, *more):
    out = asked.parent / "out.jsonl"
    argv = ["answer", "mt-bench", source, "--questions", asked, "--out", out, *more]
    evals_command.main(list(map(str, argv)))
    return [row for _, row in read_rows(out)]


def alpaca(source, file, *more):
    out = file.parent / "out.json"
    argv = ["answer", "alpaca", source, "--instructions", file, "--out", out, *more]
    evals_command.main(list(map(str, argv)))
    return json.loads(out.read_text())


def name(server):
    return f"org/m@{server.url}"


def test_the_file_is_fastchats_field_by_field(server, asked, capsys):
    rows = mt_bench(name(server), asked)
    assert [list(row) for row in rows] == [
        ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    ] * 3
    assert [row["question_id"] for row in rows] == [81, 101, 200]
    assert {row["model_id"] for row in rows} == {"org/m"}
    assert len({row["answer_id"] for row in rows}) == 3
    assert all(re.fullmatch(r"\w{22}", row["answer_id"]) for row in rows)
    assert all(isinstance(row["tstamp"], float) for row in rows)
    assert rows[0]["choices"] == [{"index": 0, "turns": ["answer to sat", "answer to the mat"]}]
    assert rows[2]["choices"] == [{"index": 0, "turns": ["answer to a"]}]
    said = capsys.readouterr().out
    assert re.search(r"^ +math +0 +1 +0 +18 +0 +0$", said, re.M), said
    assert re.search(r"^ +all +0 to 0.7 +3 +0 +16 +0 +0$", said, re.M), said
    assert "cost: 75 tokens" in said
    found = judge_mt_bench.read_answers(str(asked.parent / "out.jsonl"))
    assert found == ("org/m", {row["question_id"]: row["choices"][0]["turns"] for row in rows})


def test_the_second_turn_is_asked_behind_the_models_own_first_answer(server, asked):
    mt_bench(name(server), asked, "--system", "Be brief.")
    bodies = {body["messages"][-1]["content"]: body["messages"] for body in server.bodies}
    head = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    assert bodies["the cat"] == head
    assert bodies["on the mat"] == [
        *head,
        {"role": "assistant", "content": "answer to the cat"},
        {"role": "user", "content": "on the mat"},
    ]


def test_temperatures_are_fastchats(server, asked):
    """Of all 80 questions; greedy ones have no seed, others that of the command."""
    real = shared("mt_bench/question.jsonl")
    rows = {row["question_id"]: row for _, row in read_rows(real)}
    found = questions.read_questions(str(real), None)
    assert [q.name for q in found] == list(range(81, 161))
    assert {q.name: q.temperature for q in found} == {
        number: FASTCHAT[row["category"]] for number, row in rows.items()
    }
    own = {"question_id": 9, "category": "math", "turns": ["b"], "required_temperature": 0.3}
    low = {"question_id": 8, "category": "stem", "turns": ["c"], "required_temperature": 9e-5}
    write_rows(asked, [*QUESTIONS, own, low])
    mt_bench(name(server), asked, "--seed", 5)
    sent = {body["messages"][-1]["content"]: body for body in server.bodies}
    heat = {text: (body["temperature"], body.get("seed")) for text, body in sent.items()}
    assert heat == {
        **dict.fromkeys(("the cat", "on the mat", "c"), (0, None)),
        **dict.fromkeys(("sat", "the mat", "a"), (0.7, 5)),
        "b": (0.3, 5),
    }
    assert {body["max_tokens"] for body in server.bodies} == {1024}
    assert not any("top_p" in body for body in server.bodies)


def test_one_temperature_for_all(server, asked):
    mt_bench(name(server), asked, "--temperature", 1, "--max-new", 7)
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(1, 7)}


def test_ended_anywhere_the_same_command_goes_on(server, asked):
    """The second turn of one question is refused; nothing else is asked twice, and what lay in the
    place of the answers stays until there are new ones."""
    out = asked.parent / "out.jsonl"
    before = '{"question_id": 81, "model_id": "another", "choices": []}\n'
    out.write_text(before)
    with pytest.raises(SystemExit):
        mt_bench(name(server), asked)
    assert not server.asked  # this command has not written it
    (asked.parent / "out.jsonl.answers").touch()
    server.says = lambda text: 401 if text == "on the mat" else text
    with pytest.raises(SystemExit):
        mt_bench(name(server), asked, "--concurrency", 1)
    assert out.read_text() == before
    assert {p.name for p in out.parent.iterdir()} == {"q.jsonl", "out.jsonl", "out.jsonl.answers"}
    server.says = lambda text: text
    rows = mt_bench(name(server), asked)
    assert server.asked.pop("on the mat") == 2
    assert server.asked == dict.fromkeys(("the cat", "sat", "the mat", "a"), 1)
    again = mt_bench(name(server), asked)
    assert sum(server.asked.values()) == 4
    assert [row | {"tstamp": 0} for row in again] == [row | {"tstamp": 0} for row in rows]


def test_what_has_no_answer_is_named_and_asked_again(server, asked, capsys):
    server.says = lambda text: 400 if text == "on the mat" else text
    rows = mt_bench(name(server), asked)
    assert [row["question_id"] for row in rows] == [81, 200]
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 questions are not in the file, the first, 101: http" in said
    assert re.search(r"math 0 0 1 - 0 0 ", said)
    server.says = lambda text: text
    assert len(mt_bench(name(server), asked)) == 3 and server.asked["sat"] == 1
    server.says = lambda text: 400
    with pytest.raises(SystemExit) as ended:
        mt_bench(name(server), asked, "--seed", 1, "--temperature", 1)
    assert ended.value.code == 2
    assert "evals: no question has an answer, the first: " in capsys.readouterr().err


def test_empty_and_cut_answers_are_counted(server, asked, capsys):
    """They stand in the file, as the originals have them, and the judge reads it."""
    server.says, server.finish = lambda text: " \n" if text == "sat" else text, "length"
    rows = mt_bench(name(server), asked)
    assert rows[0]["choices"][0]["turns"] == ["", "the mat"]
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"writing 0.7 1 0 4 1 2 ", said), said
    assert "1 of 3 questions have an empty answer, the first 81; it is in the file" in said
    found = judge_mt_bench.read_answers(str(asked.parent / "out.jsonl"))[1]
    assert found[81] == ["", "the mat"]


def test_outputs_are_alpaca_evals(server, tmp_path, capsys):
    rows = [
        {"dataset": "koala", "instruction": "Hi", "output": "x", "generator": "davinci"},
        {"dataset": "oasst", "instruction": "Hö", "output": "y", "generator": "davinci"},
        {"dataset": "koala", "instruction": "Hi", "output": "z", "generator": "other"},
        {"instruction": "Bare"},
    ]
    (file := tmp_path / "set.json").write_text(json.dumps(rows))
    assert alpaca(name(server), file, "--name", "mine") == [
        {"dataset": "koala", "instruction": "Hi", "output": "answer to Hi", "generator": "mine"},
        {"dataset": "oasst", "instruction": "Hö", "output": "answer to Hö", "generator": "mine"},
        {"instruction": "Bare", "output": "answer to Bare", "generator": "mine"},
    ]
    for body in server.bodies:
        text = body["messages"][0]["content"]
        settings = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 2048, "seed": 0}
        messages = [{"role": "user", "content": text}]
        assert body == settings | {"model": "org/m", "messages": messages}
    said = capsys.readouterr().out
    assert re.search(r"^ +koala +0.7 +1 +0 +12 +0 +0$", said, re.M)
    (_, first), *_ = read_rows(tmp_path / "out.json")
    with pytest.raises(ValueError, match="outputs that no judge has seen"):
        show.kind("out.json", first)


def test_annotations_name_alpaca_evals_805_instructions():
    path = shared("alpaca_eval/annotations.vicuna-7b-v1.5.json.gz")
    found = questions.read_instructions(str(path), None)
    assert len({q.name for q in found}) == len(found) == 805
    assert {q.group for q in found} == {"selfinstruct", "koala", "helpful_base", "vicuna", "oasst"}


def greedy(folder, *spoken):
    """What the model answers to the last of these messages."""
    m, tokenizer = generate.load(str(folder))
    roles = ("user", "assistant")
    talk = [{"role": roles[k % 2], "content": text} for k, text in enumerate(spoken)]
    prompt = tokenizer.prompt(talk)
    sampling = {"temperature": 0, "pieces": tokenizer.vocab_size}
    (ids,) = generate.generate(m, [prompt], 6, tokenizer.eos, **sampling)
    return tokenizer.decode(ids).strip()


def test_a_folder_answers_in_its_own_template(folder, asked, capsys):
    rows = mt_bench(folder, asked, "--max-new", 6)
    assert {row["model_id"] for row in rows} == {"dpo"}
    first = greedy(folder, "the cat")
    turns = rows[1]["choices"][0]["turns"]
    assert turns == [first, greedy(folder, "the cat", first, "on the mat")] and first
    before = (asked.parent / "out.jsonl.answers").read_bytes()
    mt_bench(folder, asked, "--max-new", 6)
    assert (asked.parent / "out.jsonl.answers").read_bytes() == before
    assert "cost" not in capsys.readouterr().out


@torch.inference_mode()
def log_prob(folder, messages, text) -> float:
    """Of an answer and its EOS in transformers, in float64, alone."""
    m, tokenizer = MistralForCausalLM.from_pretrained(folder).double(), generate.load(folder)[1]
    begin = len(tokenizer.prompt(messages))
    ids = torch.tensor(tokenizer.render([*messages, {"role": "assistant", "content": text}]).ids)
    each = m(ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert ids[-1] == tokenizer.eos
    return float(each[begin - 1 :].sum())


def test_the_best_of_n_has_the_highest_implicit_reward(folder, tmp_path, asked, capsys):
    """Turn by turn: the second is asked behind the best first one."""
    base = folder_of(model(seed=1, max_position_embeddings=400), tmp_path / "base")
    flags = "--best-of", 5, "--reference", base, "--max-new", 6, "--temperature", 1
    rows = mt_bench(folder, asked, *flags)
    assert {row["model_id"] for row in rows} == {"dpo-best-of-5"}
    texts = {}  # of the conversations' ends, by what was asked last
    lines = (asked.parent / "out.jsonl.answers").read_text().splitlines()
    assert len(lines) == 5 * 5
    source = open_source(str(folder))
    best, every = [], []
    for row in rows:
        asked_turns = {q["question_id"]: q["turns"] for q in QUESTIONS}[row["question_id"]]
        talk = []
        for ask, answer in zip(asked_turns, row["choices"][0]["turns"], strict=True):
            talk.append({"role": "user", "content": ask})
            sampling = {"max_tokens": 6, "temperature": 1.0}
            requests = [Request(talk, sampling | {"seed": seed}) for seed in range(5)]
            known = asked.parent / "out.jsonl.answers"
            found = [a.text.strip() for a in source.ask(requests, known)]
            texts[ask] = found
            rewards = [log_prob(folder, talk, x) - log_prob(base, talk, x) for x in found]
            assert answer == found[int(np.argmax(rewards))]
            best.append(max(rewards))
            every += rewards
            talk.append({"role": "assistant", "content": answer})
    assert (asked.parent / "out.jsonl.answers").read_text().splitlines() == lines
    assert all(len(set(found)) > 2 for found in texts.values())
    said = capsys.readouterr().out
    means = re.search(r"is (\S+) nats in the mean, of all 25 answers (\S+);", said).groups()
    assert list(map(float, means)) == pytest.approx([np.mean(best), np.mean(every)], abs=6e-3)
    assert "temperature 0" not in said
    mt_bench(folder, asked, "--best-of", 2, "--reference", base, "--max-new", 6)
    assert "2 of 5 turns were asked at temperature 0" in capsys.readouterr().out
    greedy, sampled = (Request([], {"temperature": t, "seed": 2}) for t in (0.0, 0.7))
    assert samples(greedy, 3) == [greedy] * 3
    assert [r.parameters["seed"] for r in samples(sampled, 3)] == [6, 7, 8]


def test_rewards_are_those_of_each_answer_alone(folder, tmp_path):
    """Of an odd number, of equal ones, of an empty one, and of no answer at all."""
    base = folder_of(model(seed=1, max_position_embeddings=400), tmp_path / "base")
    best = BestOf(open_source(str(folder)), str(base), 3)
    talks = [[{"role": "user", "content": text}] for text in ("the cat sat", "mat", "a")]
    texts = [["on the mat", "", "the", "on the mat"], [], ["cat"]]
    found = best.rewards([Request(talk) for talk in talks], texts)
    assert [len(rewards) for rewards in found] == [4, 0, 1]
    for talk, rewards, answers in zip(talks, found, texts, strict=True):
        for reward, text in zip(rewards, answers, strict=True):
            expected = log_prob(folder, talk, text) - log_prob(base, talk, text)
            assert reward == pytest.approx(expected, abs=2e-4)


Q = QUESTIONS[0]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([Q, Q], r"q.jsonl:2: question 101 is at .*q.jsonl:1 already; delete one"),
        ([{"instruction": "x"}], "q.jsonl:1 is no question of MT-Bench, with question_id and"),
        ([{"question_id": 1, "turns": ["x"]}], "q.jsonl:1: question 1 has no category"),
        ([Q | {"turns": ["x", " "]}], "q.jsonl:1: a turn of question 101 is ' ', no text"),
        ([Q | {"required_temperature": "hot"}], "required_temperature 'hot' is no temperature"),
    ],
)
def test_a_wrong_question_costs_one_line(rows, message, server, asked, capsys):
    write_rows(asked, rows)
    with pytest.raises(SystemExit) as ended:
        mt_bench(name(server), asked)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not server.bodies and not (asked.parent / "out.jsonl").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"instruction": " "}], "set.jsonl:1: the instruction is empty"),
        ([Q], "set.jsonl:1 has no instruction, as AlpacaEval's rows: "),
        ([{"instruction": "Add", "input": "1 2"}], "set.jsonl:1 has an input, '1 2', which would"),
        (
            [{"instruction": "a", "dataset": "x"}, {"instruction": "a", "dataset": "y"}],
            "set.jsonl:2: this instruction is from another dataset above",
        ),
    ],
)
def test_a_wrong_instruction_costs_one_line(rows, message, server, tmp_path, capsys):
    write_rows(tmp_path / "set.jsonl", rows)
    with pytest.raises(SystemExit) as ended:
        alpaca(name(server), tmp_path / "set.jsonl")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not server.bodies and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--max-new 0", "--max-new 0: give 1 or more"),
        ("--temperature -1", "--temperature -1.0: give 0 or more"),
        ("--temperature nan", "--temperature nan: give 0 or more"),
        ("--seed -1", "--seed -1: give 0 to 4294967295"),
        ("--best-of 3", "--best-of N and --reference REF go together"),
        ("--best-of 3 --reference x", "so MODEL is a folder, not NAME@URL"),
        ("--instructions x", "mt-bench takes its questions from --questions FILE alone"),
        ("--out x.json", "--out 'x.json': answers to mt-bench are a .jsonl file"),
        ("--out {asked}", "would overwrite this file: it is read; name another"),
        ("--budget-tokens 5 --budget-money 2", "a budget is in tokens or in money"),
        ("--budget-tokens 5", "0 tokens of 5 are spent, and the next request could cost"),
    ],
)
def test_a_wrong_flag_costs_one_line(flags, message, server, asked, capsys):
    with pytest.raises(SystemExit) as ended:
        mt_bench(name(server), asked, *flags.format(asked=asked).split())
    err = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in err[-1] and "evals: " in err[-1]
    assert [line for line in err[:-1] if "requests to ask" not in line] == []
    assert not server.bodies and len(list(read_rows(asked))) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--concurrency 3", "--concurrency is for an endpoint, and .* is a folder"),
        ("--best-of 2 --reference nowhere", "nowhere"),
    ],
)
def test_a_wrong_flag_of_a_folder_costs_one_line(flags, message, folder, asked, capsys):
    with pytest.raises(SystemExit) as ended:
        mt_bench(folder, asked, *flags.split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
