"""What a step costs, in closed form: parameters, FLOPs, bytes. No torch.

Bytes are those of tensors. What an allocator and a CUDA context take as well is in
zephyr/plan/fit.py.

T tokens  G gathered keys  N predicting places  D width  F MLP width  H query heads
K key/value heads  E head width  V vocabulary  L layers
"""

from typing import NamedTuple

from zephyr.architecture import MistralConfig
from zephyr.config import Training

WORKSPACE, CHUNK = 2**31, 4096  # of kernels.linear_logprob: its default, its rows at a time


class Card(NamedTuple):
    """A GPU's data sheet. Rates of links count one direction."""

    gib: float  # memory as torch reports it, GiB = 2**30
    flops: float  # dense bf16 FLOP/s
    link: float  # bytes/s to the GPUs of its node: NVLink, or PCIe where there is none
    network: float  # bytes/s to other nodes: its share of what the node has


# by a word of the device's name, the first that fits. Peaks and links are NVIDIA's data sheets';
# the network is what such nodes usually have, DGX systems one adapter for each GPU
CARDS = {
    "H100 PCIe": Card(79.1, 756e12, 64e9, 25e9),
    "H100 NVL": Card(93.1, 835e12, 64e9, 25e9),
    "H100": Card(79.1, 989e12, 450e9, 50e9),
    "H200": Card(139.8, 989e12, 450e9, 50e9),
    "GH200": Card(94.5, 989e12, 450e9, 50e9),
    "B200": Card(178.3, 2250e12, 900e9, 50e9),
    "A100-40": Card(39.4, 312e12, 300e9, 25e9),
    "A100": Card(79.1, 312e12, 300e9, 25e9),
    "L40S": Card(44.4, 362e12, 32e9, 12.5e9),
    "RTX 4090": Card(23.5, 165e12, 32e9, 1.25e9),
}


class Load(NamedTuple):
    """What decides the cost of a pack."""

    tokens: float  # a shared prompt's once
    gathered: float  # keys, a shared prompt's twice
    predicted: float  # places that the head runs on
    attended: float  # visible (query, key) pairs of one layer

    def times(self, n: float) -> "Load":
        return Load(*(n * x for x in self))


def causal(length: int, window: int | None) -> int:
    """Return the number of visible (query, key) pairs of a sequence of `length` tokens."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


def pair(prompt: int, chosen: int, rejected: int, window: int | None) -> Load:
    """Return the load of a pair as `packing.pack_pairs` lays it out. A response's last token is no
    input."""
    one, other = prompt + chosen - 1, prompt + rejected - 1
    attended = causal(one, window) + causal(other, window) - causal(prompt, window)
    return Load(one + other - prompt, one + other * (rejected > 1), chosen + rejected, attended)


def document(length: int, window: int | None) -> Load:
    """Return the load (tokens, keys, predictions, visible pairs) of one document of `length`
    inputs, each of which predicts the next token."""
    return Load(length, length, length, causal(length, window))


def parameters(c: MistralConfig) -> dict[str, int]:
    """Return the number of parameters of each part of the model. A head that is tied has none of
    its own."""
    D, L, E = c.hidden_size, c.num_hidden_layers, c.head_dim
    return {
        "embedding": c.vocab_size * D,
        "attention": L * 2 * D * E * (c.num_attention_heads + c.num_key_value_heads),
        "mlp": L * 3 * D * c.intermediate_size,
        "norms": (2 * L + 1) * D,
        "head": 0 if c.tie_word_embeddings else c.vocab_size * D,
    }


class Adapters(NamedTuple):
    """LoRA's: their rank, and the names of the matrices of a block that have some."""

    rank: int
    targets: tuple[str, ...]

    def among(self, *names: str) -> int:
        """Return how many of the matrices named have adapters."""
        return sum(name in self.targets for name in names)


def adapters(t: Training) -> Adapters | None:
    """Return the adapters that the settings ask for; None if all weights are trained."""
    return Adapters(t.lora_rank, tuple(t.lora_targets.split(","))) if t.lora_rank else None


def matrices(c: MistralConfig) -> dict[str, tuple[int, int]]:
    """Return the widths in and out of a block's matrices."""
    D, F, q, kv = (
        c.hidden_size,
        c.intermediate_size,
        *(n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads)),
    )
    return {
        "q_proj": (D, q),
        "k_proj": (D, kv),
        "v_proj": (D, kv),
        "o_proj": (q, D),
        "gate_proj": (D, F),
        "up_proj": (D, F),
        "down_proj": (F, D),
    }


def trained(c: MistralConfig, a: Adapters | None) -> int:
    """Return the number of parameters that a block's adapters have, A [r, in] and B [out, r]."""
    return a.rank * sum(sum(matrices(c)[name]) for name in a.targets) if a else 0


def units(c: MistralConfig) -> tuple[int, int]:
    """Return the number of parameters of the two kinds of FSDP unit: of a block, and of embedding,
    final norm and head."""
    parts = parameters(c)
    root = parts["embedding"] + c.hidden_size + parts["head"]
    return (sum(parts.values()) - root) // c.num_hidden_layers, root


def forward(c: MistralConfig, load: Load, a: Adapters | None = None) -> dict[str, float]:
    """Return the FLOPs of one forward, by part. The head sees only the places that predict."""
    D, L, E = c.hidden_size, c.num_hidden_layers, c.head_dim
    H, K = c.num_attention_heads, c.num_key_value_heads
    return {
        "projections": 4.0 * D * E * (H + K) * L * load.tokens,
        "mlp": 6.0 * D * c.intermediate_size * L * load.tokens,
        "attention": 4.0 * L * H * E * load.attended,
        "head": 2.0 * c.vocab_size * D * load.predicted,
        "adapters": 2.0 * trained(c, a) * L * load.tokens,
    }


def model_flops(
    c: MistralConfig, tokens: float, predicted: float, attended: float, a: Adapters | None = None
) -> float:
    """Return the FLOPs of forward and backward: three times the forward's, but beside adapters
    twice those of the frozen matrices, which have no gradient of their own.

    `predicted` counts the places that the head runs on, `attended` the visible (query, key) pairs
    of one layer. Recomputation, the reference pass and padding are not counted, as MFU is about
    useful work. Nor are the scores that flash attention's backward computes again.
    """
    parts = forward(c, Load(tokens, tokens, predicted, attended), a)
    frozen = parts["projections"] + parts["mlp"] + parts["head"] if a else 0
    return 3 * sum(parts.values()) - frozen


def recomputed(c: MistralConfig, load: Load, recompute: str, a: Adapters | None = None) -> float:
    """Return the FLOPs that a backward does again. With `full` that is a block's forward without
    its last matmul; with `elementwise`, of adapters, B a x but for the last."""
    parts = forward(c, load, a)
    b = 0.0
    if a:
        widths = matrices(c)
        each = {name: 2.0 * a.rank * widths[name][1] for name in a.targets}
        tokens = c.num_hidden_layers * load.tokens
        b = tokens * (sum(each.values()) - each.get("down_proj", 0))
        parts["adapters"] -= tokens * each.get("down_proj", 0)
    again = parts["projections"] + parts["mlp"] * 2 / 3 + parts["attention"] + parts["adapters"]
    return {"none": 0.0, "elementwise": b, "full": again}[recompute]


class Kept(NamedTuple):
    """The elements that a block saves for its backward."""

    token: int  # for each token, in the precision of the run
    key: int  # for each gathered key, likewise
    token_fp32: int  # for each token, fp32 whatever the precision


def kept(c: MistralConfig, recompute: str, split: bool = False, a: Adapters | None = None) -> Kept:
    """Return what a block saves; a compiled one saves no more. (x is a block's input, h a norm's
    output, y the hidden states between attention and MLP.) With `split` masters SwiGLU's product is
    never saved: see `kernels.swiglu_linear`. A frozen matrix does not need its input, adapters do,
    and what is between A and B."""
    D, F, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    q, kv = H * c.head_dim, c.num_key_value_heads * c.head_dim
    norms, product, thin = 2, not split, 0
    if a:
        norms = (a.among("q_proj", "k_proj", "v_proj") > 0) + (a.among("gate_proj", "up_proj") > 0)
        product, thin = "down_proj" in a.targets, a.rank * len(a.targets)
    return {
        # x h q o, k v; y h, gate up product; norms' scales and attention's lse
        "none": Kept((2 + norms) * D + 2 * q + (2 + product) * F + thin, 2 * kv, H + 2),
        # x q k v o as they leave the matmuls and attention; o_proj's output, gate up
        "elementwise": Kept(2 * D + 2 * q + 2 * kv + 2 * F + thin, 0, H),
        "full": Kept(D, 0, 0),
    }[recompute]


def activations(
    c: MistralConfig,
    load: Load,
    recompute: str,
    itemsize: int,
    split: bool = False,
    a: Adapters | None = None,
) -> float:
    """Return the bytes that a micro-batch's forward leaves for its backward, without the head's G
    and the batch itself. itemsize is 2 for bf16, 4 for fp32."""
    k, L, (T, G, N, _) = kept(c, recompute, split, a), c.num_hidden_layers, load
    numbers = L * (k.token * T + k.key * G)
    fp32 = L * k.token_fp32 * T
    # cos and sin; the final norm's input and output, its scales and the head's lse
    numbers += c.head_dim * T + 2 * c.hidden_size * N
    return itemsize * numbers + 4 * (fp32 + 2 * N)


def block_backward(
    c: MistralConfig, load: Load, recompute: str, itemsize: int, a: Adapters | None = None
) -> float:
    """Return the bytes that the backward of one block needs at its peak: what it computes again;
    five gradients of activations, two of the MLP's width and three of the model's; and one weight's
    gradient, held twice: in the run's precision, and in fp32 while it is added to the others. Of
    adapters there is what is between A and B, in both. If down_proj is frozen, no product is freed
    as SwiGLU's gradients are made, which are another of the MLP's width."""
    whole, some = (kept(c, x, a=a) for x in ("none", recompute))
    again = Kept(*(x - y for x, y in zip(whole, some, strict=True)))
    numbers = again.token * load.tokens + again.key * load.gathered
    numbers += (2 * c.intermediate_size + 3 * c.hidden_size) * load.tokens
    weight = c.intermediate_size * (a.rank if a else c.hidden_size)
    fp32 = again.token_fp32 * load.tokens + weight
    if a:
        numbers += (a.rank + c.intermediate_size * (not a.among("down_proj"))) * load.tokens
        fp32 += 2 * a.rank * load.tokens
    return itemsize * (numbers + weight) + 4 * fp32


def head_kept(c: MistralConfig, load: Load, itemsize: int, workspace: int = WORKSPACE) -> float:
    """Return the bytes of G_NV, which the head keeps where it fits: see
    `kernels.fused_logprob.keeps`."""
    size = load.predicted * c.vocab_size * itemsize
    return size if size <= workspace * 7 // 8 else 0


def head(
    c: MistralConfig,
    load: Load,
    itemsize: int,
    workspace: int = WORKSPACE,
    a: Adapters | None = None,
) -> float:
    """Return the bytes that the head's forward and backward need at their peak: G and a chunk of
    fp32 logits; dh and the fp32 sum it grows in; dw, unless it is frozen, held once more in fp32
    while it is added to the gradients."""
    N, V, D = load.predicted, c.vocab_size, c.hidden_size
    logits = N * V * itemsize + min(N, CHUNK) * V * 4
    return min(workspace, logits) + (4 + itemsize) * (N + (0 if a else V)) * D


def state(
    c: MistralConfig,
    shards: int,
    adam_state: str = "fp32",
    a: Adapters | None = None,
    itemsize: int = 2,
) -> dict[str, int]:
    """Return the bytes of a rank that last from step to step: masters, gradients and moments; with
    adapters theirs, and the frozen weights. A split master takes the same 4 bytes a weight as an
    fp32 one, as its bf16 half is the weight that computes."""
    whole = -(-sum(parameters(c).values()) // shards)
    share = -(-c.num_hidden_layers * trained(c, a) // shards) if a else whole
    moments = {"fp32": 8, "bf16": 4}[adam_state]
    frozen = {"frozen weights": itemsize * whole} if a else {}
    return frozen | {"masters": 4 * share, "gradients": 4 * share, "moments": moments * share}


def plain(ranks: int, precision: str, masters: str, a: Adapters | None = None) -> bool:
    """Return True if the model is a plain module, without FSDP; the same rule as in
    `fsdp.build`."""
    return ranks == 1 and (precision == "fp32" or masters == "split" or a is not None)


def cast(c: MistralConfig, recompute: str, itemsize: int, a: Adapters | None) -> int:
    """Return the bytes of a plain module's adapters in bf16: of all from their forward to their
    backward, or, where a block is computed again, of that block's."""
    blocks = c.num_hidden_layers if recompute == "none" else 1
    return 2 * blocks * trained(c, a) if itemsize == 2 else 0


def sharding(
    c: MistralConfig, shards: int, itemsize: int, reshard: bool, a: Adapters | None = None
) -> dict[str, int]:
    """Return the bytes of a rank for what FSDP gathers, and for gradients before they are
    scattered.

    FSDP keeps the embedding, the final norm and the head gathered all the time. It keeps one block
    gathered at a time, or two if there are several ranks, as the next one is prefetched; without
    `reshard` every block stays gathered. A block's gradients are whole at first: in the dtype of
    its weights, and once more in fp32 as reduce-scatter takes them, which gives this rank a shard.
    The head's gradient is whole while it waits for the embedding's. Frozen weights have none.
    """
    (block, root), thin = units(c), trained(c, a)
    apart, blocks = shards > 1, c.num_hidden_layers
    gathered = root + (min(1 + apart, blocks) if reshard else blocks) * (block + thin)
    graded = thin if a else block
    buffers = (itemsize + 4) * (graded + apart * graded // shards)
    buffers += 0 if a else itemsize * c.vocab_size * c.hidden_size
    return {"gathered weights": itemsize * gathered, "gradient buffers": buffers}


def traffic(
    c: MistralConfig,
    shards: int,
    replicas: int,
    itemsize: int,
    reshard: bool,
    a: Adapters | None = None,
) -> dict[str, float]:
    """Return the bytes that a rank sends, and receives, for one micro-batch, by collective. Blocks
    are gathered again for the backward if they were resharded; gradients, of adapters theirs alone,
    are fp32."""
    (block, root), thin = units(c), trained(c, a)
    blocks = c.num_hidden_layers * (block + thin)
    graded = c.num_hidden_layers * thin if a else root + blocks
    others = (shards - 1) / shards
    return {
        "all-gather, forward": itemsize * (root + blocks) * others,
        "all-gather, backward": itemsize * blocks * others * reshard,
        "reduce-scatter": 4 * graded * others,
        "all-reduce, replicas": 2 * 4 * graded / shards * (replicas - 1) / replicas,
    }
