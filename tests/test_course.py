"""The course cannot rot: its code, its output, its examples and its figures are made anew here."""

import doctest
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from model_helpers import model, packed, tokens
from zephyr import explain, feedback, losses, textbook
from zephyr.attention import visible
from zephyr.packing import Pair, pack_pairs
from zephyr.tokenizer import Tokenizer
from zephyr.toy import birds, village
from zephyr.weights import config_json, hub

ROOT = Path(__file__).parent.parent
SOURCE = '''
@cache
def f(x):
    """Say."""
    if x:
        y = 1
    return y

class A:
    def g(self):
        pass
'''
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def script(name: str):
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_and_output_are_the_source_s(capsys):
    assert script("include").main(check=True) == 0, capsys.readouterr().out


def test_figures_are_what_the_code_draws(capsys):
    figures = script("figures")
    assert figures.main(check=True) == 0, capsys.readouterr().out
    drawn = {p.stem for p in (ROOT / "docs" / "figures").glob("*.svg")}
    assert drawn == set(figures.FIGURES), "a figure that nothing draws"
    shown = set(re.findall(r"!\[[^\]]{20,}\]\([^)]*figures/([\w-]+)\.svg\)", every_page()))
    assert drawn == shown, "each is on a page, with a text for who cannot see it"


def every_page() -> str:
    return "\n".join(p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *PAGES])


def examples(page: Path) -> list[str]:
    """The fenced blocks of Python that begin with a prompt."""
    return re.findall(r"^```python\n(>>> .*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.stem)
def test_examples_print_what_they_say(page):
    """Those of a page one after another, as a reader would type them."""
    test = doctest.DocTestParser().get_doctest(
        "\n".join(examples(page)), {}, page.name, str(page), 0
    )
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.DocTestRunner(optionflags=options).run(test)
    assert result.attempted and not result.failed


class TestInclude:
    """The markers, on files of its own."""

    @pytest.fixture
    def include(self, tmp_path, monkeypatch):
        include = script("include")
        monkeypatch.setattr(include, "ROOT", tmp_path)
        (tmp_path / "docs").mkdir()
        (tmp_path / "a.py").write_text(SOURCE)
        return include

    @pytest.mark.parametrize(
        "what, found",
        [
            ("a.py f", "@cache\ndef f(x):\n    if x:\n        y = 1\n    return y\n"),
            ("a.py f: if x ... y = 1", "if x:\n    y = 1\n"),
            ("a.py A.g", "def g(self):\n    pass\n"),
            ("a.py: class A", "class A:\n"),
        ],
    )
    def test_what_a_marker_names(self, include, what, found):
        assert include.code(what) == found

    @pytest.mark.parametrize("what", ["a.py g", "a.py f: while", "a.py f: if x ... while"])
    def test_what_is_gone_is_told(self, include, what):
        with pytest.raises(ValueError, match="no such"):
            include.code(what)

    def test_a_page_is_filled_and_a_stale_one_is_told(self, include, tmp_path, capsys):
        page = tmp_path / "docs" / "p.md"
        (tmp_path / "README.md").write_text("Nothing.\n")
        head = "Words.\n\n<!-- code: a.py A.g -->\n\n```python\n"
        page.write_text(
            head + "old\n```\n\n<!-- output: python -c print(1+1) -->\n```\n```\nMore.\n"
        )
        assert include.main(check=True) == 1 and "old" in page.read_text()
        assert "docs/p.md: stale" in capsys.readouterr().out
        assert include.main(check=False) == 0
        filled = (
            "def g(self):\n    pass\n```\n\n<!-- output: python -c print(1+1) -->\n```\n2\n```\n"
        )
        assert page.read_text() == head + filled + "More.\n"
        assert include.main(check=True) == 0


def test_the_pair_that_is_explained_is_the_textbook_s(capsys):
    """Every number of `python -m zephyr.explain` by the textbook: one sequence at a time."""
    explain.main()
    said = capsys.readouterr().out
    base = birds.FOLDER / "base"
    pair = explain.tokens(birds.rows(birds.FOLDER / "pairs.train.jsonl.gz")[0], Tokenizer(base))
    model = textbook.Alone(config_json.read(base))
    hub.initialise(model, seed=0)
    model.double()
    prompt, *responses = (part.tolist() for part in pair)
    with torch.no_grad():
        before = [textbook.logprob(model, prompt, r).item() for r in responses]
    rows = list(textbook.train(model, [[(prompt, *responses)]] * 2, [explain.RATE, 0.0]))
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert f"loss {rows[0]['loss']:.6f} = ln 2, margin 0\n" in said
    for side, reference in zip(explain.SIDES, before, strict=True):
        policy = rows[1][f"logps/{side}"]
        line = f"log π({side}) = {policy:.4f}, log π_ref = {reference:.4f}"
        assert f"{line}, log-ratio {policy - reference:+.4f}\n" in said
    metrics = json.loads(said.splitlines()[-1])
    assert metrics == {name: pytest.approx(rows[1][name], abs=6e-5) for name in metrics}
    assert metrics.keys() == {"loss", *textbook.NAMES}
    # by the chain rule each token of a response has the gradient of the response's sum
    weight = 1 - 1 / (1 + torch.exp(torch.tensor(-metrics["rewards/margins"])).item())
    numbers = re.findall(r"^(chosen|rejected) .* (-?\d+\.\d+)$", said, re.M)
    assert len(numbers) == sum(map(len, responses))
    for side, number in numbers:
        sign = -1 if side == "chosen" else 1
        assert float(number) == pytest.approx(sign * explain.BETA * weight, abs=6e-5)
    assert f"The pack: {len(prompt) + sum(len(r) - 1 for r in responses)} tokens" in said


def test_the_judge_gives_the_scores_that_the_demo_printed():
    """Of each answer that a page shows, and the win rate is that of its counts."""
    text = every_page()
    shown = re.findall(r"^ *(\S.*\n) +sft +(\d.*)\n +dpo +(\d.*)$", text, re.M)
    assert shown
    for prompt, *answers in shown:
        for answer in answers:
            score, said = answer.split(maxsplit=1)
            assert village.judge(prompt.strip(), said).score == float(score), said
    counts = re.findall(
        r"discrete win rate +([\d.]+)\n(?:.*\n){,3}?.*: (\d+) wins, (\d+) losses, (\d+) draws", text
    )
    assert counts
    for rate, *three in counts:
        wins, losses, ties = map(int, three)
        assert f"{100 * (wins + ties / 2) / (wins + losses + ties):.2f}" == rate


def test_a_model_of_random_weights_gives_minus_ln_v_a_token(capsys):
    """What page 1 says of `logps/chosen` where nothing has been trained."""
    explain.main()
    said = capsys.readouterr().out
    count = int(re.search(r"The chosen, (\d+) tokens", said)[1])
    before = float(re.search(r"log π\(chosen\) = \S+, log π_ref = (-[\d.]+)", said)[1])
    assert before / count == pytest.approx(-math.log(birds.VOCAB), abs=0.1)


@pytest.mark.parametrize("sizes", [(3, 2, 3), (1, 1, 4), (5, 4, 1)], ids=str)
def test_the_corner_of_a_segment_s_mask(sizes):
    """Page 3: of G keys, query k of Q sees the first G - Q + k + 1, by position and by place."""
    layout = pack_pairs([Pair(*map(np.arange, sizes))], [0]).layout
    position_G = layout.position_T[layout.kv_rows_G]
    ends_q, ends_k = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    for s, start in enumerate(ends_q[:-1]):
        keys = position_G[ends_k[s] : ends_k[s + 1]]
        Q, G = ends_q[s + 1] - start, len(keys)
        for k in range(Q):
            seen = visible(layout.position_T[start + k], keys, None)
            assert seen.tolist() == [True] * (G - Q + k + 1) + [False] * (Q - k - 1)


def test_a_third_of_the_village_s_tokens_are_shared():
    """Page 3: what packing a prompt once saves there."""
    rows = birds.rows(birds.ensure() / "ultrafeedback.train.jsonl.gz")[:200]
    tokenizer = Tokenizer(birds.FOLDER / "base")
    pairs = [explain.tokens(p, tokenizer) for p in feedback.binarize(("", row) for row in rows)]
    sizes = np.array([[len(part) for part in pair] for pair in pairs])
    packed = len(pack_pairs(pairs, range(len(pairs))).tokens_T)
    apart = (2 * sizes[:, 0] + sizes[:, 1] + sizes[:, 2] - 2).sum()
    assert apart - packed == sizes[:, 0].sum() and packed / apart < 2 / 3
    assert sizes[:, 0].mean() > sizes[:, 1:].mean()


@pytest.mark.parametrize("layers, window", [(1, 4), (2, 3), (3, 2), (3, 1)])
def test_a_stack_hears_of_l_times_w_less_one_and_itself(layers, window):
    """Page 4: the last logits depend on the last L (W - 1) + 1 tokens and on no other."""
    m, x = model(sliding_window=window, num_hidden_layers=layers), tokens(9)
    last = m.logits(x, packed(9))[-1]
    for j in range(9):
        changed = x.clone()
        changed[j] = (x[j] + 1) % 101
        heard = not torch.equal(m.logits(changed, packed(9))[-1], last)
        assert heard == (j >= 9 - (layers * (window - 1) + 1)), f"token {j}"


def test_a_reference_that_moves_along_gives_no_margin_and_a_gradient():
    """Page 5: the policy under another name; the loss stays ln 2 while log-probs are pushed."""
    logprob_N = torch.tensor([-35.0, -41.0], requires_grad=True)
    for _ in range(3):
        found = losses.preference("dpo", logprob_N, torch.tensor([0, 1]), logprob_N.detach(), 0.1)
        (slope,) = torch.autograd.grad(found["loss"].sum(), logprob_N)
        assert found["rewards/margins"].item() == 0
        assert found["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
        assert slope.tolist() == pytest.approx([-0.05, 0.05], abs=1e-7)
        logprob_N = (logprob_N - slope).detach().requires_grad_()
    assert logprob_N[0] > -35 and logprob_N[1] < -41


def test_the_loss_of_imitation_is_entropy_and_distance():
    """Page 1: over what a teacher says, 3 to 1, for any policy."""
    teacher, said = torch.tensor([0.75, 0.25]), torch.tensor([0, 0, 0, 1])
    entropy = -(teacher * teacher.log()).sum()
    for curt in (0.5, 0.75, 0.99):
        policy = torch.tensor([curt, 1 - curt])
        distance = (teacher * (teacher / policy).log()).sum()
        mean = losses.sft(policy.log()[said]) / len(said)
        torch.testing.assert_close(mean, entropy + distance, rtol=0, atol=1e-6)
    assert entropy.item() == pytest.approx(0.5623, abs=1e-4)
