"""A folder that answers as an endpoint does: filed, and the same however often it is killed."""

import json
import shutil

import pytest

from model_helpers import SMALL, folder_of, model
from zephyr import generate, source
from zephyr.client.exchange import Endpoint
from zephyr.endpoint import Answer, Failure, Request

TEXTS = ["Hi", "the cat", "the cat sat on the mat", "on the mat the cat sat on the cat", "a"]


def asked(text, **parameters):
    return Request([{"role": "user", "content": text}], {"max_tokens": 6, **parameters})


@pytest.fixture
def folder(tmp_path):
    (place := tmp_path / "tiny" / "dpo").mkdir(parents=True)
    return folder_of(model(), place / "model")


def greedy(folder, text):
    """What the model says to one prompt alone."""
    m, tokenizer = generate.load(str(folder))
    prompt = tokenizer.prompt([{"role": "user", "content": text}])
    (ids,) = generate.generate(
        m, [prompt], 6, tokenizer.eos, temperature=0, pieces=tokenizer.vocab_size
    )
    return tokenizer.decode(ids)


def test_answers_come_in_order_and_are_those_of_each_prompt_alone(folder, tmp_path):
    found = source.open_source(str(folder))
    assert source.title(found) == "dpo"
    requests = [asked(text, temperature=0) for text in [*TEXTS, TEXTS[1]]]
    answers = list(source.ask(found, requests, tmp_path / "a.jsonl", concurrency=3))
    assert [a.text for a in answers] == [greedy(folder, r.messages[0]["content"]) for r in requests]
    for a in answers:
        assert a.finish_reason == ("length" if a.usage["completion_tokens"] == 6 else "stop")


@pytest.mark.parametrize("limit", [("ROWS", 2), ("PROMPTS", 50), ("CACHE", 4000)], ids=str)
def test_batches_are_alike_in_length_and_fit(limit, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(source, *limit)
    sizes, sample = [], generate.generate

    def noted(m, prompts, *rest, **sampling):
        sizes.append([*map(len, prompts)])
        return sample(m, prompts, *rest, **sampling)

    monkeypatch.setattr(generate, "generate", noted)
    found = source.open_source(str(folder))
    answers = list(source.ask(found, [asked(t) for t in TEXTS], tmp_path / "a.jsonl"))
    assert all(isinstance(a, Answer) for a in answers)
    flat = [n for batch in sizes for n in batch]
    assert len(flat) == 5 and flat == sorted(flat, reverse=True) and 1 < len(sizes)
    each = 2 * SMALL["num_hidden_layers"] * SMALL["num_key_value_heads"] * SMALL["head_dim"] * 4
    for batch in sizes:
        bounds = (
            ("ROWS", len(batch)),
            ("PROMPTS", len(batch) * batch[0]),
            ("CACHE", len(batch) * each * min(batch[0] + 6, SMALL["sliding_window"])),
        )
        assert len(batch) == 1 or all(used <= getattr(source, name) for name, used in bounds)


def test_killed_between_batches_it_ends_with_the_same_answers(folder, tmp_path, monkeypatch):
    """And what is in the file already is not sampled again, unless its batch has other gaps."""
    monkeypatch.setattr(source, "ROWS", 2)
    requests = [asked(text, temperature=1.0, seed=s) for text in TEXTS for s in (0, 1)]
    whole = list(source.ask(source.open_source(str(folder)), requests, tmp_path / "whole.jsonl"))
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(requests)
    calls, sample = [], generate.generate
    monkeypatch.setattr(generate, "generate", lambda *a, **k: calls.append(a) or sample(*a, **k))
    for kept, left in ((10, 0), (9, 1), (4, 3), (3, 4), (0, 5)):
        path = tmp_path / f"{kept}.jsonl"
        path.write_bytes(b"".join(lines[:kept]) + lines[-1][:7] * (kept < 10))
        calls.clear()
        found = source.open_source(str(folder))
        assert list(source.ask(found, requests, path)) == whole
        assert len(calls) == left and sorted(path.read_bytes().splitlines()) == sorted(
            line.rstrip(b"\n") for line in lines
        )


def test_batches_and_seeds_give_other_answers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "ROWS", 1)
    requests = [asked("the cat", temperature=1.0, seed=s) for s in range(8)]
    answers = list(source.ask(source.open_source(str(folder)), requests, tmp_path / "a.jsonl"))
    assert len({a.text for a in answers}) > 4


def test_another_model_in_the_same_folder_is_asked_anew(folder, tmp_path):
    path, requests = tmp_path / "a.jsonl", [asked("the cat", temperature=0)]
    (one,) = source.ask(source.open_source(str(folder)), requests, path)
    shutil.rmtree(folder)
    folder_of(model(seed=1), folder)
    (other,) = source.ask(source.open_source(str(folder)), requests, path)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(set(keys)) == 2 and one.text != other.text


def test_a_conversation_that_does_not_fit_is_a_failure(folder, tmp_path, capsys):
    """And one line says so, as of an endpoint; none does where every request has its answer."""
    long = asked("the cat sat " * 200)
    bad = Request([{"role": "assistant", "content": "x"}], {"max_tokens": 6})
    found = source.open_source(str(folder))
    one, other, third = source.ask(found, [long, bad, asked("a")], tmp_path / "a.jsonl")
    assert isinstance(one, Failure) and "positions" in one.why
    assert isinstance(other, Failure) and "should speak" in other.why
    assert isinstance(third, Answer)
    line = f"dpo: 2 of 3 requests have no answer, the last: {other.why}\n"
    assert capsys.readouterr().err == line
    list(source.ask(found, [long, bad, asked("a")], tmp_path / "a.jsonl"))
    assert capsys.readouterr().err == line.replace("2 of 3", "2 of 2")
    list(source.ask(found, [asked("a")], tmp_path / "a.jsonl"))
    assert capsys.readouterr().err == ""


def test_each_answer_may_fill_the_positions_that_its_own_prompt_leaves(folder, tmp_path):
    """However long the others of its batch are."""
    requests = [asked(text, temperature=0, max_tokens=10**6) for text in TEXTS]
    answers = list(source.ask(source.open_source(str(folder)), requests, tmp_path / "a.jsonl"))
    positions = SMALL["max_position_embeddings"]
    used = [(a.usage["prompt_tokens"], a.usage["completion_tokens"]) for a in answers]
    assert len({prompt for prompt, _ in used}) > 2
    for (prompt, new), a in zip(used, answers, strict=True):
        assert (
            prompt + new == positions if a.finish_reason == "length" else prompt + new < positions
        )
    assert "length" in {a.finish_reason for a in answers}


def test_what_names_a_source():
    found = source.open_source("a@b/c@http://localhost:8000/v1", {"": "KEY"})
    assert found == Endpoint("http://localhost:8000/v1", "a@b/c", "KEY")
    assert source.title(found) == "a@b/c"
    with pytest.raises(ValueError, match="names no model; write NAME@URL"):
        source.open_source("http://localhost:8000/v1")
    with pytest.raises(ValueError, match="'gpt-4' is no folder here; .* is gpt-4@URL, as in"):
        source.open_source("gpt-4")
    with pytest.raises(ValueError, match="runs/nowhere"):
        source.open_source("runs/nowhere")
    with pytest.raises(ValueError, match=r"'gpt\\udcff@http://a/v1': its bytes are not UTF-8"):
        source.open_source("gpt\udcff@http://a/v1")


def test_a_key_is_of_the_host_and_port_that_the_url_has(folder):
    names = ["a@https://API.org/v1", "b@https://api.org:8443/v1", "c@http://[::1]:80", str(folder)]
    given = ["api.org=A", "[::1]:80=C"]
    *found, _ = source.open_sources(names, given)
    assert [(f.host, f.key_from) for f in found] == [
        ("api.org", "A"),
        ("api.org:8443", ""),
        ("[::1]:80", "C"),
    ]
    assert [f.key_from for f in source.open_sources(names[:2], None)] == ["OPENAI_API_KEY"] * 2
    with pytest.raises(ValueError, match=r"^--key-from x=...: no model is .*; all are folders$"):
        source.open_sources([str(folder)], ["x=A"])
    with pytest.raises(ValueError) as wrong:
        source.open_sources(["a@https://user:secret@api.org/v1"], ["api.org=A"])
    assert "secret" not in str(wrong.value)


def test_a_parameter_that_sampling_lacks_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="takes no parameter presence_penalty"):
        list(
            source.ask(
                source.open_source(str(folder)), [asked("a", presence_penalty=1)], tmp_path / "a"
            )
        )
