"""Cached decoding against the training forward and transformers; sampling; the chat."""

import gc
import io
import sys
import weakref

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_helpers import SMALL, batch, model, packed, tokens
from run_helpers import speak
from zephyr import attention, generate
from zephyr.distributed import machine
from zephyr.model import Mistral
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
    said = torch.tensor(list(generate.stream(m, prompts(), new))).T
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


def greedy(m: Mistral, asked: list[list[int]], new: int, eos: int) -> list[list[int]]:
    return generate.generate(m, asked, new, eos, temperature=0.0)


def up_to(eos: int, answer: list[int]) -> list[int]:
    return answer[: answer.index(eos)] if eos in answer else answer


@pytest.mark.parametrize("window", [None, 5])
def test_answers_end_before_their_eos_and_leave_the_others_alone(window, captures):
    """Each token of the longest answers plays the EOS once: rows leave early, late, together and
    never, long after the window has moved on. Batches of 1, 3 and 4 rows."""
    m, new, sizes = model(sliding_window=window), 24, set()
    keep = generate.Cache.keep
    captures.setattr(
        generate.Cache, "keep", lambda cache, rows: sizes.add(len(rows)) or keep(cache, rows)
    )
    for asked in (prompts(), prompts()[1:], prompts()[:1]):
        whole = [greedy(m, [prompt], new, eos=-1)[0] for prompt in asked]
        for eos in {token for answer in whole for token in answer} | {-1}:
            expected = [up_to(eos, answer) for answer in whole]
            assert greedy(m, asked, new, eos) == expected, f"EOS {eos}"
    assert sizes >= {1, 2}


def test_nothing_is_computed_after_the_last_end(monkeypatch):
    m, steps = model(), []
    eager = generate.Step.eager
    monkeypatch.setattr(
        generate.Step, "eager", lambda step: steps.append(len(step.token_B)) or eager(step)
    )
    whole = greedy(m, prompts(), 9, eos=-1)
    assert steps == [4] * 8, "the last token's successor is not asked for"
    steps.clear()
    eos = whole[2][3]
    lengths = [len(answer) for answer in greedy(m, prompts(), 9, eos)]
    assert steps == [sum(k < n for n in lengths) for k in range(min(8, max(lengths)))]
    steps.clear()
    assert greedy(m, [prompts()[0]], 9, eos=whole[0][0]) == [[]] and not steps


class Recording(TorchDispatchMode):
    """Plays a CUDA graph on a CPU: what is captured runs at every replay, on the same memory. A
    write waits for the first replay, and a read of a value, for which a GPU would have to be waited
    for, fails."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a value"
        kwargs = kwargs or {}
        result = args[0] if func._schema.is_mutable else func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(step):
    with Recording() as recording:
        result = step()
    return lambda: recording.replay() or result


@pytest.fixture(params=["eager", "captured"])
def captures(request, monkeypatch):
    """Steps as they are, and as replays of the first."""
    if request.param == "captured":
        monkeypatch.setattr(generate, "captures", lambda device: True)
        monkeypatch.setattr(generate, "captured", recorded)
        monkeypatch.setattr(generate, "CAPTURE", 0)
    return monkeypatch


@pytest.mark.parametrize("left, worth", [(0, [4, 2, 1]), (5, [4, 2]), (8, [])])
def test_a_captured_batch_shrinks_by_halves(left, worth, monkeypatch):
    """Of four answers one ends after the other; two rows and then one are worth a capture, while
    enough steps are left."""
    sizes, said = [], iter([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 1], [1, 1], [0, 1], [1], [0]])

    def captured(step):
        sizes.append(len(step.__self__.token_B))
        return step

    monkeypatch.setattr(generate, "captures", lambda device: True)
    monkeypatch.setattr(generate, "captured", captured)
    monkeypatch.setattr(generate, "CAPTURE", left)
    monkeypatch.setattr(generate, "choose", lambda *_: torch.tensor(next(said)))
    assert generate.generate(model(), prompts(), 9, eos=0) == [[1], [1] * 4, [1] * 2, [1] * 6]
    assert sizes == worth


def test_what_leaves_does_not_change_the_chances_of_the_rest():
    """Of many copies of a prompt some sample the EOS first and leave; the others' next tokens have
    the model's probabilities."""
    m, n, prompt = model(), 4000, prompts()[1]
    with torch.inference_mode():
        _, logits_BV = generate.prefill(m, [prompt], 1)
        eos, first = logits_BV[0].topk(2).indices.tolist()
        _, logits_BV = generate.prefill(m, [[*prompt, first]], 1)
    answers = generate.generate(m, [prompt] * n, 2, eos, temperature=1.0)
    assert n / 10 < sum(answer == [] for answer in answers), "too few leave"
    after = [answer[1:] or [eos] for answer in answers if answer[:1] == [first]]
    shares = logits_BV[0].softmax(-1) * len(after)
    counts = torch.tensor(after).flatten().bincount(minlength=len(shares))
    assert len(after) > n / 20
    assert ((counts - shares).abs() <= 5 + 5.5 * shares.sqrt()).all()


def test_both_back_ends_see_the_same_keys(monkeypatch):
    """The lengths that the GPU's attention gets, read as varlen_attn reads them."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size, **grouped):
        assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()
        out = []
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            assert b - a <= 1  # so that causal, at the bottom right, is all
            heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            if a < b:
                out.append(F.scaled_dot_product_attention(*heads, enable_gqa=True)[0])
        return torch.cat(out, 1).transpose(0, 1)

    m = model(sliding_window=5)
    expected = greedy(m, prompts(), 9, eos=-1)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(generate, "in_one_call", lambda x: True)
    assert greedy(m, prompts(), 9, eos=-1) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_equals_an_eager_one(dtype, monkeypatch):
    """In every bit, while the batch shrinks from 4 rows to 2 and 1."""
    m = model(sliding_window=6).to("cuda", dtype)
    seen, choose, made, capture = [], generate.choose, [], generate.captured
    monkeypatch.setattr(
        generate, "choose", lambda x_BV, *how: seen.append(x_BV.clone()) or choose(x_BV, *how)
    )
    monkeypatch.setattr(generate, "captured", lambda step: made.append(step) or capture(step))
    monkeypatch.setattr(generate, "CAPTURE", 0)  # 12 steps would not be worth one
    for eos in {token for answer in greedy(m, prompts(), 12, eos=-1) for token in answer}:
        assert made, "nothing was captured"
        seen.clear()
        captured = greedy(m, prompts(), 12, eos), seen[:]
        seen.clear()
        with monkeypatch.context() as eagerly:
            eagerly.setattr(generate, "captured", lambda step: step)
            assert greedy(m, prompts(), 12, eos) == captured[0]
        assert all(map(torch.equal, seen, captured[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (torch.bfloat16, 0.5)], ids=str)
def test_a_gpu_decodes_as_a_cpu(dtype, most, monkeypatch):
    """Logits along given continuations, within and beyond the window. Their spread is 1.5, and a
    CPU's in bf16 are up to 0.23 from those in fp32."""
    seen, forced_NB = [], tokens(12 * len(LENGTHS), seed=4).view(12, -1)

    def choose(logits_BV, *sampling):
        seen.append(logits_BV.cpu())
        return forced_NB[(len(seen) - 1) % 12].to(logits_BV.device)

    monkeypatch.setattr(generate, "choose", choose)
    monkeypatch.setattr(generate, "CAPTURE", 0)  # the GPU's steps are replayed, but for the first
    for m in (model(sliding_window=6), model(sliding_window=6).to("cuda", dtype)):
        list(generate.stream(m, prompts(), 12))
    expected, found = torch.stack(seen).chunk(2)
    torch.testing.assert_close(found, expected, rtol=0, atol=most)


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
    store = generate.Cache.store

    def watched(cache, k_TKE, v_TKE, layer):
        assert len(cache.place_T.unique()) == len(k_TKE), "a slot is written twice"
        return store(cache, k_TKE, v_TKE, layer)

    monkeypatch.setattr(generate.Cache, "store", watched)
    m = model(sliding_window=4)
    with torch.inference_mode():
        cache, _ = generate.prefill(m, [[1], [1, 2, 3, 4, 5, 6]], 10)
        assert cache.slots == 4 and cache.place_T.tolist() == [0, 6, 7, 4, 5]
        seen = []
        for _ in range(4):
            cache.advance()
            seen.append((cache.place_T.tolist(), cache.bias_BS.isfinite().sum(1).tolist()))
    assert seen == [([1, 6], [2, 4]), ([2, 7], [3, 4]), ([3, 4], [4, 4]), ([0, 5], [4, 4])]


def test_those_that_stay_take_their_keys_along():
    m = model()
    with torch.inference_mode():
        cache, _ = generate.prefill(m, prompts(), 10)
        k, v, positions, memory = cache.k, cache.v, cache.position_T, cache.k.data_ptr()
        k, v = k.clone(), v.clone()
        cache.keep([1, 3])
    assert torch.equal(cache.k, k[:, [1, 3]]) and torch.equal(cache.v, v[:, [1, 3]])
    assert cache.position_T.tolist() == positions[[1, 3]].tolist() == [8, 0]
    assert cache.k.data_ptr() == memory, "a second cache is made"


def test_a_cache_goes_with_its_answer(captures):
    """At once: a cycle of references would hold it until Python looks for garbage, beside the next
    answer's cache."""
    caches, prefill = [], generate.prefill

    def watched(*args):
        cache, logits_BV = prefill(*args)
        caches.append(weakref.ref(cache))
        return cache, logits_BV

    captures.setattr(generate, "prefill", watched)
    gc.disable()
    try:
        greedy(model(), prompts(), 5, eos=-1)
        assert caches[0]() is None
    finally:
        gc.enable()


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
            yield [token]

    monkeypatch.setattr(generate, "stream", stream)
    return asked, answers


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_does_not_multiply_bf16_samples_in_fp32(folder, monkeypatch, able, dtype):
    """FlashAttention, through which bf16 goes there, runs on none that does not."""
    to_empty, places = Mistral.to_empty, []

    def on_the_cpu(model, device):
        places.append(device)
        return to_empty(model, device="cpu")

    monkeypatch.setattr(Mistral, "to_empty", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    monkeypatch.setattr(machine, "tune_allocators", lambda: [])
    m, _ = generate.load(str(folder))
    assert {p.dtype for p in m.parameters()} == {dtype} and places == [torch.device("cuda")]


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
        (["--prompt", ""], "--prompt '' is out of range; --help lists the flags"),
        (["--max-new", "0"], "--max-new 0 is out of range; --help lists the flags"),
        (["--max-new", "x"], "argument --max-new: invalid int value: 'x'; --help lists the flags"),
        (["--temperature", "-0.1"], "--temperature -0.1 is out of range; --help lists the flags"),
        (["--temperature", "nan"], "--temperature nan is out of range; --help lists the flags"),
        (["--temperature", "inf"], "--temperature inf is out of range; --help lists the flags"),
        (["--top-p", "0"], "--top-p 0.0 is out of range; --help lists the flags"),
        (["--top-p", "1.01"], "--top-p 1.01 is out of range; --help lists the flags"),
        (
            ["--seed", str(1 << 64)],
            "--seed 18446744073709551616 is out of range; --help lists the flags",
        ),
        (["--seed", "-1"], "--seed -1 is out of range; --help lists the flags"),
        (["--beam", "4"], "unrecognized arguments: --beam 4; --help lists the flags"),
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
