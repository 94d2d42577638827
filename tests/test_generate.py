"""Cached decoding against the training forward and transformers; sampling; the chat."""

import io
import sys

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model_helpers import SMALL, batch, model, packed, tokens
from run_helpers import speak
from zephyr import generate
from zephyr.tokenizer import Tokenizer

LENGTHS = (3, 9, 17, 1)
HEADS = {"hidden_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}


def prompts() -> list[list[int]]:
    return [part.tolist() for part in tokens(sum(LENGTHS), seed=3).split(LENGTHS)]


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"sliding_window": 1},
        {"sliding_window": 4},
        {"sliding_window": 9},
        {"sliding_window": 17, "num_key_value_heads": 1},
        {"sliding_window": 28, "num_key_value_heads": 4},
        {"sliding_window": 100, "tie_word_embeddings": True},
        {"sliding_window": 6, **HEADS},
    ],
    ids=str,
)
def test_every_step_sees_what_training_sees(changes, monkeypatch):
    """Step by step along given continuations; prompts below, at and beyond the window."""
    m, new = model(**changes), 12
    forced_BN = tokens(len(LENGTHS) * new, seed=4).view(len(LENGTHS), new)
    seen = []

    def choose(logits_BV, *sampling):
        seen.append(logits_BV)
        return forced_BN[:, len(seen) - 1]

    monkeypatch.setattr(generate, "choose", choose)
    said = torch.stack(list(generate.stream(m, prompts(), new)), 1)
    assert torch.equal(said, forced_BN)
    for k, prompt in enumerate(prompts()):
        x = torch.tensor(prompt + forced_BN[k].tolist())
        rows = torch.arange(len(prompt) - 1, len(x) - 1)
        with torch.no_grad():
            logits = m.logits(x, packed(len(x)), rows)
            logprob_N = m(batch(x, packed(len(x)), rows.tolist(), x[rows + 1].tolist()))
        decoded = torch.stack([logits_BV[k] for logits_BV in seen])
        torch.testing.assert_close(decoded, logits, rtol=0, atol=1e-5)
        of_targets = decoded.log_softmax(-1).gather(1, x[rows + 1, None])[:, 0]
        torch.testing.assert_close(of_targets, logprob_N, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_greedy_equals_transformers_and_each_prompt_alone(window):
    m, new = model(sliding_window=window), 20
    sizes = {key: getattr(m.config, key) for key in SMALL if key != "rope_theta"}
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **sizes,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": m.config.rope_theta},
        )
    ).eval()
    theirs.load_state_dict(m.state_dict())
    together = generate.generate(m, prompts(), new, eos=-1, temperature=0.0)
    for prompt, answer in zip(prompts(), together, strict=True):
        x = torch.tensor([prompt])
        whole = theirs.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=new, do_sample=False
        )
        assert answer == whole[0, len(prompt) :].tolist()
        assert generate.generate(m, [prompt], new, eos=-1, temperature=0.0) == [answer]
    assert len({tuple(answer) for answer in together}) == len(LENGTHS), "the oracle says nothing"


def test_answers_end_before_their_eos(monkeypatch):
    steps = torch.tensor([[5, 6, 2], [2, 7, 8], [9, 2, 2], [2, 2, 2], [1, 1, 1]])
    monkeypatch.setattr(generate, "stream", lambda m, prompts, new: taken(steps[:new]))
    left = []

    def taken(rows):
        for row in rows:
            left.append(row)
            yield row

    assert generate.generate(None, [[1]] * 3, 5, eos=2) == [[5], [6, 7], []]
    assert len(left) == 3, "goes on after every answer has ended"
    assert generate.generate(None, [[1]] * 3, 2, eos=2) == [[5], [6, 7], []]
    assert generate.generate(None, [[1]] * 3, 4, eos=0) == steps[:4].T.tolist()


def sampled(probabilities: list[float], n: int, temperature=1.0, top_p=1.0, seed=0):
    logits_BV = torch.tensor(probabilities).log().expand(n, -1)
    generator = torch.Generator().manual_seed(seed)
    return generate.choose(logits_BV, temperature, top_p, generator)


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (1e-9, [{3}]),
        (0.5, [{3}]),
        (0.501, [{3, 0}]),
        (0.75, [{3, 0}]),
        (0.751, [{3, 0, 1}, {3, 0, 2}]),
        (0.875, [{3, 0, 1}, {3, 0, 2}]),
        (0.876, [{0, 1, 2, 3}]),
        (1.0, [{0, 1, 2, 3}]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    """Powers of two, whose sums are exact, so that a mass of just p can be told from less."""
    said = sampled([0.25, 0.125, 0.125, 0.5], 2000, top_p=top_p).tolist()
    assert set(said) in kept


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=9, unique=True),
    st.floats(0.01, 1),
    st.sampled_from([0.3, 1.0, 2.5]),
)
def test_samples_follow_the_renormalised_nucleus(mass, top_p, temperature):
    n = 20_000
    p = [m ** (1 / temperature) for m in mass]
    p = [x / sum(p) for x in p]
    kept, reached = [], 0.0
    for k in sorted(range(len(p)), key=lambda k: -p[k]):
        assume(abs(reached - top_p) > 1e-6)  # else rounding decides
        if reached < top_p:
            kept.append(k)
            reached += p[k]
    counts = sampled(mass, n, temperature, top_p).bincount(minlength=len(p))
    assert set(counts.nonzero().flatten().tolist()) <= set(kept)
    for k in kept:
        share = p[k] / reached
        assert abs(counts[k] - n * share) <= 5 + 5.5 * (n * share * (1 - share)) ** 0.5


def test_temperature_zero_is_the_likeliest_and_small_ones_approach_it():
    logits_BV = torch.tensor([[0.0, 3.0, 2.9], [1.0, -1.0, -60.0]])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.0, 1e-3, 1e-30):
        assert generate.choose(logits_BV, temperature, 1.0, generator).tolist() == [1, 0]


def test_the_seed_decides():
    m = model()
    first, again, other = (
        generate.generate(m, prompts(), 20, eos=-1, temperature=1.0, top_p=0.95, seed=seed)
        for seed in (7, 7, 8)
    )
    assert first == again != other


def test_a_position_takes_the_slot_of_the_one_that_left_the_window(monkeypatch):
    def store(cache, k_TKE, v_TKE, layer):
        taken = cache.owner_T * cache.slots + cache.position_T % cache.slots
        assert len(taken.unique()) == len(taken) == len(k_TKE), "a slot is written twice"

    monkeypatch.setattr(generate.Cache, "store", store)
    m = model(sliding_window=4)
    cache, _ = generate.prefill(m, [[1, 2, 3, 4, 5, 6]], 10)
    assert cache.slots == 4 and cache.held_BS.tolist() == [[4, 5, 2, 3]]
    cache.place(torch.tensor([6]), torch.tensor([0]))
    assert cache.held_BS.tolist() == [[4, 5, 6, 3]]


def spoken(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of an answer, which follows a newline."""
    return tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")) :]


@pytest.fixture
def script(monkeypatch):
    """Plays the model: answers ids given beforehand, and remembers what it was asked."""
    asked, answers = [], []

    def stream(model, prompts, new, **sampling):
        asked.append((prompts[0], new, sampling))
        for token in answers.pop(0)[:new]:
            yield torch.tensor([token])

    monkeypatch.setattr(generate, "stream", stream)
    return asked, answers


def test_one_shot_prints_what_generate_samples(folder, monkeypatch, capsys):
    speak(monkeypatch, folder, "--prompt", "the cat", "--max-new", 9, "--seed", 5)
    shown = capsys.readouterr()
    m, tokenizer = generate.load(str(folder))
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "the cat"}]
    (ids,) = generate.generate(m, [tokenizer.prompt(messages)], 9, tokenizer.eos, seed=5)
    assert shown.out == tokenizer.decode(ids) + "\n" and shown.err == ""


def test_a_conversation_keeps_its_history(folder, monkeypatch, capsys, script):
    asked, answers = script
    tokenizer = Tokenizer(folder)
    sat, mat = spoken(tokenizer, "sat"), spoken(tokenizer, "mat")
    answers += [[*sat, tokenizer.eos, *mat], [tokenizer.eos], mat]
    flags = "--system the --temperature 0.5 --top-p 0.9 --seed 3 --max-new 100".split()
    speak(monkeypatch, folder, *flags, said="cat\n\n  \n a mat \nthe\n")
    assert capsys.readouterr().out == "sat\n\nmat\n\n"
    talk = [
        ("system", "the"),
        ("user", "cat"),
        ("assistant", "sat"),
        ("user", "a mat"),
        ("assistant", ""),
        ("user", "the"),
    ]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert [prompt for prompt, *_ in asked] == [tokenizer.prompt(messages[:k]) for k in (2, 4, 6)]
    assert len(asked[0][0]) < 50 < len(asked[2][0])
    for prompt, new, sampling in asked:
        assert new == min(100, 150 - len(prompt))
        assert sampling == {"temperature": 0.5, "top_p": 0.9, "seed": 3, "pieces": 300}


def test_half_a_character_waits_for_the_rest(folder, monkeypatch, script):
    _, answers = script
    tokenizer = Tokenizer(folder)
    text = "a é🙂the 猫 cat ü"
    ids = spoken(tokenizer, text)
    assert sum(tokenizer.sp.is_byte(i) for i in ids) > 9
    half = spoken(tokenizer, "🙂")[:-1]
    answers += [[*ids, tokenizer.eos], [*ids, *half]]

    class Terminal(io.StringIO):
        def write(self, part: str) -> int:
            writes.append(part)
            return len(part)

    for end in ("", "\ufffd"):
        writes = []
        monkeypatch.setattr(sys, "stdout", Terminal())
        speak(monkeypatch, folder, "--prompt", "the")
        assert "".join(writes).rstrip("\n\ufffd") == text
        assert "".join(writes).endswith(f"{end}\n")
        assert sum(map(bool, writes)) > 10, "not printed as it comes"
        assert not any("\ufffd" in part for part in writes[:-2])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "the " * 300], "the conversation has [0-9]+ tokens, the model 150 positions"),
        (["--prompt", ""], "--prompt '' is out of range; see --help"),
        (["--max-new", "0"], "--max-new 0 is out of range; see --help"),
        (["--max-new", "x"], "argument --max-new: invalid int value: 'x'; see --help"),
        (["--temperature", "-0.1"], "--temperature -0.1 is out of range; see --help"),
        (["--temperature", "nan"], "--temperature nan is out of range; see --help"),
        (["--temperature", "inf"], "--temperature inf is out of range; see --help"),
        (["--top-p", "0"], "--top-p 0.0 is out of range; see --help"),
        (["--top-p", "1.01"], "--top-p 1.01 is out of range; see --help"),
        (["--seed", str(1 << 64)], "--seed 18446744073709551616 is out of range; see --help"),
        (["--seed", "-1"], "--seed -1 is out of range; see --help"),
        (["--beam", "4"], "unrecognized arguments: --beam 4; see --help"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_a_mistake_costs_one_line(folder, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        speak(monkeypatch, folder, *flags)
    error = capsys.readouterr().err
    assert error.startswith("generate.py: ") and error.count("\n") == 1
    assert message.partition("[")[0] in error and message.rpartition("+")[2] in error


def test_a_missing_folder_costs_one_line(tmp_path, monkeypatch, capsys):
    for flags in ([], [tmp_path / "absent"]):
        with pytest.raises(SystemExit, match="2"):
            speak(monkeypatch, *flags)
        error = capsys.readouterr().err
        assert error.startswith("generate.py: ") and error.count("\n") == 1
