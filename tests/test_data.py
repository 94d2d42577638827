"""Rows of every form become exactly the right text; recipe B's cut against a statement of its own;
the cache; what a bad row costs."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import GOOD, WORKERS, Limits, chat, save, shared, trained_tokenizer
from run_helpers import both_at_once
from zephyr import feedback
from zephyr.data import arrays, cache, readers
from zephyr.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return Tokenizer(shared("mistral"))


def said(tokenizer, ids):
    """Text between the control ids, each piece decoded on its own."""
    ids, pieces = ids.tolist(), [[]]
    assert tokenizer.bos not in ids[1:]
    for i in ids[1:] if ids[0] == tokenizer.bos else ids:
        pieces[-1].append(i)
        if i == tokenizer.eos:
            pieces.append([])
    return [tokenizer.sp.decode([i for i in piece if i != tokenizer.eos]) for piece in pieces]


def response(tokenizer, ids):
    assert ids[-1] == tokenizer.eos and tokenizer.eos not in ids[:-1]
    return tokenizer.decode(ids.tolist())


# rows in every form


ODD = " two  words,\n</s>\n<|user|>\n\u4e16\u754c \n"  # nothing in a message is markup or trimmed
ONE = ["<|user|>\nWhy?"]
MORE = ["<|user|>\nHi", "<|assistant|>\nHello", "<|user|>\nBye"]
KIND = ["<|system|>\nBe kind.", *ONE]
FORMS = {
    "binarized": (
        ONE,
        {
            "prompt": "Why?",
            "prompt_id": "f00",
            "chosen": chat("Why?", ODD),
            "rejected": chat("Why?", "No."),
            "messages": chat("Why?", ODD),
            "score_chosen": 8.5,
        },
    ),
    "messages": (ONE, {"chosen": chat("Why?", ODD), "rejected": chat("Why?", "No.")}),
    "messages of turns": (
        MORE,
        {
            "chosen": chat("Hi", "Hello", "Bye", ODD),
            "prompt": "Hi",
            "rejected": chat("Hi", "Hello", "Bye", "No."),
        },
    ),
    "messages with system": (
        KIND,
        {
            "chosen": chat("Why?", ODD, system="Be kind."),
            "rejected": chat("Why?", "No.", system="Be kind."),
        },
    ),
    "responses": (
        ONE,
        {"prompt": "Why?", "chosen": chat("", ODD)[1:], "rejected": chat("", "No.")[1:]},
    ),
    "responses to messages": (
        MORE,
        {
            "prompt": chat("Hi", "Hello", "Bye"),
            "chosen": chat("", ODD)[1:],
            "rejected": chat("", "No.")[1:],
        },
    ),
    "responses to system": (
        KIND,
        {
            "prompt": chat("Why?", system="Be kind."),
            "chosen": chat("", ODD)[1:],
            "rejected": chat("", "No.")[1:],
        },
    ),
    "responses that share turns": (
        MORE,
        {
            "prompt": chat("Hi"),
            "chosen": chat("", "Hello", "Bye", ODD)[1:],
            "rejected": chat("", "Hello", "Bye", "No.")[1:],
        },
    ),
    "text": (ONE, {"prompt": "Why?", "chosen": ODD, "rejected": "No."}),
    "text in a transcript": (ONE, {"prompt": "\n\nHuman: Why?", "chosen": ODD, "rejected": "No."}),
    "text to messages": (
        MORE,
        {"prompt": chat("Hi", "Hello", "Bye"), "chosen": ODD, "rejected": "No."},
    ),
    "transcripts": (
        ONE,
        {
            "chosen": f"\n\nHuman: Why?\n\nAssistant: {ODD}",
            "rejected": "\n\nHuman: Why? \n\nAssistant: No.",
        },
    ),
    "transcripts of turns": (
        MORE,
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:{ODD}",
            "rejected": "\n\nHuman: Hi\n\nAssistant:  Hello\n\nHuman:Bye\n\nAssistant: No.",
        },
    ),
}


@pytest.mark.parametrize("which", ["small", "mistral"])
@pytest.mark.parametrize("empty_system", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_right_text(request, which, empty_system, form, tmp_path):
    tokenizer, (prompt, row) = request.getfixturevalue(which), FORMS[form]
    path = save(tmp_path / "a.jsonl", row)
    tokens = arrays.preferences(path, tokenizer, Limits(empty_system=empty_system))
    pair = tokens.pair(0)
    if empty_system and "<|system|>" not in prompt[0]:
        prompt = ["<|system|>\n", *prompt]
    first, *rest = [*prompt, "<|assistant|>\n"]
    assert pair.prompt[0] == tokenizer.bos
    assert said(tokenizer, pair.prompt) == [first, *(f"\n{turn}" for turn in rest)]
    odd = ODD.strip() if "transcripts" in form else ODD
    assert response(tokenizer, pair.chosen) == odd
    assert response(tokenizer, pair.rejected) == "No."
    assert len(tokens) == 1 and tokens.report().endswith(" tokens")


def test_a_pair_is_what_generation_starts_from_and_what_sft_saw(small, tmp_path):
    dialogue = chat("the cat", "sat", "on a mat", "one two")
    other = [*dialogue[:-1], {"role": "assistant", "content": "of some"}]
    pair = arrays.preferences(
        save(tmp_path / "a.jsonl", {"chosen": dialogue, "rejected": other}), small, Limits()
    ).pair(0)
    assert pair.prompt.tolist() == small.prompt(dialogue[:-1])
    assert [*pair.prompt, *pair.chosen] == small.render(dialogue).ids
    assert [*pair.prompt, *pair.rejected] == small.render(other).ids


@pytest.mark.parametrize("empty_system", [True, False])
def test_conversations_are_rendered_whole(small, tmp_path, empty_system):
    rows = [chat("the cat", "sat"), chat("a", "b", "c", "d", system="e f"), chat("a", "b", "c")]
    path = save(tmp_path / "a.jsonl", *({"messages": m, "prompt": "ignored"} for m in rows))
    tokens = arrays.conversations(path, small, Limits(empty_system=empty_system))
    assert len(tokens) == 3
    at = 0
    for k, messages in enumerate(rows):
        ids, mask = small.render(messages, empty_system)
        (got,) = tokens.parts(k)
        assert got.tolist() == ids
        assert tokens.mask[at : at + len(ids)].tolist() == mask
        at += len(ids)
    assert at == len(tokens.ids) == len(tokens.mask)


def test_several_files_are_one(small, tmp_path):
    rows = [{"prompt": f"p{k}", "chosen": f"c{k}", "rejected": "r"} for k in range(5)]
    paths = [*save(tmp_path / "b.jsonl", *rows[:2]), *save(tmp_path / "a.jsonl", *rows[2:])]
    tokens = arrays.preferences(tuple(paths), small, Limits())
    chosen = [response(small, tokens.pair(k).chosen) for k in range(len(tokens))]
    assert chosen == ["c0", "c1", "c2", "c3", "c4"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_leave_no_seam(small, tmp_path, monkeypatch, chunk):
    rows = [{"prompt": "p" * k, "chosen": "c" * (k % 3), "rejected": "r"} for k in range(1, 12)]
    path = save(tmp_path / "a.jsonl", *rows)
    whole = arrays.preferences(path, small, Limits())
    monkeypatch.setattr(arrays, "CHUNK", chunk)
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "other"))
    tokens = arrays.preferences(path, small, Limits())
    assert tokens.ids.tolist() == whole.ids.tolist()
    assert tokens.ends.tolist() == whole.ends.tolist()


# bad rows


FIRST = "\n\nHuman: Why?\n\nAssistant: No."
BAD_PAIRS = [
    ({"prompt": "a", "chosen": "b"}, "has no field 'rejected'; it has 'chosen, prompt'"),
    ({"prompt": "a", "rejected": "b"}, "has no field 'chosen'; it has 'prompt, rejected'"),
    ({}, "has no field 'chosen'; it has ''"),
    (GOOD | {"prompt": " \n"}, "turn 0, the user's, is empty"),
    (
        {"chosen": chat("a", "\t", "c", "d"), "rejected": chat("a", "\t", "c", "e")},
        "turn 1, the assistant's, is empty",
    ),
    (
        {"chosen": chat("a", "b"), "rejected": chat("c", "b")},
        "the prompts of chosen and rejected differ",
    ),
    (
        {"chosen": chat("a", "b"), "rejected": chat("a", "b", "c", "d")},
        "the prompts of chosen and rejected differ",
    ),
    (
        {"chosen": chat("a", "b", system="s"), "rejected": chat("a", "b")},
        "the prompts of chosen and rejected differ",
    ),
    (
        {"chosen": FIRST, "rejected": FIRST.replace("Why", "How")},
        "the prompts of chosen and rejected differ",
    ),
    (
        {"chosen": chat("a", "b"), "rejected": [{"role": "human", "content": "a"}]},
        "rejected: message 0 has role 'human'; known roles are system, user, assistant",
    ),
    (
        GOOD | {"prompt": [{"role": "User", "content": "a"}]},
        "chosen: message 0 has role 'User'; known roles are",
    ),
    ({"chosen": [], "rejected": []}, "chosen: messages must be a list that is not empty"),
    ({"chosen": chat("a", "b"), "rejected": []}, "rejected: messages must be a list that is not"),
    (GOOD | {"prompt": []}, "chosen: text without a prompt must be a transcript"),
    (GOOD | {"prompt": 5}, "prompt must be text or messages, got 5"),
    (GOOD | {"prompt": {"a": 1}}, "prompt must be text or messages, got {'a': 1}"),
    (GOOD | {"prompt": [5]}, "chosen: message 0 must have role and content, got 5"),
    (GOOD | {"prompt": ["text"]}, "chosen: message 0 must have role and content, got 'text'"),
    (
        {"prompt": 5, "chosen": chat("", "b")[1:], "rejected": chat("", "c")[1:]},
        "prompt must be text or messages, got 5",
    ),
    (
        {"chosen": chat("", "b")[1:], "rejected": chat("", "c")[1:]},
        "chosen: it is a response, and there is no prompt to it: none of prompt, question, ",
    ),
    (
        {"chosen": chat("a", "b"), "rejected": chat("a", None)},
        "rejected: message 1 must have role and content, got {'role': 'assistant'}",
    ),
    (
        {"chosen": chat("a", "b"), "rejected": chat("a", ["c"])},
        "rejected: message 1 has content of type list, not text",
    ),
    (
        {"chosen": ["a", "b"], "rejected": chat("a", "c")},
        "chosen: message 0 must have role and content, got 'a'",
    ),
    (
        {"chosen": [{"role": "user"}], "rejected": chat("a", "c")},
        "chosen: message 0 must have role and content",
    ),
    (
        {"chosen": [m | {"tool": 1} for m in chat("a", "b")], "rejected": chat("a", "c")},
        "chosen: message 0 has 'tool': 1, which would be lost: only role and content are read",
    ),
    (GOOD | {"chosen": None, "rejected": None}, "has no field 'chosen'; it has 'prompt'"),
    (GOOD | {"chosen": 1, "rejected": 2}, "chosen: messages must be a list"),
    (GOOD | {"chosen": {}, "rejected": {}}, "chosen: message 0 must have role and content"),
    (
        GOOD | {"chosen": chat("a", "b")},
        "chosen and rejected must both be text or both be messages",
    ),
    (GOOD | {"chosen": None}, "has no field 'chosen'; it has 'prompt, rejected'"),
    (
        {"chosen": "Because.", "rejected": "No."},
        "chosen: text without a prompt must be a "
        "transcript that opens with '\\n\\nHuman:', got 'Because.'",
    ),
    ({"chosen": FIRST, "rejected": "Human: Why?"}, "rejected: text without a prompt must be"),
    ({"chosen": "", "rejected": ""}, "chosen: text without a prompt must be a transcript"),
    ({"chosen": "\n\nAssistant: a", "rejected": FIRST}, "chosen: text without a prompt must be"),
    (
        {"chosen": "\n\nHuman: a", "rejected": FIRST},
        "chosen must end with an assistant's message, the response",
    ),
    (
        {"chosen": FIRST, "rejected": FIRST + "\n\nHuman: a"},
        "rejected must end with an assistant's message, the response",
    ),
    (
        {"chosen": FIRST.replace("Ass", "Human: b\n\nAss"), "rejected": FIRST},
        "chosen: turn 1 is the user's where the assistant should speak",
    ),
    (
        {"chosen": FIRST + FIRST[13:], "rejected": FIRST},
        "chosen: turn 2 is the assistant's where the user should speak",
    ),
    ({"chosen": chat("a"), "rejected": chat("a")}, "chosen must end with an assistant's message"),
    (
        {"chosen": chat("a", "b") + chat("c", system="d"), "rejected": chat("a", "b")},
        "chosen: turn 2 is the system's where the user should speak",
    ),
    (GOOD | {"prompt": chat("a", "b")}, "chosen: turn 2 is the assistant's where the user"),
    (GOOD | {"prompt": chat(system="a")}, "chosen: turn 0 is the assistant's where the user"),
    (GOOD | {"chosen": "\ud800"}, "the lone surrogate \\ud800 is not text"),
    ([1], "a row is a JSON object, this is a list"),
]
BAD_CONVERSATIONS = [
    (
        {"message": chat("a", "b")},
        "has no field 'messages', 'conversations' or 'instruction'; it has 'message'",
    ),
    ({"messages": None}, "has no field 'messages', 'conversations' or 'instruction'; it has ''"),
    ({"messages": []}, "messages must be a list that is not empty"),
    ({"messages": "a"}, "messages must be a list that is not empty"),
    ({"messages": [1]}, "message 0 must have role and content, got 1"),
    ({"messages": chat("a", 5)}, "message 1 has content of type int, not text"),
    ({"messages": [{"role": "gpt", "content": "a"}]}, "message 0 has role 'gpt'; known roles are"),
    ({"messages": chat("a", "b")[1:]}, "turn 0 is the assistant's where the user should speak"),
    ({"messages": chat("a") + chat("b")}, "turn 1 is the user's where the assistant should speak"),
    ({"messages": chat("a")}, "no message is the assistant's; there is nothing to learn"),
    ({"messages": chat(system="a")}, "no message is the assistant's; there is nothing to learn"),
    ({"messages": chat("a", " \u2003\n")}, "turn 1, the assistant's, is empty"),
    ({"messages": chat("", "b", system="c")}, "turn 0, the user's, is empty"),
    ({"messages": chat("\udfff", "b")}, "the lone surrogate \\udfff is not text"),
]
ROWS = [(arrays.preferences, GOOD, *bad) for bad in BAD_PAIRS]
ROWS += [(arrays.conversations, {"messages": chat("a", "b")}, *bad) for bad in BAD_CONVERSATIONS]


@pytest.mark.parametrize("read, good, row, message", ROWS)
def test_a_bad_row_costs_one_line_that_names_it(read, good, row, message, small, tmp_path):
    path = save(tmp_path / "a.jsonl", good, row)
    with pytest.raises(ValueError) as error:
        read(path, small, Limits())
    assert str(error.value).startswith(f"{path[0]}:2: {message}")
    assert str(error.value).endswith("; --on-bad-row skip drops such rows")
    assert "\n" not in str(error.value)

    path = save(tmp_path / "b.jsonl", *[good] * 60, row, *[good] * 60)
    tokens = read(path, small, Limits(on_bad_row="skip"))
    assert len(tokens) == tokens.counts["kept"] == 120
    first, *listed = tokens.report().splitlines()
    assert (
        first.partition(": ")[2] == f"120 of 121 rows, {len(tokens.ids)} tokens; skipped: bad row 1"
    )
    assert listed[0] == "skipped 1 bad rows of 121; the first 1:"
    assert listed[1].startswith(f"  {path[0]}:61: {message}") and len(listed) == 2


def test_more_than_one_percent_of_bad_rows_stops(small, tmp_path):
    skip = Limits(on_bad_row="skip")
    path = save(tmp_path / "a.jsonl", *[GOOD] * 198, {}, [])
    assert arrays.preferences(path, small, skip).counts["skipped: bad row"] == 2
    path = save(tmp_path / "a.jsonl", *[GOOD] * 197, {}, [], {})
    with pytest.raises(
        ValueError,
        match="^3 of 200 rows are bad, more than the 1 % that may be "
        "skipped; the first: .*a.jsonl:198: has no field",
    ):
        arrays.preferences(path, small, skip)


def test_nothing_left_to_train_on(small, tmp_path):
    same, empty = GOOD | {"chosen": "No."}, GOOD | {"rejected": " \n"}
    path = save(tmp_path / "a.jsonl", same, same, empty)
    with pytest.raises(
        ValueError,
        match="a.jsonl: no row is left to train on; dropped: chosen and "
        "rejected are the same 2; dropped: a response is empty 1$",
    ):
        arrays.preferences(path, small, Limits())
    (tmp_path / "a.jsonl").write_text("\n \n")
    for read in (arrays.preferences, arrays.conversations):
        with pytest.raises(ValueError, match="a.jsonl: no row is left to train on$"):
            read(path, small, Limits())


def test_empty_and_equal_responses_are_dropped_and_counted(small, tmp_path):
    transcript = {"chosen": "\n\nHuman: Why?\n\nAssistant:", "rejected": FIRST}
    path = save(
        tmp_path / "a.jsonl",
        GOOD | {"chosen": ""},
        GOOD,
        GOOD | {"rejected": "\t "},
        GOOD | {"chosen": "No."},
        transcript,
    )
    tokens = arrays.preferences(path, small, Limits())
    assert response(small, tokens.pair(0).chosen) == "Because."
    assert tokens.counts == {
        "dropped: a response is empty": 3,
        "kept": 1,
        "rows": 5,
        "dropped: chosen and rejected are the same": 1,
        "skipped: bad row": 0,
    }
    assert tokens.report() == (
        f"pairs: 1 of 5 rows, {len(tokens.ids)} tokens; dropped: a response is empty 3; "
        "dropped: chosen and rejected are the same 1"
    )


# truncation


def segment(tokenizer, role, content, first=False):
    """(header, the rest with EOS) of a turn."""
    header = tokenizer.sp.encode(f"<|{role}|>\n" if first else f"\n<|{role}|>\n")
    whole = tokenizer.sp.encode(("" if first else "\n") + f"<|{role}|>\n{content}")
    assert whole[: len(header)] == header
    return header, [*whole[len(header) :], tokenizer.eos]


def ends(header, rest):
    """The turn whole, and every shorter end of it that still has some content under its header."""
    return [header + rest[cut:] for cut in range(max(1, len(rest) - 1))]


def longest(candidates, limit):
    return max((ids for ids in candidates if len(ids) <= limit), key=len, default=None)


def recipe_b(tokenizer, spoken, chosen, rejected, c):
    """trl 0.7.7's rule on token lists, but for what the cut prompt keeps: of all the ends of the
    conversation that begin with a header, the longest that fits. None if there is none."""
    turns = [segment(tokenizer, *turn, first=k == 0) for k, turn in enumerate(spoken)]
    header = segment(tokenizer, "assistant", "")[0]
    chosen, rejected = (segment(tokenizer, "assistant", text)[1] for text in (chosen, rejected))
    prompt = [tokenizer.bos, *(i for turn in turns for part in turn for i in part), *header]
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > c.max_length and len(prompt) > c.max_prompt_length:
        opening = [tokenizer.bos]
        if spoken[0][0] == "system":
            system = longest(ends(*turns.pop(0)), c.max_prompt_length // 2 - 1)
            if system is None:
                return None
            opening += system
        candidates = [
            opening + end + [i for turn in turns[k + 1 :] for part in turn for i in part] + header
            for k, turn in enumerate(turns)
            for end in ends(*turn)
        ]
        prompt = longest(candidates, c.max_prompt_length)
    if prompt and len(prompt) + longer > c.max_length:
        keep = c.max_length - c.max_prompt_length
        chosen, rejected = chosen[:keep], rejected[:keep]
    return prompt and (prompt, chosen, rejected)


def cut(tokenizer, spoken, chosen, rejected, c):
    counts = Counter()
    said = [*spoken, ("assistant", chosen), ("assistant", rejected)]
    *context, chosen, rejected = tokenizer.turns([(k == 0, *turn) for k, turn in enumerate(said)])
    return arrays.cut_pair(context, chosen, rejected, tokenizer, c, counts), counts


WORDS = "the cat sat on a mat one two three of some small words".split()
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(
    st.none() | st.just("") | texts,
    st.lists(texts, min_size=1, max_size=7),
    texts,
    texts,
    st.integers(1, 150),
    st.integers(1, 100),
)
def test_the_cut_is_recipe_b_and_leaves_a_well_formed_prompt(
    small, system, contents, chosen, rejected, limit, more
):
    contents = contents[: len(contents) - 1 + len(contents) % 2]  # the user speaks last
    spoken = [] if system is None else [("system", system)]
    spoken += [(("user", "assistant")[k % 2], text) for k, text in enumerate(contents)]
    c = Limits(max_length=limit + more, max_prompt_length=limit)
    wanted = recipe_b(small, spoken, chosen, rejected, c)
    if wanted is None:
        with pytest.raises(
            ValueError,
            match=f"^--max-prompt-length {limit} leaves no room for a "
            "prompt beside the template's headers; use a larger one",
        ):
            cut(small, spoken, chosen, rejected, c)
        return
    (prompt, *responses), counts = cut(small, spoken, chosen, rejected, c)
    assert (prompt, *responses) == wanted

    whole, *uncut = recipe_b(small, spoken, chosen, rejected, Limits(9999, 999))
    assert counts["cut: prompt"] == (prompt != whole)
    assert counts["cut: responses"] == (responses != uncut)
    assert prompt == whole or len(prompt) <= limit
    assert len(prompt) + max(map(len, responses)) <= c.max_length

    first, *rest = said(small, np.array(prompt))
    assert prompt[0] == small.bos and rest[-1] == "\n<|assistant|>\n"
    pieces = [first, *(piece.removeprefix("\n") for piece in rest[:-1])]
    kept = spoken[len(spoken) - len(pieces) :]
    if system is not None:
        kept[0] = spoken[0]
    for k, (piece, (role, text)) in enumerate(zip(pieces, kept, strict=True)):
        header = f"<|{role}|>\n"
        assert piece.removeprefix("\n").startswith(header)
        content = piece.removeprefix("\n")[len(header) :]
        if k == 0 or (k == 1 and system is not None):
            assert text.endswith(content) and (content or not text)
        else:
            assert content == text, "only the first turn that is kept may be cut"


def test_the_worked_example_of_the_docstring(small):
    spoken = [("system", "a"), ("user", "the cat"), ("assistant", "sat on a mat"), ("user", "one")]
    s, u1, a1, u2 = (segment(small, *turn, first=k == 0) for k, turn in enumerate(spoken))
    header = a1[0]
    assert len(a1[1]) > 4
    room = len([small.bos, *s[0], *s[1], *header, *u2[0], *u2[1], *header])
    c = Limits(max_length=room + 5, max_prompt_length=room + 3)
    (prompt, *_), counts = cut(small, spoken, "x", "y", c)
    assert prompt == [small.bos, *s[0], *s[1], *header, *a1[1][-3:], *u2[0], *u2[1], *header]
    assert counts == {"cut: prompt": 1}
    # a turn of which only EOS would be left goes as a whole
    (prompt, *_), _ = cut(small, spoken, "x", "y", replace(c, max_prompt_length=room + 1))
    assert prompt == [small.bos, *s[0], *s[1], *u2[0], *u2[1], *header]


def test_a_very_long_system_message_keeps_its_end_and_at_most_half(small):
    spoken = [("system", "cat " * 300), ("user", "the " * 300)]
    (prompt, *_), _ = cut(small, spoken, "a", "b", Limits(200, 100))
    system, user, header = said(small, np.array(prompt))
    assert len(prompt) == 100 and prompt.index(small.eos) == 100 // 2 - 1
    assert system.startswith("<|system|>\n") and spoken[0][1].endswith(system[11:]) and system[11:]
    assert user.startswith("\n<|user|>\nthe") or user.startswith("\n<|user|>\n the")


def test_what_fits_is_not_touched_and_one_token_more_is_cut(small):
    spoken = [("system", ""), ("user", "the cat sat on a mat " * 9)]
    (prompt, chosen, rejected), _ = cut(small, spoken, "one " * 40, "two", Limits(9999, 999))
    total = len(prompt) + len(chosen)
    assert len(prompt) > 60 and len(chosen) > len(rejected)
    fits, counts = cut(small, spoken, "one " * 40, "two", Limits(total, 60))
    assert fits == (prompt, chosen, rejected) and not counts
    # the prompt's cut is enough
    got, counts = cut(small, spoken, "one " * 40, "two", Limits(total - 1, len(prompt) - 1))
    assert got[1:] == (chosen, rejected) and len(got[0]) == len(prompt) - 1
    assert counts == {"cut: prompt": 1}
    # a short prompt stays: only the responses are cut, to the difference of the limits
    got, counts = cut(small, spoken, "one " * 40, "two", Limits(len(prompt) + 10, len(prompt)))
    assert got == (prompt, chosen[:10], rejected[:10]) and counts == {"cut: responses": 1}
    # both
    got, counts = cut(small, spoken, "one " * 40, "two", Limits(60 + 7, 60))
    assert len(got[0]) == 60 and got[1:] == (chosen[:7], rejected[:7])
    assert counts == {"cut: prompt": 1, "cut: responses": 1}


def test_cut_pairs_from_a_file(small, tmp_path):
    long, end = "one " * 200, "two"
    path = save(
        tmp_path / "a.jsonl",
        {"prompt": "the " * 300, "chosen": "a", "rejected": "cat"},
        {"prompt": "the", "chosen": long + end, "rejected": long},
        {"prompt": "the", "chosen": "a", "rejected": long},
    )
    tokens = arrays.preferences(path, small, Limits(max_length=160, max_prompt_length=80))
    assert len(tokens) == 2
    assert tokens.counts == {
        "kept": 2,
        "rows": 3,
        "cut: prompt": 1,
        "cut: responses": 2,
        "skipped: bad row": 0,
        "dropped: chosen and rejected are the same": 1,
    }
    assert [len(part) for part in tokens.pair(0)][0] == 80
    assert response(small, tokens.pair(0).rejected) == "cat"
    assert len(tokens.pair(1).rejected) == 80 and small.eos not in tokens.pair(1).rejected
    assert tokens.report().endswith(
        "; cut: prompt 1; cut: responses 2; dropped: chosen and rejected are the same 1"
    )
    with pytest.raises(ValueError, match="^--max-prompt-length 20 leaves no room"):
        arrays.preferences(path, small, Limits(max_length=160, max_prompt_length=20))


# the cache


def test_the_second_call_opens_the_same_arrays(small, tmp_path, monkeypatch):
    path = save(tmp_path / "a.jsonl", GOOD, GOOD | {"chosen": ""}, GOOD)
    talks = save(tmp_path / "b.jsonl", {"messages": chat("a", "b")})
    first = arrays.preferences(path, small, Limits()), arrays.conversations(talks, small, Limits())
    monkeypatch.setattr(Tokenizer, "turns", None)
    copy = tmp_path / "same content.jsonl"
    copy.write_bytes(Path(*path).read_bytes())
    for same in (path, (str(copy),)):
        again = (
            arrays.preferences(same, small, Limits()),
            arrays.conversations(talks, small, Limits()),
        )
        for one, two in zip(first, again, strict=True):
            assert one.ids.tolist() == two.ids.tolist()
            assert one.mask.tolist() == two.mask.tolist()
            assert one.ends.tolist() == two.ends.tolist()
            assert one.report() == two.report() and one.digest == two.digest
    assert len(list(cache.cache_folder().iterdir())) == 2
    with pytest.raises(ValueError, match="read-only"):
        first[0].ids[0] = 7


def test_every_row_knows_where_it_came_from(small, tmp_path):
    """Line 2 of the first file is dropped; line 1 of the second is blank."""
    first = save(tmp_path / "a.jsonl", GOOD, GOOD | {"chosen": ""}, GOOD | {"prompt": "more"})
    second = tmp_path / "b.jsonl"
    second.write_text("\n" + json.dumps(GOOD | {"prompt": "other"}) + "\n")
    tokens = arrays.preferences((*first, str(second)), small, Limits())
    names = [tokens.where(k) for k in range(len(tokens))]
    assert names == [f"{first[0]}:1", f"{first[0]}:3", f"{second}:2"]
    moved = tmp_path / "moved.jsonl"
    Path(*first).rename(moved)
    again = arrays.preferences((str(moved), str(second)), small, Limits())
    assert again.where(1) == f"{moved}:3", "of the same arrays"


def test_long_rows_come_in_small_chunks(monkeypatch):
    monkeypatch.setattr(arrays, "CHARACTERS", 100)
    rows = ["x" * 60, "y" * 60, "z" * 500, *"abc"]
    assert list(arrays._chunks(iter(rows))) == [rows[:2], rows[2:3], rows[3:]]
    monkeypatch.setattr(arrays, "CHUNK", 2)
    assert [len(chunk) for chunk in arrays._chunks(iter("abcde"))] == [2, 2, 1]


def test_a_file_that_changes_while_it_is_read_is_not_cached(small, tmp_path, monkeypatch):
    path = save(tmp_path / "a.jsonl", GOOD)
    write = arrays._write

    def late(*args):
        write(*args)
        with open(*path, "a") as file:
            file.write(json.dumps(GOOD) + "\n")

    monkeypatch.setattr(arrays, "_write", late)
    with pytest.raises(ValueError, match="a.jsonl changed while it was read; start again once"):
        arrays.preferences(path, small, Limits())
    assert list(cache.cache_folder().iterdir()) == []


def test_whatever_goes_into_the_arrays_makes_new_ones(small, tmp_path, monkeypatch):
    path = save(tmp_path / "a.jsonl", GOOD | {"messages": chat("a", "b")})
    digests = {arrays.preferences(path, small, Limits()).digest}

    def is_new(tokens):
        before = len(digests)
        digests.add(tokens.digest)
        return len(digests) > before

    for change in (
        {"max_length": 1000},
        {"max_prompt_length": 500},
        {"empty_system": False},
        {"on_bad_row": "skip"},
    ):
        assert is_new(arrays.preferences(path, small, replace(Limits(), **change)))
    assert is_new(arrays.conversations(path, small, Limits()))
    assert is_new(arrays.conversations(path, small, Limits(empty_system=False)))
    assert not is_new(arrays.conversations(path, small, Limits(max_length=7)))
    other = trained_tokenizer(
        tmp_path / "tokenizer.model", "of some other text about the same cat " * 3
    )
    assert is_new(arrays.preferences(path, other, Limits()))
    save(tmp_path / "a.jsonl", GOOD | {"messages": chat("a", "c")})
    assert is_new(arrays.preferences(path, small, Limits()))
    assert is_new(arrays.preferences((*path, *save(tmp_path / "b.jsonl", GOOD)), small, Limits()))
    monkeypatch.setattr(arrays, "TEMPLATE", "another")
    assert is_new(arrays.preferences(path, small, Limits()))
    assert len(list(cache.cache_folder().iterdir())) == len(digests) == 11


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
def test_an_interrupted_build_leaves_nothing_behind(small, tmp_path, monkeypatch, stop):
    path = save(tmp_path / "a.jsonl", *[GOOD] * 5)
    monkeypatch.setattr(arrays, "CHUNK", 2)
    turns, calls = Tokenizer.turns, []

    def fail_late(self, messages):
        calls.append(len(list(cache.cache_folder().glob("part-*/dpo-*/ids"))))
        if len(calls) == 2:
            raise stop
        return turns(self, messages)

    monkeypatch.setattr(Tokenizer, "turns", fail_late)
    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        arrays.preferences(path, small, Limits())
    assert calls == [1, 1], "the build had begun"
    assert not list(cache.cache_folder().iterdir())
    assert len(arrays.preferences(path, small, Limits())) == 5


def test_arrays_are_on_disk_before_they_have_their_name(small, tmp_path, monkeypatch):
    synced = []

    def fsync(number):
        assert not list(cache.cache_folder().glob("dpo-*"))
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))

    monkeypatch.setattr(os, "fsync", fsync)
    tokens = arrays.preferences(save(tmp_path / "a.jsonl", GOOD), small, Limits())
    (folder,) = cache.cache_folder().iterdir()
    assert sorted(synced) == sorted(os.listdir(folder)) and len(tokens) == 1


def test_a_failed_build_leaves_nothing_behind(small, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="a.jsonl:2: has no field"):
        arrays.preferences(save(tmp_path / "a.jsonl", GOOD, {}), small, Limits())
    monkeypatch.setattr(Path, "rename", lambda part, folder: part.rmdir())  # not empty
    with pytest.raises(OSError, match="not empty"):
        arrays.preferences(save(tmp_path / "a.jsonl", GOOD), small, Limits())
    assert not list(cache.cache_folder().iterdir())


def test_two_processes_that_build_at_once_both_succeed(small, tmp_path):
    (path,) = save(tmp_path / "a.jsonl", *[GOOD] * 5)
    outputs = both_at_once(small, path, tmp_path)
    tokens = arrays.preferences((path,), small, Limits())
    assert [int(out) for out, _ in outputs] == [tokens.ids.sum()] * 2
    (folder,) = cache.cache_folder().iterdir()
    assert folder.stat().st_mode & 0o055 == 0o055, "others may read what this user made"


def test_a_large_vocabulary_takes_more_bytes(small, tmp_path, monkeypatch):
    path = save(tmp_path / "a.jsonl", GOOD)
    for k, (size, dtype) in enumerate([(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)]):
        monkeypatch.setattr(small, "vocab_size", size)
        tokens = arrays.preferences(path, small, Limits(max_length=1000 + k))
        assert tokens.ids.dtype == dtype
        assert response(small, tokens.pair(0).chosen) == "Because."


def test_pair_lengths_count_the_rows_of_a_packed_pair(small, tmp_path):
    rows = [GOOD | {"chosen": "a" * k, "prompt": "p" * k} for k in (1, 2, 30)]
    tokens = arrays.preferences(save(tmp_path / "a.jsonl", *rows), small, Limits())
    pairs = [tokens.pair(k) for k in range(3)]
    assert tokens.pair_lengths().tolist() == [sum(map(len, pair)) - 2 for pair in pairs]
    assert sum(len(part) for pair in pairs for part in pair) == len(tokens.ids)


# real data


def test_every_real_conversation_loads(mistral):
    path = shared("ultrachat.train.jsonl.gz")
    tokens = arrays.conversations((str(path),), mistral, Limits())
    rows = [row for _, row in readers.read_rows(path)]
    assert len(tokens) == len(rows) == 640
    starts = [0, *tokens.ends[:-1, 0]]
    for k, row in enumerate(rows):
        trained = tokens.parts(k)[0][tokens.mask[starts[k] : tokens.ends[k, 0]]]
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert said(mistral, tokens.parts(k)[0])[2::2] == [f"\n<|assistant|>\n{a}" for a in answers]
        assert mistral.decode(trained.tolist()) == "".join(answers)


def test_every_real_pair_loads(mistral, tmp_path):
    out = tmp_path / "pairs.jsonl"
    feedback.main([str(shared("ultrafeedback.train.jsonl.gz")), "--out", str(out)])
    tokens = arrays.preferences((str(out),), mistral, Limits())
    rows = [row for _, row in readers.read_rows(out)]
    counts = tokens.counts
    lost = [count for what, count in counts.items() if what.startswith(("dropped", "skipped"))]
    assert counts["rows"] == len(rows) > 500
    assert counts["kept"] == len(tokens) == len(rows) - sum(lost) > 500
    assert counts["cut: responses"] > 0
    at = cut = 0
    for row in rows:
        chosen, rejected = (mistral.render(row[side]).ids for side in ("chosen", "rejected"))
        prompt = mistral.prompt(row["chosen"][:-1])
        assert prompt == chosen[: len(prompt)] == rejected[: len(prompt)]
        if not row["chosen"][-1]["content"].strip() or not row["rejected"][-1]["content"].strip():
            continue
        pair, at = tokens.pair(at), at + 1
        if max(len(chosen), len(rejected)) <= 1024:
            assert pair.prompt.tolist() == prompt
            assert response(mistral, pair.chosen) == row["chosen"][-1]["content"]
            assert response(mistral, pair.rejected) == row["rejected"][-1]["content"]
        else:
            cut += 1
            assert len(pair.prompt) <= min(len(prompt), 512)
            assert len(pair.prompt) + max(map(len, pair[1:])) <= 1024
            for part, ids in ((pair.chosen, chosen), (pair.rejected, rejected)):
                assert part.tolist() == ids[len(prompt) :][: len(part)]
    assert at == len(tokens) and cut >= counts["cut: responses"]


def test_memory_does_not_grow_with_the_file(small, tmp_path):
    """As in ultrafeedback_binarized, columns that are not read make most of a row."""
    side = " ".join(WORDS * 3)
    unread = json.dumps("of some small words " * 450)
    row = json.dumps({"prompt": "%d", "chosen": side, "rejected": side + " cat"})[:-1]
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for k in range(6000):
            file.write(f'{row % k}, "messages": {unread}}}\n')
    size = path.stat().st_size
    assert size > 55e6
    done = subprocess.run(
        [sys.executable, WORKERS / "memory.py", small.path, path],
        text=True,
        capture_output=True,
        cwd=Path(arrays.__file__).parent.parent,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < size / 4
