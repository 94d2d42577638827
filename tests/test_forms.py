"""Every public form of a conversation and of a pair is read; what would be lost is refused by
name."""

import json
import re
from pathlib import Path

import pytest

from helpers import Limits, chat, gpt, human, save, scored, shared
from zephyr import feedback
from zephyr.data import arrays, forms, readers
from zephyr.tokenizer import conversation

pytestmark = pytest.mark.usefixtures("own_cache")


def said(*contents, system=""):
    return [(m["role"], m["content"]) for m in chat(*contents, system=system)]


HI = said("Hi", "Yo")
TALKS = {
    "messages": ({"messages": chat("Hi", "Yo")}, HI),
    "a system column": (
        {"messages": chat("Hi", "Yo"), "system": "Be kind."},
        said("Hi", "Yo", system="Be kind."),
    ),
    "the same system twice": (
        {"messages": chat("Hi", "Yo", system="Be kind."), "system_prompt": "Be kind. "},
        said("Hi", "Yo", system="Be kind. "),
    ),
    "an empty system message": (
        {"messages": chat("Hi", "Yo", system=" "), "system": "Be kind."},
        said("Hi", "Yo", system="Be kind."),
    ),
    "a blank system": ({"messages": chat("Hi", "Yo"), "system": " "}, HI),
    "ShareGPT": (
        {"conversations": gpt("Hi", "Yo", "a", "b"), "id": "x_0"},
        said("Hi", "Yo", "a", "b"),
    ),
    "ShareGPT's system": (
        {"conversations": gpt("Hi", "Yo", system="s")},
        said("Hi", "Yo", system="s"),
    ),
    "ShareGPT's other names": (
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Yo"}]},
        HI,
    ),
    "ShareGPT with empty keys": (
        {
            "conversations": [
                m | {"weight": None, "markdown": "", "text": []} for m in gpt("Hi", "Yo")
            ]
        },
        HI,
    ),
    "ShareGPT in messages": ({"messages": gpt("Hi", "Yo")}, HI),
    "roles in conversations": ({"conversations": chat("Hi", "Yo")}, HI),
    "both, the same": ({"conversations": gpt("Hi", "Yo"), "messages": chat("Hi", "Yo")}, HI),
    "one of them null": ({"conversations": gpt("Hi", "Yo"), "messages": None}, HI),
    "one of them empty": ({"conversations": gpt("Hi", "Yo"), "messages": []}, HI),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Yo"}, HI),
    "Alpaca without input": ({"instruction": "Hi", "output": "Yo"}, HI),
    "Alpaca's input": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below ..."},
        said("Add.\n1 2", "3"),
    ),
    "Alpaca's system": (
        {"instruction": "Hi", "input": None, "output": "Yo", "system": "s", "history": []},
        said("Hi", "Yo", system="s"),
    ),
    "a transcript as instruction": (
        {"instruction": human("a", "b", "c"), "output": "d"},
        said("a", "b", "c", "d"),
    ),
    "null and empty keys": (
        {
            "messages": [
                m
                | {
                    "name": None,
                    "tool_calls": [],
                    "function_call": {"name": None, "arguments": " "},
                }
                for m in chat("Hi", "Yo")
            ],
            "tools": "[]",
            "images": [],
            "functions": None,
        },
        HI,
    ),
}


@pytest.mark.parametrize("name", TALKS)
def test_every_form_of_a_conversation(name, tokenizer, tmp_path):
    row, wanted = TALKS[name]
    assert forms.talk(row) == wanted
    tokens = arrays.conversations(save(tmp_path / "a.jsonl", row), tokenizer, Limits())
    messages = [{"role": role, "content": content} for role, content in wanted]
    assert tokens.parts(0)[0].tolist() == tokenizer.render(messages).ids


A, B = {"chosen": "A", "rejected": "B"}, said("Hi")
FULL = {"chosen": chat("Hi", "A"), "rejected": chat("Hi", "B")}
LONG = {"chosen": chat("Hi", "Yo", "Bye", "A"), "rejected": chat("Hi", "Yo", "Bye", "B")}
SIDES = {"chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}
FLAT = {"chosen": human("Hi", "A"), "rejected": human("Hi", "B")}
PAIRS = {
    "text": ({"prompt": "Hi"} | A, B),
    "a system column": ({"prompt": "Hi", "system": "s"} | A, said("Hi", system="s")),
    "a system column beside messages": (FULL | {"system": "s"}, said("Hi", system="s")),
    "no system": ({"prompt": "Hi", "system": None} | A, B),
    "Orca": ({"system": "s", "question": "Hi"} | A, said("Hi", system="s")),
    "Orca without system": ({"system": "", "question": "Hi"} | A, B),
    "prompt and question, the same": ({"prompt": "Hi", "question": "Hi"} | A, B),
    "Alpaca": ({"instruction": "Add.", "input": "1 2", "output": None} | A, said("Add.\n1 2")),
    "Alpaca without input": ({"instruction": "Hi", "input": ""} | A, B),
    "ShareGPT": ({"conversations": gpt("Hi", "Yo", "Bye")} | SIDES, said("Hi", "Yo", "Bye")),
    "ShareGPT's lists": (
        {"conversations": gpt("Hi", system="s")} | {name: [side] for name, side in SIDES.items()},
        said("Hi", system="s"),
    ),
    "whole ShareGPT conversations": ({"chosen": gpt("Hi", "A"), "rejected": gpt("Hi", "B")}, B),
    "messages with their prompt": (FULL | {"prompt": "Hi"}, B),
    "the prompt without its space": (FULL | {"prompt": " Hi\n"}, B),
    "an empty prompt": (FULL | {"prompt": ""}, B),
    "the first message": (LONG | {"prompt": "Hi"}, said("Hi", "Yo", "Bye")),
    "the last message": (LONG | {"prompt": "Bye"}, said("Hi", "Yo", "Bye")),
    "the first turns": (LONG | {"prompt": chat("Hi", "Yo")}, said("Hi", "Yo", "Bye")),
    "all turns": (LONG | {"prompt": chat("Hi", "Yo", "Bye")}, said("Hi", "Yo", "Bye")),
    "instruction and input, whole": (
        {
            "instruction": "Add.",
            "input": "1 2",
            "chosen": chat("Add.\n1 2", "A"),
            "rejected": chat("Add.\n1 2", "B"),
        },
        said("Add.\n1 2"),
    ),
    "transcripts": (FLAT, B),
    "transcripts with a prompt": (FLAT | {"prompt": "Hi"}, B),
    "transcripts with a transcript": (FLAT | {"prompt": "\n\nHuman: Hi\n\nAssistant:"}, B),
    "a transcript and text": (
        {"prompt": human("Hi", "Yo", "Bye") + "\n\nAssistant:"} | A,
        said("Hi", "Yo", "Bye"),
    ),
    "a transcript that is stripped": ({"prompt": "Human: Hi\n\nAssistant: "} | A, B),
    "a transcript and system": ({"prompt": human("Hi"), "system": "s"} | A, said("Hi", system="s")),
    "a transcript and messages": (
        {"prompt": human("Hi", "Yo", "Bye") + "\n\nAssistant:"} | LONG,
        said("Hi", "Yo", "Bye"),
    ),
    "null and empty keys": (
        {
            side: [m | {"name": None, "tool_calls": []} for m in messages]
            for side, messages in FULL.items()
        },
        B,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_form_of_a_pair(name, tokenizer, tmp_path):
    row, wanted = PAIRS[name]
    assert forms.preference(row) == (wanted, "A", "B")
    bare = wanted if wanted[0][1] else wanted[1:]
    assert forms.preference(row, system=False) == (bare, "A", "B")
    pair = arrays.preferences(save(tmp_path / "a.jsonl", row), tokenizer, Limits()).pair(0)
    messages = [{"role": role, "content": content} for role, content in wanted]
    assert pair.prompt.tolist() == tokenizer.prompt(messages)
    assert [tokenizer.decode(ids.tolist()) for ids in pair[1:]] == ["A", "B"]


def test_the_page_shows_lines_that_are_read():
    page = (Path(__file__).parent.parent / "docs" / "operate" / "data.md").read_text()
    talks, pairs = (part for part in page.split("\n### ") if part[:4] in ("dSFT", "dDPO"))

    def examples(part):
        quoted = [text for text in re.findall(r"`({.*?})`", part) if "..." not in text]
        return [json.loads(text) for text in quoted]

    assert len(examples(talks)) == 3
    for row in examples(talks):
        assert row.keys() <= forms.TALK and forms.talk(row)[-1][0] == "assistant"
    assert len(examples(pairs)) == 5
    for row in examples(pairs):
        assert row.keys() <= forms.PAIR and forms.preference(row)[1] in ("Yo", "3", " Yo")
    named = re.findall(r"`(\w+)`", page)
    assert {*forms.TALK, *forms.PAIR, *forms.SPEAKERS} <= {*named, *re.findall(r'"(\w+)"', page)}


LOST = "would be lost: it is not read; write what it says into the prompt's text or messages"
RENDERED = [
    ("<|user|>\nHi</s>\n<|assistant|>\n", "'<|user|>' at its start"),
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "'<|im_start|>' at its start"),
    ("[INST] Hi [/INST]", "'[INST]' at its start"),
    ("<s>[INST] Hi [/INST]", "'[INST]' at its start"),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi", "'<|begin_of_text|>' at"),
    ("<bos><start_of_turn>user\nHi<end_of_turn>\n", "'<bos>' at its start"),
    ("<｜User｜>Hi", "'<｜User｜>' at its start"),
    ("Hi</s>", "'</s>' at its end"),
    ("<s>Hi</s>", "'</s>' at its end"),
    ("Hi<|endoftext|>\n", "'<|endoftext|>' at its end"),
    ("Hi<|eot_id|>", "'<|eot_id|>' at its end"),
    ("Be kind.\n<|im_start|>assistant\n", "'<|im_start|>assistant' at its end"),
    ("Hi [/INST] ", "'[/INST]' at its end"),
    ("Hi<end_of_turn>\n<start_of_turn>model\n", "'<start_of_turn>model' at its end"),
    ("Hi\n\n### Response:", "'### Response:' at its end"),
]
BAD_TALKS = [
    ({"history": [["a", "b"]]}, f"history [['a', 'b']] {LOST}"),
    ({"tools": '[{"name": "f"}]'}, f'tools \'[{{"name": "f"}}]\' {LOST}'),
    ({"functions": [{"name": "f"}]}, f"functions [{{'name': 'f'}}] {LOST}"),
    ({"images": ["a.png"]}, f"images ['a.png'] {LOST}"),
    ({"context": "Once upon"}, f"context 'Once upon' {LOST}"),
    ({"system": 5}, "system must be text, got 5"),
    (
        {"messages": chat("Hi", "Yo", system="a"), "system": "b"},
        "system 'b' contradicts the system message 'a'",
    ),
    ({"conversations": gpt("a", "b")}, "messages and conversations differ"),
    (
        {"messages": [m | {"weight": 1, "name": None} for m in chat("a", "b")]},
        "message 0 has 'weight': 1, which would be lost",
    ),
    (
        {
            "messages": None,
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "b"},
            ],
        },
        "conversations: message 1 is from 'function_call'; known are human, user, system, gpt",
    ),
    (
        {"messages": None, "conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]},
        "conversations: message 0 must have role and content",
    ),
    (
        {"messages": None, "conversations": [m | {"weight": 0} for m in gpt("a", "b")]},
        "conversations: message 0 has 'weight': 0, which would be lost",
    ),
    (
        {"messages": None, "conversations": [*gpt("a"), {"from": ["x"], "value": "b"}]},
        "conversations: message 1 is from ['x']; known are",
    ),
    ({"messages": None, "instruction": "a"}, "has no field 'output'; it has 'instruction'"),
    ({"messages": None, "output": "a"}, "has no field 'messages', 'conversations' or"),
    ({"messages": None, "input": "a", "output": "b"}, f"input 'a' {LOST}"),
    (
        {"messages": None, "instruction": "a", "input": 5, "output": "b"},
        "input must be text, got 5",
    ),
    (
        {"messages": None, "instruction": "a", "output": 5},
        "output: message 1 has content of type int, not text",
    ),
    ({"messages": None, "instruction": "a", "output": " "}, "turn 1, the assistant's, is empty"),
    (
        {"messages": chat("\n\nHuman: a\n\nAssistant:", "b")},
        "the user's text has a chat template's '\\n\\nHuman:' at its start",
    ),
    *(
        ({"messages": chat(text, "b")}, f"the user's text has a chat template's {mark}")
        for text, mark in RENDERED
    ),
    *(
        ({"messages": chat("a", text)}, f"the assistant's text has a chat template's {mark}")
        for text, mark in RENDERED
    ),
    (
        {"messages": chat("a", "b", system="[INST] a")},
        "the system's text has a chat template's '[INST]' at its start",
    ),
]
BAD_PAIRS = [
    ({"history": [["a", "b"]]}, f"history [['a', 'b']] {LOST}"),
    ({"tools": [{"a": 1}]}, f"tools [{{'a': 1}}] {LOST}"),
    ({"input": "more"}, f"input 'more' {LOST}"),
    ({"system": ["s"]}, "chosen: system must be text, got ['s']"),
    ({"question": "Why?"}, "prompt 'Hi' and question 'Why?' differ; keep the one that was asked"),
    (FULL | {"prompt": "Ho" * 99}, "the prompt's user says 'HoHoHo"),
    (
        FULL | {"prompt": chat("Ho")},
        "the prompt's user says 'Ho', where chosen has the user's 'Hi'",
    ),
    (
        LONG | {"prompt": chat("Hi", "No", "Bye")},
        "the prompt's assistant says 'No', where chosen has the assistant's 'Yo'",
    ),
    (
        FULL | {"prompt": chat("Hi", "Yo", "Bye")},
        "the prompt's assistant says 'Yo', where chosen has the user's 'Hi'",
    ),
    (
        FULL | {"prompt": chat("Hi", system="s")},
        "the prompt's system says 's', where chosen has the user's 'Hi'",
    ),
    (
        FULL | {"prompt": [{"role": "wizard", "content": "Hi"}]},
        "prompt: message 0 has role 'wizard'",
    ),
    (
        FLAT | {"prompt": human("Ho") + "\n\nAssistant:"},
        "the prompt's user says 'Ho', where chosen has the user's 'Hi'",
    ),
    (
        {
            "chosen": chat("Hi", "A", system="a"),
            "rejected": chat("Hi", "B", system="a"),
            "system": "b",
        },
        "chosen: system 'b' contradicts the system message 'a'",
    ),
    ({"prompt": human("Hi", "Sure, ")}, "chosen: turn 2 is the assistant's where the user"),
    (
        {"prompt": None, "conversations": gpt("Hi", "Yo")} | SIDES,
        "chosen: turn 2 is the assistant's where the user should speak",
    ),
    (
        {"prompt": None, "conversations": gpt("Hi")}
        | SIDES
        | {"chosen": {"from": "observation", "value": "A"}},
        "chosen: message 0 is from 'observation'; known are human, user",
    ),
    *(
        ({"prompt": text}, f"the user's text has a chat template's {mark}")
        for text, mark in RENDERED
    ),
    *(
        ({"rejected": text}, f"the assistant's text has a chat template's {mark}")
        for text, mark in RENDERED
    ),
    (
        {"chosen": "\n\nAssistant: A"},
        "the assistant's text has a chat template's '\\n\\nAssistant:'",
    ),
]
GOOD = {arrays.conversations: TALKS["messages"][0], arrays.preferences: PAIRS["text"][0]}
BAD = [(arrays.conversations, *bad) for bad in BAD_TALKS]
BAD += [(arrays.preferences, *bad) for bad in BAD_PAIRS]


@pytest.mark.parametrize("read, change, message", BAD)
def test_what_cannot_be_used_is_refused_by_name(read, change, message, tokenizer, tmp_path):
    good = GOOD[read]
    path = save(tmp_path / "a.jsonl", good, good | change)
    with pytest.raises(ValueError) as error:
        read(path, tokenizer, Limits())
    text = str(error.value)
    assert text.startswith(f"{path[0]}:2: {message}") and text.isprintable() and len(text) < 600
    path = save(tmp_path / "b.jsonl", *[good] * 100, good | change)
    tokens = read(path, tokenizer, Limits(on_bad_row="skip"))
    assert tokens.counts["skipped: bad row"] == 1 and len(tokens) == 100
    assert f"\n  {path[0]}:101: {message}" in tokens.report()


@pytest.mark.parametrize(
    "text",
    [
        "What does <|im_start|> mean?",
        "Is [INST] a token?",
        "a </s> b",
        "In HTML, <s>old</s>",
        "use `<|endoftext|>` to end a text",
        "x <|> y |> f",
        "<b>bold</b>",
        "a <| b |> c",
        "Human: Hi",
        "Write a play.\n\nHuman: ...",
        "Assistant:",
        "</s> is what Mistral ends with.",
        "def f():\n  ### Response: none\n  pass",
        "<|>",
        "<s>old</s> and new",
    ],
)
def test_a_text_about_templates_is_text(text):
    assert forms.talk({"messages": chat(text, text)})[1:] == said(text, text)[1:]
    assert forms.preference({"prompt": text, "chosen": text, "rejected": "B"}) == (
        said(text),
        text,
        "B",
    )


def test_no_real_text_is_taken_for_another_format():
    """Three of the 3220 answers of UltraFeedback's models do end in a literal `</s>`."""
    for name in ("ultrachat.train", "ultrachat.test", "ultrafeedback.train", "ultrafeedback.test"):
        for _, row in readers.read_rows(shared(f"{name}.jsonl.gz")):
            if "messages" in row:
                messages = conversation(row["messages"])
                assert forms.talk(row) == messages
                continue
            assert forms.turns("prompt", row["instruction"])[0]["content"] == row["instruction"]
            assert forms.rendered(row["instruction"]) is None
            for text in (c["response"] for c in row["completions"]):
                assert forms.rendered(text) == (("</s>", "end") if text.endswith("</s>") else None)


def test_scores_that_contradict_are_trained_and_counted(tokenizer, tmp_path):
    pair = {"prompt": "Hi"} | A
    odd = [float("nan"), None, "N/A", 3]
    rows = [
        pair | {"score_chosen": a, "score_rejected": b}
        for a, b in [
            (1, 2),
            (2, 1),
            (1, 1),
            (-1.5, 0),
            *((1, x) for x in odd),
            *((x, 1) for x in odd[:3]),
        ]
    ]
    tokens = arrays.preferences(save(tmp_path / "a.jsonl", *rows), tokenizer, Limits())
    assert len(tokens) == len(rows) == 11
    for k in range(len(rows)):
        assert tokenizer.decode(tokens.pair(k).chosen.tolist()) == "A"
    line = "trained as they stand: score_chosen below score_rejected"
    assert tokens.counts[line] == 3
    assert tokens.report().endswith(f"; {line} 3")
    del tokens
    dropped = save(tmp_path / "b.jsonl", rows[0] | {"chosen": ""}, rows[1])
    assert line not in arrays.preferences(dropped, tokenizer, Limits()).counts


# feedback reads the same prompts


@pytest.mark.parametrize(
    "row, message",
    [
        (scored(history=[["a", "b"]]), f"history [['a', 'b']] {LOST}"),
        (scored(input="more"), f"input 'more' {LOST}"),
        (scored(system="Be kind."), f"system 'Be kind.' {LOST}"),
        (scored("[INST] a [/INST]"), "the user's text has a chat template's '[INST]' at its start"),
        (scored(human("a", "b")), "instruction must end with what the user says"),
        (scored(human("a", " ", "c")), "turn 1, the assistant's, is empty"),
    ],
)
def test_feedback_refuses_what_it_would_lose(row, message):
    with pytest.raises(readers.BadRow) as error:
        list(feedback.binarize([("raw.jsonl:7", row)]))
    assert str(error.value).startswith(f"raw.jsonl:7: {message}")


def test_feedback_reads_a_transcript_and_drops_rendered_completions():
    counts = feedback.Counts()
    row = scored(human("a", "b", "c") + "\n\nAssistant:", history=[], system=None)
    row["completions"].append(row["completions"][0] | {"response": "d</s>", "overall_score": 10})
    (pair,) = feedback.binarize([("raw.jsonl:1", row)], counts=counts)
    assert pair["chosen"] == chat("a", "b", "c", "a")
    assert counts.noted["a chat template's mark at an end: dropped"] == 1
    assert forms.preference(pair) == (said("a", "b", "c"), "a", "b")
