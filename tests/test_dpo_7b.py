"""The three-way benchmark of DPO at 7B: what it refuses, draws, keeps and compares, and a real run
of the smallest shape."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers

from benchmarks import dpo_7b, vs_trl
from zephyr import config, lora
from zephyr.config import DPOConfig
from zephyr.model import Mistral
from zephyr.packing import Pair, pack_pairs
from zephyr.weights import config_json

pytestmark = pytest.mark.tools

TINY = ["--shape", "tiny", "--steps", "3", "--batch", "1"]
SMALL = {  # the same in Hugging Face's words
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
PATHS = ["--model", "m", "--data", "d", "--out", "o"]
BF16 = ["--precision", "bf16"]
MACHINE = {"gpu": None, "cpu": "some", "cores": 2, "commit": "abc", "torch": "2.13"}


def result(losses: list[float], pairs: float = 1.0) -> dict:
    return {
        "losses": losses,
        "pairs_per_second": pairs,
        "tokens_per_second": 780 * pairs,
        "unshared_per_second": 950 * pairs,
        "peak_gib": 2.0,
        "reference": 0.0,
        "hours": 61_135 / 3600 / pairs,
    }


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Runs main with contenders that are not run but give these results; returns who was asked."""

    def main(results: dict, *argv: str) -> list[str]:
        asked = []

        def run(o, name, left):
            asked.append(name)
            found = results.get(name, "failed: exit status 1")
            return ([], found) if isinstance(found, str) else ([found], "ok")

        monkeypatch.setattr(dpo_7b, "KEPT", tmp_path / "kept")
        monkeypatch.setattr(dpo_7b, "run", run)
        monkeypatch.setattr(vs_trl, "alone", lambda function, *_: MACHINE)
        dpo_7b.main([*TINY, "--out", str(tmp_path / "out"), *argv])
        return asked

    return main


@pytest.mark.parametrize(
    "line, message",
    [
        ("--steps 2", "--steps 2 must be above 2, the steps of the warm-up"),
        ("--batch 6 --trl-pairs 4", "--batch 6 must be a multiple of --trl-pairs 4"),
        ("--batch 0", "--batch 0 must be a multiple of --trl-pairs 0"),
        ("--minutes 0", "--minutes 0.0 must be above 0"),
        ("--shape 70b", "argument --shape: invalid choice: '70b'"),
        ("--contenders theirs", "argument --contenders: invalid choice: 'theirs'"),
        ("--ours=--recompute=some", "--ours: argument --recompute: invalid choice: 'some'"),
        ("--control=--reworm=0.1", "--control: unknown argument --reworm=0.1"),
        ("--lora=--lora-rank=5000", "--lora: --lora-rank 5000 must be from 0 to 4096"),
        ("--lora=--lora-rank=0", "--lora: --lora-alpha is for adapters; give"),
        ("--ours=--lora-rank=8", "--ours: --lora-rank is 8; adapters are for --lora alone"),
    ],
)
def test_a_mistake_costs_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        dpo_7b.main(line.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"dpo_7b: {message}") and said.count("\n") == 1


def test_pairs_have_ultrafeedbacks_lengths():
    """Means of UltraFeedback's pairs after the cut to 512 and 1024: docs/operate/performance.md."""
    data = dpo_7b.tokens(4 * 64)
    pairs = [data.pair(k) for k in range(len(data))]
    lengths = np.array([[len(part) for part in pair] for pair in pairs])
    assert lengths.mean(0) == pytest.approx([170, 320, 290], rel=0.01)
    assert (lengths[:, 0] + lengths[:, 1:].max(1)).max() <= vs_trl.LENGTH and lengths.min() > 0
    assert np.corrcoef(lengths[:, 1:].T)[0, 1] > 0.5, "long answers come in pairs: less padding"
    assert 3 <= data.ids.min() and data.ids.max() < vs_trl.VOCABULARY
    assert (dpo_7b.tokens(4 * 64).ids == data.ids).all(), "seeded"


def test_starting_weights_go_by_name():
    """The same names and shapes in both models, and equal bits in whatever order."""
    shape = vs_trl.architecture("tiny")
    with torch.device("meta"):
        ours = {name: p.shape for name, p in Mistral(shape).named_parameters()}
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**SMALL))
    assert ours == {name: p.shape for name, p in theirs.named_parameters()}
    cpu, names = torch.device("cpu"), ["model.norm.weight", "lm_head.weight", *list(ours)[1:3]]
    once = {name: dpo_7b.drawn(name, ours[name], cpu) for name in names}
    for name in reversed(names):
        assert torch.equal(once[name], dpo_7b.drawn(name, ours[name], cpu))
    q, k = names[2:]
    assert once["lm_head.weight"].std() == pytest.approx(0.02, rel=0.01)
    assert not torch.equal(once[q][:8], once[k][:8]) and (once["model.norm.weight"] == 1).all()


@pytest.mark.parametrize("inputs", [256, 4096])
def test_starting_weights_pass_on_the_same_at_any_width(inputs):
    """At 7b a rounding must not grow from layer to layer, or the losses of two right contenders
    would differ by more than TOLERANCE."""
    w = dpo_7b.drawn("lm_head.weight", torch.Size([512, inputs]), torch.device("cpu"))
    out = torch.randn(512, inputs, generator=torch.Generator().manual_seed(0)) @ w.T
    assert out.std() == pytest.approx(0.32, rel=0.02)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_start_as_ours_in_peft():
    """PEFT's parameters that train have the names and the values that ours have; the base is drawn
    for both."""
    o = dpo_7b.parse([*TINY, "--lora=--lora-rank=4 --lora-targets=q_proj,down_proj"])
    spec, cpu = lora.spec(dpo_7b.settings(o, "lora")), torch.device("cpu")
    with torch.device("meta"):
        ours = Mistral(vs_trl.architecture("tiny"))
    lora.attach(ours, spec, "fp32", cpu)
    expected = {name: p.shape for name, p in ours.named_parameters() if p.requires_grad}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**SMALL))
    theirs = dpo_7b.adapted(model, dpo_7b.peft_config(spec))
    theirs = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(theirs) == len(expected) == 2 * 2 * 4
    for name, shape in expected.items():
        other = theirs[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
        assert torch.equal(other, lora.initial(name, shape, DPOConfig.seed))
        assert torch.equal(other, dpo_7b.start(name, shape, cpu))
        assert bool(other.any()) == name.endswith(lora.A)


def test_lora_has_the_recipe_at_7b():
    """What of the recipe decides the work; objective and schedule are those of the others."""
    o = dpo_7b.parse(["--precision", "bf16"])
    c, _ = config.parse(config.DPOConfig, [dpo_7b.LORA, *PATHS])
    found = dpo_7b.settings(o, "lora")
    for name in ("lora_rank", "lora_alpha", "lora_targets", "recompute", "microbatch_tokens"):
        assert getattr(found, name) == getattr(c, name), name
    assert dpo_7b.rate(o, "lora") == dpo_7b.rate(o, "trl-lora") == c.lr and c.lora_rank == 128
    assert found.seed == DPOConfig.seed and dpo_7b.settings(o, "ours").lora_rank == 0
    assert dpo_7b.rate(o, "trl") == dpo_7b.settings(o, "ours").lr == o.lr == 6.25e-7


def test_adapters_are_held_to_each_other_alone(table, capsys):
    """Losses with adapters may be others than without, and not differ among themselves."""
    same = {name: result([0.69, 0.5]) for name in dpo_7b.DEFAULT}
    thin = {name: result([0.69, 0.6]) for name in dpo_7b.ADAPTED}
    asked = ["--contenders", *dpo_7b.DEFAULT, *dpo_7b.ADAPTED]
    table(same | thin, *asked)
    said = capsys.readouterr().out
    assert "lora pairs_per_second: 1.00 x trl-lora\n" in said
    assert "ours pairs_per_second: 1.00 x control, 1.00 x trl\n" in said
    with pytest.raises(SystemExit, match=r"0.610000 in trl-lora, 0.600000 in lora; over 0.005"):
        table(
            thin | {"trl-lora": result([0.69, 0.61])}, "--again", *BF16, *asked[:1], *dpo_7b.ADAPTED
        )
    table(same | thin, "--lora-lr", "1e-3", *asked)


def test_the_control_is_planned_by_the_lengths_of_its_own_packs(monkeypatch):
    monkeypatch.setattr(dpo_7b.arrays, "Tokens", dpo_7b.Apart)
    data = dpo_7b.tokens(64)
    packs = [dpo_7b.apart([data.pair(k)], [k]) for k in range(64)]
    assert data.pair_lengths().tolist() == [len(pack.tokens_T) for pack in packs]


def test_responses_apart():
    """Prompt a b c, chosen p q, rejected x y z: rows a b c p | a b c x y."""
    pair = Pair(np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7, 8]))
    row = dpo_7b.apart([pair], [17])
    assert row.tokens_T.tolist() == [1, 2, 3, 4, 1, 2, 3, 6, 7]
    assert row.layout.position_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert row.layout.cu_seqlens_q.tolist() == row.layout.cu_seqlens_k.tolist() == [0, 4, 9]
    assert row.predict_N.tolist() == [2, 3, 6, 7, 8] and row.pairs.tolist() == [17]
    shared = pack_pairs([pair], [17])
    for name in ("targets_N", "response_N"):
        assert torch.equal(getattr(row, name), getattr(shared, name))


def test_rates_and_hours(monkeypatch):
    """Steps of 2 and 4 s after the warm-up; the reference's calls but the first two make 2 s a
    pair."""
    steps = [{"tokens": 8, "flops": 40.0, "unshared": 10, "unshared_flops": 60.0}] * 4
    monkeypatch.setattr(dpo_7b, "work", lambda o: steps)
    o = dpo_7b.parse(["--shape", "tiny", "--steps", "4", "--batch", "4"])
    measured = {
        "seconds": [90.0, 50.0, 2.0, 4.0],
        "reference": 99.0,
        "calls": [(4, 60.0), (4, 30.0), (3, 4.0), (1, 4.0)],
    }
    r = dpo_7b.rates(o, dict(measured), peak=20.0)
    assert (r["pairs_per_second"], r["tokens_per_second"], r["unshared_per_second"]) == (
        1.5,
        3.0,
        3.75,
    )
    assert (r["mfu"], r["unshared_mfu"]) == (0.75, 1.125)
    assert r["hours"] == pytest.approx(dpo_7b.PAIRS / 3600 * (1 / 1.5 + 2))
    live = dpo_7b.rates(o, measured | {"calls": [], "reference": 0.0}, peak=None)
    assert live["hours"] == pytest.approx(dpo_7b.PAIRS / 3600 / 1.5) and "mfu" not in live


def test_what_has_a_result_is_not_run_again(table, tmp_path, capsys):
    good = {name: result([0.69, 0.5]) for name in dpo_7b.DEFAULT}
    with pytest.raises(SystemExit, match="dpo_7b: trl stopped at 30 s"):
        table(good | {"trl": "stopped at 30 s"})
    assert table(good) == ["trl"], "the others have theirs"
    assert table(good) == []
    assert table(good, "--ours", "--recompute full", "--control", "") == ["ours"]
    assert table(good, "--again", "--contenders", "control", "trl") == ["control", "trl"]
    assert table(good, "--lr", "3e-6") == list(dpo_7b.DEFAULT)
    capsys.readouterr()
    (tmp_path / "out" / dpo_7b.FILE).rename(tmp_path / "moved")
    (tmp_path / "kept").mkdir()
    (tmp_path / "moved").rename(tmp_path / "kept" / dpo_7b.FILE)
    assert table(good) == [], "brought along in the checkout"
    assert "ours pairs_per_second: 1.00 x control, 1.00 x trl" in capsys.readouterr().out


def test_a_broken_result_is_named(table, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (path := tmp_path / "out" / dpo_7b.FILE).write_text('{"about": {}, "found": {}}\n{"about"\n')
    with pytest.raises(SystemExit) as stop:
        table({})
    said = f"dpo_7b: {path}:2 is no result; delete the line\n"
    assert stop.value.code == 2 and capsys.readouterr().err == said


def test_out_of_memory_is_a_result(table, tmp_path, capsys):
    results = {name: result([0.69, 0.5]) for name in ("ours", "control")}
    table(results | {"trl": {"error": "out of memory: tried 2 GiB", "peak_gib": 139.0}})
    said = capsys.readouterr().out
    assert "trl              failed: out of memory: tried 2 GiB" in said
    rows = [json.loads(x) for x in (tmp_path / "out" / dpo_7b.FILE).read_text().splitlines()]
    assert [row["about"]["contender"] for row in rows] == list(dpo_7b.DEFAULT)


def test_a_peer_that_is_not_installed_is_left_out(table):
    results = {name: result([0.69, 0.5]) for name in ("ours", "control")}
    table(results | {"trl": "left out: it needs trl"})


@pytest.mark.parametrize(
    "other, precision, right", [(0.50011, "fp32", False), (0.504, "bf16", True)]
)
def test_losses_that_differ_fail(table, other, precision, right):
    results = {
        "ours": result([0.69, 0.5]),
        "control": result([0.69, 0.5]),
        "trl": result([0.69, other]),
    }
    said = f"at step 2 the loss is {other:.6f} in trl, 0.5"
    with nullcontext() if right else pytest.raises(SystemExit, match=said):
        table(results, "--precision", precision)


def test_a_real_run(tmp_path, capsys, monkeypatch):
    """Ours and the control agree to fp32's tolerance, the first loss is ln 2, and both are kept."""
    monkeypatch.setattr(dpo_7b, "KEPT", tmp_path)
    argv = [*TINY, "--precision", "fp32", "--out", str(tmp_path), "--contenders", "ours", "control"]
    dpo_7b.main(argv)
    rows = [json.loads(x) for x in (tmp_path / dpo_7b.FILE).read_text().splitlines()]
    ours, control = (row["found"] for row in rows)
    assert ours["losses"] == pytest.approx(control["losses"], abs=vs_trl.TOLERANCE["fp32"])
    assert ours["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(ours["losses"][2] - math.log(2)) > 10 * vs_trl.TOLERANCE["fp32"], "it learns"
    assert ours["hours"] > 0 and ours["reference"] > 0 and ours["peak_gib"] > 0.1
    assert "ours pairs_per_second: " in capsys.readouterr().out


def test_a_real_run_with_adapters(tmp_path, capsys, monkeypatch):
    """It starts at ln 2 and learns in another way than all weights do; its work is less."""
    monkeypatch.setattr(dpo_7b, "KEPT", tmp_path)
    argv = [*TINY, "--precision", "fp32", "--out", str(tmp_path), "--contenders", "lora"]
    dpo_7b.main(argv)
    (row,) = (json.loads(x) for x in (tmp_path / dpo_7b.FILE).read_text().splitlines())
    found, about = row["found"], row["about"]
    assert about["lr"] == 8e-5 and about["contender"] == "lora"
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(found["losses"][2] - math.log(2)) > 10 * vs_trl.TOLERANCE["fp32"], "it learns"
    assert found["reference"] > 0 and "tiny fp32 with adapters" in capsys.readouterr().out
    thin, whole = (
        dpo_7b.work(dpo_7b.parse([*TINY, "--contenders", name])) for name in ("lora", "ours")
    )
    for a, b in zip(thin, whole, strict=True):
        assert a["tokens"] == b["tokens"] and a["flops"] != b["flops"]


def test_the_architecture_is_one_that_huggingface_reads(tmp_path):
    shape = vs_trl.architecture("7b")
    config_json.write_config(tmp_path, shape, "float32", {})
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.head_dim, theirs.sliding_window) == (shape.head_dim, shape.sliding_window)
