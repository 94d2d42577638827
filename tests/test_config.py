"""Which value wins, the published recipes' numbers, and one line for every mistake."""

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr import config, errors
from zephyr.architecture import PROJECTIONS
from zephyr.config import DPOConfig, SFTConfig
from zephyr.run import exits

OWN = {"model": "m", "data": ("d.jsonl",), "out": "o"}
FLAGS = "--model m --data d.jsonl --out o".split()
STAGES = pytest.mark.parametrize("cls", [SFTConfig, DPOConfig])


def parse(cls, *argv):
    return config.parse(cls, [*FLAGS, *argv])[0]


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Shipped recipes of the test's own."""
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    for name, batch in (("tiny", 4), ("grand", 512)):
        (tmp_path / f"{name}.toml").write_text(
            f'[sft]\nmodel = "{name}"\ndata = ["a", "b"]\nout = "run"\nbatch = {batch}\n'
            f'[dpo]\nmodel = "{name}"\ndata = ["c"]\nout = "run"\nbatch = {batch + 1}\nlr = 1\n'
        )
    return tmp_path


def test_defaults_then_recipe_then_flags(recipes):
    default = DPOConfig(**OWN)
    assert (default.batch, default.lr, default.beta) == (128, 5e-7, 0.01)
    c, name = config.parse(DPOConfig, ["grand", "--lr", "0.5"])
    assert name == "grand"
    assert c == DPOConfig(model="grand", data=("c",), out="run", batch=513, lr=0.5)
    c, _ = config.parse(DPOConfig, ["--data", "x", "y", "--batch", "7", "--out", "z", "grand"])
    assert c == DPOConfig(model="grand", data=("x", "y"), out="z", batch=7, lr=1)
    c, _ = config.parse(SFTConfig, ["grand"])
    assert c == SFTConfig(model="grand", data=("a", "b"), out="run", batch=512)


def test_a_recipe_by_its_path(recipes, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('# mine\n[dpo]\nsteps = 3\nempty_system = false\nseed = 7\nloss = "ipo"\n')
    c, name = config.parse(DPOConfig, [str(path), *FLAGS, "--seed", "9"])
    assert name == str(path)
    assert c == DPOConfig(**OWN, steps=3, empty_system=False, loss="ipo", seed=9)


def test_without_a_recipe_it_is_tiny_but_not_for_a_model_of_ones_own(recipes):
    c, name = config.parse(SFTConfig, [])
    assert (name, c.model, c.batch) == ("tiny", "tiny", 4)
    c, name = config.parse(SFTConfig, ["--steps", "2"])
    assert (name, c.model, c.batch, c.steps) == ("tiny", "tiny", 4, 2)
    c, name = config.parse(SFTConfig, FLAGS)
    assert (name, c) == ("", SFTConfig(**OWN))
    with pytest.raises(ValueError, match="^--data is required: training files"):
        config.parse(SFTConfig, ["--model", "m", "--out", "o"])
    c, name = config.parse(SFTConfig, ["tiny", "--model", "m"])
    assert (name, c.model, c.batch) == ("tiny", "m", 4)


def test_argv_is_the_default(recipes, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "grand"])
    assert config.parse(SFTConfig)[1] == "grand"


# the published table: recipe A is the paper's, recipe B the alignment handbook's re-run
SHARED = dict(
    clip=1.0,
    weight_decay=0.0,
    warmup=0.1,
    seed=42,
    precision="bf16",
    eval_every=100,
    empty_system=True,
    steps=None,
)
PAIRS = SHARED | dict(max_length=1024, max_prompt_length=512, loss="dpo", label_smoothing=0.0)
GOLDEN = {
    "zephyr-7b-sft": SHARED
    | dict(lr=2e-5, schedule="cosine", batch=128, max_length=2048, epochs=1, train_on="all"),
    "zephyr-7b-beta-dpo": PAIRS | dict(lr=5e-7, schedule="linear", batch=32, beta=0.1, epochs=3),
    "zephyr-7b-dpo": PAIRS | dict(lr=5e-7, schedule="cosine", batch=128, beta=0.01, epochs=1),
    "zephyr-7b-sft-lora": SHARED
    | dict(
        lr=2e-4,
        schedule="cosine",
        batch=8,
        max_length=2048,
        epochs=1,
        train_on="all",
        eval_every=500,
    )
    | dict(lora_rank=16, lora_alpha=16, lora_targets=",".join(PROJECTIONS), lora_rslora=False),
    "zephyr-7b-dpo-lora": PAIRS
    | dict(lr=5e-6, schedule="cosine", batch=16, beta=0.01, epochs=1)
    | dict(lora_rank=128, lora_alpha=128, lora_targets=",".join(PROJECTIONS), lora_rslora=False),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_recipes(name):
    c = parse(SFTConfig if "-sft" in name else DPOConfig, name)
    assert {key: getattr(c, key) for key in GOLDEN[name]} == GOLDEN[name]


@pytest.mark.parametrize(
    "pairs, recipe, steps", [(61_966, "zephyr-7b-beta-dpo", 5809), (61_135, "zephyr-7b-dpo", 478)]
)
def test_the_recipes_make_the_published_number_of_steps(pairs, recipe, steps):
    c = parse(DPOConfig, recipe)
    assert round(c.epochs * pairs / c.batch) == steps


def test_the_defaults_are_recipe_b():
    free = {"microbatch_tokens", "log_every", "recompute", "empty_system", "precision"}
    for cls, name in ((SFTConfig, "zephyr-7b-sft"), (DPOConfig, "zephyr-7b-dpo")):
        recipe, default = (dataclasses.asdict(c) for c in (parse(cls, name), parse(cls)))
        assert {k for k in recipe if recipe[k] != default[k]} <= free


def test_every_shipped_recipe_parses_for_its_script():
    paths = sorted(config.RECIPES.glob("*.toml"))
    assert {p.stem for p in paths} == {"tiny", *GOLDEN}
    for path in paths:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        assert tables and set(tables) <= {"sft", "dpo"}
        for cls in (SFTConfig, DPOConfig):
            if cls.table in tables:
                own = [] if path.stem == "tiny" else FLAGS
                c, name = config.parse(cls, [path.stem, *own])
                assert name == path.stem
                for key, value in tables[cls.table].items():
                    got = getattr(c, key)
                    assert (list(got) if isinstance(got, tuple) else got) == value


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--lrr 1", "^unknown argument --lrr; --help lists what there is"),
        ("--mod x", "^unknown argument --mod;"),  # an abbreviation
        ("--no-empty", "^unknown argument --no-empty;"),
        ("--table dpo", "^unknown argument --table;"),
        ("zephyr-7b-dpo again", "^unknown argument again; --help"),
        ("--learning-rate 1", "^unknown argument --learning-rate; here it is --lr$"),
        ("--learning_rate=1", "^unknown argument --learning_rate=1; here it is --lr$"),
        ("--max_length 9", "^unknown argument --max_length; here it is --max-length$"),
        ("--loss-type ipo", "; here it is --loss, whose dpo is sigmoid there$"),
        ("--per_device_train_batch_size 1", "; here it is --batch, of a whole step, with"),
        ("--assistant-only-loss", "loss; --help lists what there is$"),  # dSFT's alone
        ("--steps", "argument --steps: expected one argument"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--batch 1.5", "argument --batch: invalid int value: '1.5'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--eval-data", "argument --eval-data: expected at least one argument"),
        ("--no-empty-system=1", "argument --empty-system/--no-empty-system: ignored explicit"),
        ("--schedule step", "argument --schedule: invalid choice: 'step' .choose from '?linear"),
        ("--on-bad-row drop", "argument --on-bad-row: invalid choice: 'drop'"),
        (
            "zephyr-8b",
            "^no recipe zephyr-8b; there are tiny, zephyr-7b-beta-dpo, zephyr-7b-dpo, "
            "zephyr-7b-dpo-lora, zephyr-7b-sft, zephyr-7b-sft-lora, or give the path of a .toml",
        ),
        ("none.toml", "^no recipe none.toml; there are tiny"),
        ("zephyr-7b-sft", r"zephyr-7b-sft.toml: has no \[dpo\] table; this script wants one"),
        ("--out=", "^--out is required: run folder"),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(DPOConfig, *argv.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("betta = 0.1", "has an unknown key 'betta'"),
        ('table = "dpo"', "has an unknown key 'table'"),
        ("check = 1", "has an unknown key 'check'"),
        ("train_on = 'all'", "has an unknown key 'train_on'"),  # the other stage's
        ("help = true", "has an unknown key 'help'"),
        ('batch = "many"', "argument --batch: invalid int value: 'many'"),
        ("batch = 1.0", "argument --batch: invalid int value: '1.0'"),
        ("batch = true", "argument --batch: invalid int value: 'True'"),
        ('lr = "fast"', "argument --lr: invalid float value: 'fast'"),
        ("lr = [1.0, 2.0]", r"lr = \[1.0, 2.0\] is not one value"),
        ("lr = []", r"lr = \[\] is not one value"),
        ("lr = false", "argument --lr: invalid float value: 'False'"),
        ('data = "d"', "data = 'd' is not a list of texts"),
        ("data = [1]", r"data = \[1\] is not a list of texts"),
        ("model = {a = 1}", "model = {'a': 1} is not one value"),
        ("empty_system = 1", "argument --empty-system.*: ignored explicit argument '1'"),
        ('steps = "all"', "argument --steps: invalid int value: 'all'"),
        ('schedule = "step"', "argument --schedule: invalid choice: 'step'"),
        ("beta = {a = 1}", "beta = {'a': 1} is not one value"),
        ('recompute = "some"', "argument --recompute: invalid choice: 'some'"),
        ("microbatch_tokens = 1.5", "argument --microbatch-tokens: '1.5' is neither an int nor"),
    ],
)
def test_wrong_recipes(tmp_path, line, message):
    path = tmp_path / "r.toml"
    path.write_text(f"[dpo]\n{line}\n")
    with pytest.raises(ValueError, match=rf"r.toml: \[dpo\] {message}"):
        parse(DPOConfig, str(path))


def test_a_recipe_is_a_command_line():
    hints = get_type_hints(DPOConfig)
    table = {"lr": 5e-7, "empty_system": False, "deterministic": True, "data": ["a", "b"]}
    flags = ["--lr=5e-07", "--no-empty-system", "--deterministic"]
    assert config.flags_of(table, hints) == flags


def test_recipes_that_are_none(tmp_path):
    path = tmp_path / "r.toml"
    for text, message in [
        (b"[dpo]\nlr = \n", "r.toml: .*line 2"),
        (b"[dpo]\nlr = 1\nlr = 2\n", "r.toml: Cannot overwrite a value"),
        (b"\xff\xfe", "r.toml: 'utf-8' codec can't decode"),
        (b"lr = 1\n", r"r.toml: has no \[dpo\] table"),
        (b"dpo = 1\n", r"r.toml: has no \[dpo\] table"),
        (b"[sft]\n", r"r.toml: has no \[dpo\] table"),
    ]:
        path.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            parse(DPOConfig, str(path))


@STAGES
@pytest.mark.parametrize("missing", ["model", "data", "out"])
@pytest.mark.parametrize("empty", [False, True])
def test_what_must_be_given(cls, missing, empty, tmp_path):
    lines = {"model": '"m"', "data": '["d"]', "out": '"o"'}
    if empty:
        lines[missing] = "[]" if missing == "data" else '""'
    else:
        del lines[missing]
    path = tmp_path / "r.toml"
    path.write_text("\n".join([f"[{cls.table}]", *(f"{k} = {v}" for k, v in lines.items())]))
    with pytest.raises(ValueError, match=f"^--{missing} is required: ") as error:
        config.parse(cls, [str(path)])
    assert str(error.value).endswith(config.comments(cls)[missing])


NUMBERS = ("epochs", "batch", "microbatch-tokens", "max-length", "lr", "log-every", "clip")


@STAGES
@pytest.mark.parametrize(
    "flag, value, message",
    [
        *(
            (name, value, " must be finite and above 0")
            for name in NUMBERS
            for value in ("0", "-1")
        ),
        *(
            (name, value, " must be finite and above 0")
            for name in ("lr", "clip")
            for value in ("nan", "inf")
        ),
        ("steps", "0", " must be greater than 0; leave it out for all"),
        ("steps", "-1", " must be greater than 0; leave it out for all"),
        *(
            (name, "-1", " must be finite and 0 or more")
            for name in ("eval-every", "save-every", "weight-decay", "seed")
        ),
        *(("weight-decay", value, " must be finite and 0 or more") for value in ("nan", "inf")),
        *(
            ("warmup", value, " must be a share of the steps, 0 <= w < 1")
            for value in ("-0.1", "1.0", "nan")
        ),
    ],
)
def test_ranges_of_both_stages(cls, flag, value, message):
    with pytest.raises(ValueError, match=rf"^--{flag} {value}(\.0)?{re.escape(message)}"):
        parse(cls, f"--{flag}", value)


@pytest.mark.parametrize(
    "argv, message",
    [
        *(
            (f"--beta {value}", f"--beta {value} must be finite and above 0; Zephyr's: 0.1, 0.01")
            for value in ("0.0", "-0.1", "nan", "inf")
        ),
        (
            "--max-prompt-length 1024",
            "--max-prompt-length 1024 must be above 0 and below --max-length "
            "1024: the difference is what each response may keep",
        ),
        ("--max-prompt-length 0", "--max-prompt-length 0 must be above 0 and below"),
        *(
            (f"--label-smoothing {value}", f"--label-smoothing {value} must be in 0 <= s < 0.5")
            for value in ("-0.1", "0.5", "nan")
        ),
        (
            "--label-smoothing 0.1 --loss ipo",
            "--label-smoothing has no meaning for --loss ipo; use 0",
        ),
        ("--label-smoothing 0.1 --loss hinge", "--label-smoothing has no meaning for --loss hinge"),
    ],
)
def test_ranges_of_dpo(argv, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse(DPOConfig, *argv.split())


def test_a_row_of_sft_must_fit_a_microbatch():
    with pytest.raises(
        ValueError,
        match="^--microbatch-tokens 100 is less than one chunk of "
        "--max-length 101; use a multiple of it",
    ):
        parse(SFTConfig, "--microbatch-tokens", "100", "--max-length", "101")


def test_values_at_the_edge_are_fine():
    parse(SFTConfig, *"--microbatch-tokens 101 --max-length 101 --warmup 0 --seed 0".split())
    parse(DPOConfig, *"--eval-every 0 --save-every 0 --steps 1 --max-prompt-length 1023".split())
    for loss in ("dpo", "robust"):
        parse(DPOConfig, "--loss", loss, "--label-smoothing", "0.49")


@STAGES
def test_help_has_every_field_with_its_comment_and_default(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        config.parse(cls, ["--help"], doc="What the script does,\n    and how.")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "What the script does,\n    and how." in text
    text, helps = " ".join(text.split()), config.comments(cls)
    for field in dataclasses.fields(cls):
        comment = helps[field.name]
        assert len(comment) > 10, f"{field.name} has no comment"
        bare = field.default in (dataclasses.MISSING, None, ())
        shown = comment if bare else f"{comment} [{field.default}]"
        assert shown in text
        assert f"{config.flag(field.name)} " in text or f"{config.flag(field.name)}," in text
    other = {SFTConfig: "zephyr-7b-dpo", DPOConfig: "zephyr-7b-sft"}[cls]
    assert f"zephyr-7b-{cls.table}-lora" in text and other not in text, "its own recipes alone"
    assert "[]" not in text and "None" not in text and "MISSING" not in text


def test_a_script_shows_its_own_stage_only():
    assert "train_on" in config.comments(SFTConfig) and "beta" not in config.comments(SFTConfig)
    assert "Eq. 7" in config.comments(DPOConfig)["beta"]
    assert config.comments(SFTConfig)["batch"] != config.comments(DPOConfig)["batch"]


# no config that was parsed has a path that begins with ~, which parse writes out
path_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), min_size=1
).filter(lambda text: not text.startswith("~"))
positive = st.floats(0, exclude_min=True, allow_infinity=False)
WIDEST = 2**63 - 1  # the largest whole number that TOML promises to hold
dpo_configs = st.builds(
    DPOConfig,
    model=path_text,
    data=st.lists(path_text, min_size=1).map(tuple),
    out=path_text,
    eval_data=st.lists(path_text).map(tuple),
    lr=positive,
    beta=positive,
    clip=positive,
    steps=st.none() | st.integers(1, WIDEST),
    seed=st.integers(0, WIDEST),
    empty_system=st.booleans(),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup=st.floats(0, 0.99),
)


@settings(max_examples=40)
@given(dpo_configs)
def test_to_toml_round_trips_through_a_file(tmp_path_factory, c):
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_bytes(config.to_toml(c).encode())
    assert config.parse(DPOConfig, [str(path)]) == (c, str(path))


def test_to_toml_leaves_out_what_is_not_set():
    c = SFTConfig(**OWN, train_on="assistant")
    table = tomllib.loads(config.to_toml(c))
    assert set(table) == {"sft"} and "steps" not in table["sft"]
    names = {f.name for f in dataclasses.fields(SFTConfig)}
    assert table["sft"].keys() == names - {"base", "steps", "profile", "lora_alpha", "empty_system"}
    assert table["sft"]["train_on"] == "assistant" and table["sft"]["data"] == ["d.jsonl"]


CODES = {
    OSError: 5,
    errors.BadCheckpoint: 3,
    errors.NonFinite: 4,
    errors.Storage: 5,
    errors.Preempted: 143,
}


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("--lr 0 must be finite"), "--lr 0 must be finite"),
        (FileNotFoundError(2, "No such file", "x.bin"), "[Errno 2] No such file: 'x.bin'"),
        (OSError(28, "No space left"), "[Errno 28] No space left"),
        (errors.BadCheckpoint("step-000003 is damaged"), "step-000003 is damaged"),
        (errors.NonFinite("the loss is nan"), "the loss is nan"),
        (errors.Storage("the disk is full"), "the disk is full"),
        (errors.Preempted("saved"), "saved"),
    ],
)
def test_run_prints_one_line_and_exits_with_its_code(capsys, monkeypatch, error, line):
    monkeypatch.setattr(sys, "argv", ["/some/where/train_dpo.py"])
    monkeypatch.delenv("RANK", raising=False)
    for rank, said in ((None, True), ("0", True), ("1", False), ("10", False)):
        if rank:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            exits.call(fail(error))
        assert end.value.code == CODES.get(type(error), 2)
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"train_dpo.py: {line}\n" if said else "")


def test_run_lets_other_errors_through(capsys):
    exits.call(lambda: print("fine"))
    assert capsys.readouterr().out == "fine\n"
    with pytest.raises(ZeroDivisionError):
        exits.call(fail(ZeroDivisionError()))
    with pytest.raises(SystemExit) as end:
        exits.call(fail(KeyboardInterrupt()))
    assert end.value.code == 130


def test_the_other_kernels_package_is_refused_where_it_hides_ours(tmp_path):
    ours, theirs = Path(__file__).parent.parent, tmp_path / "theirs"
    info = theirs / "kernels-0.1.dist-info"
    for folder in (info, theirs / "kernels"):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    (theirs / "kernels" / "__init__.py").touch()
    code = "from zephyr.run import exits; exits.call(lambda: print('ran'))"

    def run(*path: Path) -> tuple[int, str, str]:
        env = {k: x for k, x in os.environ.items() if k != "RANK"}
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    assert run(ours, theirs) == (0, "ran\n", "")
    code_, out, err = run(theirs, ours)
    assert (code_, out) == (2, "") and err == (
        f"-c: {theirs}/kernels/__init__.py, of the distribution `kernels` from PyPI, hides this "
        "project's package of that name: pip uninstall kernels\n"
    )
    (theirs / "kernels" / "__init__.py").unlink()  # of a half removed one nothing hides anything
    (theirs / "kernels").rmdir()
    assert run(theirs, ours)[:2] == (0, "ran\n")


@STAGES
def test_the_empty_system_message_in_flags_and_recipes(cls, tmp_path):
    own = ["--model", "m", "--data", "d", "--out", "o"]
    for flags, value in (([], None), (["--empty-system"], True), (["--no-empty-system"], False)):
        c, _ = config.parse(cls, own + flags)
        assert c.empty_system is value
        path = tmp_path / "again.toml"
        path.write_text(config.to_toml(dataclasses.replace(c, empty_system=value)))
        assert config.parse(cls, [str(path)])[0] == c
