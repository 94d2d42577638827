"""The packed row of the docstrings, the plan's invariants, and how full micro-batches are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import Limits, shared
from model_helpers import token_arrays
from zephyr import attention, config, packing
from zephyr.data import arrays, batching
from zephyr.data.arrays import Tokens
from zephyr.packing import Pair
from zephyr.tokenizer import Tokenizer


def pairs(lengths: list[tuple[int, int, int]]) -> Tokens:
    count = iter(range(10**6))
    return token_arrays([[[next(count) for _ in range(n)] for n in row] for row in lengths])


def test_the_worked_example_of_shared_prompts():
    a, b, c, p, q, x, y, z = range(8)
    batch = packing.pack_pairs([Pair(*map(np.array, ([a, b, c], [p, q], [x, y, z])))], [7])
    assert batch.tokens_T.tolist() == [a, b, c, p, x, y]
    assert batch.layout.position_T.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.layout.cu_seqlens_q.tolist() == [0, 4, 6]
    assert batch.layout.cu_seqlens_k.tolist() == [0, 4, 9]
    assert batch.layout.kv_rows_G.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5]
    assert batch.layout.kv_inverse_2T.tolist() == [[0, 1, 2, 3, 7, 8], [4, 5, 6, -1, -1, -1]]
    assert (batch.layout.max_q, batch.layout.max_k) == (4, 5)
    assert batch.predict_N.tolist() == [2, 3, 2, 4, 5]
    assert batch.targets_N.tolist() == [p, q, x, y, z]
    assert batch.response_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.pairs.tolist() == [7]


def test_the_worked_example_of_documents():
    a, b, c, d, e = range(5)
    everything = np.ones(3, bool)
    pieces = [(np.array([a, b, c]), everything, 4), (np.array([d, e]), everything[:2], 1)]
    batch = packing.pack_documents(pieces)
    assert batch.documents == (4, 1)
    assert batch.tokens_T.tolist() == [a, b, d]
    assert batch.targets_N.tolist() == [b, c, e]
    assert batch.predict_N.tolist() == [0, 1, 2]
    assert batch.layout.position_T.tolist() == [0, 1, 0]
    assert batch.layout.cu_seqlens_q.tolist() == batch.layout.cu_seqlens_k.tolist() == [0, 2, 3]


@pytest.mark.parametrize("c, r", [(1, 1), (1, 3), (3, 1)])
def test_responses_of_one_token_are_predicted_by_the_prompt_alone(c, r):
    batch = packing.pack_pairs([pairs([(2, c, r)]).pair(0)] * 2, [0, 1])
    assert len(batch.tokens_T) == 2 * (2 + c + r - 2)
    assert batch.response_N.tolist() == [0] * c + [1] * r + [2] * c + [3] * r
    assert int(np.diff(batch.layout.cu_seqlens_q).min()) > 0, "an empty segment"
    assert batch.layout.cu_seqlens_q[-1] == len(batch.tokens_T)
    assert batch.layout.cu_seqlens_k[-1] == len(batch.layout.kv_rows_G)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_gathered_keys_is_autograds(dtype):
    """In every bit; of the keys of a prompt that only one branch sees, too (a response of one)."""
    data = pairs([(5, 3, 4), (2, 4, 1), (7, 1, 1), (1, 2, 6)])
    layout = packing.pack_pairs([data.pair(k) for k in range(4)], [0, 1, 2, 3]).layout
    x, theirs = (torch.randn(len(layout.position_T), 2, 3).to(dtype) for _ in range(2))
    theirs.copy_(x)
    g = torch.randn(len(layout.kv_rows_G), 2, 3).to(dtype)
    for leaf in (x, theirs):
        leaf.requires_grad_()
    ours = attention.gathered(x, layout)
    ours.backward(g)
    theirs.index_select(0, layout.kv_rows_G).backward(g)
    assert torch.equal(ours, theirs[layout.kv_rows_G]) and torch.equal(x.grad, theirs.grad)
    assert (layout.kv_inverse_2T[1] >= 0).sum() == 5 + 1


def test_a_prompt_has_at_most_two_branches():
    """A third would lose its part of the prompt's gradient."""
    pack = packing.PackBuilder(shares_prompts=True)
    shared = pack.segment([1, 2, 3])
    for _ in range(2):
        pack.segment([4], first_position=3, prefix=shared)
    with pytest.raises(AssertionError, match="shared by two responses at most"):
        pack.batch()


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(sizes, st.integers(50, 90), st.integers(1, 4))
def test_bins_hold_every_item_once_within_the_budget(lengths, budget, multiple):
    groups = batching.bins(np.array(lengths), budget, multiple)
    assert sorted(k for group in groups for k in group) == list(range(len(lengths)))
    assert all(sum(lengths[k] for k in group) <= budget for group in groups)
    assert len(groups) % multiple == 0


@pytest.fixture(scope="module")
def real_pairs(tmp_path_factory):
    """Pairs that zephyr.feedback makes of the real sample, with Mistral's tokenizer."""
    from zephyr import feedback

    out = tmp_path_factory.mktemp("real") / "pairs.jsonl"
    feedback.main([str(shared("ultrafeedback.train.jsonl.gz")), "--out", str(out)])
    patch = pytest.MonkeyPatch()
    patch.setenv("ZEPHYR_CACHE", str(out.parent))
    yield arrays.preferences((str(out),), Tokenizer(shared("mistral")), Limits())
    patch.undo()


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
@pytest.mark.parametrize("batch", [32, 128])
def test_microbatches_are_at_most_one_above_the_lower_bound(real_pairs, budget, batch):
    plan = batching.PairSteps(real_pairs, batch, budget, seed=0, rank=0, world=1)
    lengths = real_pairs.pair_lengths()
    for step in range(plan.steps_per_epoch):
        bound = -(-lengths[plan.step(step)].sum() // budget)
        batches = plan.microbatches(step)
        assert len(batches) <= bound + 1
        assert max(len(b.tokens_T) for b in batches) <= budget


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [40, 64, 500])
def test_a_step_holds_the_same_pairs_on_any_number_of_ranks(world, budget):
    rng = np.random.default_rng(0)
    data = pairs([tuple(rng.integers(1, 12, 3)) for _ in range(23)])
    alone = batching.PairSteps(data, 5, 10**6, 3, 0, 1)
    for step in range(2 * alone.steps_per_epoch + 1):
        shares = [
            batching.PairSteps(data, 5, budget, 3, rank, world).microbatches(step)
            for rank in range(world)
        ]
        assert len({len(share) for share in shares}) == 1, "ranks run different numbers"
        got = [k for share in shares for b in share for k in b.pairs.tolist()]
        assert sorted(got) == sorted(alone.step(step).tolist())


def test_an_epoch_visits_every_pair_once_and_epochs_differ():
    plan = batching.PairSteps(pairs([(2, 2, 2)] * 23), 5, 64, 0, 0, 1)
    epochs = [np.concatenate([plan.step(e * 5 + s) for s in range(5)]) for e in range(2)]
    assert plan.steps_per_epoch == 5
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_every_trained_token_is_predicted_exactly_once_in_its_own_context(world, train_on):
    """Targets carry their own number, so a row's context can be read off its tokens."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 40, 30)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    documents = [list(range(a, b)) for a, b in zip(starts, starts[1:], strict=False)]
    mask = rng.integers(0, 2, starts[-1])
    data = token_arrays(documents, mask)
    seen = []
    plans = [batching.DocumentSteps(data, 4, 16, 32, 5, r, world, train_on) for r in range(world)]
    for plan in plans:
        for batch in batching.epoch(plan, torch.device("cpu")):
            previous = batch.tokens_T[batch.predict_N]
            assert (batch.targets_N == previous + 1).all(), "a row predicts another's next token"
            seen += batch.targets_N.tolist()
            for a, b in zip(batch.layout.cu_seqlens_q, batch.layout.cu_seqlens_q[1:], strict=False):
                piece = batch.tokens_T[a:b]
                assert (piece.diff() == 1).all() or len(piece) == 1
                assert batch.layout.position_T[a:b].tolist() == list(range(b - a))
    everything = set(range(starts[-1])) - set(starts[:-1].tolist())
    trained = everything if train_on == "all" else {k for k in everything if mask[k]}
    assert sorted(seen) == sorted(trained)


def test_rows_are_full_but_for_the_last():
    data = token_arrays([list(range(10))] * 7)
    plan = batching.DocumentSteps(data, 1, 16, 16, 0, 0, 1)
    sizes = [len(b.tokens_T) for b in batching.epoch(plan, torch.device("cpu"))]
    assert sizes == [16, 16, 16, 15]


def test_the_empty_microbatch_predicts_nothing():
    batch = packing.nothing()
    assert len(batch.tokens_T) == 1 and len(batch.targets_N) == 0 and len(batch.pairs) == 0


def test_mistakes_cost_one_line():
    data = pairs([(5, 4, 6)])
    with pytest.raises(ValueError, match="--microbatch-tokens 12 is less than the longest pair"):
        batching.PairSteps(data, 1, 12, 0, 0, 1)
    with pytest.raises(ValueError, match="--batch 1 is less than the 2 ranks"):
        batching.PairSteps(data, 1, 64, 0, 0, 2)
    with pytest.raises(ValueError, match="--microbatch-tokens 8 is less than one chunk"):
        config.parse(
            config.SFTConfig,
            "--model m --data d --out o --max-length 16 --microbatch-tokens 8".split(),
        )


def test_what_is_packed_ahead_is_what_the_steps_hold():
    """Of any steps, in their order; none of no steps; and a mistake in the thread is not lost."""
    data = pairs([(3, 2, 4)] * 9)
    plan = batching.PairSteps(data, 3, 20, 0, 0, 1)
    for steps in ([], [2], [2, 0, 1]):
        found = list(batching.packed_ahead(plan, steps, torch.device("cpu")))
        for batches, step in zip(found, steps, strict=True):
            expected = plan.microbatches(step)
            for a, b in zip(batches, expected, strict=True):
                assert torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.pairs, b.pairs)
    packed = batching.packed_ahead(plan, [0, "x"], torch.device("cpu"))
    next(packed)
    with pytest.raises(TypeError):
        next(packed)


def test_moving_a_batch_keeps_it():
    batch = packing.pack_pairs([pairs([(2, 3, 4)]).pair(0)], [0])
    moved = batch.to(torch.device("meta"))
    for record, other in ((moved, batch), (moved.layout, batch.layout)):
        for name, value in vars(record).items():
            if isinstance(value, torch.Tensor):
                assert value.is_meta and value.shape == getattr(other, name).shape, name
    assert (moved.layout.max_q, moved.layout.max_k) == (batch.layout.max_q, batch.layout.max_k)
    everywhere = packing.map_tensors(batch, lambda x: x + 1)
    assert torch.equal(everywhere.layout.kv_rows_G, batch.layout.kv_rows_G + 1)
