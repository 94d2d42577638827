"""Bytes per GPU and hours per run, before renting one. No torch.

    python -m zephyr.plan zephyr-7b-dpo --gpu h200
    python -m zephyr.plan zephyr-7b-dpo --gpu a100 --gpus 8 --nodes 8 --replicas 8

Every flag of train_dpo.py or train_sft.py besides --help counts too: --recompute, --batch, ...
What is computed is in zephyr/costs.py, with the GPUs' data sheets; what is assumed are the
efficiency, lengths of usual data, and the constants on top of zephyr/plan.py.
"""

import argparse
import bisect
import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from zephyr import config, costs, disk, exits, folders, huggingface
from zephyr.config import DPOConfig, SFTConfig, Training
from zephyr.costs import CARDS, Card, Load
from zephyr.files import home
from zephyr.huggingface import MistralConfig

GIB = 2**30
CONTEXT = 1.0 * GIB  # CUDA's context, and what cuBLAS and NCCL hold
FRAGMENTS = 0.04  # of all tensors: what an allocator whose segments grow holds and cannot use
GRAIN = 128  # a budget is a multiple of this many tokens: a matmul's tile
POLICIES = ("none", "elementwise", "full")
ELEMENTWISE = 0.015  # of a step's time: what norms, rotations and products anew take
FIXED = 256  # tokens' worth of time that a micro-batch takes besides: gradients are read and added
NETWORK = 0.8  # of a link's rate is what collectives reach
LATENCY = 5e-6  # seconds of a message: a ring of n sends n - 1 in turn, a tree log n twice
LARGEST = 4096  # GPUs that a verdict tries

MODELS = {
    "mistral-7b": MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=4096,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
    ),
    "llama-2-70b": MistralConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        model_type="llama",
    ),
}
GPUS = {name.removeprefix("RTX ").lower().replace(" ", "-"): name for name in CARDS}
FLAGS = (
    ("model", str, "mistral-7b", f"{', '.join(MODELS)}, or a folder or its config.json"),
    ("gpu", str, "h100", ", ".join(GPUS)),
    ("gpus", int, 1, "in a node"),
    ("nodes", int, 1, "of as many GPUs each"),
    ("efficiency", float, 0.5, "share of the peak that a step's FLOPs run at"),
    ("intra-bandwidth", float, None, "GB/s from a GPU to its node's others, in one direction"),
    ("inter-bandwidth", float, None, "GB/s to other nodes, a GPU's share"),
    ("pairs", int, 61_135, "in the data, for DPO"),
    ("rows", int, 139_520, "of --max-length tokens in the data, for SFT"),
    ("prompt", int, 170, "tokens of a pair's prompt, on average"),
    ("chosen", int, 320, "of its chosen response"),
    ("rejected", int, 290, "of its rejected response"),
)


def occupied(
    c: MistralConfig, t: Training, ranks: int, load: Load, recompute: str, reshard: bool
) -> dict[str, float]:
    """Bytes of one GPU by part, at the peak of a micro-batch of `load`."""
    # --precision auto is bf16 on every card there is a plan for
    itemsize, shards = 2 if t.precision != "fp32" else 4, ranks // t.replicas
    parts: dict[str, float] = {**costs.state(c, shards, t.adam_state)}
    fsdp = (
        {}
        if costs.plain(ranks, t.precision, t.masters)
        else costs.sharding(c, shards, itemsize, reshard)
    )
    parts |= fsdp
    if getattr(t, "reference", "") == "live":
        parts["live reference"] = parts["masters"] + fsdp.get("gathered weights", 0)
    parts["activations"] = costs.activations(c, load, recompute, itemsize)
    block = costs.block_backward(c, load, recompute, itemsize)
    parts["head, or a block's backward"] = max(costs.head(c, load, itemsize), block)
    parts["context and fragments"] = CONTEXT + FRAGMENTS * sum(parts.values())
    return parts


def largest(
    c: MistralConfig,
    t: Training,
    memory: float,
    ranks: int,
    recompute: str,
    reshard: bool,
    row: Load,
    most: float,
) -> int:
    """The most tokens, up to about `most`, whose micro-batch fits `memory` bytes; `row` is the load
    of a token. 0 if none fits."""

    def size(grains: int) -> float:
        load = row.times(grains * GRAIN)
        return sum(occupied(c, t, ranks, load, recompute, reshard).values())

    grains = range(-int(-most // GRAIN) + 1)
    return GRAIN * max(0, bisect.bisect_right(grains, memory, key=size) - 1)


def choose(
    c: MistralConfig, t: Training, memory: float, ranks: int, longest: int, step: float
) -> tuple[int, str]:
    """(microbatch_tokens, recompute): of `t`, or chosen where it says auto.

    `memory` is what a GPU has in all, in bytes; `longest` the tokens of the longest pair or row;
    `step` those of an optimizer step, over all ranks. For each way to recompute the largest budget
    that fits is found, up to the one with which a rank's share of a step surely is one micro-batch;
    of these the fastest is taken, see `slowness`. If nothing fits, it is the smallest there is. A
    pair is taken as the dearest of its length: all prompt, and every row predicts.
    """
    row, share = Load(1, 1 + (t.table == "dpo"), 1, 0), step / ranks
    most, auto = share + longest, t.microbatch_tokens == "auto"
    least = longest if auto else min(t.microbatch_tokens, most)
    policies = POLICIES if t.recompute == "auto" else (t.recompute,)
    fit = []
    for recompute in policies:
        room = largest(c, t, memory, ranks, recompute, t.reshard != "never", row, most)
        if room >= least:
            fit.append((room if auto else t.microbatch_tokens, recompute))
    smallest = (longest if auto else t.microbatch_tokens, policies[-1])
    return min(fit, key=lambda x: slowness(c, share, *x), default=smallest)


def slowness(c: MistralConfig, share: float, budget: int, recompute: str) -> float:
    """Time of a token, in units of the least there could be."""
    return (1 + again(c, Load(1, 1, 1, 0), recompute)) * (1 + FIXED * -(-share // budget) / share)


def again(c: MistralConfig, load: Load, recompute: str) -> float:
    """Time of what is computed again, as a share of forward and backward."""
    useful = costs.model_flops(c, load.tokens, load.predicted, load.attended)
    more = costs.recomputed(c, load, recompute) / useful
    return ELEMENTWISE if recompute == "elementwise" else more


def reshard(
    c: MistralConfig, t: Training, memory: float, ranks: int, tokens: int, recompute: str
) -> bool:
    """Whether FSDP frees a block's weights between its forward and its backward: as `t` says, and
    if that is auto, unless all gathered weights fit beside micro-batches of `tokens`."""
    if t.reshard != "auto":
        return t.reshard == "always"
    load = Load(1, 1 + (t.table == "dpo"), 1, 0).times(tokens)
    return sum(occupied(c, t, ranks, load, recompute, False).values()) > memory


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on a number of GPUs; an item is a pair, or a row of documents. Methods after `settled`
    are a settled job's."""

    c: MistralConfig
    t: Training
    card: Card
    gpus: int  # of a node
    nodes: int
    items: int  # of an epoch
    item: Load
    efficiency: float  # share of the card's peak that a step's FLOPs run at

    def __post_init__(self) -> None:
        if self.t.batch < self.ranks:
            raise ValueError(
                f"--batch {self.t.batch} is less than the {self.ranks} GPUs; each needs a share"
            )
        if self.ranks % self.t.replicas:
            raise ValueError(f"--replicas {self.t.replicas} does not divide the {self.ranks} GPUs")
        if self.t.masters == "split" and self.ranks > 1:
            raise ValueError(f"--masters split is for one GPU, not {self.ranks}; leave it out")

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def memory(self) -> float:
        return self.card.gib * GIB

    @property
    def itemsize(self) -> int:
        return 2 if self.t.precision != "fp32" else 4

    @property
    def share(self) -> float:
        """Tokens of a step that a rank gets."""
        return self.t.batch * self.item.tokens / self.ranks

    @property
    def useful(self) -> float:
        """FLOPs of an item, forward and backward."""
        return costs.model_flops(self.c, self.item.tokens, *self.item[2:])

    def settled(self) -> "Job":
        """With values for what is auto. The longest pair there may be has two full responses."""
        t, longest = self.t, self.t.max_length * (1 + (self.t.table == "dpo"))
        step = self.share * self.ranks
        tokens, recompute = choose(self.c, t, self.memory, self.ranks, longest, step)
        anew = reshard(self.c, t, self.memory, self.ranks, tokens, recompute)
        return replace(
            self,
            t=replace(
                t,
                microbatch_tokens=tokens,
                recompute=recompute,
                reshard="always" if anew else "never",
            ),
        )

    def rows(self) -> float:
        """Tokens of a micro-batch."""
        return min(self.t.microbatch_tokens, max(self.share, self.item.tokens))

    def microbatches(self) -> int:
        """Of a step, on each rank."""
        return max(1, int(-(-self.share // self.t.microbatch_tokens)))

    def parts(self) -> dict[str, float]:
        """Bytes of a GPU."""
        load = self.item.times(self.rows() / self.item.tokens)
        anew = self.t.reshard == "always"
        return occupied(self.c, self.t, self.ranks, load, self.t.recompute, anew)

    def left(self) -> float:
        """Bytes of a GPU that are left, below 0 if the job does not fit."""
        return self.memory - sum(self.parts().values())

    def traffic(self) -> dict[str, tuple[float, float]]:
        """(bytes, seconds) of a step's collectives. In a group of several nodes each byte enters a
        node once, through all its adapters; replicas are on different nodes, if there are any."""
        card, replicas, shards = self.card, self.t.replicas, self.ranks // self.t.replicas
        within = min(card.link, card.network * self.gpus) if shards > self.gpus else card.link
        across = card.network if self.nodes > 1 else card.link
        n, units = self.microbatches(), self.c.num_hidden_layers + 1
        sent = costs.traffic(self.c, shards, replicas, self.itemsize, self.t.reshard == "always")
        found = {}
        for name, size in sent.items():
            tree = "replicas" in name
            turns = 2 * (replicas - 1).bit_length() if tree else shards - 1
            seconds = size / (NETWORK * (across if tree else within))
            found[name] = n * size, n * (seconds + (size > 0) * units * turns * LATENCY)
        return found

    def seconds(self) -> dict[str, float]:
        """Of a step: its computation, its communication, a forward with what that waits for, and
        all. While a block computes, the next is gathered, the last one's gradients are scattered,
        and those before it are added up over the replicas, on links of their own."""
        load, rate = self.item.times(self.t.batch / self.ranks), self.card.flops * self.efficiency
        forward = sum(costs.forward(self.c, load).values()) / rate
        backward = (2 + 3 * again(self.c, load, self.t.recompute)) * forward
        gather, anew, scatter, between = (s for _, s in self.traffic().values())
        block, root = costs.units(self.c)
        # nothing is computed while the first unit is gathered and the last is scattered
        ends = (block + root) / (root + self.c.num_hidden_layers * block) / self.microbatches()
        ahead = max(forward, gather)
        step = ahead + max(backward, anew + scatter, between) + ends * (gather + scatter)
        step += ahead * (getattr(self.t, "reference", "") == "live")
        return {
            "compute": forward + backward,
            "communication": gather + anew + scatter + between,
            "forward": ahead,
            "step": step,
        }


def remedy(job: Job) -> str:
    """The first flags with which a job fits, by trying: one change, several, then the same on more
    GPUs; "" if nothing helps. Changes of speed come before changes of rounding."""
    t = job.t
    changes: list[dict[str, str]] = [
        {"masters": "split"} if job.ranks == 1 and t.precision != "fp32" else {},
        {"recompute": "elementwise"} if t.recompute == "none" else {},
        {"microbatch_tokens": "auto"},
        {"recompute": "full"} if t.recompute != "auto" else {},
        {"adam_state": "bf16"},
    ]
    changes = [x for x in changes if any(getattr(t, name) != v for name, v in x.items())]
    for gpus, nodes in _sizes(job):
        for change in ({}, *changes, *accumulate(changes, operator.or_)):
            if not _changed(job, gpus, nodes, change):
                continue
            for name in list(change):  # of several, what the later ones made needless
                fewer = {k: v for k, v in change.items() if k != name}
                change = fewer if _changed(job, gpus, nodes, fewer) else change
            found = _changed(job, gpus, nodes, change).t
            flags = [f"{config.flag(name)} {getattr(found, name)}" for name in change]
            flags.insert(0, f"--gpus {gpus}" * (gpus > job.gpus))
            flags.insert(1, f"--nodes {nodes}" * (nodes > job.nodes))
            return " ".join(filter(None, flags))
    return ""


def _changed(job: Job, gpus: int, nodes: int, change: dict[str, str]) -> Job | None:
    """The job with other settings on other GPUs, settled; None if it does not fit."""
    if gpus * nodes > 1:
        change = {"masters": "fp32"} | {k: v for k, v in change.items() if k != "masters"}
    job = replace(job, gpus=gpus, nodes=nodes, t=replace(job.t, **change)).settled()
    return job if job.left() >= 0 else None


def _sizes(job: Job) -> Iterator[tuple[int, int]]:
    """(GPUs of a node, nodes): as it is, then doubled, first in the node up to 8."""
    gpus, nodes = job.gpus, job.nodes
    while gpus * nodes <= min(LARGEST, job.t.batch):
        yield gpus, nodes
        gpus, nodes = (2 * gpus, nodes) if gpus <= 4 and nodes == 1 else (gpus, 2 * nodes)


def report(job: Job) -> str:
    """The page that the command prints."""
    settled = job.settled()
    left = settled.left() / GIB
    if left >= 0:
        verdict = f"fits, with {left:.1f} GiB to spare"
    else:
        cure = remedy(job)
        cure = f"enough would be {cure}" if cure else "no flag and no number of GPUs is enough"
        verdict = f"does not fit, by {-left:.1f} GiB; {cure}"
    sent = [_sent(settled)] if job.ranks > 1 else []
    sections = [_memory(settled), _policies(settled), _flop(settled), *sent, _hours(settled)]
    return "\n\n".join([*sections, verdict])


def _memory(job: Job) -> str:
    t, parts = job.t, job.parts()
    notes = {
        "masters": "fp32" if t.masters == "fp32" else "bf16 weights, and the other 16 bits",
        "gradients": "fp32",
        "moments": f"AdamW's, {t.adam_state}",
        "gathered weights": f"reshard {t.reshard}",
        "gradient buffers": "before reduce-scatter",
        "activations": f"{job.rows():,.0f} tokens, recompute {t.recompute}",
        "context and fragments": f"assumed: 1 GiB, and {FRAGMENTS:.0%} of the rest",
    }
    rows = [(name, f"{x / GIB:.2f}", notes.get(name, "")) for name, x in parts.items()]
    rows.append(("in all", f"{sum(parts.values()) / GIB:.2f}", f"of {job.card.gib}"))
    return _table(("GiB of a GPU", "", ""), rows, left=(0, 2))


def _policies(job: Job) -> str:
    rows, one = [], job.item.times(1 / job.item.tokens)
    for recompute in POLICIES:
        size = costs.activations(job.c, one.times(1000), recompute, job.itemsize) / GIB
        most = largest(job.c, job.t, job.memory, job.ranks, recompute, True, one, 1 << 20)
        shown = f"{most:,}" if most >= job.item.tokens else "none fits"
        more = again(job.c, job.item, recompute)
        rows.append((recompute, f"{size:.2f}", shown, f"{more:.1%}"))
    return _table(("recompute", "GiB per 1,000 tokens", "largest micro-batch", "more time"), rows)


def _flop(job: Job) -> str:
    parts, t = costs.forward(job.c, job.item), job.t
    flop = {
        "blocks' matmuls": 3 * (parts["projections"] + parts["mlp"]),
        "attention": 3 * parts["attention"],
        "head": 3 * parts["head"],
        "forward and backward": job.useful,
        "recomputed": costs.recomputed(job.c, job.item, t.recompute),
    }
    if t.table == "dpo":
        once = "reference, each epoch" if t.reference == "live" else "reference, once"
        flop[once] = sum(parts.values())
    rows = [(name, f"{x / 1e12:.2f}", f"{x * job.items / 1e18:.3f}") for name, x in flop.items()]
    return _table(("FLOP", f"T per {'pair' if t.table == 'dpo' else 'row'}", "E per epoch"), rows)


def _sent(job: Job) -> str:
    rows = [(name, f"{x / 1e9:.2f}", f"{s:.3f}") for name, (x, s) in job.traffic().items() if x]
    times = job.seconds()
    bare = (
        times["step"]
        - times["compute"]
        - times["forward"] * (getattr(job.t, "reference", "") == "live")
    )
    hidden = min(1.0, max(0.0, 1 - bare / times["communication"]))
    rows += [("compute", "", f"{times['compute']:.3f}"), ("hidden behind it", "", f"{hidden:.0%}")]
    kind = f"HSDP, {job.t.replicas} replicas" if job.t.replicas > 1 else "FSDP"
    return _table((f"communication of a GPU and step, {kind}", "GB", "seconds"), rows)


def _hours(job: Job) -> str:
    t, times, n = job.t, job.seconds(), job.microbatches()
    steps = -(-job.items // t.batch)
    passes = {"an epoch": steps * times["step"]}
    if t.table == "dpo" and t.reference == "cached":
        passes["the reference pass"] = steps * times["forward"]
    passes["the run"] = sum(passes.values()) + (t.epochs - 1) * passes["an epoch"]
    rows = [(name, f"{s / 3600:.3f}", f"{s / 3600 * job.ranks:.2f}") for name, s in passes.items()]
    count = f"a step of {t.batch}, {n} micro-batch{'es' * (n > 1)} a GPU"
    rows.insert(0, (count, f"{times['step']:.2f} s", ""))
    peak = f"{job.efficiency:.0%} of {job.card.flops / 1e12:,.0f} TFLOP/s"
    ours = "assumed" if t.precision != "fp32" else "bf16's, which fp32 is far from"
    return _table((f"time at {peak}, {ours}", "hours", "GPU-hours"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> str:
    """Aligned columns under a head, the first indented; those not in `left` to the right."""
    lines = [head, *((f"  {name}", *rest) for name, *rest in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(
            f"{x:<{w}}" if i in left else f"{x:>{w}}"
            for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def architecture(name: str) -> MistralConfig:
    """Of a name in MODELS, a folder with a config.json, or the path of one."""
    if name in MODELS:
        return MODELS[name]
    path = Path(home(name))
    path = folders.config_file(path) if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"--model {name}: no such folder or file; known are {', '.join(MODELS)}")
    return huggingface.parse(disk.read_json(path), path)


def settings(argv: list[str]) -> tuple[Training, str]:
    """The config of a recipe and flags, for the stage that they fit: DPO if both."""
    errors = []
    for stage in (DPOConfig, SFTConfig):
        try:
            return config.parse(stage, argv)
        except ValueError as error:
            errors.append(error)
    raise next((e for e in errors if "has no [" not in str(e)), errors[0])


def parse(argv: list[str] | None) -> tuple[Job, str]:
    """The job that the command line describes, and what it is, in two lines."""
    parser = argparse.ArgumentParser(
        "python -m zephyr.plan",
        "%(prog)s [RECIPE] [--gpu GPU] [--flag value]...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for flag, kind, default, text in FLAGS:
        shown = text if default is None else f"{text} [{default}]"
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar="X", help=shown)
    try:
        args, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    for name, value in vars(args).items():
        if type(value) in (int, float) and not 0 < value < 1e9:
            raise ValueError(f"{config.flag(name)} {value} must be above 0 and below 1e9")
    if args.efficiency > 1:
        raise ValueError(f"--efficiency {args.efficiency} is a share of the peak, at most 1")
    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu} is unknown; there are {', '.join(GPUS)}")
    c, card = architecture(args.model), CARDS[GPUS[args.gpu]]
    t, recipe = settings([*rest, "--model", args.model, "--data", "-", "--out", "-"])
    card = card._replace(
        link=(args.intra_bandwidth or card.link / 1e9) * 1e9,
        network=(args.inter_bandwidth or card.network / 1e9) * 1e9,
    )
    items, item, what = _data(args, c, t)
    job = Job(
        c=c,
        t=t,
        card=card,
        gpus=args.gpus,
        nodes=args.nodes,
        items=items,
        item=item,
        efficiency=args.efficiency,
    )
    size = f"{sum(costs.parameters(c).values()):,} parameters"
    where = f"{args.gpus} x {args.gpu}" + f" on each of {args.nodes} nodes" * (args.nodes > 1)
    return job, f"{recipe or 'the defaults'}, {args.model}, {size}, {where}\n{items:,} {what}"


def _data(args: argparse.Namespace, c: MistralConfig, t: Training) -> tuple[int, Load, str]:
    """An epoch's items, one of them, and what they are in words."""
    if t.table == "sft":
        row = costs.document(t.max_length, c.sliding_window)
        return args.rows, row, f"rows of {row.tokens:,} tokens, each counted as one document"
    prompt = min(args.prompt, t.max_prompt_length)
    room = t.max_length - prompt
    lengths = prompt, min(args.chosen, room), min(args.rejected, room)
    pair = costs.pair(*lengths, c.sliding_window)
    what = "pairs of {} + {} + {} tokens: ".format(*lengths)
    what += f"{pair.tokens:,} rows, the prompt's once, and {pair.predicted:,} predictions"
    return args.pairs, pair, what


def main(argv: list[str] | None = None) -> None:
    try:
        job, title = parse(argv)
        print(f"{title}\n\n{report(job)}")
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    exits.call(main)
