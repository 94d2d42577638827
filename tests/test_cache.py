"""The token cache: nothing in it is believed that is not as it was written."""

import os
import shutil
from pathlib import Path

import pytest

from helpers import GOOD, Limits, chat, save
from run_helpers import both_at_once
from zephyr.data import arrays
from zephyr.data.cache import cache_folder

pytestmark = pytest.mark.usefixtures("own_cache")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["about.json", "ends.npy", "ids", "mask", "places.npy", arrays.SUMS]
)
@pytest.mark.parametrize(
    "harm",
    [
        shorten,
        zero,
        flip,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + bytes(9) + path.read_bytes()),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["cut", "zero", "flip", "purged", "empty", "twice", "a folder"],
)
def test_a_damaged_entry_is_made_again(small, tmp_path, capsys, name, harm):
    path = save(tmp_path / "a.jsonl", GOOD, GOOD | {"messages": chat("a", "b")})
    for read in (arrays.preferences, arrays.conversations):
        shutil.rmtree(cache_folder(), ignore_errors=True)
        save(tmp_path / "a.jsonl", GOOD | {"messages": chat("a", "b")})
        first = read(path, small, Limits())
        ids, about = first.ids.tolist(), first.report()
        (entry,) = cache_folder().iterdir()
        before = {file.name: file.read_bytes() for file in entry.iterdir()}
        harm(entry / name)
        if {x.name: x.is_file() and x.read_bytes() for x in entry.iterdir()} == before:
            continue  # the mask of pairs is a zero already
        capsys.readouterr()
        again = read(path, small, Limits())
        said = capsys.readouterr().err
        assert said.startswith(f"{entry} is damaged: ") and said.endswith("; it is made again\n")
        assert said.count("\n") == 1
        assert (again.ids.tolist(), again.report()) == (ids, about)
        assert {file.name: file.read_bytes() for file in entry.iterdir()} == before
        assert list(cache_folder().iterdir()) == [entry]
        assert read(path, small, Limits()).digest == again.digest
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["a file", "a link to nothing", "an empty folder"])
def test_an_entry_that_is_no_entry_is_made_again(small, tmp_path, capsys, what):
    path = save(tmp_path / "a.jsonl", GOOD)
    arrays.preferences(path, small, Limits())
    (entry,) = cache_folder().iterdir()
    shutil.rmtree(entry)
    if what == "a file":
        entry.write_text("x")
    elif what == "an empty folder":
        entry.mkdir()
    else:
        entry.symlink_to("nothing")
    assert len(arrays.preferences(path, small, Limits())) == 1
    assert f"{entry} is damaged: " in capsys.readouterr().err
    assert list(cache_folder().iterdir()) == [entry] and entry.is_dir()


def test_what_killed_makers_left_goes_after_a_day(small, tmp_path):
    cache = cache_folder()
    for k, name in enumerate(("part-old", "part-busy", "part-new")):
        (cache / name / "dpo-1").mkdir(parents=True)
        (cache / name / "dpo-1" / "ids").write_bytes(b"x")
        for part in (cache / name / "dpo-1" / "ids", cache / name / "dpo-1", cache / name):
            if k < 2:
                os.utime(part, (1, 1))
    os.utime(cache / "part-busy" / "dpo-1" / "ids")  # written to just now
    (cache / ".reference-1.npy.x").touch()
    os.utime(cache / ".reference-1.npy.x", (1, 1))
    arrays.preferences(save(tmp_path / "a.jsonl", GOOD), small, Limits())
    assert sorted(p.name[:9] for p in cache.iterdir())[-2:] == ["part-busy", "part-new"]
    assert len(list(cache.iterdir())) == 3


def test_two_processes_that_mend_an_entry_at_once_both_succeed(small, tmp_path):
    (path,) = save(tmp_path / "a.jsonl", *[GOOD] * 5)
    total = int(arrays.preferences((path,), small, Limits()).ids.sum())
    (entry,) = cache_folder().iterdir()
    flip(entry / "ids")
    outputs = both_at_once(small, path, tmp_path)
    assert [int(out) for out, _ in outputs] == [total] * 2
    assert list(cache_folder().iterdir()) == [entry] and arrays._damage(entry) is None
