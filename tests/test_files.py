"""Rows in and out: every format reads the same rows; every broken file says what and where."""

import gzip
import json
import os
import random
import stat
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr import files
from zephyr.data.readers import BadRow, BadRows, expand, read_rows, write_rows, writing
from zephyr.files import atomic

ROWS = [
    {"prompt": "a\u2028b\x85c\x00d", "n": 1},
    {"prompt": "Grüße, 世界 \U0001f600", "list": [1, {"x": None}]},
    {"prompt": "", "n": -0.5},
]


def save(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines(rows=ROWS):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
@pytest.mark.parametrize("escape", [True, False])
def test_formats_read_the_same_rows(tmp_path, name, escape):
    for data in (
        "\n".join(json.dumps(row, ensure_ascii=escape) for row in ROWS),
        json.dumps(ROWS, indent=1, ensure_ascii=escape),
    ):
        if ".jsonl" in name and data.startswith("["):
            continue
        path = save(tmp_path / name, data.encode())
        assert list(read_rows(path)) == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, 1)]


def test_parquet_is_read_over_row_groups(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": i, "messages": [{"role": "user", "content": str(i)}]} for i in range(1000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    assert list(read_rows(path)) == [(f"{path}:{i + 1}", row) for i, row in enumerate(rows)]
    bad = BadRows()
    assert len(list(read_rows(path, bad))) == bad.rows == 1000


def test_parquet_damage(tmp_path, monkeypatch):
    for data, why in [
        (b"", "is empty"),
        (b"PAR1 and no more", "cannot read past row 0: "),
        (b'{"a": 1}\n', "is not a parquet file; name it for what it is"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ]:
        with pytest.raises(ValueError, match=f"a.parquet:? {why}"):
            list(read_rows(save(tmp_path / "a.parquet", data)))
    with pytest.raises(ValueError, match="cannot read: No such file"):
        list(read_rows(tmp_path / "b.parquet"))
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "c.parquet"
    far = pyarrow.array([1 << 62], pyarrow.timestamp("s"))  # no date that Python knows
    parquet.write_table(
        pyarrow.table([far.cast("int64").view(pyarrow.timestamp("us"))], names=["a"]), path
    )
    with pytest.raises(ValueError, match="c.parquet: cannot read past row 0: ") as raised:
        list(read_rows(path))
    assert str(raised.value).isprintable()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow; pip install zephyr-dpo\[parquet\]"):
        list(read_rows(tmp_path / "a.parquet"))


def test_blank_lines_count_and_crlf_and_bom_vanish(tmp_path):
    path = save(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(read_rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]
    path = save(tmp_path / "a.json", b'\xef\xbb\xbf \r\n[{"a": 1}\r\n,\r\n{"a": 2} ]\r\n')
    assert list(read_rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]


def test_the_offset_of_a_byte_counts_the_mark_before_it(tmp_path):
    data = b'\xef\xbb\xbf{"a": "\xff"}'
    for name, row in (("a.jsonl", data), ("a.json", b"\xef\xbb\xbf[" + data[3:] + b"]")):
        at = row.index(b"\xff")
        with pytest.raises(ValueError, match=f"byte 0xff at offset {at} "):
            list(read_rows(save(tmp_path / name, row)))


def test_parquets_maps_may_have_keys_that_are_no_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.map_(pyarrow.binary(), pyarrow.int64())
    parquet.write_table(
        pyarrow.table({"a": pyarrow.array([[(b"k", 1)]], kind)}), path := tmp_path / "a.parquet"
    )
    assert list(read_rows(path, columns={"a"})) == [(f"{path}:1", {"a": {b"k": 1}})]


BAD = {
    b'{"a": 1': "malformed JSON: Expecting ',' delimiter: ",
    b"nothing": "malformed JSON: Expecting value: column 1",
    b'{"a": 1} {"a": 2}': "malformed JSON: Extra data: column 10",
    b'"text"': "a row is a JSON object, this is a str",
    b"null": "a row is a JSON object, this is a NoneType",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "malformed JSON: nested too deeply",
    b'{"a": "\\ud83d \\uDe00"}': r"the lone surrogate \\ud83d is not text",
    b'{"\\uDBFF": 1}': r"the lone surrogate \\udbff is not text",
    b'{"\\udfff": 1}': r"the lone surrogate \\udfff is not text",
    b'{"a": "\xff"}': "byte 0xff at offset 7 of it is not UTF-8",
    b'{"a": "\xed\xa0\x80"}': "byte 0xed at offset 7 of it is not UTF-8",
}


@pytest.mark.parametrize("line", BAD, ids=[line[:20] for line in BAD])
def test_bad_row_has_its_line_and_can_be_skipped(tmp_path, line):
    path = save(tmp_path / "a.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": "\\ud83d\\ude00"}\n')
    rows = read_rows(path)
    assert next(rows) == (f"{path}:1", {"a": 1})
    with pytest.raises(BadRow, match=f"^{path}:3: {BAD[line]}") as error:
        next(rows)
    assert "\n" not in str(error.value)

    bad = BadRows("skip")
    assert [where for where, _ in read_rows(path, bad)] == [f"{path}:1", f"{path}:4"]
    assert (bad.rows, bad.skipped) == (3, 1)


@pytest.mark.parametrize("element", [b"[]", b'{"a": "\\ud800"}'])
def test_bad_element_of_a_list_can_be_skipped(tmp_path, element):
    path = save(tmp_path / "a.json", '[ {"ü": 1},\n'.encode() + element + b', {"b": 2}]')
    bad = BadRows("skip")
    assert list(read_rows(path, bad)) == [(f"{path}:1", {"ü": 1}), (f"{path}:3", {"b": 2})]
    assert bad.messages[0].startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    "data, why",
    [
        (b"[]", "a.json is empty"),
        (b"[] []", "a.json: malformed JSON: Extra data: line 1 column 4"),
        (b'[{"a": 1}', "a.json: malformed JSON: Expecting ',' delimiter: line 1 column 10"),
        (b'[{"a": 1},\n{"a": 2,\n', "a.json: malformed JSON: Expecting property name .* line 3"),
        (b'[{"a": "\xff"}]', "a.json: byte 0xff at offset 8 is not UTF-8"),
        (b"[" * 100_000, "a.json: malformed JSON: nested too deeply"),
        (b"[1]", "a.json:1: a row is a JSON object, this is a int"),
    ],
)
def test_broken_list(tmp_path, data, why):
    with pytest.raises(ValueError, match=why):
        list(read_rows(save(tmp_path / "a.json", data)))


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"\n\n<!DOCTYPE html><html>", "is an HTML or XML page, not data"),
        (b"<?xml?>", "is an HTML or XML page, not data"),
        (b"\xff\xfe" + '{"a": 1}'.encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
        (b"\xfe\xff" + '{"a": 1}'.encode("utf-16-be"), "is UTF-16 text; save it as UTF-8"),
        (b"PAR1\x15\x04", "is a parquet file; rename it to .parquet"),
        (gzip.compress(b"{}", mtime=0), "is gzip-compressed; add .gz to its name"),
        (b' [{"a": 1}]', "is a JSON list, not an object per line; name it .json"),
    ],
)
def test_wrong_file_is_recognised(tmp_path, data, why):
    with pytest.raises(ValueError, match=f"a.jsonl {why}"):
        list(read_rows(save(tmp_path / "a.jsonl", data)))
    with pytest.raises(ValueError, match=f"a.jsonl.gz {why}"):
        list(read_rows(save(tmp_path / "a.jsonl.gz", data)))


def test_gzip_in_name_only(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(ValueError, match="is not gzip-compressed; take .gz off its name"):
        list(read_rows(path))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="a.jsonl.gz is a Git LFS pointer"):
        list(read_rows(path))


def test_damaged_gzip(tmp_path):
    noise = random.Random(0).randbytes(50_000).hex()
    whole = gzip.compress(lines() * 100 + json.dumps({"a": noise}).encode() + b"\n")
    path = tmp_path / "a.jsonl.gz"
    for data, why in [
        (whole[:-20], "end-of-stream"),
        (whole[:-20] + bytes(20), ""),
        (whole[:-8] + b"12345678", "CRC check failed"),
        (whole[:2], "Compressed"),
        (whole[:9000] + b"\xff" * 9000 + whole[18000:], ""),
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"gz: gzip data damaged after line \d+: .*{why}"):
            list(read_rows(path, BadRows("skip")))


def test_unreadable(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl: cannot read: No such file"):
        list(read_rows(tmp_path / "a.jsonl"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="folder.json is a folder; name a file in it"):
        list(read_rows(tmp_path / "folder.json"))
    with pytest.raises(ValueError, match="a.csv is none of .jsonl, .json, .jsonl.gz, .json.gz, .p"):
        list(read_rows(tmp_path / "a.csv"))


def test_what_a_message_quotes_is_one_short_line():
    deep: list = []
    for _ in range(2000):
        deep = [deep]
    texts = ["x" * 10**6, "\x1b[2J\n\u2028\u202e\0", ""]
    for value in (
        *texts,
        deep,
        {"a": deep},
        b"\x1b" * 999,
        1 << 99_999,
        10**4000,
        None,
        [["\n" * 99] * 9] * 9,
        {"\x1b": 1},
        ("a" * 99,) * 99,
    ):
        assert files.shown(value).isprintable() and 0 < len(files.shown(value)) <= 80
    for text in texts:
        assert files.plain(text).isprintable() and len(files.plain(text)) <= 80
    assert files.shown({"role": "user"}) == "{'role': 'user'}"
    assert files.plain("model.norm.weight") == "model.norm.weight"
    assert files.plain("a\x1b[2J") == r"'a\x1b[2J'"


def test_lines_are_streamed(tmp_path):
    path = save(tmp_path / "a.jsonl", lines([{"a": "x" * 1000}]) * 10_000)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_skipping_is_for_one_percent():
    def skipping(rows, broken):
        bad = BadRows("skip")
        for i in range(rows):
            bad.seen()
            with bad.guard():
                if i < broken:
                    raise BadRow(f"a.jsonl:{i + 1}: broken")
        return bad

    for rows, broken in (0, 0), (99, 0), (100, 1), (3000, 30):
        skipping(rows, broken).check()
    for rows, broken in (50, 1), (99, 1), (100, 2), (3000, 31):
        with pytest.raises(
            ValueError,
            match=f"^{broken} of {rows} rows are bad, more than the 1 % "
            "that may be skipped; the first: a.jsonl:1: broken$",
        ):
            skipping(rows, broken).check()
    assert skipping(100, 0).report() == ""
    report = skipping(3000, 25).report().split("\n")
    assert report[0] == "skipped 25 bad rows of 3000; the first 20:"
    assert report[1:] == [f"  a.jsonl:{i}: broken" for i in range(1, 21)]


def test_guard_lets_other_errors_through():
    with pytest.raises(BadRow), BadRows("stop").guard():
        raise BadRow("x")
    with pytest.raises(KeyError), BadRows("skip").guard():
        raise KeyError("x")
    with pytest.raises(ValueError, match="on-bad-row 'ignore' is neither stop nor skip"):
        BadRows("ignore")


def test_expand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl", "sub/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe")

    def names(*paths):
        return list(map(str, expand(paths)))

    assert names() == []
    assert names("b.jsonl", "a.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names("sub/d.jsonl", "[ab].jsonl") == ["sub/d.jsonl", "a.jsonl", "b.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "c[1].jsonl", "sub/d.jsonl"]
    assert names("c[1].jsonl") == ["c[1].jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/a.jsonl") == [f"{tmp_path}/a.jsonl"]
    for paths, why in [
        (["x.jsonl"], "x.jsonl: no such file"),
        (["x*"], r"x\*: no such file"),
        (["org/pairs_v1"], r"no such file; from the Hub: hf download org/pairs_v1 --repo-type"),
        (["org/pairs.jsonl"], r"org/pairs.jsonl: no such file$"),
        (["sub/"], r"sub/ is a folder; name its files, as sub/\*.jsonl"),
        (["pipe"], "pipe is a pipe or a device; data is read twice"),
        (["a.jsonl", "*.jsonl"], "a.jsonl is given twice; its rows would count"),
    ]:
        with pytest.raises(ValueError, match=why):
            expand(paths)


@pytest.mark.parametrize("name", ["a.jsonl", "new/folder/a.jsonl.gz"])
def test_written_rows_come_back_in_the_same_bytes(tmp_path, name):
    path = tmp_path / name
    write_rows(path, ROWS)
    first = path.read_bytes()
    assert [row for _, row in read_rows(path)] == ROWS
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    os.utime(path, (0, 0))
    write_rows(str(path), iter(ROWS))
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == ["a.jsonl.gz" if ".gz" in name else "a.jsonl"]
    if ".gz" in name:
        assert first[4:8] == bytes(4)  # the time of the header
    else:
        assert "世界".encode() in first and first.count(b"\n") == len(ROWS)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text(),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.text()
                | st.floats(allow_nan=False, allow_infinity=False),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=5,
            ),
        ),
        min_size=1,
    )
)
def test_any_rows_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    write_rows(path, rows)
    assert [row for _, row in read_rows(path)] == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_failed_write_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    write_rows(path, ROWS)
    with pytest.raises(KeyError), writing(path) as write:
        write({"a": 1})
        raise KeyError
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [{"a": float("nan")}])
    assert [row for _, row in read_rows(path)] == ROWS and os.listdir(tmp_path) == [name]


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(ValueError, match="a.txt: rows are written as .jsonl or .jsonl.gz"):
        write_rows(tmp_path / "a.txt", [])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/a.jsonl: cannot write: (File exists|Not a dir)"):
        write_rows(tmp_path / "file/a.jsonl", [])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder.jsonl: cannot write: Is a directory"):
        write_rows(tmp_path / "folder.jsonl", ROWS)
    with pytest.raises(ValueError, match="b: cannot write: No space left"), atomic(tmp_path / "b"):
        raise OSError(28, "No space left on device")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.jsonl"]


def test_json_that_is_none(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config\.json: cannot read: No such file"):
        files.read_json(path)
    for text, message in {
        '{"a": 1,': "malformed JSON",
        "3": "holds a JSON int, not an object",
        "[" * 100_000: "malformed JSON: nested too deeply$",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.json.*{message}"):
            files.read_json(path)
    path.write_bytes(b'{"\xff": 1}')
    with pytest.raises(ValueError, match="malformed JSON"):
        files.read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="config.json: cannot read: it is not a file"):
        files.read_json(path)
