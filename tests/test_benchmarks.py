"""The pure parts of the benchmarks: what they refuse, compute and print. No peer is needed."""

import json
import math

import pytest

from benchmarks import generate, vs_trl

pytestmark = pytest.mark.tools


def result(pairs: float, gib: float, losses: list[float], reference: float = 0.0) -> dict:
    return {
        "pairs_per_second": pairs,
        "tokens_per_second": 500 * pairs,
        "peak_gib": gib,
        "losses": losses,
        "reference": reference,
    }


@pytest.mark.parametrize(
    "line, message",
    [
        ("--steps 2", "--steps 2 must be above 2, the steps of the warm-up"),
        ("--batch 6 --trl-pairs 4", "--batch 6 must be a multiple of --trl-pairs 4"),
        ("--trl-pairs 0", "--batch 8 must be a multiple of --trl-pairs 0"),
        ("--batch 12", "--batch 12 must be a multiple of TRL's default, 8"),
        ("--batch 0", "--batch 0 must be a multiple of --trl-pairs 1"),
    ],
)
def test_numbers_that_do_not_go_together(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        vs_trl.main(line.split())
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"vs_trl: {message}")


def test_without_trl_the_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(vs_trl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        vs_trl.main(["--contenders", "ours-live", "trl"])
    line = "vs_trl: TRL is not installed: pip install zephyr-dpo[peers]\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line


def test_rates_leave_out_the_warm_up(monkeypatch):
    """Steps of 2, 4 and 1 s after the warm-up: medians, each of its own quotient."""
    measured = {"seconds": [90.0, 50.0, 2.0, 4.0, 1.0], "losses": []}
    monkeypatch.setattr(vs_trl, "alone", lambda *_: dict(measured))
    o = vs_trl.parse(["--steps", "5", "--contenders", "trl"])
    got = vs_trl.race(o, None, "fp32", [1, 1, 100, 100, 30])["trl"]
    assert got["pairs_per_second"] == 8 / 2 and got["tokens_per_second"] == 30


def test_one_that_fails_is_a_row(monkeypatch):
    def out_of_memory(_, o, place, name, precision):
        if name == "trl":
            raise MemoryError("no room\nfor it")
        return {"seconds": [1.0] * 3, "losses": [0.5] * 3, "peak_gib": 1.0, "reference": 0.0}

    monkeypatch.setattr(vs_trl, "alone", out_of_memory)
    o = vs_trl.parse(["--steps", "3", "--contenders", "trl", "ours-live", "trl-malloc"])
    results = vs_trl.race(o, None, "fp32", [1] * 3)
    assert list(results) == ["trl", "ours-live", "trl-malloc"]
    lines = vs_trl.table(results).splitlines()
    assert lines[1] == "trl              failed: MemoryError: no room"
    assert "ours-live pairs_per_second: 1.00 x trl-malloc" in lines
    assert vs_trl.verdict(results, "fp32") == "fp32: trl failed"


def test_the_table_gives_our_multiples_of_each_peer():
    results = {
        "ours-cached": result(6, 2, [0.6931, 0.5], 9.0),
        "ours-live": result(4.5, 1, [0.6]),
        "trl": result(1.5, 4, [0.6931, 0.5]),
        "trl-tuned": result(3, 2, [0.6]),
    }
    lines = vs_trl.table(results).splitlines()
    assert lines[1].split() == ["ours-cached", "6.000", "3000", "2.00", "9.0", "0.6931", "0.5000"]
    assert lines[5:] == [
        "ours-cached pairs_per_second: 4.00 x trl, 2.00 x trl-tuned",
        "ours-cached peak_gib: 0.50 x trl, 1.00 x trl-tuned",
        "ours-live pairs_per_second: 3.00 x trl, 1.50 x trl-tuned",
        "ours-live peak_gib: 0.25 x trl, 0.50 x trl-tuned",
    ]
    assert len(vs_trl.table({"trl": results["trl"]}).splitlines()) == 2, "nothing to compare"


@pytest.mark.parametrize(
    "other, precision, right",
    [
        (0.50009, "fp32", True),
        (0.50011, "fp32", False),
        (0.504, "bf16", True),
        (0.506, "bf16", False),
        (math.nan, "bf16", False),
    ],
)
def test_losses_that_differ_are_not_the_same_work(other, precision, right):
    results = {"ours-live": result(1, 1, [0.7, 0.5]), "trl": result(1, 1, [0.7, other])}
    said = vs_trl.verdict(results, precision)
    assert (said == "") == right
    if not right:
        assert said.startswith(f"{precision}: at step 2 the loss is {other:.6f} in trl, 0.5")


def test_decoding_is_timed_where_it_gives_the_same_tokens(tmp_path, capsys):
    line = f"--shape tiny --batches 2 --prompt 5 --new 4 --rounds 1 --static --json {tmp_path}/out"
    generate.main(line.split())
    row = json.loads((tmp_path / "out").read_text())
    assert row["batch"] == 2 and min(row[name] for name in ("ours", "transformers", "static")) > 0
    assert capsys.readouterr().out.count("tokens/s") == 3
