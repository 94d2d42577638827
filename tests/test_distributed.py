"""Two ranks against one process: messages, sums, sharded forward, gradients and steps."""

import copy

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import kernels
from helpers import WORKERS
from model_helpers import close, folder_of, gradients, model, pairs, token_arrays
from run_helpers import torchrun
from zephyr import errors, losses, optim, reference
from zephyr.data.batching import PairSteps
from zephyr.distributed import fsdp, group
from zephyr.weights import hub, masters

OUTPUTS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def inputs() -> dict:
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 9, (7, 3))
    rows = [[rng.integers(0, 101, n).tolist() for n in row] for row in sizes]
    return {"batches": [pairs(0), pairs(1)], "data": token_arrays(rows)}


@pytest.fixture(scope="module")
def two(tmp_path_factory, inputs) -> list[dict]:
    """What each of two ranks found; the models' folders lie beside it."""
    where = tmp_path_factory.mktemp("two")
    for name, tied in (("base", False), ("tied", True)):
        folder_of(model(tie_word_embeddings=tied), where / name)
    torch.save(inputs, where / "inputs.pt")
    return torchrun(WORKERS / "two_ranks.py", where)


def test_together_every_rank_raises_the_first_failing_ranks_message(two):
    for rank, found in enumerate(two):
        agreed, first, second, system = found["together"]
        assert agreed == f"{rank} agrees"
        assert first == "ValueError: 0 refuses"
        assert second == system == "ValueError: 1 refuses"


def test_storage_that_refuses_stays_that_on_every_rank(ranks):
    def full():
        raise OSError(28, "No space left on device", "cache")

    with pytest.raises(errors.Storage, match="No space left on device: 'cache'") as refused:
        with group.together():
            full()
    assert refused.value.code == 5 and refused.value.shared


def test_on_first_only_rank_0_builds_and_every_rank_has_it(two):
    for found in two:
        assert found["on_first"] == ["0 agrees", "ValueError: 0 refuses", "0 agrees"]


def test_once_per_node_the_first_rank_builds_and_the_others_find_it(two):
    assert two[0]["once_per_node"][0] and not two[1]["once_per_node"][0]
    for found in two:
        assert found["once_per_node"][1:] == ["ValueError: 0 refuses", "ValueError: 1 refuses"]


def test_total(two):
    assert [found["total"] for found in two] == [11, 11]


@pytest.mark.parametrize("folder", ["base", "tied"])
def test_two_ranks_equal_one_process(two, inputs, folder):
    m = model(tie_word_embeddings=folder == "tied")
    logprobs = [m(batch).detach() for batch in inputs["batches"]]
    expected = gradients(m, inputs["batches"])
    norm = optim.step(optim.adamw(m, 0.1), 1e-3, 1e-2)
    after = [m(batch).detach() for batch in inputs["batches"]]
    for rank, found in enumerate(each[folder] for each in two):
        assert found["tied"] == (folder == "tied")
        assert ("lm_head.weight" in found["shards"]) == (folder == "base")
        assert found["shards"]["model.embed_tokens.weight"] in (51 * 32, 50 * 32)
        torch.testing.assert_close(found["logprob"], logprobs[rank], rtol=0, atol=1e-6)
        close(found["gradients"], expected, 1e-6)
        close(found["uneven"], expected, 1e-6)
        assert all(torch.equal(found["recomputed"][n], g) for n, g in found["gradients"].items())
        assert float(found["norm"]) == pytest.approx(float(norm), rel=1e-5) and norm > 1e-2
        close(found["stepped"], {name: p.detach() for name, p in m.named_parameters()}, 1e-5)
        torch.testing.assert_close(found["after"], after[rank], rtol=0, atol=1e-3)
        assert (found["after"] - logprobs[rank]).abs().max() > 0.1


@pytest.mark.parametrize("folder", ["base", "tied"])
def test_two_ranks_fill_the_reference_cache_as_one_would(two, inputs, folder):
    """A last step of one pair leaves the second rank nothing to do."""
    m, data = model(tie_word_embeddings=folder == "tied"), inputs["data"]
    (everything,) = PairSteps(data, len(data), 10**6, 0, 0, 1).microbatches(0)
    for found in two:
        torch.testing.assert_close(found[folder]["cached"], reference.live(m)(everything))


def test_bf16_gradients_are_added_in_fp32(two, inputs):
    """Each rank's own are bf16; the sum of two has more digits."""
    narrow, count = model().bfloat16(), sum(len(b.targets_N) for b in inputs["batches"])
    expected = {}
    for batch in inputs["batches"]:
        narrow.zero_grad()
        (losses.sft(narrow(batch)) * 2 / count).backward()
        for name, p in narrow.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.float() / 2
    for found in two:
        assert all(torch.equal(found["bf16"][name], g) for name, g in expected.items())
    assert any((g != g.bfloat16()).any() for g in expected.values())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_process_in_fp32_is_a_plain_module(ranks, inputs, tmp_path, recompute):
    m = model()
    built = fsdp.build(m.config, ranks, "fp32", recompute)
    hub.load(folder_of(m, tmp_path / "base"), built)
    assert not any(isinstance(p, DTensor) for p in built.parameters())
    expected = gradients(m, inputs["batches"])
    ours = gradients(built, inputs["batches"])
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_bf16_computes_narrow_and_keeps_fp32(ranks, inputs, tmp_path, tied, recompute):
    """The oracle is the same model in bf16, its gradients widened before they are added."""
    m = model(tie_word_embeddings=tied)
    built = fsdp.build(m.config, ranks, "bf16", recompute)
    hub.load(folder_of(m, tmp_path / "base"), built)
    narrow, seen, expected = copy.deepcopy(m).bfloat16(), [], {}
    built.model.layers[1].mlp.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    for batch in inputs["batches"]:
        logprob_N, narrow_N = built(batch), narrow(batch)
        assert logprob_N.dtype == torch.float32 and torch.equal(logprob_N, narrow_N)
        (losses.sft(logprob_N) / len(batch.targets_N)).backward()
        for name, g in gradients(narrow, [batch]).items():
            expected[name] = expected.get(name, 0) + g.float()
        narrow.zero_grad()
    assert set(seen) == {torch.bfloat16}
    for name, p in built.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert torch.equal(p.full_tensor(), m.get_parameter(name))
        assert torch.equal(p.grad.full_tensor(), expected[name]), name


def test_split_masters_compute_as_cast_ones_do(ranks, inputs, tmp_path):
    """Bit for bit, over two micro-batches and an update, where no master is halfway between two
    bf16 numbers: there the halves go up, a cast's to even. The oracle's layers that have one input
    are one matmul too, by autograd."""

    def project(module):
        layers = [layer for name, layer in module.named_children() if name not in OUTPUTS]
        return lambda x: F.linear(x, torch.cat([layer.weight for layer in layers])).split(
            [layer.out_features for layer in layers], 1
        )

    m = model()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(p.bfloat16() * (1 + 2**-12))  # every master has a lower half
    folder = folder_of(m, tmp_path / "base")
    cast, split = (fsdp.build(m.config, ranks, "bf16", masters=x) for x in ("fp32", "split"))
    for block in cast.model.layers:
        block.self_attn.project, gate_up = project(block.self_attn), project(block.mlp)
        block.mlp.forward = lambda x, mlp=block.mlp, gate_up=gate_up: mlp.down_proj(
            kernels.swiglu(*gate_up(x))
        )
    optimizers = []
    for built in (cast, split):
        hub.load(folder, built)
        optimizers.append(optim.adamw(built, 0.1))
        for batch in inputs["batches"]:
            (losses.sft(built(batch)) / len(batch.targets_N)).backward()
    for (name, p), q in zip(split.named_parameters(), cast.parameters(), strict=True):
        gradient = masters.gradient(p)
        assert p.dtype == torch.bfloat16 and gradient.dtype == torch.float32 and p.grad is None
        assert torch.equal(masters.full_master(p), m.get_parameter(name)), name
        assert torch.equal(gradient, q.grad.full_tensor()), name
        assert (gradient != gradient.bfloat16()).any() or p.dim() == 1, "added in fp32"
    norms = [optim.step(o, 1e-3, 1e-2) for o in optimizers]
    assert torch.equal(*norms)
    for (name, p), q in zip(split.named_parameters(), cast.parameters(), strict=True):
        assert torch.equal(masters.full_master(p), q.full_tensor()), name


def test_only_the_first_rank_speaks(ranks, capsys):
    ranks.say("hello")
    ranks._replace(rank=1).say("silence")
    shown = capsys.readouterr()
    assert shown.err == "hello\n" and shown.out == ""
