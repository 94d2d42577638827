"""Only the columns that are used are read; the same line gives the same answer in every format;
files are told apart by what they are and not by how they are spelled."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Limits, chat, gpt, human, save, scored
from zephyr import feedback, files
from zephyr.data import arrays, forms, readers

pytestmark = pytest.mark.usefixtures("own_cache")

HI = [("system", ""), ("user", "Hi"), ("assistant", "Yo")]
GOOD = {
    arrays.conversations: {"messages": chat("Hi", "Yo")},
    arrays.preferences: {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
}


def parquet(path: Path, rows: list[dict], schema=None) -> tuple[str]:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return (str(path),)


def test_only_used_columns_are_read_from_parquet(tokenizer, tmp_path):
    import pyarrow
    from pyarrow import parquet

    far = pyarrow.array([1 << 62], "int64").view(pyarrow.timestamp("us"))  # no date Python knows
    odd = {"when": far, "nan": pyarrow.array([float("nan")]), "raw": pyarrow.array([b"\xff"])}
    for read, row in GOOD.items():
        columns = {name: pyarrow.array([value]) for name, value in row.items()} | odd
        names = [*columns, "when"]  # twice: which of the two is not asked
        table = pyarrow.table([*columns.values(), far], names=names)
        parquet.write_table(table, tmp_path / "a.parquet")
        assert len(read((str(tmp_path / "a.parquet"),), tokenizer, Limits())) == 1
        parquet.write_table(table.select([len(row)]), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=r"b.parquet:1: has no field .*; it has 'when'; --on"):
            read((str(tmp_path / "b.parquet"),), tokenizer, Limits())
    path = tmp_path / "raw.parquet"
    wide = pyarrow.Table.from_pylist([scored(principle="x")]).append_column("when", far)
    parquet.write_table(wide, path)
    out = tmp_path / "pairs.jsonl"
    feedback.main([str(path), "--out", str(out)])
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '"\\ud800"', '{"a": NaN}'])
def test_an_unused_value_of_json_stops_no_line(value, tokenizer, tmp_path):
    for read, row in GOOD.items():
        line = json.dumps(row)[:-1] + f', "unused": {value}}}'
        for name, text in (("a.jsonl", line), ("a.json", f"[{line}]")):
            (tmp_path / name).write_text(text)
            assert len(read((str(tmp_path / name),), tokenizer, Limits())) == 1
        used = json.dumps(row | {"system": 0}).replace('"system": 0', f'"system": {value}')
        (tmp_path / "a.jsonl").write_text(used)
        with pytest.raises(ValueError, match="a.jsonl:1: "):
            read((str(tmp_path / "a.jsonl"),), tokenizer, Limits())


def test_a_number_that_is_none_is_refused_where_one_is_needed(tmp_path, capsys):
    for value in ("NaN", "Infinity"):
        path = tmp_path / "raw.jsonl"
        line = json.dumps(scored())
        path.write_text(line.replace('"overall_score": 9', f'"overall_score": {value}'))
        with pytest.raises(SystemExit):
            feedback.main([str(path), "--out", str(tmp_path / "o.jsonl")])
        assert "raw.jsonl:1: completions[0].overall_score must be a finite number, not " in (
            capsys.readouterr().err
        )


texts = st.sampled_from(["a", "b", " ", "<|user|>\nHi", "a</s>", human("a", "b", "c"), human("a")])
plain = st.sampled_from(["a", "b"])
maybe = st.none() | texts
role = st.sampled_from(["user", "assistant", "system", "tool"]) | st.none()
who = st.sampled_from(["human", "gpt", "system", "function_call"]) | st.none()
name = st.sampled_from([None, None, "", "Bob"])
turn = st.fixed_dictionaries({"role": role, "content": maybe}, optional={"name": name})
share = st.fixed_dictionaries({"from": who, "value": maybe}, optional={"name": name})
good = st.lists(plain, min_size=2, max_size=4)
messages = st.lists(turn, max_size=3) | good.map(lambda texts: chat(*texts))
shares = st.lists(share, max_size=3) | good.map(lambda texts: gpt(*texts))
score = st.none() | st.sampled_from([1.0, 2.0, float("nan")])
more = {
    "system": maybe,
    "history": st.none() | st.just([]) | st.just([["a"]]),
    "input": maybe,
    "tools": st.none() | texts,
    "unused": score,
    "score_chosen": score,
    "score_rejected": score,
}
asked = {"prompt": maybe, "question": st.none() | plain, "instruction": st.none() | plain}
lines = {
    forms.talk: [
        st.fixed_dictionaries(
            {},
            optional={
                "messages": messages,
                "conversations": shares,
                "output": maybe,
                **asked,
                **more,
            },
        )
    ],
    forms.preference: [
        st.fixed_dictionaries(
            {},
            optional={"chosen": side, "rejected": side, **asked, **more, "conversations": shares},
        )
        for side in (texts, messages, shares, share)
    ],
}
EVERY = {forms.talk: forms.TALK, forms.preference: forms.PAIR}


def without_nulls(value):
    """As a writer that leaves null out."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


@pytest.mark.parametrize("read", lines)
@settings(max_examples=60)
@given(pick=st.data())
def test_the_same_line_gives_the_same_answer_in_every_format(read, pick, tmp_path_factory):
    rows = pick.draw(st.lists(pick.draw(st.sampled_from(lines[read])), min_size=1, max_size=6))
    rows = [{"unused": None} | row for row in rows]
    folder = tmp_path_factory.mktemp("rows")
    compact = [without_nulls(row) for row in rows]
    paths = [*save(folder / "a.jsonl", *rows), *save(folder / "b.jsonl", *compact)]
    (folder / "c.json").write_text(json.dumps(rows))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(Path(paths[0]).read_bytes()))
    names = sorted({key for row in rows for key in row})  # Arrow looks at the first row's alone
    full = [{name: row.get(name) for name in names} for row in rows]
    paths += [
        str(folder / "c.json"),
        str(folder / "d.jsonl.gz"),
        *parquet(folder / "e.parquet", full),
    ]

    def used(listed):
        """Which columns are there but unused is the file's in parquet, the line's in JSON."""
        return [name for name in listed[0].split(", ") if name in EVERY[read]]

    def answers(path):
        for _, row in readers.read_rows(path, columns=EVERY[read]):
            try:
                yield read(row), forms.below(row)
            except ValueError as error:
                yield re.sub("(?<=; it has ')[^']*", lambda m: str(used(m)), str(error))

    first, *others = [list(answers(path)) for path in paths]
    assert len(first) == len(rows)
    for path, other in zip(paths[1:], others, strict=True):
        assert other == first, path


def test_a_map_of_parquet_is_an_object(tmp_path, tokenizer):
    import pyarrow

    said = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
    rows = [{"messages": [list(m.items()) for m in chat("Hi", "Yo")]}]
    path = parquet(tmp_path / "a.parquet", rows, pyarrow.schema([("messages", said)]))
    tokens = arrays.conversations(path, tokenizer, Limits())
    assert tokens.parts(0)[0].tolist() == tokenizer.render(chat("Hi", "Yo")).ids


def test_arrow_fills_one_odd_line_into_every_line(tokenizer, tmp_path):
    odd = chat("Hi", "Yo")
    odd[1] |= {"tool_calls": [{"id": "1", "function": {"name": "f"}}], "name": "Bob"}
    rows = [{"messages": chat("Hi", "Yo")}] * 100 + [{"messages": odd}]
    first = [{"messages": [m | {"name": None, "tool_calls": None} for m in chat("Hi", "Yo")]}]
    path = parquet(tmp_path / "a.parquet", [*rows[-1:], *rows[:100]])
    with pytest.raises(ValueError, match="a.parquet:1: message 1 has 'name': 'Bob', which would"):
        arrays.conversations(path, tokenizer, Limits())
    assert len(arrays.conversations(path, tokenizer, Limits(on_bad_row="skip"))) == 100
    assert forms.talk(first[0]) == HI


def test_blank_is_what_carries_nothing():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    nested = {"a": None, "b": {"c": []}}
    for value in (None, "", " \n", "[]", "{}", [], {}, [None, ""], nested, deep):
        assert files.blank(value)
    for value in (0, False, 0.0, "a", [0], {"a": {"b": "c"}}, readers.UNREAD, b""):
        assert not files.blank(value)


# files


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_under_two_names_is_refused(tmp_path, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    Path("copy.jsonl").touch()
    Path("sub").mkdir()
    link(tmp_path / "a.jsonl", "b.jsonl")
    for again in ("b.jsonl", "b*.jsonl", "sub/../a.jsonl", "./a.jsonl", f"{tmp_path}/a.jsonl"):
        with pytest.raises(
            ValueError,
            match=r"^.*[ab].jsonl is given twice, also as a.jsonl; its "
            "rows would count double, so name it once$",
        ):
            readers.expand(["a.jsonl", again])
    with pytest.raises(ValueError, match="^a.jsonl is given twice; its rows would count double"):
        readers.expand(["a.jsonl", "copy.jsonl", "a.jsonl"])
    assert len(readers.expand(["a.jsonl", "copy.jsonl"])) == 2
    Path("c.jsonl").symlink_to("gone")
    with pytest.raises(ValueError, match="^c.jsonl: cannot read: No such file"):
        readers.expand(["c*.jsonl"])
    os.mkfifo("d.jsonl")
    with pytest.raises(ValueError, match="^d.jsonl is a pipe or a device"):
        readers.expand(["d*.jsonl"])


def test_brackets_in_names_that_exist_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[v1]/a.jsonl", "[v1]/b[2]*.jsonl", "v/c.jsonl", "v1/d.jsonl", "x/[y]/z/e.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def names(path):
        return list(map(str, readers.expand([path])))

    assert names("[v1]/a.jsonl") == ["[v1]/a.jsonl"]
    assert names("[v1]/*.jsonl") == ["[v1]/a.jsonl", "[v1]/b[2]*.jsonl"]
    assert names("[v1]/b[2]*.jsonl") == ["[v1]/b[2]*.jsonl"]
    assert names(f"{tmp_path}/[v1]/[ab].jsonl") == [f"{tmp_path}/[v1]/a.jsonl"]
    assert names("x/[y]/**/*.jsonl") == ["x/[y]/z/e.jsonl"]
    assert names("v[1]/*.jsonl") == ["v1/d.jsonl"]
    assert names("[v]/*.jsonl") == ["v/c.jsonl"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("b.jsonl", b""),
        ("b.jsonl", b"\n \n"),
        ("b.json", b"[ ]\n"),
        ("b.jsonl.gz", b""),
        ("b.json.gz", gzip.compress(b"[]", mtime=0)),
        ("b.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("b.parquet", b""),
        ("b.parquet", None),
    ],
)
def test_an_empty_file_among_full_ones_is_a_line(name, content, tokenizer, tmp_path, capsys):
    (full,) = save(tmp_path / "a.jsonl", GOOD[arrays.preferences])
    empty = tmp_path / name
    if content is None:
        import pyarrow

        parquet(empty, [], pyarrow.schema([("prompt", pyarrow.string())]))
    else:
        empty.write_bytes(content)
    for paths in ((full, str(empty)), (str(empty), full)):
        tokens = arrays.preferences(paths, tokenizer, Limits())
        assert tokens.report().splitlines()[1:] == [f"{empty} is empty: no row comes from it"]
        assert tokens.where(0) == f"{full}:1"
    with pytest.raises(ValueError, match=f"^{empty}: no row is left to train on$"):
        arrays.preferences((str(empty),), tokenizer, Limits())
    with pytest.raises(ValueError, match=f"^{empty} is empty$"):
        list(readers.read_rows(empty))

    (raw,) = save(tmp_path / "raw.jsonl", scored())
    feedback.main([raw, str(empty), "--out", str(tmp_path / "out.jsonl")])
    assert f"{empty} is empty: no row comes from it" in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        feedback.main([str(empty), "--out", str(tmp_path / "no.jsonl")])
    assert capsys.readouterr().err == f"zephyr.feedback: {empty}: no row is in it\n"
    assert not (tmp_path / "no.jsonl").exists()
