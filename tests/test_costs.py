"""Closed forms against what real models have, compute and keep."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from helpers import ROOT, WORKERS
from kernels import fused_logprob
from run_helpers import torchrun
from zephyr import attention, lora, optim, packing
from zephyr.architecture import PROJECTIONS, MistralConfig
from zephyr.config import DPOConfig
from zephyr.distributed import fsdp
from zephyr.model import Mistral
from zephyr.packing import Pair
from zephyr.plan import costs, fit
from zephyr.plan.__main__ import MODELS
from zephyr.weights import masters

MISTRAL, LLAMA = MODELS["mistral-7b"], MODELS["llama-2-70b"]
SMALL = MistralConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=64,
)
SHAPES = {
    "grouped": SMALL,
    "odd": dataclasses.replace(
        SMALL,
        vocab_size=77,
        intermediate_size=100,
        head_dim=24,
        num_key_value_heads=1,
        num_hidden_layers=2,
    ),
    "one block": dataclasses.replace(
        SMALL, num_hidden_layers=1, num_key_value_heads=4, sliding_window=None
    ),
}
WIDE = dataclasses.replace(
    SMALL, vocab_size=400, hidden_size=256, intermediate_size=896, num_hidden_layers=5
)
ADAPTERS = {
    "all": costs.Adapters(8, PROJECTIONS),
    "some": costs.Adapters(12, ("v_proj", "o_proj")),
    "one": costs.Adapters(4, ("down_proj",)),
}
each_adapters = pytest.mark.parametrize("a", ADAPTERS.values(), ids=ADAPTERS)
PAIRS = [(50, 60, 70), (100, 30, 20), (5, 9, 1)]


def pairs(c: MistralConfig, times: int = 1) -> packing.Batch:
    draw = np.random.default_rng(0)
    lengths = PAIRS * times
    made = [Pair(*(draw.integers(0, c.vocab_size, n) for n in each)) for each in lengths]
    return packing.pack_pairs(made, list(range(len(made))))


def documents(c: MistralConfig) -> packing.Batch:
    draw = np.random.default_rng(0)
    pieces = [(draw.integers(0, c.vocab_size, n), draw.random(n) < 0.6, n) for n in (90, 41, 130)]
    return packing.pack_documents(pieces)


def load_of(batch: packing.Batch, c: MistralConfig) -> costs.Load:
    rows = batch.layout.kv_rows_G
    gathered = len(batch.tokens_T) if rows is None else len(rows)
    return costs.Load(
        len(batch.tokens_T), gathered, len(batch.targets_N), batch.layout.attended(c.sliding_window)
    )


class Live(TorchDispatchMode):
    """The storages that ops made, and how many bytes of them are alive; those `without` not."""

    def __init__(self, without=()):
        super().__init__()
        self.made, self.peak = {}, 0
        self.without = {x.untyped_storage()._cdata for x in without}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made.setdefault(storage._cdata, StorageWeakRef(storage))
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self):
        total = 0
        for key, ref in list(self.made.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                del self.made[key]
            elif key not in self.without:
                total += storage.nbytes()
        return total


def model(c: MistralConfig, recompute: str = "none", dtype=torch.float32) -> Mistral:
    made = Mistral(c).to(dtype)
    for block in made.model.layers:
        block.forward = fsdp.wrapped(block, recompute, compiled=False)
    return made


def adapted(
    c: MistralConfig, a: costs.Adapters, recompute: str = "none", dtype: str = "fp32"
) -> Mistral:
    """A model with adapters as `fsdp.build` makes it for one process. The input of the first block
    takes a gradient, as it does where blocks are compiled."""
    with torch.device("meta"):
        made = Mistral(c)
    spec = lora.Spec(a.rank, 1, a.targets)
    lora.attach(made, spec, dtype, torch.device("cpu"))
    made.to_empty(device="cpu")
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.02)
    for block in made.model.layers:
        matmuls = lora.matmuls(PROJECTIONS, spec)
        block.forward = fsdp.wrapped(block, recompute, False, matmuls)
    made.model.embed_tokens.register_forward_hook(lambda *call: call[2].requires_grad_())
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_the_models(shape, tied):
    c = dataclasses.replace(shape, tie_word_embeddings=tied)
    with torch.device("meta"):
        made = Mistral(c)
    found = dict.fromkeys(costs.parameters(c), 0)
    places = {"embed": "embedding", "self_attn": "attention", "mlp": "mlp", "lm_head": "head"}
    for name, p in made.named_parameters():
        part = next((part for word, part in places.items() if word in name), "norms")
        found["norms" if p.dim() == 1 else part] += p.numel()
    assert costs.parameters(c) == found
    block, root = costs.units(c)
    assert block == sum(p.numel() for p in made.model.layers[0].parameters())
    assert c.num_hidden_layers * block + root == sum(found.values())


def test_published_numbers_of_parameters():
    assert sum(costs.parameters(MISTRAL).values()) == 7_241_732_096
    assert sum(costs.parameters(LLAMA).values()) == 68_976_648_192


@pytest.mark.parametrize("window", [None, 64, 7])
def test_the_load_of_a_pair_and_a_document_is_that_of_their_batch(window):
    c = dataclasses.replace(SMALL, sliding_window=window)
    parts = [costs.pair(*lengths, window) for lengths in PAIRS]
    assert load_of(pairs(c), c) == costs.Load(*map(sum, zip(*parts, strict=True)))
    row = packing.pack_documents([(np.arange(91), np.ones(91, bool), 0)])
    assert load_of(row, c) == costs.document(90, window)
    # by the mask's definition
    i = torch.arange(90)
    assert costs.causal(90, window) == int(attention.visible(i[:, None], i, window).sum())


@pytest.mark.parametrize("batch", [pairs, documents])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flops_are_what_torch_counts(as_on_a_gpu, monkeypatch, shape, batch):
    """All but attention: there torch counts the pairs that the mask hides, and in the backward the
    scores once more. Here a visible pair is two products of E numbers, each a multiplication and an
    addition, and the backward twice that."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "reference")  # the fused head is one op, not counted
    b = batch(shape)
    load = load_of(b, shape)
    parts = costs.forward(shape, load)
    heads = shape.num_hidden_layers * shape.num_attention_heads
    assert parts["attention"] == heads * load.attended * 2 * 2 * shape.head_dim
    nothing = {
        op: lambda *args, **kwargs: 0
        for op in (torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward)
    }
    for recompute in ("none", "elementwise", "full"):
        with FlopCounterMode(display=False, custom_mapping=nothing) as counter:
            model(shape, recompute)(b).sum().backward()
        unseen = parts["attention"] * (3 + (recompute == "full"))
        ours = costs.model_flops(shape, load.tokens, load.predicted, load.attended)
        ours += costs.recomputed(shape, load, recompute)
        assert ours - unseen == counter.get_total_flops()


@each_adapters
def test_flops_beside_frozen_weights_are_what_torch_counts(as_on_a_gpu, monkeypatch, a):
    """Where blocks are not compiled, `full` repeats the last matmul too."""
    monkeypatch.setenv("ZEPHYR_KERNELS", "reference")
    b, load, c = pairs(SMALL), load_of(pairs(SMALL), SMALL), SMALL
    parts = costs.forward(c, load, a)
    nothing = {
        op: lambda *args, **kwargs: 0
        for op in (torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward)
    }
    for recompute in ("none", "elementwise", "full"):
        made = adapted(c, a, recompute)
        with FlopCounterMode(display=False, custom_mapping=nothing) as counter:
            made(b).sum().backward()
        ours = costs.model_flops(c, load.tokens, load.predicted, load.attended, a)
        ours += costs.recomputed(c, load, recompute, a)
        ours -= parts["attention"] * (3 + (recompute == "full"))
        if recompute != "none" and "down_proj" in a.targets:
            ours += parts["mlp"] / 3
        assert ours == counter.get_total_flops(), recompute


def test_flops_of_an_average_pair_of_ultrafeedback():
    """The table of docs/operate/performance.md, in TFLOP; each number is in the page too."""
    load = costs.pair(170, 320, 290, 4096)
    parts = {name: 3 * x / 1e12 for name, x in costs.forward(MISTRAL, load).items()}
    again = costs.recomputed(MISTRAL, load, "full") / 1e12
    whole = sum(parts.values())
    page = (ROOT / "docs" / "operate" / "performance.md").read_text()
    for number in (parts["projections"] + parts["mlp"], parts["attention"], parts["head"]):
        assert f"| {number:.2f} |" in page
    assert f"| **{whole:.2f}** |" in page
    assert f"| the reference pass, once | {whole / 3:.2f} |" in page
    assert f"| `--recompute full` would add | {again:.2f} |" in page
    assert costs.recomputed(MISTRAL, load, "elementwise") == 0


@pytest.mark.parametrize(
    "recompute, size", [("none", 139_264), ("elementwise", 94_208), ("full", 8_192)]
)
def test_activations_of_a_token(recompute, size):
    """Bytes per token and layer, as docs/operate/performance.md has them, without the norms' scales
    and attention's lse."""
    more = [dataclasses.replace(MISTRAL, num_hidden_layers=n) for n in (2, 1)]
    two, one = (costs.activations(c, costs.Load(1, 1, 1, 0), recompute, 2) for c in more)
    fp32 = {"none": 4 * (32 + 2), "elementwise": 4 * 32, "full": 0}
    assert two - one == size + fp32[recompute]


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [pairs, documents])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_activations_are_what_a_forward_leaves(as_on_a_gpu, shape, batch, dtype, recompute):
    """Storages alive after it, so that what checkpoints hold counts."""
    b, made = batch(shape), model(shape, recompute, dtype)
    with Live(made.parameters()) as live:
        logprob_N = made(b)
        alive = live.bytes() - logprob_N.untyped_storage().nbytes()
    load = load_of(b, shape)
    ours = costs.activations(shape, load, recompute, dtype.itemsize)
    ours += costs.head_kept(shape, load, dtype.itemsize)
    # views of the positions count their whole storage
    assert ours == pytest.approx(alive - b.layout.position_T.nbytes, rel=1e-3)


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_split_masters_keep_no_product_of_swiglu(as_on_a_gpu, shape, recompute):
    b, made = pairs(shape), Mistral(shape).bfloat16()
    masters.fuse_matmuls(made)
    for block in made.model.layers:
        block.forward = fsdp.wrapped(block, recompute, False, fsdp.FUSED)
    masters.attach_halves(made)
    fused = [m.fused for m in made.modules() if hasattr(m, "fused")]
    with Live([*made.parameters(), *fused, *(p.low for p in made.parameters())]) as live:
        logprob_N = made(b)
        alive = live.bytes() - logprob_N.untyped_storage().nbytes()
    load = load_of(b, shape)
    ours = costs.activations(shape, load, recompute, 2, split=True)
    ours += costs.head_kept(shape, load, 2)
    assert ours == pytest.approx(alive - b.layout.position_T.nbytes, rel=1e-3)


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_adapters
def test_activations_beside_frozen_weights(as_on_a_gpu, a, dtype, recompute):
    b, made, itemsize = pairs(SMALL), adapted(SMALL, a, recompute, dtype), 2 + 2 * (dtype == "fp32")
    with Live(made.parameters()) as live:
        logprob_N = made(b)
        alive = live.bytes() - logprob_N.untyped_storage().nbytes()
    load = load_of(b, SMALL)
    ours = costs.activations(SMALL, load, recompute, itemsize, a=a)
    ours += costs.head_kept(SMALL, load, itemsize)
    ours += costs.cast(SMALL, recompute, itemsize, a) * (recompute == "none")
    assert ours == pytest.approx(alive - b.layout.position_T.nbytes, rel=1e-3)


@pytest.mark.parametrize("batch", [pairs, documents])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_activations_are_what_autograd_saves(as_on_a_gpu, shape, batch):
    b, made, saved = batch(shape), model(shape), {}
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    tensors = (
        b.tokens_T,
        b.predict_N,
        b.targets_N,
        b.layout.kv_rows_G,
        b.layout.kv_inverse_2T,
        b.layout.cu_seqlens_q,
        b.layout.cu_seqlens_k,
    )
    known = weights | {x.untyped_storage().data_ptr() for x in tensors if x is not None}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made(b)
    found = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in known)
    load = load_of(b, shape)
    ours = costs.activations(shape, load, "none", 4) + costs.head_kept(shape, load, 4)
    assert ours == pytest.approx(found, rel=0.003)


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
def test_the_moment_of_a_blocks_backward(as_on_a_gpu, recompute):
    """No less than what a backward has beside the activations, nor twice as much."""
    c = dataclasses.replace(
        SMALL, vocab_size=20, intermediate_size=224, num_key_value_heads=1, num_hidden_layers=4
    )
    b, made = pairs(c, times=4), model(c, recompute, torch.bfloat16)
    for p in made.parameters():
        p.grad = torch.zeros_like(p)
    with Live([*made.parameters(), *(p.grad for p in made.parameters())]) as live:
        logprob_N = made(b)
        left, live.peak = live.bytes(), 0
        logprob_N.sum().backward()
    ours = costs.block_backward(c, load_of(b, c), recompute, 2)
    assert ours / 2 < live.peak - left < ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "recompute", ["full", "elementwise", pytest.param("none", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("a", [None, ADAPTERS["all"]], ids=["all weights", "adapters"])
def test_what_compiled_blocks_keep(as_on_a_gpu, monkeypatch, recompute, a):
    """What their backward has in hand besides weights, by the compiler's partitioner."""
    compiled = torch.compile
    eager = {"backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **eager, **options))
    torch._dynamo.reset()
    made, b = adapted(SMALL, a) if a else Mistral(SMALL), pairs(SMALL)
    spec = lora.Spec(a.rank, 1, a.targets) if a else None
    for block in made.model.layers:
        block.forward = type(block).forward.__get__(block)
        matmuls = lora.matmuls(PROJECTIONS, spec)
        block.forward = fsdp.wrapped(block, recompute, True, matmuls)
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    logprob_N = made(b)
    seen, kept, nodes = set(), {}, [logprob_N.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for x in getattr(node, "saved_tensors", ()) if "Compiled" in type(node).__name__ else ():
            storage = x.untyped_storage()
            if x.is_floating_point() and storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
    load = load_of(b, SMALL)
    ours = costs.activations(SMALL, load._replace(predicted=0), recompute, 4, a=a)
    assert sum(kept.values()) == pytest.approx(ours, rel=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", ["none", "elementwise", "full"])
@each_adapters
def test_the_moment_of_a_blocks_backward_with_adapters(as_on_a_gpu, recompute, a):
    c = dataclasses.replace(
        SMALL, vocab_size=20, intermediate_size=224, num_key_value_heads=1, num_hidden_layers=4
    )
    b, made = pairs(c, times=4), adapted(c, a, recompute, "bf16")
    trained = [p for p in made.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    with Live([*made.parameters(), *(p.grad for p in trained)]) as live:
        logprob_N = made(b)
        left, live.peak = live.bytes(), 0
        logprob_N.sum().backward()
    ours = costs.block_backward(c, load_of(b, c), recompute, 2, a) + costs.cast(c, "full", 2, a)
    assert ours / 2 < live.peak - left < ours


@pytest.mark.parametrize("rows", [0, 1, 29_360, 29_361, 60_000])
def test_the_head_keeps_what_the_kernel_keeps(rows):
    load = costs.Load(rows, rows, rows, 0)
    for dtype, V in ((torch.bfloat16, 32000), (torch.float32, 32000), (torch.bfloat16, 151_936)):
        c = dataclasses.replace(MISTRAL, vocab_size=V)
        keeps = fused_logprob.keeps(rows, V, dtype, costs.WORKSPACE)
        kept = costs.head_kept(c, load, dtype.itemsize)
        assert kept == rows * V * dtype.itemsize * keeps
        assert kept <= costs.head(c, load, dtype.itemsize)
    assert fused_logprob.ROWS["cuda"] == costs.CHUNK


def test_state_is_what_adamw_has():
    c = dataclasses.replace(SMALL, vocab_size=61)
    made = model(c)
    optimizer = optim.adamw(made, 0.0)
    made(documents(c)).sum().backward()
    optimizer.step()
    size = {
        "masters": made.parameters(),
        "gradients": [p.grad for p in made.parameters()],
        "moments": [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")],
    }
    found = {name: sum(x.nbytes for x in of) for name, of in size.items()}
    assert costs.state(c, 1) == found
    # a split master: the bf16 weight, and 16 bits beside it
    halves = [
        torch.empty_like(p, dtype=d)
        for p in made.parameters()
        for d in (torch.bfloat16, torch.int16)
    ]
    assert sum(x.nbytes for x in halves) == costs.state(c, 1)["masters"]
    moments = [torch.empty_like(p, dtype=torch.bfloat16) for p in made.parameters()] * 2
    assert sum(x.nbytes for x in moments) == costs.state(c, 1, "bf16")["moments"]
    assert costs.state(c, 8)["masters"] == 4 * math.ceil(found["masters"] / 4 / 8)


@each_adapters
def test_state_beside_frozen_weights(a):
    c = dataclasses.replace(SMALL, vocab_size=61)
    made = adapted(c, a, dtype="bf16")
    optimizer = optim.adamw(made, 0.0)
    made(documents(c)).sum().backward()
    optimizer.step()
    trained = [p for p in made.parameters() if p.requires_grad]
    size = {
        "frozen weights": [p for p in made.parameters() if not p.requires_grad],
        "masters": trained,
        "gradients": [p.grad for p in made.parameters() if p.grad is not None],
        "moments": [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")],
    }
    found = {name: sum(x.nbytes for x in of) for name, of in size.items()}
    assert costs.state(c, 1, a=a) == found
    assert found["masters"] == 4 * c.num_hidden_layers * costs.trained(c, a)


def test_state_of_mistral_7b():
    """16 and 12 bytes a weight, in GB."""
    for adam_state, size in (("fp32", 115.9), ("bf16", 86.9)):
        found = sum(costs.state(MISTRAL, 1, adam_state).values()) / 1e9
        assert found == pytest.approx(size, abs=0.05)


def test_what_fsdp_holds(tmp_path):
    """On two ranks, of so few tokens that activations hardly count."""
    found = torchrun(WORKERS / "gathered.py", tmp_path)
    for reshard in ("always", "never"):
        forward, backward = map(max, zip(*(each[reshard] for each in found), strict=True))
        ours = costs.sharding(WIDE, 2, 2, reshard == "always")
        assert forward < sum(ours.values())
        assert backward == pytest.approx(sum(ours.values()), rel=0.1)
    # of two replicas what a backward adds to the gradients too: but for the root's, its last
    t = DPOConfig(model="", data=("",), out="", replicas=2)
    parts = fit.occupied(WIDE, t, 2, costs.Load(1, 1, 1, 0), "none", True)
    shared = sum(costs.sharding(WIDE, 1, 2, True).values())
    ours = shared + parts["gradients all-reduced"]
    forward, backward = map(max, zip(*(each["replicas"] for each in found), strict=True))
    assert forward < shared and 0.8 * ours < backward < ours


def test_traffic():
    block, root = costs.units(MISTRAL)
    every = 32 * block + root
    assert not any(costs.traffic(MISTRAL, 1, 1, 2, True).values())
    assert costs.traffic(MISTRAL, 8, 1, 2, True) == pytest.approx(
        {
            "all-gather, forward": 2 * every * 7 / 8,
            "all-gather, backward": 2 * 32 * block * 7 / 8,
            "reduce-scatter": 4 * every * 7 / 8,
            "all-reduce, replicas": 0,
        }
    )
    shared = costs.traffic(MISTRAL, 8, 4, 2, False)
    assert shared["all-gather, backward"] == 0
    # a ring sends each rank's sums around once and the totals once
    assert shared["all-reduce, replicas"] == pytest.approx(2 * 3 / 4 * 4 * every / 8)
