"""What a user gets for a mistake: exit code 2 and one line that says what to change."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train_dpo
import train_sft
from run_helpers import DPO, SFT, run, weights_of
from zephyr.distributed import group
from zephyr.run import exits


@pytest.fixture
def fails(place, tmp_path, capfd, monkeypatch):
    """Run a script as from the command line; returns its one line."""

    def fails(script, *flags: str, data: bytes | None = None, model: Path | None = None) -> str:
        files = {train_dpo: "pairs.jsonl", train_sft: "chats.jsonl"}
        path = place / files[script]
        if data is not None:
            path = tmp_path / "data.jsonl"
            path.write_bytes(data)
        argv = [
            "--model",
            str(model or place / "base"),
            "--data",
            str(path),
            "--out",
            str(tmp_path / "run"),
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *argv])
        try:
            with pytest.raises(SystemExit) as stop:
                exits.call(script.main)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        assert stop.value.code == 2
        assert not list((tmp_path / "run").glob("m*")), "no metrics, no model"
        name = Path(script.__file__).name
        err = capfd.readouterr().err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith(f"{name}: ")]
        assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
        return lines[0]

    return fails


def rows(place: Path, name: str = "pairs.jsonl") -> list[dict]:
    return [json.loads(line) for line in (place / name).read_text().splitlines()]


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_missing_weights_are_told_before_the_data_is_read(fails, place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    line = fails(train_dpo, *DPO, model=tmp_path / "bare", data=b"no pair\n")
    assert "bare has no model.safetensors and no model.safetensors.index.json" in line


def test_data(fails, place):
    good = rows(place)
    assert "gone.jsonl: no such file" in fails(train_dpo, *DPO, "--data", "gone.jsonl")
    assert "data.jsonl:3: " in fails(train_dpo, *DPO, data=lines(good[:2]) + b'{"chosen": [\n')
    assert "data.jsonl" in fails(train_dpo, *DPO, data=b"")
    line = fails(train_dpo, *DPO, data=lines([*good, {"chosen": good[0]["chosen"]}]))
    assert "data.jsonl:9: has no field 'rejected'" in line
    odd = json.loads(json.dumps(good[1]))
    odd["chosen"][1]["role"] = odd["rejected"][1]["role"] = "robot"
    assert "data.jsonl:1: " in fails(train_dpo, *DPO, data=lines([odd]))
    odd["chosen"][0]["role"] = odd["rejected"][0]["role"] = "robot"
    odd["chosen"][1]["role"] = odd["rejected"][1]["role"] = "assistant"
    line = fails(train_dpo, *DPO, data=lines([good[0], odd]))
    assert "data.jsonl:2: " in line and "message 0 has role 'robot'; known roles are" in line
    assert "UTF-8" in fails(train_dpo, *DPO, data=lines(good[:1]) + b'{"prompt": "\xff"}\n')
    odd = b'{"messages": [{"role": "wizard", "content": "x"}]}\n'
    line = fails(train_sft, *SFT, data=odd)
    assert "data.jsonl:1: message 0 has role 'wizard'" in line
    same = json.loads(json.dumps(good[0])) | {"rejected": good[0]["chosen"]}
    assert "no row is left" in fails(train_dpo, *DPO, data=lines([same]))


def test_model(fails, place, tmp_path):
    assert "no such folder" in fails(train_dpo, *DPO, model=tmp_path / "nothing")
    broken = tmp_path / "broken"
    shutil.copytree(place / "base", broken)
    (broken / "tokenizer.model").unlink()
    assert "needs its tokenizer.model" in fails(train_dpo, *DPO, model=broken)
    shutil.copy(place / "base" / "tokenizer.model", broken)
    about = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(about | {"vocab_size": 299}))
    line = fails(train_dpo, *DPO, model=broken)
    assert "only 299 embedding rows" in line and "tokenizer.model" in line


def test_weights(fails, place, tmp_path):
    """These need the model built, so the run folder is there: only settings and versions in it."""
    broken = tmp_path / "broken"
    shutil.copytree(place / "base", broken)
    about = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(about | {"intermediate_size": 57}))
    line = fails(train_dpo, *DPO, model=broken)
    assert "mlp.down_proj.weight is [32, 56]; its config says [32, 57]" in line


def test_flags(fails):
    assert "--beta 0.0 must be" in fails(train_dpo, *DPO, "--beta", "0")
    line = fails(train_dpo, *DPO, "--max-length", "64", "--max-prompt-length", "64")
    assert "--max-prompt-length 64 must be" in line and "below --max-length 64" in line
    assert "unknown argument --bata" in fails(train_dpo, *DPO, "--bata", "0")
    line = fails(train_dpo, *DPO, "--microbatch-tokens", "20")
    assert "--microbatch-tokens 20 is less than the longest pair" in line
    line = fails(train_sft, *SFT, "--label-smoothing", "0.1")
    assert "unknown argument --label-smoothing" in line


@pytest.mark.parametrize(
    "script, flags, said, fix",
    [
        (
            train_dpo,
            (),
            "8 pairs with --batch 128, --epochs 1 and no --steps: that is 1 step, whose "
            "learning rate --warmup 0.1 makes 0, and nothing would be learned; use --batch 1, "
            "which makes 8 steps, --epochs 10 or --warmup 0",
            ("--batch", "1"),
        ),
        (train_sft, (), "1 chunk with --batch 128", ("--epochs", "10")),
        (train_sft, ("--steps", "1"), "--steps 1: that is 1 step, whose", ("--steps", "10")),
        (train_dpo, ("--steps", "1"), "use --steps 10 or --warmup 0", ("--warmup", "0")),
    ],
)
def test_a_run_that_could_not_learn(fails, place, tmp_path, monkeypatch, script, flags, said, fix):
    """Nothing is computed and no folder is made; the fix it names trains."""
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))
    flags = ("--lr", "1e-2", *flags)
    assert said in fails(script, *flags)
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache").glob("reference-*"))
    run(script, place, tmp_path / "run", *flags, *fix)
    before, after = load_file(place / "base" / "model.safetensors"), weights_of(tmp_path / "run")
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_a_run_that_mostly_warms_up_says_so(place, tmp_path, capfd):
    for flags, said in {
        ("--steps", "2"): "warm-up takes 1 of the 2 steps (--warmup 0.1)",
        ("--steps", "3"): "",
    }.items():
        run(train_dpo, place, tmp_path / "run", *flags, "--resume", "fresh")
        err = capfd.readouterr().err
        assert ("warm-up takes" in err) == bool(said) and said in err


def test_fewer_pairs_in_a_batch_than_ranks(fails, monkeypatch):

    real = group.start

    def of_eight(replicas, *_):
        return real(replicas)._replace(size=8)

    monkeypatch.setattr(group, "start", of_eight)
    assert "--batch 4 is less than the 8 ranks" in fails(train_dpo, *DPO, "--batch", "4")


def test_a_model_that_is_not_finite_stops_where_it_is_noticed(fails, place, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(place / "base", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinity in model.norm.weight" in fails(train_dpo, *DPO, model=broken)


def test_the_second_stage_before_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_dpo.py"])
    try:
        with pytest.raises(SystemExit) as stop:
            exits.call(train_dpo.main)
    finally:
        dist.destroy_process_group()
    assert stop.value.code == 2
    assert "runs/tiny/sft/model is not there yet; run train_sft.py first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
