"""The plan: what fits, what is chosen, what the command prints."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zephyr.config import DPOConfig, SFTConfig
from zephyr.plan import __main__ as plan_command
from zephyr.plan import costs, fit
from zephyr.plan.__main__ import MODELS
from zephyr.plan.fit import GIB

ROOT = Path(__file__).parent.parent
MISTRAL = MODELS["mistral-7b"]
OWN = dict(model="m", data=("d",), out="o")
AUTO = dict(microbatch_tokens="auto", recompute="auto")
STEP = 128 * 778  # tokens


def page(capsys, line: str) -> str:
    plan_command.main(line.split())
    out = capsys.readouterr()
    assert not out.err
    return out.out


def value(text: str, row: str, column: int = 0) -> float:
    """A number of the row that begins so."""
    found = re.search(rf"^  {re.escape(row)} +(.*)$", text, re.M)
    return float(re.findall(r"-?[\d,.]*\d", found[1])[column].replace(",", ""))


@pytest.mark.parametrize(
    "line, fits",
    [
        ("zephyr-7b-dpo --gpu h200", False),
        ("zephyr-7b-dpo --gpu h200 --microbatch-tokens auto --recompute auto", True),
        ("zephyr-7b-dpo --gpu h200 --masters split --adam-state bf16", True),
        ("zephyr-7b-dpo --gpu a100 --gpus 8", True),
        ("zephyr-7b-dpo --gpu a100-40 --gpus 8", False),
        ("zephyr-7b-dpo --gpu 4090", False),
        ("zephyr-7b-sft --gpu h100 --gpus 8 --nodes 8 --replicas 8", True),
        ("zephyr-7b-sft --gpu l40s --gpus 4 --recompute full --train-on assistant", True),
        ("zephyr-7b-beta-dpo --gpu b200 --reference live", False),
        ("zephyr-7b-dpo --model llama-2-70b --gpu h100 --gpus 8", False),
        ("tiny --gpu a100 --gpus 8 --precision bf16", True),
        ("zephyr-7b-dpo-lora --gpu 4090", True),
        ("zephyr-7b-dpo-lora --gpu 4090 --recompute none", False),
        ("zephyr-7b-sft-lora --gpu 4090 --gpus 4", True),
        ("zephyr-7b-dpo-lora --gpu l40s --reference live --recompute auto", True),
        ("--gpu h100-nvl --gpus 2", False),
    ],
)
def test_the_page(capsys, line, fits):
    text = page(capsys, line)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 or not fits
    assert all(x == x.rstrip() for x in lines)
    memory = re.search(r"GiB of a GPU\n(.*?)  in all +([\d.]+) +of ([\d.]+)", text, re.S)
    parts = [float(x) for x in re.findall(r"^  .*? +([\d.]+)(?:   |$)", memory[1], re.M)]
    assert sum(parts) == pytest.approx(float(memory[2]), abs=0.06)
    assert (float(memory[2]) <= float(memory[3])) == fits
    assert lines[-1].startswith("fits, with " if fits else "does not fit, by ")
    # columns of numbers end together
    for head in ("recompute  ", "FLOP  ", "communication"):
        rows = text[text.index(head) :].split("\n\n")[0].splitlines() if head in text else []
        assert len({len(row) for row in rows}) <= 1


@pytest.mark.parametrize(
    "line",
    [
        "zephyr-7b-dpo --gpu h200",
        "zephyr-7b-dpo --gpu h100",
        "zephyr-7b-dpo --gpu 4090",
        "zephyr-7b-dpo --gpu a100-40 --gpus 8",
        "zephyr-7b-sft --gpu l40s",
        "zephyr-7b-dpo --model llama-2-70b --gpu h100 --gpus 8",
        "zephyr-7b-dpo-lora --gpu 4090 --recompute none",
        "zephyr-7b-dpo-lora --model llama-2-70b --gpu h100",
    ],
)
def test_what_the_verdict_says_is_enough(capsys, line):
    """And no part of it is needless, nor half the GPUs."""
    change = page(capsys, line).split("enough would be ")[1].split()
    flags = [f"{flag} {x}" for flag, x in zip(change[::2], change[1::2], strict=True)]
    assert "\nfits, with" in page(capsys, " ".join([line, *flags]))
    for flag in flags:
        fewer = " ".join(x for x in flags if x != flag)
        assert "\ndoes not fit" in page(capsys, f"{line} {fewer}"), flag


def test_nothing_helps(capsys):
    text = page(capsys, "zephyr-7b-dpo --model llama-2-70b --gpu 4090 --batch 8")
    assert text.endswith("no flag and no number of GPUs is enough\n")


def test_the_numbers_of_the_page(capsys):
    text = page(capsys, "zephyr-7b-dpo --gpu h200 --masters split --adam-state bf16")
    assert "7,241,732,096 parameters" in text and "61,135 pairs of 170 + 320 + 290" in text
    assert value(text, "masters") == pytest.approx(4 * 7_241_732_096 / GIB, abs=0.01)
    assert value(text, "moments") == pytest.approx(4 * 7_241_732_096 / GIB, abs=0.01)
    assert "gathered" not in text and "communication" not in text
    total = value(text, "forward and backward")
    assert total == pytest.approx(33.5, rel=0.01)
    assert value(text, "forward and backward", 1) == pytest.approx(total * 61_135 / 1e6, rel=1e-3)
    assert value(text, "reference, once") == pytest.approx(11.2, rel=0.015)
    # the notes' hours at 100 % of 790, of an epoch and with the reference pass
    text = page(capsys, "zephyr-7b-dpo --gpu h200 --efficiency 0.7988")
    assert value(text, "an epoch") == pytest.approx(0.72, rel=0.02)
    assert value(text, "the run") == pytest.approx(0.96, rel=0.02)
    text = page(capsys, "zephyr-7b-dpo --gpu h200 --efficiency 0.7988 --recompute full")
    assert value(text, "an epoch") == pytest.approx(0.72 * 1.24, rel=0.02)


def test_adapters_on_a_24_gb_card(capsys):
    """The notes' bytes: 13.5 GiB of bf16, 5.0 of adapters and their fp32 state, 0.26 MB a token."""
    text = page(capsys, "zephyr-7b-dpo-lora --gpu 4090")
    assert "7,241,732,096 parameters and 335,544,320 of adapters" in text
    assert value(text, "frozen weights") == pytest.approx(13.49, abs=0.01)
    state = sum(value(text, part) for part in ("masters", "gradients", "moments"))
    assert state == pytest.approx(5.0, abs=0.02)
    assert value(text, "activations") == pytest.approx(4096 * 0.27e6 / GIB, rel=0.03)
    assert "gathered" not in text and "live reference" not in text
    live = page(capsys, "zephyr-7b-dpo-lora --gpu 4090 --reference live")
    assert value(live, "in all") == value(text, "in all"), "the policy without its adapters"
    # a frozen matrix has no gradient of its own: two thirds of its FLOPs
    full = page(capsys, "zephyr-7b-dpo --gpu 4090")
    assert value(text, "blocks' matmuls") == pytest.approx(2 / 3 * value(full, "blocks' matmuls"))
    assert value(text, "attention") == value(full, "attention")
    thin = 6 * 335_544_320 * 778 / 1e12
    assert value(text, "adapters") == pytest.approx(thin, rel=0.005)
    many = page(capsys, "zephyr-7b-dpo-lora --gpu 4090 --gpus 8")
    sent = [value(many, name) for name in ("all-gather, forward", "reduce-scatter")]
    assert sent[1] / sent[0] == pytest.approx(2 * 335_544_320 / (7_241_732_096 + 335_544_320), 0.02)


def test_the_cards_of_the_page_on_lora(capsys):
    """The table of operate/running.md, and the numbers of operate/performance.md."""
    rows = (ROOT / "docs" / "operate" / "running.md").read_text().partition("## One card: LoRA")[2]
    row = r"^\| \d+ GB \((\w+)\) \| (.*?) \| ([\d.]+) of [\d.]+ \| ([\d.]+) \|$"
    cards = re.findall(row, rows, re.M)
    assert len(cards) == 3
    for name, flags, need, hours in cards:
        flags = "" if flags == "nothing more" else flags.strip("`")
        text = page(capsys, f"zephyr-7b-dpo-lora --gpu {name.lower()} {flags}")
        assert f"{value(text, 'in all'):.1f}" == need and "\nfits, with" in text, name
        assert f"{value(text, 'the run'):.1f}" == hours, name
    text = page(capsys, "zephyr-7b-dpo-lora --gpu 4090")
    (useful,) = re.findall(r"^  forward and backward +([\d.]+)", text, re.M)
    page_text = (ROOT / "docs" / "operate" / "performance.md").read_text()
    numbers = " ".join(page_text.split())
    assert f"{useful} TFLOP at rank 128" in numbers and "36 % of that" in numbers
    assert re.search(r"^  full .* 35.7%$", text, re.M)


def test_epochs_and_the_reference(capsys):
    text = page(capsys, "zephyr-7b-beta-dpo --gpu a100 --gpus 8")
    epoch, once = value(text, "an epoch"), value(text, "the reference pass")
    assert value(text, "the run") == pytest.approx(3 * epoch + once, abs=0.003)
    assert value(text, "the run", 1) == pytest.approx(8 * value(text, "the run"), rel=0.01)
    live = page(capsys, "zephyr-7b-beta-dpo --gpu a100 --gpus 8 --reference live")
    assert value(live, "an epoch") == pytest.approx(epoch + once, rel=0.01)
    assert value(live, "live reference") > value(live, "masters")


def test_fsdp_and_hsdp(capsys):
    """Of many nodes a ring is long; replicas keep it inside the node."""
    line = "zephyr-7b-dpo --gpu a100 --gpus 8 --nodes {} --batch 512"
    sent = {}
    for nodes in (1, 8, 64):
        for replicas in {1, nodes}:
            text = page(capsys, line.format(nodes) + f" --replicas {replicas}")
            sent[nodes, replicas] = value(text, "hidden behind it")
            kind = f"HSDP, {replicas} replicas" if replicas > 1 else "FSDP"
            assert f"communication of a GPU and step, {kind}  " in text
            assert value(text, "masters") == pytest.approx(
                4 * 7_241_732_096 / 8 / (nodes // replicas) / GIB, abs=0.01
            )
    assert sent[1, 1] > sent[8, 8] > sent[64, 64]
    assert sent[8, 1] > sent[64, 1]


def test_a_model_of_ones_own(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    about = {"model_type": "mistral"} | dataclasses.asdict(MISTRAL) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(about))
    for path in (folder, folder / "config.json"):
        assert f"{path}, 698,372,096 parameters" in page(capsys, f"zephyr-7b-dpo --model {path}")


@pytest.mark.parametrize(
    "line, message",
    [
        ("nope", "no recipe nope; there are tiny"),
        ("zephyr-7b-dpo --gpu h1000", "--gpu h1000 is unknown; there are h100-pcie, "),
        ("zephyr-7b-dpo --gpus 0", "--gpus 0 must be above 0 and below 1e9"),
        ("zephyr-7b-dpo --gpus many", "argument --gpus: invalid int value: 'many'"),
        ("zephyr-7b-dpo --gpus", "argument --gpus: expected one argument"),
        ("zephyr-7b-dpo --efficiency 1.5", "--efficiency 1.5 is a share of the peak, at most 1"),
        ("zephyr-7b-dpo --efficiency nan", "--efficiency nan must be above 0"),
        (
            "zephyr-7b-dpo --model nowhere",
            "--model nowhere: no such folder or file; known are mistral",
        ),
        ("zephyr-7b-dpo --model .", ". has no config.json"),
        ("zephyr-7b-dpo --gpus 8 --nodes 64", "--batch 128 is less than the 512 GPUs"),
        ("zephyr-7b-dpo --gpus 8 --replicas 3", "--replicas 3 does not divide the 8 GPUs"),
        ("zephyr-7b-dpo --gpus 8 --masters split", "--masters split is for one GPU, not 8"),
        ("zephyr-7b-dpo --bogus 1", "unknown argument --bogus"),
        ("zephyr-7b-sft --bogus 1", "unknown argument --bogus"),
        ("zephyr-7b-sft --batch 0", "--batch 0 must be finite and above 0"),
        ("zephyr-7b-dpo --recompute some", "argument --recompute: invalid choice: 'some'"),
    ],
)
def test_a_mistake_costs_one_line(capsys, monkeypatch, tmp_path, line, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        plan_command.main(line.split())
    out = capsys.readouterr()
    assert (ended.value.code, out.out) == (2, "")
    assert out.err.count("\n") == 1 and f"plan: {message}" in out.err


def test_without_torch():
    """And without what takes long to import."""
    script = (
        "import sys; sys.modules['torch'] = None; from zephyr.plan.__main__ import main; main(); "
        "print({'numpy', 'tqdm', 'kernels'} & sys.modules.keys() or 'quick')"
    )
    command = [sys.executable, "-X", "importtime", "-c", script, "zephyr-7b-dpo", "--gpus", "8"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("GiB to spare\nquick\n")
    took = re.search(r"\| +(\d+) \| +zephyr\.plan\.__main__$", ran.stderr, re.M)
    assert int(took[1]) < 2e6  # microseconds; torch alone takes more, and this a tenth


def dearest(t, tokens):
    return costs.Load(1, 1 + (t.table == "dpo"), 1, 0).times(tokens)


def needs(t, ranks, tokens, recompute, reshard=True):
    load = dearest(t, tokens)
    return sum(fit.occupied(MISTRAL, t, ranks, load, recompute, reshard).values())


@pytest.mark.parametrize("ranks, gib", [(1, 139), (8, 79), (8, 39), (8, 23), (64, 79), (2, 79)])
@pytest.mark.parametrize(
    "t", [DPOConfig(**OWN, **AUTO), SFTConfig(**OWN, **AUTO)], ids=["dpo", "sft"]
)
def test_what_is_chosen_fits_and_is_the_largest(t, ranks, gib):
    memory, longest = gib * GIB, 2048
    found = fit.choose(MISTRAL, t, memory, ranks, longest, STEP)
    assert found == fit.choose(MISTRAL, t, memory, ranks, longest, STEP)
    tokens, recompute = found
    assert longest <= tokens <= STEP / ranks + longest + fit.GRAIN
    assert needs(t, ranks, tokens, recompute) <= memory
    most = tokens + fit.GRAIN > STEP / ranks + longest
    assert most or needs(t, ranks, tokens + fit.GRAIN, recompute) > memory
    # nothing slower: what is cheaper to recompute has no room for as much as makes up for it
    for other in fit.POLICIES:
        row = dearest(t, 1)
        room = fit.largest(MISTRAL, t, memory, ranks, other, True, row, STEP / ranks + longest)
        if room >= longest:
            times = [fit.slowness(MISTRAL, STEP / ranks, *x) for x in (found, (room, other))]
            assert times == sorted(times)


def test_more_memory_is_never_slower():
    t = DPOConfig(**OWN, **AUTO)
    chosen = [fit.choose(MISTRAL, t, gib * GIB, 8, 1500, STEP) for gib in range(20, 100, 2)]
    times = [fit.slowness(MISTRAL, STEP / 8, *x) for x in chosen]
    assert times == sorted(times, reverse=True)
    assert {recompute for _, recompute in chosen} == set(fit.POLICIES)
    assert (chosen[0][1], chosen[-1][1]) == ("full", "none")


def test_what_is_given_is_kept():
    given = DPOConfig(**OWN, microbatch_tokens=8192, recompute="auto")
    assert fit.choose(MISTRAL, given, 79 * GIB, 8, 1500, STEP) == (8192, "none")
    assert fit.choose(MISTRAL, given, 45 * GIB, 8, 1500, STEP) == (8192, "elementwise")
    assert fit.choose(MISTRAL, given, 25 * GIB, 8, 1500, STEP) == (8192, "full")
    given = DPOConfig(**OWN, microbatch_tokens="auto", recompute="full")
    assert fit.choose(MISTRAL, given, 79 * GIB, 8, 1500, STEP)[1] == "full"
    # a budget that no step fills needs memory for a step alone
    given = DPOConfig(**OWN, microbatch_tokens=1 << 20, recompute="auto")
    assert fit.choose(MISTRAL, given, 79 * GIB, 8, 1500, STEP / 8) == (1 << 20, "none")


def test_where_nothing_fits_the_least_is_tried():
    t = DPOConfig(**OWN, **AUTO)
    assert fit.choose(MISTRAL, t, GIB, 1, 1500, STEP) == (1500, "full")
    tiny = dataclasses.replace(
        MISTRAL,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=100,
        head_dim=2,
    )
    assert fit.choose(tiny, t, 4 * GIB, 1, 30, 100) == (256, "none")


def test_reshard():
    t = DPOConfig(**OWN)
    assert not fit.reshard(MISTRAL, t, 79 * GIB, 8, 8192, "none")
    assert fit.reshard(MISTRAL, t, 39 * GIB, 8, 4096, "none")
    for word in ("always", "never"):
        said = DPOConfig(**OWN, reshard=word)
        assert fit.reshard(MISTRAL, said, 79 * GIB, 8, 8192, "none") == (word == "always")
    tokens, recompute = fit.choose(MISTRAL, DPOConfig(**OWN, **AUTO), 79 * GIB, 8, 1500, STEP)
    if not fit.reshard(MISTRAL, t, 79 * GIB, 8, tokens, recompute):
        assert needs(t, 8, tokens, recompute, False) <= 79 * GIB
