"""A job on so many GPUs of a kind: bytes, seconds, what would make it fit. No torch."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from zephyr import config
from zephyr.architecture import MistralConfig
from zephyr.config import Training
from zephyr.plan import costs
from zephyr.plan.costs import Adapters, Card, Load
from zephyr.plan.fit import GIB, again, choose, occupied, reshard

NETWORK = 0.8  # of a link's rate is what collectives reach
LATENCY = 5e-6  # seconds of a message: a ring of n sends n - 1 in turn, a tree log n twice
LARGEST = 4096  # GPUs that a verdict tries


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on a number of GPUs. An item is a pair, or a chunk of documents. Methods after
    `settled` are for a settled job."""

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
    def adapters(self) -> Adapters | None:
        return costs.adapters(self.t)

    @property
    def share(self) -> float:
        """Return how many tokens of a step a rank gets."""
        return self.t.batch * self.item.tokens / self.ranks

    @property
    def useful(self) -> float:
        """Return the FLOPs of an item, forward and backward."""
        return costs.model_flops(self.c, self.item.tokens, *self.item[2:], self.adapters)

    def settled(self) -> "Job":
        """Return the job with values for what is auto. The longest possible pair has two responses
        of full length."""
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

    def microbatch(self) -> float:
        """Return the tokens of a micro-batch."""
        return min(self.t.microbatch_tokens, max(self.share, self.item.tokens))

    def microbatches(self) -> int:
        """Return the number of micro-batches of a step, on each rank."""
        return max(1, int(-(-self.share // self.t.microbatch_tokens)))

    def parts(self) -> dict[str, float]:
        """Return the bytes that each part of the job (masters, gradients, activations, ...) takes
        on a GPU."""
        load = self.item.times(self.microbatch() / self.item.tokens)
        anew = self.t.reshard == "always"
        return occupied(self.c, self.t, self.ranks, load, self.t.recompute, anew)

    def left(self) -> float:
        """Return the bytes of a GPU that are left; below 0 if the job does not fit."""
        return self.memory - sum(self.parts().values())

    def traffic(self) -> dict[str, tuple[float, float]]:
        """Return (bytes, seconds) of a step's collectives.

        In a group of several nodes each byte enters a node once, through all its adapters.
        Replicas, if there are any, are on different nodes.
        """
        card, replicas, shards = self.card, self.t.replicas, self.ranks // self.t.replicas
        within = min(card.link, card.network * self.gpus) if shards > self.gpus else card.link
        across = card.network if self.nodes > 1 else card.link
        n, units = self.microbatches(), self.c.num_hidden_layers + 1
        anew = self.t.reshard == "always"
        sent = costs.traffic(self.c, shards, replicas, self.itemsize, anew, self.adapters)
        found = {}
        for name, size in sent.items():
            tree = "replicas" in name
            turns = 2 * (replicas - 1).bit_length() if tree else shards - 1
            seconds = size / (NETWORK * (across if tree else within))
            found[name] = n * size, n * (seconds + (size > 0) * units * turns * LATENCY)
        return found

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a step: of its computation, of its communication, of a forward with
        what it waits for, and of all.

        While a block computes, the next is gathered, the last one's gradients are scattered, and
        those before it are added up over the replicas, on links of their own.
        """
        items, rate = self.t.batch / self.ranks, self.card.flops * self.efficiency
        forward = sum(costs.forward(self.c, self.item, self.adapters).values()) * items / rate
        more = again(self.c, self.item, self.t.recompute, self.adapters)
        backward = (1 + more) * self.useful * items / rate - forward
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
    """Return the first flags with which a job fits, found by trying: one change, several, then the
    same on more GPUs; "" if nothing helps. Changes of speed come before changes of rounding."""
    t = job.t
    splits = job.ranks == 1 and t.precision != "fp32" and not t.lora_rank
    changes: list[dict[str, str]] = [
        {"masters": "split"} if splits else {},
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
    """Return the job with other settings on other GPUs, settled; None if it does not fit."""
    if gpus * nodes > 1:
        change = {"masters": "fp32"} | {k: v for k, v in change.items() if k != "masters"}
    job = replace(job, gpus=gpus, nodes=nodes, t=replace(job.t, **change)).settled()
    return job if job.left() >= 0 else None


def _sizes(job: Job) -> Iterator[tuple[int, int]]:
    """Yield (GPUs of a node, nodes): as they are, then doubled, first within a node up to 8."""
    gpus, nodes = job.gpus, job.nodes
    while gpus * nodes <= min(LARGEST, job.t.batch):
        yield gpus, nodes
        gpus, nodes = (2 * gpus, nodes) if gpus <= 4 and nodes == 1 else (gpus, 2 * nodes)
