"""Runs that stop and go on, on other numbers of ranks too, and what a run folder accepts."""

import json
import os
import shutil
import subprocess
import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import filesystem

from helpers import WORKERS
from model_helpers import folder_of, model, pairs
from run_helpers import torchrun
from zephyr import config, losses, optim
from zephyr.config import DPOConfig, SFTConfig
from zephyr.distributed import fsdp, machine, signals
from zephyr.errors import BadCheckpoint, Preempted
from zephyr.files import read_json, write_json
from zephyr.run import checkpoint
from zephyr.run.folder import FREE, Run
from zephyr.weights import __main__ as weights_command
from zephyr.weights import config_json, hub

DIGESTS = {"data": "digest", "model": "another"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return folder_of(model(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def c(base, tmp_path) -> DPOConfig:
    """With values that a settings file must not bend, else a run would not know itself again."""
    lr = float(np.nextafter(5e-7, 1))
    return DPOConfig(
        model=str(base), data=('ä "b"',), out=str(tmp_path / "run"), steps=9, lr=lr, keep=0
    )


def start(ranks, base: Path, precision: str = "fp32"):
    m = fsdp.build(config_json.read(base), ranks, precision)
    hub.load(base, m)
    return m, optim.adamw(m, 0.1)


def train(m, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        losses.sft(m(pairs(step))).backward()
        optim.step(optimizer, 1e-3 / (1 + step), 1.0)


def state(m, optimizer) -> dict[str, torch.Tensor]:
    """Weights and moments by name, whole."""
    flat = checkpoint.tensors_of(m, optimizer)
    return {
        k: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for k, x in flat.items()
    }


def equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and len(a) > 60
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Notes:
    """A journal of one value."""

    def __init__(self, value: float | str = 0.0):
        self.value = value

    def state(self) -> dict:
        return {"notes": {"value": self.value}}

    def paused(self):
        return nullcontext()

    def phase(self, name: str):
        return nullcontext()


@pytest.mark.parametrize("save_async", [False, True], ids=["", "async"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_one_straight_through(ranks, base, c, precision, save_async, capsys):
    c = replace(c, save_async=save_async)
    straight = start(ranks, base, precision)
    train(*straight, 0, 6)
    first, run = start(ranks, base, precision), Run(c, DIGESTS, ranks)
    assert (run.load(*first), run.kept) == (0, {})
    train(*first, 0, 3)
    run.save(3, *first, Notes(0.1))
    train(*first, 3, 6)  # while an asynchronous save may still be writing
    run.wait()
    equal(state(*first), state(*straight))  # saving leaves no trace
    run.held.close()
    second, again = start(ranks, base, precision), Run(c, DIGESTS, ranks)
    assert "continues" not in capsys.readouterr().err
    assert (again.load(*second), again.kept["notes"]) == (3, [{"value": 0.1}])
    assert f"continues from {c.out}/checkpoints/step-000003\n" in capsys.readouterr().err
    assert all(float(s["step"]) == 3 for s in second[1].state.values())
    train(*second, 3, 6)
    equal(state(*second), state(*straight))


def test_a_save_in_the_background_has_the_state_it_was_called_with(ranks, base, c, monkeypatch):
    m, optimizer = start(ranks, base)
    train(m, optimizer, 0, 2)
    expected, gate = state(m, optimizer), threading.Event()
    write = checkpoint.Writer.write_data

    def late(self, *plan):
        gate.wait(60)
        return write(self, *plan)

    monkeypatch.setattr(checkpoint.Writer, "write_data", late)
    run = Run(c, DIGESTS, ranks)
    run.save(2, m, optimizer)
    train(m, optimizer, 2, 4)
    assert checkpoint.complete(run.out) == [] and not run.under_way.done()
    gate.set()
    run.wait()
    run.held.close()
    fresh = start(ranks, base)
    assert Run(c, DIGESTS, ranks).load(*fresh) == 2
    equal(state(*fresh), expected)
    assert any((x != expected[name]).any() for name, x in state(m, optimizer).items())


def test_without_memory_for_a_copy_training_waits(ranks, base, c, monkeypatch, capsys):
    run, trained = Run(c, DIGESTS, ranks), start(ranks, base)
    need = sum(x.nbytes for x in checkpoint.tensors_of(*trained).values())
    monkeypatch.setattr(machine, "host_memory", lambda: need - 1)
    for step in (1, 2):
        train(*trained, step - 1, step)
        run.save(step, *trained)
        assert run.under_way is None and checkpoint.complete(run.out)[-1].name.endswith(str(step))
    assert capsys.readouterr().err == (
        "training waits while a checkpoint is written, as with --no-save-async: a copy of its "
        f"state takes {need:,} bytes of host memory a rank, and {need - 1:,} are free\n"
    )
    run.held.close()
    fresh = start(ranks, base)
    assert Run(c, DIGESTS, ranks).load(*fresh) == 2
    equal(state(*fresh), state(*trained))


def test_pinned_memory_is_counted_as_torch_takes_it():
    """Its allocator rounds each piece up to a power of two."""
    tensors = {"a": torch.empty(3), "b": torch.empty(4), "c": torch.empty(0)}
    copies = checkpoint.HostCopies(pinned=False)
    assert (copies.missing(tensors), checkpoint.HostCopies(True).missing(tensors)) == (28, 32)
    copies.stage(tensors)
    assert copies.missing(tensors) == 0


def test_saves_in_the_background_use_one_copy_of_the_state(ranks, base, c):
    """At 7 B that is memory which takes seconds to make, and more to pin."""
    run, trained = Run(c, DIGESTS, ranks), start(ranks, base)
    places, expected = [], []
    for step in (1, 2, 3):
        train(*trained, step - 1, step)
        run.save(step, *trained)
        expected.append(state(*trained))
        run.wait()
        places.append({name: copy.data_ptr() for name, copy in run.copies.copies.items()})
    assert places[0] == places[1] == places[2] and len(places[0]) > 60
    assert len(set(places[0].values())) == len(places[0])
    for step, right in zip((1, 2, 3), expected, strict=True):
        found = {name: torch.empty_like(x) for name, x in right.items()}
        checkpoint.read(run.out / "checkpoints" / f"step-{step:06d}", found)
        equal(found, right)


def test_a_file_is_written_without_a_wait_for_the_gpu(ranks, base, c, monkeypatch):
    """Each wait is for all that training has queued since."""
    waits, write = [], checkpoint.Writer.write_data

    class Loader(filesystem._SerialCpuLoader):  # the one for GPUs, which waits
        def __init__(self, resolve, **ahead):
            super().__init__(resolve)
            waits.append(ahead)

    def beside_a_gpu(self, *plan):
        with monkeypatch.context() as here:
            here.setattr(torch.cuda, "is_available", lambda: True)
            here.setattr(filesystem, "_OverlappingCpuLoader", Loader)
            return write(self, *plan)

    monkeypatch.setattr(checkpoint.Writer, "write_data", beside_a_gpu)
    run = Run(c, DIGESTS, ranks)
    run.save(1, *start(ranks, base))
    run.wait()
    assert len(checkpoint.complete(run.out)) == 1 and waits == []


def test_a_tied_model_stays_tied(ranks, c, tmp_path):
    base = folder_of(model(tie_word_embeddings=True), tmp_path / "tied")
    straight, again = start(ranks, base), start(ranks, base)
    train(*straight, 0, 2)
    run = Run(c, DIGESTS, ranks)
    run.save(2, *straight)
    run.wait()
    run.held.close()
    Run(c, DIGESTS, ranks).load(*again)
    for m, optimizer in (straight, again):
        train(m, optimizer, 2, 4)
        assert m.lm_head.weight is m.model.embed_tokens.weight
    assert all(map(torch.equal, again[0].parameters(), straight[0].parameters()))


def test_a_state_before_any_step_is_one_too(ranks, base, c):
    """A run may skip its first steps, and then be asked to stop."""
    run, first = Run(c, DIGESTS, ranks), start(ranks, base)
    run.save(1, *first)
    run.wait()
    run.held.close()
    second = start(ranks, base)
    Run(c, DIGESTS, ranks).load(*second)
    straight = start(ranks, base)
    for m, optimizer in (first, second, straight):
        train(m, optimizer, 0, 2)
    equal(state(*first), state(*straight))
    equal(state(*second), state(*straight))


@pytest.mark.parametrize("size, replicas", [(2, 1), (4, 2)])
def test_one_rank_then_many_then_one(ranks, base, c, tmp_path, size, replicas):
    """Step 3 is step 2 saved again by all ranks; steps 2 and 3 of the training are theirs too."""
    shutil.copytree(base, tmp_path / "base")
    torch.save([pairs(2), pairs(3)], tmp_path / "batches.pt")
    torch.save(vars(c) | {"replicas": replicas}, tmp_path / "settings.pt")
    straight, run = start(ranks, base), Run(c, DIGESTS, ranks)
    train(*straight, 0, 2)
    run.save(2, *straight, Notes("alone"))
    run.wait()
    run.held.close()
    many = torchrun(WORKERS / "resharded.py", tmp_path, size)

    run, back = Run(c, DIGESTS, ranks), start(ranks, base)
    third, fourth = run.out / "checkpoints/step-000003", run.out / "checkpoints/step-000004"
    assert checkpoint.complete(run.out)[1:] == [third, fourth]
    run.folder = third
    assert run.load(*back) == 3
    equal(state(*back), state(*straight))
    second, again = (
        sum(p.stat().st_size for p in folder.glob("shard-*"))
        for folder in (run.out / "checkpoints" / "step-000002", third)
    )
    assert again < 1.1 * second, "replicas write each shard once"
    run.folder = fourth
    assert (run.load(*back), run.kept["notes"]) == (4, [{"rank": k} for k in range(size)])
    train(*straight, 2, 5)
    train(*back, 4, 5)
    expected = state(*straight)
    for name, x in state(*back).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=2e-5, msg=name)
    for found in many:  # an error of the first rank's is every rank's, and none waits
        assert found["step"] == 4 and found["kept"] == [{"value": "alone"}]
        assert found["refused"].startswith(f"5 {tmp_path}/file/run: cannot write: Not a directory")


def test_a_checkpoint_is_exported_as_the_end_of_a_run_would(ranks, base, c, tmp_path, capsys):
    (base / "tokenizer.model").touch()
    m, optimizer = start(ranks, base)
    train(m, optimizer, 0, 2)
    run = Run(c, DIGESTS, ranks)
    run.save(2, m, optimizer)
    run.wait()
    hub.save(m, tmp_path / "expected", base, shard_bytes=9_000_000)
    weights_command.main([str(run.out / "checkpoints" / "latest"), str(tmp_path / "exported")])
    files = sorted(p.name for p in (tmp_path / "expected").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "exported").iterdir())
    for name in files:
        read = [(tmp_path / folder / name).read_bytes() for folder in ("expected", "exported")]
        assert read[0] == read[1], name
    with pytest.raises(ValueError, match="was trained from .*, which is not there; give --base"):
        moved = tmp_path / "moved"
        shutil.copytree(run.out / "checkpoints" / "step-000002", moved)
        about = read_json(moved / "state.json")
        about["run"]["settings"]["model"] = str(tmp_path / "gone")
        write_json(moved / "state.json", about)
        lines = [
            line
            for line in (moved / "SHA256SUMS").read_text().splitlines()
            if not line.endswith("state.json")
        ]
        lines.append(checkpoint._sum(moved / "state.json"))
        (moved / "SHA256SUMS").write_text("\n".join(lines) + "\n")
        checkpoint.export(moved, tmp_path / "again")
    checkpoint.export(moved, tmp_path / "again", base)
    (moved / "state.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        weights_command.main([str(moved), str(tmp_path / "third")])
    assert end.value.code == 3 and "state.json, 2 bytes, is not what" in capsys.readouterr().err


def test_sums_are_those_of_sha256sum(ranks, base, c):
    run = Run(c, DIGESTS, ranks)
    run.save(2, *start(ranks, base))
    run.wait()
    folder = run.out / "checkpoints" / "step-000002"
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (0, [1, 2, 3, 4])])
def test_the_newest_stay_and_latest_follows(ranks, base, c, keep, left):
    run, first = Run(replace(c, keep=keep), DIGESTS, ranks), start(ranks, base)
    for step in range(1, 5):
        run.save(step, *first)
        run.wait()
        assert (run.out / "checkpoints" / "latest").resolve().name == f"step-{step:06d}"
    folder = run.out / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", *(f"step-{s:06d}" for s in left)]


def never(*_, **__) -> None:
    raise OSError(95, "Operation not supported")


def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "x").touch()


@pytest.mark.parametrize("where", ["no links", "latest", ".latest"])
def test_a_link_that_cannot_be_made_is_left_out(ranks, base, c, monkeypatch, capsys, where):
    """As on a disk without links, and after a copy that made folders of them."""
    run, first = Run(replace(c, keep=1), DIGESTS, ranks), start(ranks, base)
    folder = run.out / "checkpoints"
    if where == "no links":
        monkeypatch.setattr(Path, "symlink_to", never)
    else:
        folder.mkdir()
        a_folder(folder / where)
    for step in (1, 2):
        run.save(step, *first)
        run.wait()
        assert [p.name for p in checkpoint.complete(run.out)] == [f"step-{step:06d}"]
    kept = set() if where == "no links" else {where}
    assert {p.name for p in folder.iterdir()} == {"step-000002"} | kept
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"{folder}/latest does not link to the newest checkpoint, " in said[1]
    assert "step-000002: " in said[1]


def test_an_old_checkpoint_that_cannot_be_removed_stays(ranks, base, c, monkeypatch, capsys):
    run, first = Run(replace(c, keep=1), DIGESTS, ranks), start(ranks, base)
    rename = Path.rename

    def refuse(path, target):
        return never() if ".trash" in str(target) else rename(path, target)

    for step in (1, 2):
        monkeypatch.setattr(Path, "rename", refuse if step == 2 else rename)
        run.save(step, *first)
        run.wait()
    assert [p.name for p in checkpoint.complete(run.out)] == ["step-000001", "step-000002"]
    line = f"{run.out}/checkpoints/step-000001 stays, as it cannot be removed: Operation not supp"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        ".nfs000000000123",
        "._shard-00001-model-00001-of-00001.safetensors",
        "Thumbs.db",
        "notes.txt",
        ".x.safetensors",
    ],
)
def test_what_no_sum_names_is_no_damage(ranks, base, c, tmp_path, name):
    run, first = Run(c, DIGESTS, ranks), start(ranks, base)
    run.save(2, *first)
    run.wait()
    saved = run.out / "checkpoints" / "step-000002"
    (saved / name).write_bytes(b"\0\5\x16\7" * 9)
    (saved / "a folder").mkdir()
    (saved / "a link").symlink_to("nothing")
    run.held.close()
    again = Run(c, DIGESTS, ranks)
    assert again.load(*start(ranks, base)) == 2
    checkpoint.export(saved, tmp_path / "exported", base)
    (saved / "shard-00007-model-00001-of-00001.safetensors").touch()
    with pytest.raises(BadCheckpoint, match="SHA256SUMS does not name shard-00007-model-00001"):
        checkpoint.verified(saved)


@pytest.mark.parametrize("keep", ["no shard", "no state", "a path"])
def test_sums_that_are_not_whole_are_damage(ranks, base, c, keep):
    run, first = Run(c, DIGESTS, ranks), start(ranks, base)
    run.save(2, *first)
    run.wait()
    sums = run.out / "checkpoints" / "step-000002" / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    if keep == "a path":
        sums.write_text("".join([*lines, lines[0].replace("  ", "  ../")]))
    else:
        word = "state.json" if keep == "no shard" else "shard-"
        sums.write_text("".join(line for line in lines if word in line))
    with pytest.raises(BadCheckpoint, match="step-000002 is damaged: SHA256SUMS "):
        checkpoint.verified(sums.parent)


def test_what_is_due_is_saved_and_the_last_step_too(ranks, base, c, tmp_path):
    first, run = start(ranks, base), Run(replace(c, save_every=2), DIGESTS, ranks)
    never = Run(replace(c, out=str(tmp_path / "never")), DIGESTS, ranks)
    for step in range(1, 6):
        run.after(step, 5, *first, Notes())
    run.wait()
    never.after(5, 5, *first, Notes())
    steps = [2, 4, 5]
    assert [p.name for p in checkpoint.complete(run.out)] == [f"step-{s:06d}" for s in steps]
    assert checkpoint.complete(never.out) == [] and never.under_way is None


def test_asked_to_stop_a_run_saves_and_says_so(ranks, base, c, monkeypatch):
    first, run = start(ranks, base), Run(c, DIGESTS, ranks)
    monkeypatch.setattr(signals, "stop_wanted", lambda: True)
    message = f"saved after step 3 in {c.out}; the same command"
    with pytest.raises(Preempted, match=message):
        run.after(3, 5, *first, Notes())
    assert [p.name for p in checkpoint.complete(run.out)] == ["step-000003"]


def fake(c, step: int, suffix: str = "", state: bytes | None = None) -> Path:
    """A checkpoint as far as opening a folder looks."""
    folder = Path(c.out) / "checkpoints" / f"step-{step:06d}{suffix}"
    folder.mkdir(parents=True)
    identity = read_json(Path(c.out) / "run.json")["run"]
    whole = json.dumps({"step": step, "ranks": [], "run": identity}).encode()
    (folder / "state.json").write_bytes(whole if state is None else state)
    (folder / "SHA256SUMS").write_text(checkpoint._sum(folder / "state.json") + "\n")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def test_a_fresh_start_writes_what_reproduces_it(ranks, c):
    run = Run(c, DIGESTS, ranks)
    assert run.folder is None and not run.finished
    assert sorted(tree(run.out)) == ["config.toml", "run.json"]
    assert {oct((run.out / name).stat().st_mode & 0o777) for name in tree(run.out)} == {"0o644"}
    again, _ = config.parse(DPOConfig, [str(run.out / "config.toml")])
    assert again == c
    about = json.loads((run.out / "run.json").read_text())
    assert about["run"]["data"] == "digest" and about["ranks"] == 1 and about["kernels"] == "torch"
    assert about["torch"] == torch.__version__ and about["safetensors"]


@pytest.mark.parametrize("failure", [FileNotFoundError("git"), None])
def test_neither_git_nor_a_checkout_is_needed(ranks, c, monkeypatch, failure):
    def check_output(command, **options):
        raise failure or subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(subprocess, "check_output", check_output)
    Run(c, DIGESTS, ranks)
    assert json.loads((Path(c.out) / "run.json").read_text())["commit"] is None


def test_it_continues_from_the_last_complete_checkpoint(ranks, c):
    Run(c, DIGESTS, ranks)
    fake(c, 100, ".part")
    assert Run(c, DIGESTS, ranks).folder is None
    for step in (20, 1_000_000, 100, 3):
        fake(c, step)
    before = tree(Path(c.out))
    fake(c, 120, ".part")
    fake(c, 10, ".trash").rename(Path(c.out) / "checkpoints" / ".trash")
    assert Run(c, DIGESTS, ranks).folder.name == "step-1000000"
    assert tree(Path(c.out)) == before, "what a killed run left half done is gone, and only that"


def test_a_finished_run_is_left_alone(ranks, c, capsys):
    Run(c, DIGESTS, ranks)
    (Path(c.out) / "model").mkdir()
    before = tree(Path(c.out))
    assert Run(c, DIGESTS, ranks).finished
    assert f"{c.out} is finished; --resume fresh starts over" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds another run: --beta was 0.01, is 0.2. Continue it"):
        Run(replace(c, beta=0.2), DIGESTS, ranks)
    assert tree(Path(c.out)) == before


def test_fresh_moves_aside_and_deletes_nothing(ranks, c):
    out, fresh = Path(c.out), replace(c, resume="fresh")
    assert Run(fresh, DIGESTS, ranks).folder is None
    seen = []
    for k in (1, 2):
        (fake(c, k) / "weights").write_text(f"of run {k}")  # damaged, and moved all the same
        (out / "model").mkdir()
        seen.append(tree(out))
        assert Run(replace(fresh, lr=k / 10), {"data": f"digest {k}"}, ranks).folder is None
    assert sorted(p.name for p in out.parent.iterdir()) == ["run", "run.1", "run.2"]
    assert [tree(out.with_name(f"run.{k}")) for k in (1, 2)] == seen
    assert sorted(tree(out)) == ["config.toml", "run.json"]


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_fresh_start_that_is_started_again_goes_on(ranks, c, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    Run(replace(c, resume="fresh"), DIGESTS, ranks)
    fake(c, 3)
    monkeypatch.setenv(name, "1")
    assert Run(replace(c, resume="fresh"), DIGESTS, ranks).folder.name == "step-000003"
    assert not Path(c.out).with_name("run.1").exists()


def test_changed_settings_are_listed(ranks, c):
    Run(c, DIGESTS, ranks)
    fake(c, 3)
    before = tree(Path(c.out))
    changed = replace(c, beta=0.2, steps=None, data=("a.jsonl", "b.jsonl"), save_every=7)
    message = (
        rf"^{c.out} holds another run: --beta was 0.01, is 0.2; "
        r"--steps was 9, is None; the content of --data "
        "changed. Continue it as it was, "
        "or --resume fresh starts over and keeps it$"
    )
    with pytest.raises(ValueError, match=message):
        Run(changed, DIGESTS | {"data": "new"}, ranks)
    with pytest.raises(ValueError, match="run: the content of --data changed; the content of --mo"):
        Run(c, {"data": "new", "model": "new"}, ranks)
    with pytest.raises(ValueError, match="the script changed"):
        Run(SFTConfig(model=c.model, data=c.data, out=c.out), DIGESTS, ranks)
    assert tree(Path(c.out)) == before


def test_settings_that_leave_the_trajectory_alone_may_change(ranks, c, monkeypatch, tmp_path):
    Run(c, DIGESTS, ranks)
    fake(c, 3)
    monkeypatch.chdir(tmp_path)
    free = replace(
        c,
        out="run",
        log_every=7,
        eval_every=8,
        save_every=9,
        microbatch_tokens=999,
        keep=5,
        recompute="full",
        save_async=False,
        timeout=7,
        replicas=2,
        on_nonfinite="skip",
        compile="off",
        reshard="never",
        profile=1,
        eval_data=("x.jsonl",),
        deterministic=True,
    )
    changed = {k for k, v in vars(c).items() if v != getattr(free, k)}
    assert changed == FREE - {"resume", "merge"}  # of LoRA runs: see test_lora.py
    assert Run(free, DIGESTS, ranks).folder.name == "step-000003"


@pytest.mark.parametrize(
    "state, message",
    [
        (b"", "is damaged: .*state.json: malformed JSON"),
        (b"[]", "is damaged: .*state.json holds a JSON list"),
        (b"{}", "state.json does not say whose run this is; --resume previous"),
        (
            b'{"step": 3, "ranks": [], "run": 1}',
            "state.json does not say whose run this is; --resume",
        ),
        (b'{"step": 3, "ranks": [], "run": {"settings": []}}', "does not say whose run this is;"),
    ],
)
def test_checkpoints_of_nobody_are_refused(ranks, c, state, message):
    Run(c, DIGESTS, ranks)
    fake(c, 3, state=state)
    with pytest.raises(BadCheckpoint, match=message):
        Run(c, DIGESTS, ranks)


def test_what_has_a_digest_is_compared_by_it_alone(ranks, c):
    Run(c, DIGESTS, ranks)
    state = read_json(fake(c, 3) / "state.json")
    moved = replace(c, model="moved/base", data=("a.jsonl", "b.jsonl"), eval_data=("new.jsonl",))
    assert Run(moved, DIGESTS, ranks).folder.name == "step-000003"
    assert Run(c, DIGESTS, ranks).identity["settings"]["model"] == c.model  # for an export
    del state["run"]["model"]  # as a run of dSFT once recorded it: there the path has to do
    fake(c, 4, state=json.dumps(state | {"step": 4}).encode())
    assert Run(c, DIGESTS, ranks).folder.name == "step-000004"
    with pytest.raises(ValueError, match="holds another run: --model was .*, is 'moved/base'. C"):
        Run(moved, DIGESTS, ranks)


@pytest.mark.parametrize("links", [["runs/it"], ["far/away/it"], ["second", "far/it"]])
def test_fresh_moves_what_a_link_leads_to(ranks, c, tmp_path, links):
    """From one link to the next, relative each, to a folder that is not there yet."""
    out = Path(c.out)
    places = [out, *(tmp_path / link for link in links)]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    for place, target in pairwise(places):
        place.symlink_to(os.path.relpath(target, place.parent))
    Run(c, DIGESTS, ranks)
    fake(c, 3)
    Run(replace(c, resume="fresh"), DIGESTS, ranks)
    real = places[-1]
    assert out.is_symlink() and out.resolve() == real
    assert (real.with_name(f"{real.name}.1") / "checkpoints" / "step-000003").is_dir()
    assert not (real / "checkpoints").exists() and (out / "config.toml").is_file()
    assert not out.with_name(f"{out.name}.1").exists()


def test_a_loop_of_links_is_told(ranks, c):
    out = Path(c.out)
    out.symlink_to(out.name)
    with pytest.raises(ValueError, match="cannot write: .*; change --out"):
        Run(c, DIGESTS, ranks)


def test_a_folder_in_use_is_refused(ranks, c):
    first = Run(c, DIGESTS, ranks)
    with pytest.raises(ValueError, match=rf"^{c.out} is in use by process \d+ on .+; wait for it"):
        Run(replace(c, resume="fresh"), DIGESTS, ranks)
    assert first.out.exists()
    del first
    assert Run(c, DIGESTS, ranks).folder is None


def test_no_random_numbers_are_drawn_and_their_state_comes_back(ranks, base, c):
    before = torch.get_rng_state()
    first, run = start(ranks, base), Run(c, DIGESTS, ranks)
    train(*first, 0, 2)
    assert torch.equal(torch.get_rng_state(), before)
    run.save(2, *first)
    run.wait()
    torch.rand(3)
    run.folder = checkpoint.complete(run.out)[0]
    run.load(*first)
    assert torch.equal(torch.get_rng_state(), before)
