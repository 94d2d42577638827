"""Runs that stop and go on, on other numbers of ranks too, and what a run folder accepts."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import model
from test_parallel import pairs, torchrun
from test_weights import folder_of
from torch.distributed.checkpoint.state_dict import get_state_dict

from zephyr import checkpoint, config, losses, optim, parallel, weights
from zephyr.config import DPOConfig, SFTConfig


@pytest.fixture(scope="module")
def ranks():
    yield parallel.start()
    parallel.finish()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return folder_of(model(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def c(tmp_path) -> DPOConfig:
    """With values that a settings file must not bend, else a run would not know itself again."""
    lr = float(np.nextafter(5e-7, 1))
    return DPOConfig(model='ä "b"', data=("a.jsonl",), out=str(tmp_path / "run"), steps=9, lr=lr)


def start(ranks, base: Path, precision: str = "fp32"):
    m = parallel.build(weights.config(base), ranks, precision)
    weights.load(base, m)
    return m, optim.adamw(m, 0.1)


def train(m, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        losses.sft(m(pairs(step))).backward()
        optim.step(optimizer, 1e-3 / (1 + step), 1.0)


def state(m, optimizer) -> dict[str, torch.Tensor]:
    """Weights and moments by name, whole."""
    weights, moments = get_state_dict(m, optimizer)
    flat = dict(weights)
    for name, parts in moments["state"].items():
        flat |= {f"{name} {part}": x for part, x in parts.items()}
    return {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in flat.items()}


def equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and len(a) > 60
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_one_straight_through(ranks, base, tmp_path, precision):
    straight = start(ranks, base, precision)
    train(*straight, 0, 6)
    first = start(ranks, base, precision)
    train(*first, 0, 3)
    checkpoint.save(str(tmp_path), 3, *first)
    train(*first, 3, 6)
    equal(state(*first), state(*straight))  # saving leaves no trace
    second = start(ranks, base, precision)
    assert checkpoint.load(tmp_path / "checkpoints" / "step-000003", *second) == 3
    assert float(second[1].state[second[0].lm_head.weight]["step"]) == 3
    train(*second, 3, 6)
    equal(state(*second), state(*straight))


def test_a_tied_model_stays_tied(ranks, tmp_path):
    base = folder_of(model(tie_word_embeddings=True), tmp_path / "base")
    straight, again = start(ranks, base), start(ranks, base)
    train(*straight, 0, 2)
    checkpoint.save(str(tmp_path), 2, *straight)
    checkpoint.load(tmp_path / "checkpoints" / "step-000002", *again)
    for m, optimizer in (straight, again):
        train(m, optimizer, 2, 4)
        assert m.lm_head.weight is m.model.embed_tokens.weight
    assert all(map(torch.equal, again[0].parameters(), straight[0].parameters()))


SCRIPT = """
import sys
from pathlib import Path

import torch
from zephyr import checkpoint, losses, optim, parallel, weights
from zephyr.config import DPOConfig

where = Path(sys.argv[1])
ranks = parallel.start()
batches = torch.load(where / "batches.pt", weights_only=False)
m = parallel.build(weights.config(where / "base"), ranks, "fp32")
weights.load(where / "base", m)
optimizer = optim.adamw(m, 0.1)
step = checkpoint.load(where / "checkpoints" / "step-000002", m, optimizer)
checkpoint.save(str(where), 3, m, optimizer)
for batch in batches:
    weight = ranks.size * ranks.rank  # all of the gradient is the second rank's
    (losses.sft(m(batch)) * weight).backward()
    optim.step(optimizer, 1e-3 / (1 + step), 1.0)
    step += 1
checkpoint.save(str(where), step, m, optimizer)


def opened(out, **changes):
    c = DPOConfig(model="m", data=("d",), out=str(where / out), **changes)
    try:
        return checkpoint.open_run(c, "digest", ranks)
    except ValueError as error:
        return f"ValueError: {error}"


found = [opened("file/run"), opened("run"), opened("run", resume="fresh")]
torch.save({"step": step, "found": [str(x) for x in found]}, where / f"{ranks.rank}.pt")
parallel.finish()
"""


def test_one_rank_then_two_then_one(ranks, base, tmp_path):
    """Step 3 is step 2 saved again by two ranks; steps 2 and 3 of the training are theirs too."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "file").touch()
    torch.save([pairs(2), pairs(3)], tmp_path / "batches.pt")
    straight = start(ranks, base)
    train(*straight, 0, 2)
    checkpoint.save(str(tmp_path), 2, *straight)
    two = torchrun(SCRIPT, tmp_path)

    back = start(ranks, base)
    assert checkpoint.load(tmp_path / "checkpoints" / "step-000003", *back) == 3
    equal(state(*back), state(*straight))

    assert [found["step"] for found in two] == [4, 4]
    assert checkpoint.load(tmp_path / "checkpoints" / "step-000004", *back) == 4
    train(*straight, 2, 5)
    train(*back, 4, 5)
    expected = state(*straight)
    for name, x in state(*back).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=2e-5, msg=name)

    for found in two:  # an error of the first rank's is every rank's, and none waits
        failed, fresh, again = found["found"]
        assert failed.startswith("ValueError: ") and "file/run/config.toml: cannot write" in failed
        assert fresh == again == "None"
    assert sorted(p.name for p in tmp_path.glob("run*")) == ["run", "run.1"]


def test_a_checkpoint_appears_when_it_is_complete(ranks, base, tmp_path, monkeypatch):
    run = start(ranks, base)
    train(*run, 0, 1)
    names = []
    dcp_save = checkpoint.dcp.save

    def save(*args, **options):
        dcp_save(*args, **options)
        names.extend(p.name for p in (tmp_path / "checkpoints").iterdir())

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    (tmp_path / "checkpoints" / "step-000007.part").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000007.part" / "left over").touch()
    checkpoint.save(str(tmp_path), 7, *run)
    assert names == ["step-000007.part"]
    folder, = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "step-000007" and not (folder / "left over").exists()


def test_a_disk_that_refuses_and_a_damaged_checkpoint_cost_one_line(ranks, base, tmp_path):
    run = start(ranks, base)
    train(*run, 0, 1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="step-000001.part: cannot write: NotADirecto") as error:
        checkpoint.save(str(tmp_path / "file"), 1, *run)
    assert "\n" not in str(error.value)
    checkpoint.save(str(tmp_path), 1, *run)
    folder = tmp_path / "checkpoints" / "step-000001"
    data, = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:9999])
    with pytest.raises(ValueError, match="step-000001 is damaged: .*; remove it, and the") as error:
        checkpoint.load(folder, *run)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def fake_checkpoint(c, step: int, suffix: str = "") -> Path:
    folder = Path(c.out) / "checkpoints" / f"step-{step:06d}{suffix}"
    folder.mkdir(parents=True)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_fresh_start_writes_what_reproduces_it(ranks, c):
    assert checkpoint.open_run(c, "digest", ranks) is None
    out = Path(c.out)
    assert sorted(p.name for p in out.iterdir()) == ["config.toml", "run.json"]
    assert {oct(p.stat().st_mode & 0o777) for p in out.iterdir()} == {"0o644"}
    again, _ = config.parse(DPOConfig, [str(out / "config.toml")])
    assert again == c
    about = json.loads((out / "run.json").read_text())
    assert about["data"] == "digest" and about["ranks"] == 1 and about["kernels"] == "torch"
    assert about["torch"] == torch.__version__ and about["safetensors"]


@pytest.mark.parametrize("failure", [FileNotFoundError("git"), None])
def test_neither_git_nor_a_checkout_is_needed(ranks, c, monkeypatch, failure):
    def check_output(command, **options):
        raise failure or subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(subprocess, "check_output", check_output)
    checkpoint.open_run(c, "digest", ranks)
    assert json.loads((Path(c.out) / "run.json").read_text())["commit"] is None


def test_it_continues_from_the_last_complete_checkpoint(ranks, c):
    checkpoint.open_run(c, "digest", ranks)
    fake_checkpoint(c, 100, ".part")
    assert checkpoint.open_run(c, "digest", ranks) is None
    for step in (20, 100, 3):
        fake_checkpoint(c, step)
    fake_checkpoint(c, 120, ".part")
    before = tree(Path(c.out))
    assert checkpoint.open_run(c, "digest", ranks).name == "step-000100"
    assert tree(Path(c.out)) == before


def test_a_finished_run_is_refused(ranks, c):
    checkpoint.open_run(c, "digest", ranks)
    (Path(c.out) / "model").mkdir()
    with pytest.raises(ValueError, match=f"^{c.out} holds a finished run; --resume fresh moves it"):
        checkpoint.open_run(c, "digest", ranks)


def test_fresh_moves_aside_and_deletes_nothing(ranks, c):
    out, fresh = Path(c.out), replace(c, resume="fresh")
    assert checkpoint.open_run(fresh, "digest", ranks) is None
    assert not out.with_name("run.1").exists()
    seen = []
    for k in (1, 2):
        (fake_checkpoint(c, k) / "weights").write_text(f"of run {k}")
        (out / "model").mkdir()
        seen.append(tree(out))
        assert checkpoint.open_run(replace(fresh, lr=k / 10), f"digest {k}", ranks) is None
    assert sorted(p.name for p in out.parent.iterdir()) == ["run", "run.1", "run.2"]
    assert [tree(out.with_name(f"run.{k}")) for k in (1, 2)] == seen
    assert sorted(tree(out)) == ["config.toml", "run.json"]


def test_changed_settings_are_listed(ranks, c):
    checkpoint.open_run(c, "digest", ranks)
    fake_checkpoint(c, 3)
    before = tree(Path(c.out))
    changed = replace(c, beta=0.2, steps=None, data=("a.jsonl", "b.jsonl"), save_every=7)
    message = (
        rf"^{c.out} has checkpoints of another run: --beta was 0.01, is 0.2; --data was "
        r"\['a.jsonl'\], is \['a.jsonl', 'b.jsonl'\]; --steps was 9, is None; the content of "
        "--data changed. Continue it as it was, or use --resume fresh$"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint.open_run(changed, "another digest", ranks)
    with pytest.raises(ValueError, match="run: the content of --data changed. Continue"):
        checkpoint.open_run(c, "another digest", ranks)
    assert tree(Path(c.out)) == before


def test_settings_that_leave_the_trajectory_alone_may_change(ranks, c, monkeypatch, tmp_path):
    checkpoint.open_run(c, "digest", ranks)
    fake_checkpoint(c, 3)
    monkeypatch.chdir(tmp_path)
    free = replace(c, out="run", log_every=7, eval_every=8, save_every=9, microbatch_tokens=999,
                   recompute="full")  # fmt: skip
    changed = {k for k, v in vars(c).items() if v != getattr(free, k)}
    assert changed == checkpoint.FREE - {"resume"}
    assert checkpoint.open_run(free, "digest", ranks).name == "step-000003"


@pytest.mark.parametrize("damage", ["config.toml", "run.json", "{", "[]", "sft"])
def test_checkpoints_without_their_settings_are_refused(ranks, c, damage):
    checkpoint.open_run(c, "digest", ranks)
    fake_checkpoint(c, 3)
    if damage.endswith(("toml", "json")):
        (Path(c.out) / damage).unlink()
    elif damage == "sft":
        c = SFTConfig(model=c.model, data=c.data, out=c.out)
    else:
        (Path(c.out) / "run.json").write_text(damage)
    with pytest.raises(ValueError, match=rf"no config.toml and run.json of a \[{c.table}\] run;"):
        checkpoint.open_run(c, "digest", ranks)
