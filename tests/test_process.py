"""The edges of a process: home folders, bytes that are no text, closed streams, sampling."""

import io
import os
import pwd
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import GOOD, Limits, save
from run_helpers import speak
from zephyr import config, errors, feedback, files, generate, reference
from zephyr.config import DPOConfig, SFTConfig
from zephyr.data import arrays
from zephyr.data.cache import cache_folder
from zephyr.metrics import __main__ as metrics_command
from zephyr.plan import __main__ as plan_command
from zephyr.run import exits
from zephyr.weights import __main__ as weights_command

ROOT = Path(__file__).parent.parent


# --- home folders


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me").mkdir()
    return tmp_path / "me"


def test_a_tilde_at_the_start_is_a_home_folder(home, monkeypatch):
    root = pwd.getpwuid(0)
    for path, whole in {
        "~": home,
        "~/a/b": home / "a" / "b",
        f"~{root.pw_name}/x": f"{root.pw_dir}/x",
        "./~": "./~",
        "a~": "a~",
        "a/~/b": "a/~/b",
        "": "",
        "/~": "/~",
    }.items():
        assert files.home(path) == str(whole)
    with pytest.raises(ValueError, match="^~nobody-here/x: nobody knows the home folder ~nobod"):
        files.home("~nobody-here/x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(ValueError, match="~/x: nobody knows the home folder ~; write it out, or"):
        files.home("~/x")


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig])
def test_every_path_of_a_run_may_begin_with_a_tilde(home, cls):
    words = "--model ~/m --data ~/a.jsonl b.jsonl ~/c*.jsonl --out ~/o --eval-data ~/e.jsonl"
    c, _ = config.parse(cls, words.split())
    (home / "mine.toml").write_text(config.to_toml(c).replace(f"{home}/", "~/"))
    again, _ = config.parse(cls, ["~/mine.toml"])
    for found in (c, again):
        assert (found.model, found.out) == (f"{home}/m", f"{home}/o")
        assert found.data == (f"{home}/a.jsonl", "b.jsonl", f"{home}/c*.jsonl")
        assert found.eval_data == (f"{home}/e.jsonl",)
    with pytest.raises(ValueError, match="~nobody-here/m: nobody knows"):
        config.parse(cls, ["--model", "~nobody-here/m", "--data", "d", "--out", "o"])


def test_every_path_of_a_command_may_begin_with_a_tilde(home, monkeypatch, capsys):
    def says(command, *words: str) -> str:
        with pytest.raises(SystemExit):
            command(list(words))
        return capsys.readouterr().err

    assert f"{home}/c: no such folder" in says(weights_command.main, "~/c", "~/n")
    assert f"{home}/run" in says(metrics_command.main, "~/run")
    assert "--model ~/m: no such folder" in says(
        plan_command.main, "zephyr-7b-dpo", "--model", "~/m"
    )
    assert f"{home}/raw.jsonl: no such file" in says(feedback.main, "~/raw.jsonl", "--out", "~/o")
    assert "~nobody-here: nobody knows" in says(feedback.main, "r", "--out", "~nobody-here")
    monkeypatch.setattr(sys, "argv", ["generate", "~/m"])
    with pytest.raises(ValueError, match=f"{home}/m: no such folder"):
        generate.main()
    monkeypatch.setenv("ZEPHYR_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    monkeypatch.setenv("ZEPHYR_CACHE", "")
    assert cache_folder() == home / ".cache" / "zephyr"


def test_without_a_home_folder_the_cache_asks_for_one(small, tmp_path, monkeypatch):
    path = save(tmp_path / "a.jsonl", GOOD)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("ZEPHYR_CACHE")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(ValueError) as raised:
        arrays.preferences(path, small, Limits())
    rule = "set ZEPHYR_CACHE to a folder that can be written"
    assert str(raised.value) == f"there is no home folder; {rule}"
    (tmp_path / "a file").touch()
    for cache in (tmp_path / "a file", tmp_path / "a file" / "x", Path("/proc/nothing/x")):
        monkeypatch.setenv("ZEPHYR_CACHE", str(cache))
        with pytest.raises(errors.Storage, match=f"^{cache}: cannot write: .*; {rule}$"):
            arrays.preferences(path, small, Limits())
        with pytest.raises(errors.Storage, match=f"^{cache}/r.npy: cannot write: .*; {rule}, with"):
            reference._write(cache / "r.npy", torch.zeros(2, 2))
    monkeypatch.setenv("ZEPHYR_CACHE", "~nobody-here/x")
    with pytest.raises(ValueError, match="^~nobody-here/x: nobody knows the home folder"):
        arrays.preferences(path, small, Limits())


# --- bytes that are no text


def test_text_is_utf_8_whatever_the_locale():
    for right in ("", "hé 你好 \U0001f600", "a\n"):
        as_ascii = right.encode().decode("ascii", "surrogateescape")
        assert generate.text(right, "x") == generate.text(as_ascii, "x") == right
    for wrong in (b"\xe4\xbd", b"abc\xff", b"\xa0"):
        with pytest.raises(ValueError, match="^--prompt '.*' is not UTF-8: a character is cut, or"):
            generate.text(wrong.decode("ascii", "surrogateescape"), "--prompt")
    with pytest.raises(ValueError, match="--data: |its bytes are not the text of this locale"):
        config.parse(DPOConfig, ["--model", "m", "--data", "\udce4.jsonl", "--out", "o"])


def test_half_a_character_in_a_conversation(folder, monkeypatch, capsys):
    said = b"the \xe4\xbd\nthe cat\n".decode("utf-8", "surrogateescape")
    with pytest.raises(SystemExit) as ended:
        speak(monkeypatch, folder, "--max-new", 2, said=said)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.endswith(
        ": a line of the input 'the \\udce4\\udcbd' is not UTF-8: a character is "
        "cut, or it is in another encoding; give it again\n"
    )

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(said))
    assert generate.ask() == "the cat" and generate.ask() == ""
    assert "is not UTF-8" in capsys.readouterr().err


# --- streams

PLAN = f"{sys.executable} -m zephyr.plan zephyr-7b-dpo --gpu h200"


def shell(command: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, env=os.environ | env
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_closed_stream_ends_no_command(tmp_path):
    code, whole, err = shell(PLAN)
    assert (code, err) == (0, "") and len(whole) > 1000
    assert shell(f"{PLAN} <&-") == (0, whole, "")
    assert shell(f"{PLAN} 2>&-") == (0, whole, "")
    assert shell(f"{PLAN} >&-") == (0, "", "")
    assert shell(f"{PLAN} >&- 2>&- <&-") == (0, "", "")
    # a file that is opened later does not get stdout's number, and what C prints there
    code_ = (
        "from zephyr import files; from zephyr.run import exits; import os; "
        "exits.call(lambda: (open('f', 'wb'), os.write(1, b'x'), os.write(2, b'y')))"
    )
    path = {"PYTHONPATH": str(ROOT)}
    assert shell(f'cd {tmp_path}; {sys.executable} -c "{code_}" >&- 2>&-', **path)[0] == 0
    assert (tmp_path / "f").read_bytes() == b""


def test_a_full_gpu_is_one_line():
    code = (
        "import torch; from zephyr.run import exits; "
        "said = 'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB. If reserved "
        "but unallocated memory is large try setting PYTORCH_ALLOC_CONF.'; "
        "exits.call(lambda: print('step 1') or (_ for _ in ()).throw(torch.OutOfMemoryError(said)))"
    )
    told = (
        "-c: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB. In training a "
        "smaller --microbatch-tokens or --recompute full takes less; python -m zephyr.plan says "
        "what fits\n"
    )
    path = {"PYTHONPATH": str(ROOT)}
    assert shell(f'{sys.executable} -c "{code}"', **path) == (2, "step 1\n", told)
    assert shell(f'{sys.executable} -c "{code}"', **path, RANK="1")[2].startswith("-c (rank 1): ")


def test_a_run_that_a_mistake_ends_leaves_its_group():
    """Else NCCL says on a GPU, behind the line about the mistake, that nobody has left it."""
    code = (
        "import atexit, torch.distributed as dist; "
        "atexit.register(lambda: print('left' if not dist.is_initialized() else 'in it')); "
        "from zephyr.distributed import group; from zephyr.run import exits; "
        "exits.call(lambda: (group.start(), int('no number')))"
    )
    env = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (2, "left\n") and len(found.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_ends_a_command_quietly():
    code, out, err = shell(f"set -o pipefail; {PLAN} | head -c 10")
    assert (len(out), err) == (10, "") and code in (0, exits.NOBODY_READS)
    slow = "import sys; from zephyr.run import exits; exits.call(lambda: print('x' * 10**6))"
    code, _, err = shell(f'set -o pipefail; {sys.executable} -c "{slow}" | true')
    assert (code, err) == (exits.NOBODY_READS, "")
    help_ = f"{sys.executable} -m zephyr.plan --help"
    assert shell(f"set -o pipefail; {help_} | true")[2] == ""


def test_what_stdout_cannot_encode_is_escaped():
    code = "from zephyr.run import exits; exits.call(lambda: print('h\u00e9 \u4f60\u597d'))"
    for env in (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        command = f'{sys.executable} -c "{ascii(code)[1:-1]}"'
        found = subprocess.run(
            command, shell=True, cwd=ROOT, env=os.environ | env, capture_output=True, check=True
        )
        assert found.stdout == b"h\\xe9 \\u4f60\\u597d\n" and found.stderr == b""


def test_a_prompt_in_a_c_locale_with_everything_closed(folder):
    """One answer as a user of a bare container gets it, in the characters of the locale."""
    ask = f"{sys.executable} -m zephyr.generate {folder} --prompt $'the \\xe4\\xbd\\xa0'"
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = shell(f"{ask} --max-new 4 --temperature 0 <&-", **env)
    assert (code, err) == (0, "") and out.endswith("\n") and out.isascii()
    same = shell(f"{ask} --max-new 4 --temperature 0 <&-")[1]
    assert same.encode("ascii", "backslashreplace") == out.encode()
    cut = ask.replace("\\xa0", "")
    assert "is not UTF-8" in shell(f"{cut} --temperature 0", **env)[2]


# --- sampling


def oracle(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The probabilities to sample with, in extended precision."""
    x = logits.astype(np.longdouble)
    p = np.exp((x - x.max()) / np.longdouble(temperature))
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return (p / p.sum()).astype(float)


TINY = [5e-324, 1e-45, 1e-38, 1e-9]


@pytest.mark.parametrize("temperature", [*TINY, 0.3, 1.0, 7.0, 1e38, 1e308])
@pytest.mark.parametrize("top_p", [5e-324, 1e-45, 0.4, 0.9, 1.0])
def test_sampling_at_any_temperature(temperature, top_p):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=7).astype(np.float32) * 5
    logits[3] = logits.max() + 1
    generator = torch.Generator().manual_seed(2**64 - 1)
    rows = torch.from_numpy(logits).repeat(20_000, 1)
    token = generate.choose(rows, temperature, top_p, generator)
    found = np.bincount(token.numpy(), minlength=7) / len(rows)
    expected = oracle(logits, temperature, top_p)
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=0.015)
    if temperature in TINY:
        assert (token == generate.choose(rows, 0, 1.0, generator)).all(), "greedy is its limit"


@pytest.mark.parametrize("temperature", TINY)
def test_equal_logits_stay_equal_at_a_tiny_temperature(temperature):
    rows = torch.tensor([[1e4, -1e4, 1e4]]).repeat(5000, 1)
    token = generate.choose(rows, temperature, 1.0, torch.Generator().manual_seed(0))
    assert 0.4 < (token == 0).float().mean() < 0.6 and not (token == 1).any()
