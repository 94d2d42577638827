"""Every way a weight file or an index can be wrong, and what is left when writing fails."""

import errno
import json
import os
import re
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zephyr import files
from zephyr.weights import locate, safetensor_files

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def raw(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file by hand."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(*offsets: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read(folder: Path) -> dict[str, safetensor_files.Stored]:
    return safetensor_files.stored(*locate.weight_files(folder))


def sharded(folder: Path, **changes: str) -> None:
    """Tensors a and b in two files; `changes` are put in the index."""
    save_file({"a": torch.ones(2)}, folder / A)
    save_file({"b": torch.ones(3)}, folder / B)
    weight_map = {"a": A, "b": B} | changes
    (folder / locate.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_headers_say_what_is_where(tmp_path):
    sharded(tmp_path)
    assert read(tmp_path) == {
        "a": safetensor_files.Stored(tmp_path / A, "a", (2,), "F32"),
        "b": safetensor_files.Stored(tmp_path / B, "b", (3,), "F32"),
    }
    one = tmp_path / "one"
    one.mkdir()
    tensors = {"w": torch.ones(2, 3).bfloat16(), "layers.0.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, one / locate.SINGLE)
    assert read(one) == {"w": safetensor_files.Stored(one / locate.SINGLE, "w", (2, 3), "BF16")}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "not a valid safetensors file: .*; fetch it again"),
        (
            lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "is a Git LFS pointer, not the data; run git lfs pull",
        ),
        (lambda p: p.write_bytes(b"GGUF" + bytes(90)), "is a GGUF file, for llama.cpp"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(90)), "is a pickle of torch.save"),
        (lambda p: raw(p, {}, length=1 << 63), "not a valid"),
        (lambda p: raw(p, {"a": entry(0, 8)}, b"1234567"), "not a valid"),
        (lambda p: raw(p, {"a": entry(0, 8)}, b"123456789"), "not a valid"),
        (lambda p: raw(p, b"{"), "not a valid"),
        (lambda p: raw(p, b'{"a":' * 100_000), "not a valid"),
        (lambda p: raw(p, {"a\n\x1b[2J": 3}), "not a valid"),
        (lambda p: raw(p, {"a": entry(0, -1)}), "not a valid"),
        (lambda p: raw(p, {"a": entry(0, 0, shape=[0, 1 << 64])}), "not a valid"),
        (lambda p: os.mkfifo(p), "cannot read: it is not a file"),
        (lambda p: raw(p, {"a": entry(0, 8, dtype="F7")}, bytes(8)), "not a valid"),
        (lambda p: raw(p, {"a": entry(0, 8, shape=[-2])}, bytes(8)), "not a valid"),
        (lambda p: raw(p, {"a": entry(0, 8, shape=[1 << 62, 4])}, bytes(8)), "not a valid"),
        (lambda p: raw(p, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "not a valid"),
        (lambda p: raw(p, {"a": entry(8, 16)}, bytes(16)), "not a valid"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, write, message):
    write(tmp_path / locate.SINGLE)
    where = re.escape(str(tmp_path / locate.SINGLE))
    with pytest.raises(ValueError, match=f"^{where}:? .*{message}") as raised:
        read(tmp_path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": "../" + B}, r"'../model-00002-of-00002.safetensors' is not the plain name"),
        ({"b": "/etc/model.safetensors"}, "is not the plain name"),
        ({"b": "sub\\model.safetensors"}, "is not the plain name"),
        ({"b": "C:model.safetensors"}, "is not the plain name"),
        ({"b": "model.bin"}, "'model.bin' is not the plain name of a safetensors file"),
        ({"b": ".."}, "'..' is not the plain name"),
        ({"b": "a\x1b[2J.safetensors"}, r"'a\\x1b\[2J.safetensors' is not the plain name"),
        ({"b": "x" * 5000 + ".safetensors"}, "'x+...x+.safetensors' is not the plain name"),
        ({"c\x1b[2J": B}, f"the index has 'c.x1b.2J' in {B}; no file holds it"),
        ({"b": "model-00003-of-00002.safetensors"}, "00003-of-00002.safetensors is missing from"),
        ({"b": A}, f"the index has b in {A}; no file holds it"),
        ({"c": B}, f"the index has c in {B}; no file holds it"),
        ({"a": B, "b": A}, f"the index has a in {B}; {A} holds it"),
        ({f"t{i}": f"model-{i}.safetensors" for i in range(1001)}, "lists 1003 files; 1000 is the"),
        ({"b": 3}, "weight_map must be an object of tensor: file name"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, changes, message):
    sharded(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_tensor_the_index_lacks(tmp_path):
    sharded(tmp_path)
    save_file({"a": torch.ones(2), "c": torch.ones(1)}, tmp_path / A)
    with pytest.raises(ValueError, match=f"{tmp_path}: the index has c in no file; {A} holds it"):
        read(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    sharded(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / B)
    with pytest.raises(ValueError, match=f"{B}: a is in {A} too"):
        read(tmp_path)


def test_a_link_that_leaves_the_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    sharded(folder)
    (folder / B).rename(tmp_path / "elsewhere.safetensors")
    (folder / B).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=f"{B} links out of the folder; hf download --local-dir"):
        read(folder)
    (tmp_path / "elsewhere.safetensors").rename(folder / "here.safetensors")
    (folder / B).unlink()
    (folder / B).symlink_to("here.safetensors")
    assert read(folder).keys() == {"a", "b"}
    (folder / B).unlink()
    (folder / B).symlink_to(B)
    with pytest.raises(ValueError, match=f"{B} is missing from the folder"):
        read(folder)
    (folder / B).unlink()
    (folder / B).symlink_to("here.safetensors")
    (tmp_path / "other").symlink_to(folder)  # the folder itself may be a link
    assert read(tmp_path / "other").keys() == {"a", "b"}


def test_no_weights_or_two_kinds(tmp_path):
    with pytest.raises(ValueError, match=r"has no model.safetensors and no model.safe.*json$"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "consolidated.00.pth").touch()
    pickles = "only consolidated.00.pth, pytorch_model.bin, and reading a pickle can run code"
    with pytest.raises(ValueError, match=pickles):
        read(tmp_path)
    sharded(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / locate.SINGLE)
    with pytest.raises(ValueError, match="has both model.safetensors and model.safetensors.index"):
        read(tmp_path)


def test_split():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 7, "f": 7}
    assert safetensor_files.group_by_size(sizes, 8) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert safetensor_files.group_by_size(sizes, 100) == [[*"abcdef"]]


def two_shards(folder):
    shapes = {"a": (2,), "b": (3, 1), "c": (1,)}
    ones = (torch.ones(shape).half() for shape in shapes.values())
    safetensor_files.write_shards(folder, [["a"], ["b", "c"]], torch.float16, ones)


def test_a_new_folder_is_complete_and_readable_by_all(tmp_path):
    target = tmp_path / "deep" / "model"
    before = os.umask(0o077)
    try:
        with files.new_folder(target, 30) as temp:
            files.write_json(temp / "config.json", {"a": 1})
            two_shards(temp)
            assert not target.exists()
    finally:
        os.umask(before)
    names = ["config.json", A, B, locate.INDEX]
    assert sorted(p.name for p in target.iterdir()) == names
    assert {oct(p.stat().st_mode & 0o777) for p in target.iterdir()} == {"0o644"}
    assert oct(target.stat().st_mode & 0o777) == "0o755"
    assert files.read_json(target / locate.INDEX) == {
        "metadata": {"total_size": 4 + 6 + 2},
        "weight_map": {"a": A, "b": B, "c": B},
    }
    assert load_file(target / B)["b"].tolist() == [[1], [1], [1]]
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_folder_is_written_with_one_file_in_memory_at_most(tmp_path):
    made = []

    def tensors():
        for _ in names:
            x = torch.ones(5)
            made.append(weakref.ref(x))
            assert sum(ref() is not None for ref in made) <= 7  # 5 of a file, 2 on their way
            yield x
            del x

    names = [f"x{k}" for k in range(9)]
    safetensor_files.write_shards(tmp_path, [names[:5], names[5:]], torch.float32, tensors())
    assert len(made) == 9 and len(safetensor_files.stored(*locate.weight_files(tmp_path))) == 9


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), "model: cannot write: .*No space left"),
        (files.SafetensorError("I/O error"), "model: cannot write: I/O error"),
        (ValueError("something else"), "^something else$"),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, failure, message):
    with pytest.raises(ValueError, match=message):
        with files.new_folder(tmp_path / "model", 0) as temp:
            two_shards(temp)
            raise failure
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="NaN or infinity in b; the weights are not saved"):
        values = iter([torch.ones(1), torch.tensor([torch.inf])])
        safetensor_files.write_shards(tmp_path, [["a", "b"]], torch.float32, values)
    with pytest.raises(ValueError, match=r"exists already; choose another name or move it away"):
        with files.new_folder(tmp_path, 0):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"model: cannot write: .*(Not a directory|File exists)"):
        with files.new_folder(tmp_path / "file" / "model", 0):
            pass
    with pytest.raises(ValueError, match=r"model takes [0-9,]+ bytes and the disk has \d"):
        with files.new_folder(tmp_path / "model", 10**18 * 1000):
            pass
