"""What `kernels.bench` measures: an op at a size, its inputs, its specification, its contenders.

N rows or tokens  D width  V vocabulary  R responses
T tokens of a pack  G gathered keys  H query heads  K key heads  E head width
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import reference
from kernels.bench import fused_forward, peers
from kernels.bench.peers import BETA, LENGTH, Contenders

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 512  # rows of which float64 logits exist at a time
PAIR = (170, 320, 290)  # tokens of UltraFeedback's prompts, chosen and rejected responses, about
HEADS_OF_7B, WINDOW = (32, 8, 128), 4096  # Mistral's: query heads, key heads, their width


@dataclass(frozen=True, kw_only=True)
class Case:
    op: str
    dtype: str
    N: int
    D: int | None = None
    V: int | None = None
    draw: Callable[[], list[Tensor]]  # random inputs
    leaves: int  # how many of the first inputs get a gradient
    outputs: int  # numbers in the output; a loss is one
    results: tuple[str, ...]  # what is compared with float64: the output, gradients of inputs
    exact: Callable  # kernels/reference.py's
    contenders: Contenders  # ours first
    flops: int | None = None  # of the forward, where matmuls bound the op; else bytes do

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} N {self.N}" + (f" D {self.D} V {self.V}" if self.V else "")


def linear_logprob(dtype: str, N: int, D: int, V: int, device: torch.device) -> Case:
    """Hidden states to log-probs, and back."""
    return Case(
        op="linear_logprob",
        dtype=dtype,
        N=N,
        D=D,
        V=V,
        flops=2 * N * D * V,
        leaves=2,
        outputs=N,
        draw=lambda: hidden(dtype, N, D, V, device),
        results=("logprob", "dh", "dw"),
        exact=reference.linear_logprob,
        contenders={"ours": kernels.linear_logprob}
        | peers.linear(device)
        | peers.compiled(peers.plain, device),
    )


def no_grad(dtype: str, N: int, D: int, V: int, device: torch.device) -> Case:
    """The same where no gradient is asked for: the reference's log-probs, evaluation."""
    ours = {"ours": kernels.linear_logprob} | candidate(device)
    return Case(
        op="no_grad",
        dtype=dtype,
        N=N,
        D=D,
        V=V,
        flops=2 * N * D * V,
        leaves=0,
        outputs=N,
        draw=lambda: [x.detach() for x in hidden(dtype, N, D, V, device)],
        results=("logprob",),
        exact=reference.linear_logprob,
        contenders=ours | peers.linear(device),
    )


def candidate(device: torch.device) -> Contenders:
    """The forward in one kernel, where there is one; it runs on a GPU only."""
    if device.type != "cuda":
        return {}
    return {"fused_forward": fused_forward.linear_logprob}


def linear_dpo(dtype: str, N: int, D: int, V: int, device: torch.device) -> Case:
    """Hidden states to the mean DPO loss, and back."""
    R = responses(N)

    def draw() -> list[Tensor]:
        return [*hidden(dtype, N, D, V, device), response_of(N, device)]

    def exact(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, response_N: Tensor) -> Tensor:
        blocks = zip(h_ND.split(BLOCK), targets_N.split(BLOCK), strict=True)
        logprob_N = torch.cat([reference.linear_logprob(h, w_VD, t) for h, t in blocks])
        zeros_R = logprob_N.new_zeros(R)
        return reference.dpo_loss(logprob_N, response_N, zeros_R, BETA, 0.0, "dpo").loss_P.mean()

    def ours(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, response_N: Tensor) -> Tensor:
        logprob_N = kernels.linear_logprob(h_ND, w_VD, targets_N)
        return kernels.dpo_loss(logprob_N, response_N, logprob_N.new_zeros(R), BETA).loss_P.mean()

    return Case(
        op="linear_dpo",
        dtype=dtype,
        N=N,
        D=D,
        V=V,
        flops=2 * N * D * V,
        leaves=2,
        outputs=1,
        draw=draw,
        results=("loss",),
        exact=exact,
        contenders={"ours": ours} | peers.linear_dpo(device, N, R),
    )


def dpo_loss(N: int, device: torch.device) -> Case:
    """Token log-probs to the loss of each pair, and back."""
    R = responses(N)

    def draw() -> list[Tensor]:
        logprob_N, response_N = -3 * torch.rand(N, device=device), response_of(N, device)
        reference_R = reference.response_sums(logprob_N, response_N, R)
        reference_R += torch.randn(R, device=device)
        return [logprob_N.requires_grad_(), response_N, reference_R]

    def exact(logprob_N: Tensor, response_N: Tensor, reference_R: Tensor) -> Tensor:
        return reference.dpo_loss(logprob_N, response_N, reference_R, BETA, 0.0, "dpo").loss_P

    def ours(logprob_N: Tensor, response_N: Tensor, reference_R: Tensor) -> Tensor:
        return kernels.dpo_loss(logprob_N, response_N, reference_R, BETA).loss_P

    others = {"plain": peers.plain_dpo} | peers.compiled(peers.plain_dpo, device)
    return Case(
        op="dpo_loss",
        dtype="fp32",
        N=N,
        leaves=1,
        outputs=R // 2,
        draw=draw,
        results=("loss", "dlogprob"),
        exact=exact,
        contenders={"ours": ours} | others,
    )


def response_sums(N: int, device: torch.device) -> Case:
    """Token log-probs to each response's, and back."""
    R = responses(N)

    def of(sums: Callable) -> Callable:
        return lambda logprob_N, response_N: sums(logprob_N, response_N, R)

    def draw() -> list[Tensor]:
        return [(-3 * torch.rand(N, device=device)).requires_grad_(), response_of(N, device)]

    return Case(
        op="response_sums",
        dtype="fp32",
        N=N,
        leaves=1,
        outputs=R,
        draw=draw,
        results=("sum", "dlogprob"),
        exact=of(reference.response_sums),
        contenders={"ours": of(kernels.response_sums), "plain": of(peers.plain_sums)},
    )


def attention(
    dtype: str,
    N: int,
    device: torch.device,
    lengths: tuple[int, int, int] = PAIR,
    heads: tuple[int, int, int] = HEADS_OF_7B,
) -> Case:
    """Attention over a pack of about N tokens, of pairs with these lengths of prompt, chosen and
    rejected response, and back."""
    (prompt, chosen, rejected), (H, K, E) = lengths, heads
    # a response's last token is no input; the branch sees the prompt's keys and its own
    document, branch = prompt + chosen - 1, rejected - 1
    T, G = document + branch, document + prompt + branch
    own = torch.arange(T)
    pair = (
        torch.tensor([0, document, T], dtype=torch.int32),
        torch.tensor([0, document, G], dtype=torch.int32),
        torch.cat([own[:document], own[:prompt], own[document:]]),
    )
    max_q, max_k = max(document, branch), max(document, prompt + branch)
    seen_TG, pairs = reference.seen_keys(*pair[:2], WINDOW), max(1, N // T)
    # the ends of pair n lie n pairs further on
    pack = [
        torch.cat([x[:skip], *(x[skip:] + n * step for n in range(pairs))]).to(device)
        for x, skip, step in zip(pair, (1, 1, 0), (T, G, T), strict=True)
    ]
    flops = 4 * H * E * int(seen_TG.sum()) * pairs
    *pair, seen_TG = (x.to(device) for x in (*pair, seen_TG))

    def draw() -> list[Tensor]:
        shapes = [(pairs * T, n, E) for n in (H, K, K)]
        return [torch.randn(x, device=device, dtype=DTYPES[dtype]).requires_grad_() for x in shapes]

    def by_pair(attend: Callable) -> Callable:
        def run(*qkv: Tensor) -> Tensor:
            parts = zip(*(x.split(T) for x in qkv), strict=True)
            return torch.cat([attend(*part) for part in parts]).flatten()

        return run

    def ours(*qkv: Tensor) -> Tensor:
        return kernels.attention(*qkv, *pack, max_q, WINDOW).flatten()

    return Case(
        op="attention",
        dtype=dtype,
        N=pairs * T,
        flops=flops,
        leaves=3,
        outputs=pairs * T * H * E,
        draw=draw,
        results=("o", "dq", "dk", "dv"),
        exact=by_pair(lambda *qkv: reference.attention(*qkv, *pair, WINDOW)),
        contenders={
            "ours": ours,
            "plain": by_pair(lambda *qkv: peers.plain_attention(*qkv, pair[2], seen_TG)),
        }
        | peers.attention(device, *pack, max_q, max_k, WINDOW),
    )


HEADS = {"linear_logprob": linear_logprob, "no_grad": no_grad, "linear_dpo": linear_dpo}
LOSSES = {"dpo_loss": dpo_loss, "response_sums": response_sums}


def hidden(dtype: str, N: int, D: int, V: int, device: torch.device) -> list[Tensor]:
    """h, w and targets; the logits are N(0, 4)."""
    h_ND = torch.randn(N, D, device=device, dtype=DTYPES[dtype])
    w_VD = torch.randn(V, D, device=device, dtype=DTYPES[dtype]).mul_(2 / D**0.5)
    targets_N = torch.randint(V, (N,), device=device)
    return [h_ND.requires_grad_(), w_VD.requires_grad_(), targets_N]


def responses(N: int) -> int:
    """How many responses N tokens are: of LENGTH tokens or, for fewer than two such, two."""
    return 2 * max(1, N // (2 * LENGTH))


def response_of(N: int, device: torch.device) -> Tensor:
    """Each token's response; their lengths differ by one at most."""
    return torch.arange(N, device=device) * responses(N) // N
