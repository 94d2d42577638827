"""The reference's log-probs: live against lone sequences, cached against live, and the cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kernels
from model_helpers import model, packed, token_arrays
from zephyr import errors, reference
from zephyr import reference as wanted
from zephyr.data.arrays import Tokens
from zephyr.data.batching import PairSteps, epoch
from zephyr.data.cache import cache_folder
from zephyr.distributed import group, signals
from zephyr.reference import _write, live

PAIRS, BATCH = 23, 5


@pytest.fixture(scope="module")
def ranks():
    yield group.start()
    group.finish()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path / "cache"))


class Counting:
    """A model that counts the micro-batches it is asked for."""

    def __init__(self):
        self.model, self.calls = model(), 0

    def __call__(self, batch):
        self.calls += 1
        return self.model(batch)


def never(batch):
    raise AssertionError("the cache holds this already")


def pairs(seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 15, (PAIRS, 3))
    rows = [[rng.integers(0, 101, n).tolist() for n in row] for row in sizes]
    return replace(token_arrays(rows), digest=f"data {seed}")


def plan(tokens: Tokens, budget: int = 60, **changes) -> PairSteps:
    return PairSteps(
        tokens, **{"batch": BATCH, "budget": budget, "seed": 0, "rank": 0, "world": 1} | changes
    )


def cached(m, p: PairSteps, ranks, steps: int = 99, weights: str = "w", precision: str = "fp32"):
    return wanted.cached(m, p, steps, weights, precision, ranks)


def table() -> np.ndarray:
    (path,) = cache_folder().glob("reference-*.npy")
    return np.load(path)


def test_another_attention_has_another_table(ranks, tmp_path, monkeypatch):
    """Its log-probs have other last bits, and margins at the start must be exactly 0."""
    p, names = plan(pairs()), []
    for name in ("flash2", "flash3"):
        monkeypatch.setenv("ZEPHYR_ATTENTION", name)
        cached(model(), p, ranks)
        names.append({path.name for path in (tmp_path / "cache").rglob("reference-*.npy")})
    assert len(names[0]) == 1 and len(names[1]) == 2


def test_live_equals_each_response_alone():
    m, p = model(), plan(pairs())
    for batch in epoch(p, torch.device("cpu")):
        expected = []
        for k in batch.pairs.tolist():
            prompt, *responses = map(torch.tensor, p.data.pair(k))
            for response in responses:
                x = torch.cat([prompt, response])
                with torch.no_grad():
                    logprob = m.logits(x, packed(len(x))).log_softmax(-1)[:-1]
                rows = torch.arange(len(prompt) - 1, len(x) - 1)
                expected.append(logprob[rows, response].sum())
        given_2P = live(m)(batch)
        assert not given_2P.requires_grad
        torch.testing.assert_close(given_2P, torch.stack(expected), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("window", [5, None])
def test_cached_equals_live_in_any_packing(ranks, window):
    m, p = model(sliding_window=window), plan(pairs())
    reference = cached(m, p, ranks)
    for other in (p, plan(p.data, budget=10_000, batch=PAIRS), plan(p.data, shuffle=False, seed=1)):
        for batch in epoch(other, torch.device("cpu")):
            torch.testing.assert_close(reference(batch), live(m)(batch), rtol=1e-6, atol=1e-5)


def test_a_table_is_no_more_exact_than_what_filled_it(ranks, monkeypatch):
    """benchmarks/dpo_7b.py's control has a head that may round in two ways, and says so."""
    assert cached(model(), plan(pairs()), ranks).exact
    monkeypatch.setattr(wanted, "live", lambda m: replace(live(m), exact=False))
    assert not cached(model(), plan(pairs()), ranks, weights="other").exact


def test_training_starts_from_equal_bits(ranks):
    m, p = model(), plan(pairs())
    reference = cached(m, p, ranks)
    for batch in epoch(p, torch.device("cpu")):
        policy_2P = kernels.response_sums(m(batch), batch.response_N, 2 * len(batch.pairs))
        assert policy_2P.requires_grad and torch.equal(policy_2P, reference(batch))


def test_only_the_visited_steps_are_computed(ranks):
    m, p = Counting(), plan(pairs())
    cached(m, p, ranks, steps=2)
    visited = np.concatenate([p.step(0), p.step(1)])
    others = np.setdiff1d(np.arange(PAIRS), visited)
    assert len(others) == PAIRS - 2 * BATCH
    assert np.isfinite(table()[visited]).all() and np.isnan(table()[others]).all()
    assert m.calls == len(p.microbatches(0)) + len(p.microbatches(1))

    m.calls = 0
    cached(m, p, ranks, steps=4)
    assert m.calls == len(p.microbatches(2)) + len(p.microbatches(3))
    m.calls = 0
    cached(m, p, ranks, steps=3 * p.steps_per_epoch)  # later epochs visit the same pairs
    assert m.calls == len(p.microbatches(4)) and len(p.step(4)) == PAIRS % BATCH
    assert np.isfinite(table()).all()


def test_a_pass_that_is_stopped_is_taken_up_where_it_was(ranks, monkeypatch):
    """A signal after the second of five steps, with a table written after each."""
    m, p, asked = Counting(), plan(pairs()), iter([False, True])
    monkeypatch.setattr(reference, "SAVE_EVERY", 1)
    with monkeypatch.context() as signalled:
        signalled.setattr(signals, "stop_wanted", lambda: next(asked))
        with pytest.raises(errors.Preempted, match="asked to stop: .*npy has the reference log-pr"):
            cached(m, p, ranks)
    assert m.calls == len(p.microbatches(0)) + len(p.microbatches(1))
    m.calls = 0
    resumed = cached(m, p, ranks)
    assert m.calls == sum(len(p.microbatches(s)) for s in (2, 3, 4))
    for batch in epoch(p, torch.device("cpu")):
        torch.testing.assert_close(resumed(batch), live(m)(batch), rtol=0, atol=0)


def test_a_second_call_computes_nothing(ranks):
    m, p = model(), plan(pairs())
    first = cached(m, p, ranks)
    for steps, budget in ((99, 60), (2, 60), (99, 1000)):
        again = cached(never, plan(p.data, budget), ranks, steps)
        for batch in epoch(p, torch.device("cpu")):
            assert torch.equal(first(batch), again(batch))


@pytest.mark.parametrize(
    "changes", [{"weights": "v"}, {"precision": "bf16"}, {"p": plan(pairs(1))}], ids=str
)
def test_other_weights_data_or_precision_have_a_table_of_their_own(ranks, changes):
    m, same = Counting(), {"m": model(), "p": plan(pairs()), "ranks": ranks}
    cached(**same)
    cached(**same | {"m": m} | changes)
    assert m.calls > 0
    cached(**same | {"m": never})
    assert len(list(cache_folder().iterdir())) == 2


def test_another_device_or_implementation_too(ranks, monkeypatch):
    """Their bits differ, and at step 0 policy and reference shall have the same."""
    names = []

    def read(path, pairs):
        names.append(path.name)
        raise ValueError("far enough")

    monkeypatch.setattr(reference, "_read", read)
    for implementation in ("reference", "triton"):
        monkeypatch.setattr(
            reference.kernels, "implementation", lambda _, name=implementation: name
        )
        for device in ("cpu", "cuda"):
            with pytest.raises(ValueError, match="far enough"):
                cached(never, plan(pairs()), ranks._replace(device=torch.device(device)))
    assert len(set(names)) == 4


def test_what_the_file_says_is_returned(ranks):
    m, p = model(), plan(pairs())
    cached(m, p, ranks)
    (path,) = cache_folder().iterdir()
    poisoned = table()
    poisoned[3] = -1, -2
    _write(path, torch.from_numpy(poisoned))
    reference = cached(never, p, ranks)
    (batch,) = plan(p.data, budget=10_000, batch=PAIRS).microbatches(0)
    values_P2 = reference(batch).view(-1, 2)
    assert values_P2[batch.pairs.tolist().index(3)].tolist() == [-1, -2]
    assert torch.equal(values_P2, torch.from_numpy(poisoned)[batch.pairs])


WHOLE = np.zeros((PAIRS, 2), np.float32)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04" + bytes(99),
        bytes(999),
        WHOLE[:-1],
        WHOLE[:1],
        WHOLE[:, :1],
        WHOLE.T,
        WHOLE.astype(np.float64),
        WHOLE.view(np.int32),
        np.array(None),
        0.5,
        0.99,
        "header",
        "a bit",
    ],
    ids=range(15),
)
def test_a_damaged_file_is_computed_again(ranks, content, capsys):
    """Fractions cut the file short; an array that would broadcast is no table either."""
    m, p = model(), plan(pairs())
    first = cached(m, p, ranks)
    (path,) = cache_folder().iterdir()
    raw = path.read_bytes()
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, float):
        path.write_bytes(raw[: int(content * len(raw))])
    elif content == "a bit":
        path.write_bytes(raw[:150] + bytes([raw[150] ^ 1]) + raw[151:])
    else:
        path.write_bytes(raw.replace(b"{", b"(") if content == "header" else content)
    capsys.readouterr()
    again = cached(m, p, ranks)
    said = f"{path} is damaged: it is not as it was written; it is made again\n"
    assert path.read_bytes() == raw and capsys.readouterr().err == said
    for batch in epoch(p, torch.device("cpu")):
        assert torch.equal(first(batch), again(batch))


def test_a_cache_that_cannot_be_written_costs_one_line(ranks, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"reference-\w{20}.npy: cannot write: "):
        cached(model(), plan(pairs()), ranks)
