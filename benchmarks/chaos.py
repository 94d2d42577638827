"""Break a tiny run in every way that can be arranged, and show that nothing of it is lost.

    python -m benchmarks.chaos               ten minutes on two cores
    python -m benchmarks.chaos --kills 8     four: fewer kills, signals and restarts

A run on two ranks is killed 50 times, inside saves, evaluations and the export among others, and
resumed each time by the same command. Further runs meet a full disk, a read-only one, signals, and
a dead rank under `--max-restarts`; further saves, a fault in each call that changes the disk.
Whatever happens, every finished checkpoint verifies, and the run that went on ends with the weights
and the metrics of one that nothing happened to, bit for bit. Exits with 1 if not. What is arranged
is looked at before anything is concluded from it; where it did not come about, as the disks of a
few MB that only root mounts, its line says that it was not tried. Needs Linux.
"""

import argparse
import builtins
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from benchmarks import tiny
from zephyr import config, errors, optim
from zephyr.distributed import fsdp, group
from zephyr.distributed.group import Ranks
from zephyr.metrics.log import trajectory
from zephyr.run import checkpoint
from zephyr.run.folder import Run
from zephyr.weights import config_json

ROOT = Path(__file__).resolve().parent.parent
# three rhythms and an epoch of 8 steps, without a common beat; at 21 a line and an evaluation meet
RHYTHM = "--save-every 2 --log-every 3 --eval-every 7".split()
LONG, SHORT = 60, 24  # steps: of the run that is killed and killed again, and of the others
PATIENCE = 120.0  # seconds in which a run gets anywhere, or ends
TRIES = 5  # of what depends on the moment


class NotArranged(Exception):
    """What was to happen to a run did not come about, so that nothing was learned."""


def arranged(what: str, scenario: Callable[[int], None]) -> None:
    """The scenario, as often as it takes to come about; if it never does, a line that says so."""
    for k in range(TRIES):
        try:
            return scenario(k)
        except NotArranged as reason:
            last = reason
    line(what, "not tried", str(last))


class Trial:
    """A run that is started again and again, always by the same command."""

    verifications = lost = 0  # checkpoints, and bytes of finished ones, in all trials

    def __init__(self, place: Path, out: Path, ranks: int, steps: int, *flags: str):
        self.out, self.log = out, place / f"{out.name}.log"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.python = [sys.executable, *(torchrun if ranks > 1 else [])]
        self.script = [
            "train_dpo.py",
            "--model",
            str(place / "base"),
            "--data",
            str(place / "pairs.jsonl"),
            "--eval-data",
            str(place / "test.jsonl"),
            "--out",
            str(out),
            *tiny.DPO,
            *RHYTHM,
            "--steps",
            str(steps),
            *flags,
        ]
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "ZEPHYR_CACHE": str(place / "cache")}
        self.before: int | None = None

    @contextmanager
    def going(self, *options: str, also: tuple[str, ...] = ()) -> Iterator[subprocess.Popen]:
        """The run, as long as the block; what is left of it at its end is killed. `options` are
        for the interpreter, `also` for the script."""
        self.before = self._metrics()
        with open(self.log, "w") as log:
            process = subprocess.Popen(
                [*self.python, *options, *self.script, *also],
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            kill(family(process.pid))
            process.wait()

    def ends(self, *options: str) -> int:
        """Run it to its end; the exit code."""
        with self.going(*options) as process:
            return process.wait(PATIENCE)

    def until(self, process: subprocess.Popen, there: Callable[[], object]) -> bool:
        """Wait for it to be there; False if the run ended before."""
        deadline = time.monotonic() + PATIENCE
        while not there():
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"{self.out} is stuck at step {self.step()}"
            time.sleep(0.001)
        return True

    def reaches(self, process: subprocess.Popen, step: int) -> bool:
        return self.until(process, lambda: self.step() >= step)

    def _metrics(self) -> int | None:
        """Which metrics.jsonl there is; an attempt that is about to train makes a new one."""
        with suppress(OSError):
            return (self.out / "metrics.jsonl").stat().st_ino
        return None

    def step(self) -> int:
        """The step this attempt is known to have come to; -1 if it does not train yet."""
        if self._metrics() in (None, self.before):
            return -1
        begun = [int(p.name[5:11]) for p in self.out.glob("checkpoints/step-*")]
        return max([0, *begun, *(row["step"] for row in self.rows()[-1:])])

    def rows(self) -> list[dict]:
        with suppress(OSError):
            lines = (self.out / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
            return [json.loads(line) for line in lines]
        return []

    def saved(self) -> int:
        return newest(self.out)

    def said(self) -> str:
        """The last words of a run: one line for its user, and no traceback of ours."""
        text = self.log.read_text()
        lines = [line for line in text.splitlines() if line.startswith("train_dpo.py")]
        lines = [line for line in lines if line != "train_dpo.py FAILED"]  # that is torchrun
        assert len(lines) == 1 and 'train_dpo.py", line' not in text, text[-6000:]
        return lines[0]

    def equals(self, other: "Trial") -> None:
        """Fail unless both ended alike, and left nothing but what a run leaves."""
        assert (self.out / "model").is_dir(), self.log.read_text()[-6000:]
        mine, right = (t.out / "model" / "model.safetensors" for t in (self, other))
        assert mine.read_bytes() == right.read_bytes(), "the weights differ"
        mine, right = (trajectory(t.rows()) for t in (self, other))
        assert mine == right, f"metrics.jsonl differs: {mine} is not {right}"
        lines = [(row["step"], "loss" in row) for row in mine]
        assert len(set(lines)) == len(lines), "a step stands in metrics.jsonl twice"
        assert self.saved() == other.saved()
        newest = checkpoint.complete(self.out)[-1]
        assert (newest.parent / "latest").resolve() == newest.resolve()
        left = [p for p in self.out.rglob("*") if p.name.startswith(".") or p.suffix == ".part"]
        left = [str(p.relative_to(self.out)) for p in left if p.name != ".lock"]
        assert not left, f"left over: {', '.join(left)}"


def newest(out: Path) -> int:
    """The step of the newest checkpoint, after a look at whether each is what it was."""
    folders = checkpoint.complete(out)
    for folder in folders:
        try:
            checkpoint.verified(folder)
            Trial.verifications += 1
        except errors.BadCheckpoint as error:
            print(error, file=sys.stderr)
            Trial.lost += sum(path.stat().st_size for path in folder.iterdir())
    return int(folders[-1].name[5:]) if folders else 0


def family(pid: int) -> list[int]:
    """A process and its descendants; torchrun gives each rank a session of its own."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in path.read_text().split():
                found += family(int(child))
    return found


def kill(pids: list[int]) -> None:
    """SIGKILL; returns once they are dead."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while not all(map(dead, pids)):
        time.sleep(0.001)


def dead(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def line(what: str, count: object, more: str = "") -> None:
    print(f"{what:44} {count:>8}   {more}".rstrip(), flush=True)


def kills(place: Path, count: int, rng: random.Random) -> None:
    """SIGKILL to all, or to one rank, at moments spread over the whole run."""
    right = Trial(place, place / "right", 2, LONG)
    assert right.ends() == 0, right.log.read_text()
    trial = Trial(place, place / "killed", 2, LONG)
    few, saves = max(count // 25, 1), count // 2
    plan = [(step, "evaluation") for step in (21, 42) for _ in range(few)]
    plan += [(rng.randrange(LONG), "start") for _ in range(few)] + [(LONG, "export")] * few
    plan += [(LONG * k // saves, "save") for k in range(saves)]
    plan += [(rng.randrange(LONG), "step") for _ in range(count - len(plan))]
    done = dict.fromkeys(("kills", "save", "evaluation", "export", "start", "alone"), 0)
    saved, recomputed, most, slowest = 0, 0, 0, 0.0

    plan.sort()
    for k, (target, kind) in enumerate(plan):
        assert k < 2 * count, "the run ends before it can be killed"
        # how a checkpoint is written may change from one attempt to the next
        with trial.going(also=("--no-save-async",) if k % 3 == 2 else ()) as process:
            if kind == "start":
                time.sleep(rng.uniform(0, 5))
            elif kind in ("export", "evaluation"):
                trial.reaches(process, target - 1)
                pids = family(process.pid)  # now, as either takes but milliseconds
                inside = evaluating if kind == "evaluation" else exporting
                trial.until(process, partial(inside, trial))
                kill(pids)
            else:
                trial.reaches(process, target)
            if kind == "save":
                trial.until(process, lambda: any(trial.out.glob("checkpoints/*.part")))
            lasts = {"step": 0.4, "save": 0.02}  # seconds, more or less
            time.sleep(rng.uniform(0, lasts.get(kind, 0)))
            ranks = family(process.pid)[1:]
            if k % 5 == 1 and len(ranks) == 2 and kind != "export":
                done["alone"] += 1
                began = time.monotonic()
                kill([rng.choice(ranks)])
                assert process.wait(PATIENCE) == 1
                slowest = max(slowest, time.monotonic() - began)
        if (trial.out / "model").exists():  # too late: it can be exported, and killed, once more
            shutil.rmtree(trial.out / "model")
            plan.append((LONG, "export"))
        else:
            done["kills"] += 1
        reached, older = trial.step(), saved
        saved = trial.saved()
        assert saved >= older, f"the checkpoint of step {older} is lost"
        lost = max(0, reached - saved)
        assert lost <= 4, f"{lost} steps lost: more than the save under way and those since"
        recomputed, most = recomputed + lost, max(most, lost)
        done["save"] += any(
            p.suffix == ".part" or p.name.startswith((".latest", ".trash"))
            for p in trial.out.glob("checkpoints/*")
        )
        done["export"] += exporting(trial)
        done["start"] += kind == "start"
        done["evaluation"] += evaluating(trial)
    assert trial.ends() == 0, trial.log.read_text()[-6000:]
    trial.equals(right)
    assert done["save"] >= count // 5, f"only {done['save']} of {count} kills inside a save"

    line("kills", done["kills"])
    line("  inside a save", done["save"])
    line("  inside an evaluation", done["evaluation"] or "not tried")
    line("  inside the export", done["export"] or "not tried")
    line("  while it started", done["start"])
    line("  of one rank alone", done["alone"], f"torchrun had ended after {slowest:.1f} s at most")
    line("resumes", len(plan))
    line("steps recomputed, at least", recomputed, f"after one kill {most} at most")
    line("checkpoints verified", Trial.verifications)
    line("bytes of finished checkpoints lost", Trial.lost)
    line("weights and metrics equal, nothing left over", "yes")


def evaluating(trial: Trial) -> bool:
    """Whether the last line that was written is a step's with an evaluation to follow."""
    rows = trial.rows()
    return bool(rows) and rows[-1]["step"] % 7 == 0 and "loss" in rows[-1]


def exporting(trial: Trial) -> bool:
    return any(trial.out.glob(".model.*"))


def restarts(place: Path, right: Trial, count: int, rng: random.Random) -> None:
    """torchrun restarts the ranks after one of them was killed, and they resume by themselves."""
    for k in range(count):
        trial = Trial(place, place / f"restarted-{k}", 2, SHORT)
        with trial.going("--max-restarts=3") as process:
            assert trial.reaches(process, rng.randrange(SHORT - 3))
            first = trial._metrics()
            kill([rng.choice(family(process.pid)[1:])])
            assert process.wait(PATIENCE) == 0, trial.log.read_text()[-6000:]
        assert trial._metrics() != first, "it was not restarted"
        trial.equals(right)
    line("--max-restarts: one rank killed, resumed", f"{count}/{count}", "each equal")


def signals(place: Path, right: Trial, ranks: int, count: int, rng: random.Random) -> None:
    """SIGTERM at random moments: the state is saved and no step is computed twice."""
    trial = Trial(place, place / f"stopped-{ranks}", ranks, SHORT)
    sent = 0
    for k in range(count):
        with trial.going() as process:
            assert trial.reaches(process, (SHORT - 3) * k // count)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGTERM)
            code = process.wait(PATIENCE)
        if code == 0:  # too late: it had ended, or was about to
            break
        sent += 1
        assert code == (143 if ranks == 1 else 1), trial.log.read_text()
        assert f"asked to stop: saved after step {trial.saved()} in " in trial.said()
        assert trial.step() == trial.saved(), "steps were lost"
    assert trial.ends() == 0
    trial.equals(right)
    how = "python: exit 143" if ranks == 1 else "torchrun: exit 1"
    line(f"SIGTERM to {how}", sent or "not tried", "one line each; steps recomputed 0; equal")


def second_signal(place: Path) -> None:
    """Whoever signals twice means it: a step that takes long is not waited for."""
    slow = "import sys, time; del sys.argv[0]; import train_dpo; from zephyr import optim; "
    slow += "from zephyr.run import exits; "
    slow += "optim.step = lambda *_, **__: time.sleep(60); exits.call(train_dpo.main)"
    trial = Trial(place, place / "twice", 1, SHORT)
    with trial.going("-c", slow) as process:
        assert trial.reaches(process, 0)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(PATIENCE) == 143
    line("a second SIGTERM in a step of a minute", 1, f"ended in {time.monotonic() - began:.2f} s")


@contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A small one, for as long as the block."""
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "-R", str(place)], check=False)


def full_disk(place: Path, right: Trial, attempt: int) -> None:
    """It fills up in the middle of a save."""
    with disk(place / f"full-{attempt}", "3m") as small:
        trial = Trial(place, small / "full", 2, SHORT)
        with trial.going() as process, open(small / "ballast", "wb", buffering=0) as ballast:
            assert trial.reaches(process, 8)
            if not trial.until(process, lambda: any(trial.out.glob("checkpoints/*.part"))):
                raise NotArranged("the run had ended before it could be met inside a save")
            fails(errno.ENOSPC, lambda: ballast.write(bytes(4096)), often=True)
            code = process.wait(PATIENCE)
        said = refused(trial, code)
        mount("-o", "remount,size=12m", str(small))
        assert trial.ends() == 0, trial.log.read_text()[-6000:]
        trial.equals(right)
    line("disk full inside a save: exit 5", 1, f"{said}; with more room: equal")


def read_only_disk(place: Path, right: Trial, attempt: int) -> None:
    """It becomes read-only between saves, once no file there is open for writing."""
    with disk(place / f"read-only-{attempt}", "12m") as small:
        trial = Trial(place, small / "read-only", 2, SHORT)
        with trial.going() as process:
            assert trial.reaches(process, 8)
            bound = str(trial.out / "checkpoints")
            mount("--bind", bound, bound)
            while mount("-o", "remount,ro,bind", bound, check=False):
                if process.poll() is not None:
                    raise NotArranged("the run had ended before the disk was read-only")
            fails(errno.EROFS, lambda: Path(bound, "mine").touch())
            code = process.wait(PATIENCE)
        said = refused(trial, code)
        subprocess.run(["umount", bound], check=True)
        assert trial.ends() == 0, trial.log.read_text()[-6000:]
        trial.equals(right)
    line("disk read-only between saves: exit 5", 1, f"{said}; writable again: equal")


def mount(*arguments: str, check: bool = True) -> int:
    """Mount's exit code. Raises NotArranged if it fails."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise NotArranged(done.stderr.strip() + "; it needs root" * (os.geteuid() != 0))
    return done.returncode


def fails(number: int, write: Callable[[], object], often: bool = False) -> None:
    """Raise NotArranged unless a write, or one of many, ends in this errno."""
    try:
        write()
        while often:
            write()
    except OSError as error:
        if error.errno == number:
            return
        raise NotArranged(f"a write ends in {error.strerror}, not {os.strerror(number)}") from None
    raise NotArranged(f"a write succeeds, instead of {os.strerror(number)}")


def refused(trial: Trial, code: int) -> str:
    """The reason in the one line of a run that storage ended; its checkpoints are intact."""
    if code == 0:
        raise NotArranged("the run had ended before the disk was as it should be")
    assert code == 1, code
    assert trial.saved() >= 6
    said, codes = trial.said(), trial.log.read_text()
    assert "exitcode  : 5" in codes, codes[-6000:]
    return re.search(r"cannot write: ([^:;]+)|(takes [^:;]+)", said)[0]


@contextmanager
def faulty(k: int, fault: str) -> Iterator[list[str]]:
    """Inside, the k-th call that changes the disk goes wrong, in whatever thread it is: EIO, once;
    ENOSPC, and from then on whenever room is needed; or the process ends there, "kill". A write
    does half of its work before. Yields the calls so far."""
    calls: list[str] = []

    def count(name: str, half: Callable[[], object] = bool) -> None:
        calls.append(name)
        roomy = name in ("unlink", "rmdir", "rename", "replace", "chmod", "fchmod", "fsync")
        if len(calls) == k or (len(calls) > k and fault == "ENOSPC" and not roomy):
            half()
            if fault == "kill":
                os._exit(9)
            raise OSError(number := getattr(errno, fault), os.strerror(number))

    def counted(name: str, call: Callable) -> Callable:
        def wrapper(*args, **options):
            if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                count(name)
            return call(*args, **options)

        return wrapper

    class Writing:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            def half():
                self.file.write(data[: len(data) // 2])
                self.file.flush()

            count("write", half)
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def opened(file, mode="r", *args, **options):
        if set(mode) <= set("rbt"):
            return real_open(file, mode, *args, **options)
        count("open")
        return Writing(real_open(file, mode, *args, **options))

    real_open = builtins.open
    names = (
        "mkdir",
        "rename",
        "replace",
        "unlink",
        "rmdir",
        "symlink",
        "chmod",
        "fchmod",
        "fsync",
        "open",
    )
    real = {name: getattr(os, name) for name in names}
    try:
        builtins.open = io.open = opened
        for name in names:
            setattr(os, name, counted(name, real[name]))
        yield calls
    finally:
        builtins.open = io.open = real_open
        for name in names:
            setattr(os, name, real[name])


class Saves:
    """A run that does nothing but save; all numbers of the state of step s tell that they are."""

    def __init__(self, place: Path, out: Path, ranks: Ranks, background: bool, **settings):
        base, settings = str(place / "base"), settings | {"save_async": background}
        c = config.DPOConfig(model=base, data=("none",), out=str(out), **settings)
        self.model = fsdp.build(config_json.read(base), ranks, "fp32")
        self.optimizer = optim.adamw(self.model, 0.0)
        self.run = Run(c, {}, ranks)

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *raised: object) -> None:
        self.run.__exit__(*raised)

    def tensors(self, step: int) -> Iterator[tuple[torch.Tensor, float]]:
        for k, x in enumerate(checkpoint.tensors_of(self.model, self.optimizer).values()):
            yield x, step + k / 1024

    @torch.no_grad()
    def save(self, step: int) -> None:
        for x, value in self.tensors(step):
            x.fill_(value)
        self.run.save(step, self.model, self.optimizer)
        self.run.wait()

    def load(self) -> int:
        step = self.run.load(self.model, self.optimizer)
        pure = all(bool((x == value).all()) for x, value in self.tensors(step))
        assert pure or not step, "a mixture"
        return step


def forked(do: Callable[[], int | None]) -> int:
    """`do` in a process of its own, which has imported everything already; its exit code."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        code = do() or 0
    except errors.Storage as error:
        code = error.code if "\n" not in str(error) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def each_call(place: Path, fault: str, background: bool) -> None:
    """Saves with the fault in their first, second, ... call, until one gets by without it."""
    out = place / f"{fault}-{background}"

    def attempt(step: int, k: int) -> int:
        saves = Saves(place, out, group.start(), background)
        assert saves.load() == step - 2
        with faulty(k, fault) as calls:
            saves.save(step)
        return 0 if len(calls) < k else 8  # 8: the fault did no harm

    import torch._dynamo  # noqa: F401 building a model does it, so each process forked need not

    assert forked(lambda: attempt(2, 10**9)) == 0
    step, k, code = 2, 0, -1
    while code:
        k += 1
        code = forked(lambda step=step + 2, k=k: attempt(step, k))
        assert code in (0, 8, 9 if fault == "kill" else 5), f"{fault} in call {k}: exit {code}"
        found = newest(out)
        assert found in (step, step + 2), f"{fault} in call {k}: the checkpoint is lost"
        step = found
    how = "in the background" if background else "in the foreground"
    line(f"{fault} in each call of a save {how}", k - 1, "the one before or the new one loads")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs, 8 or more [50]")
    parser.add_argument("--seed", type=int, default=0, help="of their moments [0]")
    parser.add_argument("--out", type=Path, help="a folder for the runs, which stay [none stays]")
    o = parser.parse_args()
    if o.kills < 8:
        parser.error(f"--kills {o.kills} is less than 8, one of each sort")
    place = o.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        tiny.make(place)
        rng = random.Random(o.seed)
        began = time.monotonic()
        for fault in ("EIO", "ENOSPC", "kill"):
            for background in (False, True):
                each_call(place, fault, background)
        right = {ranks: Trial(place, place / f"right-{ranks}", ranks, SHORT) for ranks in (1, 2)}
        assert [trial.ends() for trial in right.values()] == [0, 0]
        for what, scenario in (
            ("disk full inside a save", full_disk),
            ("disk read-only between saves", read_only_disk),
        ):
            arranged(what, partial(scenario, place, right[2]))
        for ranks in (1, 2):
            signals(place, right[ranks], ranks, min(5, o.kills), rng)
        second_signal(place)
        restarts(place, right[2], min(20, o.kills), rng)
        kills(place, o.kills, rng)
        line("minutes", f"{(time.monotonic() - began) / 60:.0f}")
        assert Trial.lost == 0, "finished checkpoints were damaged"
    except (AssertionError, errors.BadCheckpoint):
        traceback.print_exc()
        print(f"chaos: something was lost, see above and {place}", file=sys.stderr)
        sys.exit(1)
    if not o.out:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
