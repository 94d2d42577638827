"""What ends, damages or fills a run folder, and what is lost by it: never more than the steps since
the last checkpoint. The long versions, on two ranks, are in benchmarks/chaos.py."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_dpo
from benchmarks import tiny
from benchmarks.chaos import Saves, faulty
from run_helpers import run
from workers import troubled
from zephyr import optim
from zephyr.distributed import fsdp, group
from zephyr.errors import BadCheckpoint, Storage
from zephyr.metrics import log
from zephyr.run import checkpoint, exits
from zephyr.run.checkpoint import STATE, SUMS
from zephyr.weights import hub

FLAGS = [*tiny.DPO, *"--batch 4 --steps 10 --save-every 2 --log-every 3 --eval-every 3".split()]
STEPS = 10  # 4 an epoch


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    tiny.make(place := tmp_path_factory.mktemp("faults"), pairs=16)
    FLAGS[:] = [*FLAGS, "--eval-data", str(place / "test.jsonl")]
    return place


@pytest.fixture(scope="module")
def straight(place) -> Path:
    """A run that nothing happened to, with all its checkpoints."""
    run(train_dpo, place, out := place / "straight", *FLAGS, "--keep", "0")
    return out


@pytest.fixture
def killed(straight, tmp_path) -> Path:
    """The folder of a run that was killed after step 7: it goes on from 6, and has 4."""
    shutil.copytree(straight, out := tmp_path / "run", symlinks=True)
    shutil.rmtree(out / "model")
    for name in ("step-000002", "step-000008", "step-000010"):
        shutil.rmtree(out / "checkpoints" / name)
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["step"] <= 7]
    (out / "metrics.jsonl").write_text("".join(kept) + '{"step": 9, "lo')
    (out / "checkpoints" / "latest").unlink()
    (out / "checkpoints" / "latest").symlink_to("step-000006")
    return out


def trajectory(out: Path) -> list[dict]:
    return log.trajectory(log.read(out))


def alike(out: Path, straight: Path) -> None:
    """Fail unless the run ended as the other did, and left nothing but what a run leaves."""
    assert trajectory(out) == trajectory(straight)
    model = Path("model") / "model.safetensors"
    assert (out / model).read_bytes() == (straight / model).read_bytes(), "not bit for bit"
    newest = checkpoint.complete(out)[-1]
    assert checkpoint.verified(newest)["step"] == STEPS
    assert (newest.parent / "latest").resolve() == newest.resolve()
    hidden = {p.name for p in out.rglob("*") if p.name.startswith(".") or p.suffix == ".part"}
    assert hidden == {".lock"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# a process that has imported everything, from which each run of its own is forked
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train_dpo", "torch._dynamo", "tensorboard"])


class Process:
    """train_dpo.py in a process of its own, with `trouble`, as rank `rank` of `ranks`."""

    def __init__(
        self,
        place: Path,
        out: Path,
        *flags: str,
        trouble: Callable[[], None] | None = None,
        rank: int = 0,
        ranks: int = 1,
        port: int = 0,
    ):
        self.log = out.with_name(f"{out.name}.{rank}.log")
        argv = [
            "train_dpo.py",
            "--model",
            str(place / "base"),
            "--data",
            str(place / "pairs.jsonl"),
            "--out",
            str(out),
            *FLAGS,
            *flags,
        ]
        own = {"ZEPHYR_CACHE": os.environ["ZEPHYR_CACHE"]}
        if ranks > 1:
            own |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        arguments = (self.log, own, argv, trouble)
        self.process = server.Process(target=troubled.train, args=arguments)
        self.log.write_text("")
        self.process.start()

    def ends(self) -> int:
        self.process.join(60)
        return self.process.exitcode

    def says(self, word: str) -> None:
        """Wait until it has."""
        deadline = time.monotonic() + 60
        while word not in self.said():
            assert self.process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.005)

    def kill(self) -> None:
        self.process.kill()
        assert self.ends() == -signal.SIGKILL

    def said(self) -> str:
        return self.log.read_text()

    def line(self) -> str:
        """The one line of a run's error."""
        lines = [x for x in self.said().splitlines() if x.startswith("train_dpo.py")]
        assert len(lines) == 1 and "Traceback" not in self.said(), self.said()
        return lines[0]


# --- the end of the process


def test_killed_in_a_save_an_evaluation_a_step_and_the_export(place, straight, tmp_path):
    """Steps 5 to 8 are an epoch: it is resumed before, inside and after it."""
    out = tmp_path / "run"
    now = "--no-save-async"  # else a save may be under way, or may just have ended
    for moment, steps in (
        (troubled.hang_in_a_save, [2]),
        (troubled.hang_in_an_evaluation, [2]),
        (troubled.hang_in_a_save, [2]),
        (troubled.hang_in_a_step, [6, 8]),
        (troubled.hang_in_the_export, [8, 10]),
    ):
        process = Process(place, out, now, trouble=moment)
        process.says("it hangs")
        if moment == troubled.hang_in_a_save:
            (part,) = out.glob("checkpoints/*.part")
            assert part.name == "step-000004.part" and len(list(part.iterdir())) == 1
        process.kill()
        assert [checkpoint.verified(p)["step"] for p in checkpoint.complete(out)] == steps
    process = Process(place, out)
    assert process.ends() == 0, process.said()
    alike(out, straight)


@pytest.mark.parametrize("steps", [(2, 3), (4, 5), (5, 7, 7)], ids=str)
def test_resumed_twice_within_an_epoch_and_across_its_border(
    place, straight, tmp_path, monkeypatch, steps
):
    """Each attempt but the last ends as it begins the step after one of `steps`."""

    class End(BaseException):
        pass

    schedule = optim.schedule

    def until(last: int, kind: str, step: int, *rest):
        if step == last:
            raise End
        return schedule(kind, step, *rest)

    for last in steps:
        monkeypatch.setattr(optim, "schedule", partial(until, last))
        with pytest.raises(End):
            run(train_dpo, place, tmp_path / "run", *FLAGS, "--no-save-async")
    monkeypatch.setattr(optim, "schedule", schedule)
    run(train_dpo, place, tmp_path / "run", *FLAGS)
    alike(tmp_path / "run", straight)


def nothing(out: Path) -> None: ...


def no_link(out: Path) -> None:
    (out / "checkpoints" / "latest").unlink()


def dangling_link(out: Path) -> None:
    no_link(out)
    (out / "checkpoints" / "latest").symlink_to("step-000099")


def old_link(out: Path) -> None:
    """As between the rename of the folder and that of the link."""
    no_link(out)
    (out / "checkpoints" / "latest").symlink_to("step-000004")
    (out / "checkpoints" / ".latest").symlink_to("step-000006")


def half_pruned(out: Path) -> None:
    (out / "checkpoints" / "step-000004").rename(out / "checkpoints" / ".trash")
    (out / "checkpoints" / ".trash" / SUMS).unlink()


def half_saved(out: Path) -> None:
    part = out / "checkpoints" / "step-000008.part"
    shutil.copytree(out / "checkpoints" / "step-000006", part)
    (part / STATE).write_bytes(b"")


def old_part(out: Path) -> None:
    shutil.copytree(out / "checkpoints" / "step-000006", out / "checkpoints" / "step-000001.part")


def half_exported(out: Path) -> None:
    (out / ".model.abcdefgh").mkdir()
    (out / ".model.abcdefgh" / "model.safetensors").write_bytes(bytes(99))


def half_written(out: Path) -> None:
    for name in ("metrics.jsonl", "run.json", "config.toml"):
        (out / f".{name}.abcdefgh").write_text("{")


@pytest.mark.parametrize(
    "left",
    [
        nothing,
        no_link,
        dangling_link,
        old_link,
        half_pruned,
        half_saved,
        old_part,
        half_exported,
        half_written,
    ],
)
def test_what_a_kill_leaves_changes_nothing_and_goes(place, straight, killed, left):
    left(killed)
    run(train_dpo, place, killed, *FLAGS)
    alike(killed, straight)


def test_one_of_two_ranks_is_killed(place, straight, tmp_path):
    """The other notices at once, and says so in a line; one rank alone can finish what they began,
    though a vocabulary of 301 does not divide by two."""
    out = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as any_port:
        port = any_port.getsockname()[1]
    pair = [
        Process(
            place,
            out,
            "--no-save-async",
            trouble=troubled.hang_in_a_step if rank else None,
            rank=rank,
            ranks=2,
            port=port,
        )
        for rank in (0, 1)
    ]
    pair[1].says("it hangs")
    pair[1].kill()
    began = time.monotonic()
    assert pair[0].ends() == exits.LOST_RANK and time.monotonic() - began < 10
    assert "train_dpo.py: " in pair[0].line()
    assert [checkpoint.verified(p)["step"] for p in checkpoint.complete(out)] == [6, 8]
    run(train_dpo, place, out, *FLAGS)
    for row, right in zip(trajectory(out), trajectory(straight), strict=True):
        assert row == pytest.approx(right, rel=1e-3, abs=1e-4)


def test_a_reader_that_goes_away_ends_nothing(place, straight, tmp_path):
    """As in `train_dpo.py ... 2>&1 | head`."""
    assert Process(place, tmp_path / "run", trouble=troubled.no_reader).ends() == 0
    alike(tmp_path / "run", straight)


# --- the disk


@pytest.fixture
def ranks():
    yield group.start()
    group.finish()


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC"])
def test_a_fault_in_each_call_of_a_save(place, tmp_path, ranks, fault, background):
    step, k, calls = 6, 0, []
    with Saves(place, tmp_path / "run", ranks, background) as saves:
        saves.save(2)
        saves.save(4)
        while k <= len(calls):
            k += 1
            before = {p: tree(p) for p in checkpoint.complete(tmp_path / "run")[-1:]}
            with faulty(k, fault) as calls:
                try:
                    saves.save(step)
                    done = True
                except Storage as error:
                    said, done = str(error), False
                    assert "\n" not in said, said
                    assert said.endswith("the checkpoints before are intact"), said
            after = checkpoint.complete(tmp_path / "run")
            assert [checkpoint.verified(p)["step"] for p in after][-1] in (
                [step] if done else [step, step - 2]
            )
            assert all(tree(p) == content for p, content in before.items()), calls[-1]
            assert done or not list(tmp_path.glob("run/checkpoints/*.part")), "a part is left"
            if int(after[-1].name[5:]) == step:
                step += 2
    assert k > 30
    with Saves(place, tmp_path / "run", ranks, background) as saves:
        assert saves.load() == step - 2


def test_a_checkpoint_gets_its_name_once_all_of_it_is_on_the_disk(place, tmp_path, ranks):
    with faulty(sys.maxsize, "EIO") as calls, Saves(place, tmp_path / "run", ranks, False) as saves:
        saves.save(2)
    named = len(calls) - calls[::-1].index("rename") - 1
    files = len(tree(tmp_path / "run" / "checkpoints" / "step-000002"))
    last = len(calls[:named]) - calls[:named][::-1].index("write")
    assert calls[:named].count("fsync") >= files + 1 and "fsync" in calls[last:named]
    assert calls[named + 1] == "fsync" and "write" not in calls[named:]


def test_a_full_disk_ends_training_with_a_line_wherever_it_shows(place, straight, killed):
    """Bytes per file are limited instead, to what each file has: the line of the metrics, then the
    checkpoint."""
    for limit in ((killed / "metrics.jsonl").stat().st_size, 100_000):
        process = Process(place, killed, trouble=partial(troubled.no_file_beyond, limit))
        assert process.ends() == Storage.code, process.said()
        assert "File too large" in process.line()
        assert [checkpoint.verified(p)["step"] for p in checkpoint.complete(killed)] == [4, 6]
    run(train_dpo, place, killed, *FLAGS)
    alike(killed, straight)


@pytest.mark.parametrize("out", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_read(
    place, tmp_path, monkeypatch, out
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(fsdp, "build", None)
    with pytest.raises(Storage, match=rf"^{tmp_path / out}: cannot write: .*; change --out$"):
        run(train_dpo, place, tmp_path / out, *FLAGS)


# --- damage

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def at(position: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return flip


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(share * (path.stat().st_size - 1)))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def gone(path: Path) -> None:
    path.unlink()


def added(path: Path) -> None:
    shutil.copy(path, path.with_name("shard-00002-model-00001-of-00001.safetensors"))


def link_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-000004") / path.name, path)


def link_of_another(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.with_name("step-000004") / path.name)


no_newline = cut(1)
# the length of a shard's header, the header, the data, the end
DAMAGE = [
    *map(at, (0, 1e-5, 1e-3, 0.02, 0.3, 0.6, 1)),
    *map(cut, (0, 1e-4, 0.5)),
    no_newline,
    longer,
    gone,
    added,
    link_elsewhere,
    link_to_nothing,
    folder,
    of_another,
    link_of_another,
]


@pytest.mark.parametrize("name", [SHARD, STATE, SUMS])
def test_damage_is_named_and_the_checkpoint_before_is_taken(place, tmp_path, ranks, name):
    """Each byte region flipped or cut, and each file replaced."""
    with Saves(place, tmp_path / "run", ranks, False) as saves:
        for step in (4, 6):
            saves.save(step)
    newest = checkpoint.complete(tmp_path / "run")[-1]
    before = tree(newest)
    for damage in DAMAGE:
        if (name, damage) == (SUMS, no_newline):
            continue  # which the sums do without
        damage(newest / name)
        with (
            pytest.raises(BadCheckpoint) as caught,
            Saves(place, tmp_path / "run", ranks, False) as saves,
        ):
            saves.load()
        said = str(caught.value)
        assert "\n" not in said and str(newest) in said and "--resume previous" in said, said
        assert len(said) < 400
        with Saves(place, tmp_path / "run", ranks, False, resume="previous") as saves:
            assert saves.load() == 4, damage
        damaged = newest.with_name("damaged-step-000006")
        assert damaged.is_dir(), "nothing is deleted"
        shutil.rmtree(damaged)
        for path, data in before.items():
            newest.mkdir(exist_ok=True)
            (newest / path).write_bytes(data)
    with Saves(place, tmp_path / "run", ranks, False) as saves:
        assert saves.load() == 6


def test_nothing_intact_is_told_and_kept(place, tmp_path, ranks):
    with Saves(place, tmp_path / "run", ranks, False) as saves:
        saves.save(2)
    longer(tmp_path / "run" / "checkpoints" / "step-000002" / SHARD)
    with pytest.raises(BadCheckpoint, match="has no intact checkpoint; --resume fresh starts over"):
        Saves(place, tmp_path / "run", ranks, False, resume="previous")
    with Saves(place, tmp_path / "run", ranks, False, resume="fresh") as saves:
        assert saves.load() == 0
    assert (tmp_path / "run.1" / "checkpoints" / "damaged-step-000002" / SHARD).exists()


# --- another's checkpoint, whose sums are right


def signed(folder: Path) -> None:
    """Let SHA256SUMS say what is there."""
    names = sorted(p.name for p in folder.iterdir() if p.name != SUMS)
    (folder / SUMS).write_text("".join(f"{checkpoint._sum(folder / n)}\n" for n in names))


def rewritten(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        with safe_open(folder / SHARD, "pt") as file:
            about = file.metadata()
        tensors = load_file(folder / SHARD)
        offsets = json.loads(about["DCP_SHARDING_INFO"])
        change(tensors)
        for name in tensors:
            offsets.setdefault(name, {"saved_offsets": [0] * tensors[name].dim()})
        save_file(tensors, folder / SHARD, about | {"DCP_SHARDING_INFO": json.dumps(offsets)})

    return forge


NORM = "model.norm.weight"


def state(**changes) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        before = json.loads((folder / STATE).read_text())
        (folder / STATE).write_text(json.dumps(before | changes))

    return forge


def rank(**changes) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        before = json.loads((folder / STATE).read_text())
        before["ranks"][0] |= changes
        (folder / STATE).write_text(json.dumps(before))

    return forge


FORGED = {
    "longer": rewritten(lambda t: t.update({NORM: torch.ones(33)})),
    "shorter": rewritten(lambda t: t.update({NORM: torch.ones(31)})),
    "a column": rewritten(lambda t: t.update({NORM: torch.ones(32, 1)})),
    "integers": rewritten(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int32)})),
    "doubles": rewritten(lambda t: t.update({NORM: torch.ones(32).double()})),
    "another name": rewritten(lambda t: t.update({"model.norm.weigth": t.pop(NORM)})),
    "no moments": rewritten(lambda t: [t.pop(n) for n in list(t) if "exp_avg" in n]),
    "no header": lambda folder: (folder / SHARD).write_bytes(b"\xff" * 99),
    "no step": state(step=None),
    "step -2": state(step=-2),
    "step of another": state(step=10**9),
    "ranks of numbers": state(ranks=[5]),
    "no ranks": state(ranks=[]),
    "short rng": rank(rng="00"),
    "rng of words": rank(rng="hello"),
    "rng of numbers": rank(rng=5),
    "run of numbers": state(run=5),
    "no settings": state(run={}),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_forged_checkpoint_is_refused_in_a_line(place, killed, forge):
    forge(killed / "checkpoints" / "step-000006")
    signed(killed / "checkpoints" / "step-000006")
    with pytest.raises(BadCheckpoint, match="step-000006") as caught:
        run(train_dpo, place, killed, *FLAGS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rng.pt"])
@pytest.mark.parametrize("sums", ["name it", "do not"])
def test_a_pickle_is_never_opened(place, straight, killed, tmp_path, name, sums):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    newest = killed / "checkpoints" / "step-000006"
    (newest / name).write_bytes(pickle.dumps(Code()))
    if sums == "name it":
        signed(newest)
    run(train_dpo, place, killed, *FLAGS)
    alike(killed, straight)
    assert not (tmp_path / "it ran").exists()


# --- whose run it is


def test_a_process_whose_run_failed_may_run_again_in_its_folder(place, straight, tmp_path):
    """Whoever still holds the error, and with it the frames of the run, holds no lock."""

    errors = []
    for fails in ((hub, "load"), (log.Log, "begin"), (hub, "save")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError) as caught:
            patch.setattr(*fails, lambda *_, **__: 1 // 0)
            run(train_dpo, place, tmp_path / "run", *FLAGS)
        errors.append(caught)
    run(train_dpo, place, tmp_path / "run", *FLAGS)
    alike(tmp_path / "run", straight)


def test_a_second_run_on_a_folder_refuses_and_the_lock_goes_with_the_first(
    place, straight, tmp_path
):
    out = tmp_path / "run"
    first = Process(place, out, "--no-save-async", trouble=troubled.hang_in_a_step)
    first.says("it hangs")
    before = tree(out)
    holder = f"process {first.process.pid} on {socket.gethostname()}"
    for flags in ([], ["--resume", "fresh"], ["--resume", "previous"]):
        with pytest.raises(ValueError, match=rf"^{out} is in use by {holder}; wait for") as caught:
            run(train_dpo, place, out, *FLAGS, *flags)
        assert not hasattr(caught.value, "code"), "exit code 2"
    assert tree(out) == before and not out.with_name("run.1").exists()
    first.kill()
    run(train_dpo, place, out, *FLAGS)
    alike(out, straight)


def test_what_changes_the_trajectory_is_listed_and_what_does_not_may_change(
    place, straight, killed, tmp_path
):
    before = tree(killed)
    changed = ("--lr", "2e-3", "--seed", "7", "--batch", "2", "--beta", "0.2")
    with pytest.raises(
        ValueError,
        match=(
            "^.*run holds another run: --batch was 4, is 2; --beta was 0.1, is 0.2; "
            "--lr was 0.001, is 0.002; --seed was 42, is 7. Continue it as it was, or "
            "--resume fresh starts over"
        ),
    ):
        run(train_dpo, place, killed, *FLAGS, *changed)
    other = tmp_path / "place"
    shutil.copytree(place, other, ignore=shutil.ignore_patterns("straight"))
    rows = (other / "pairs.jsonl").read_text().splitlines(keepends=True)
    (other / "pairs.jsonl").write_text("".join(rows[::-1]))
    with pytest.raises(ValueError, match="holds another run: the content of --data changed. Con"):
        run(train_dpo, other, killed, *FLAGS, "--model", str(place / "base"))
    config = (other / "base" / "config.json").read_text()
    (other / "base" / "config.json").write_text(config + "\n")
    with pytest.raises(ValueError, match="another run: the content of --model changed. Con"):
        run(train_dpo, place, killed, *FLAGS, "--model", str(other / "base"))
    assert tree(killed) == before
    (other / "base" / "config.json").write_text(config)
    path = other / "pairs.jsonl"
    path.write_text("".join(rows))
    glob = f"{other}/../{other.name}/pairs.json[l]"
    spelt = "--data", glob, "--model", os.path.relpath(other / "base")
    free = "--keep 1 --no-save-async --recompute full --timeout 60 --microbatch-tokens 300"
    run(train_dpo, place, killed, *FLAGS, *free.split(), *spelt)
    assert [r["step"] for r in log.read(killed)] == [r["step"] for r in log.read(straight)]
    assert [p.name for p in checkpoint.complete(killed)] == ["step-000010"]
