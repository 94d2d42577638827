"""DPO as the paper writes it (arXiv:2305.18290), and nothing else: read this first.

    python -m zephyr.textbook        twenty steps on the invented village

There are two models: the policy, which is trained, and the reference, a frozen copy of what it was
at the start. Each pair takes four forward passes, one sequence at a time. train_dpo.py gives the
same numbers (tests/test_train.py), but fast, exact on many GPUs, and in a run that is hard to lose.

T tokens of a sequence  V vocabulary
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zephyr.attention import Layout
from zephyr.model import Mistral
from zephyr.run import exits
from zephyr.tokenizer import Tokenizer
from zephyr.toy import birds
from zephyr.weights import config_json, hub

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
NAMES = (*REWARDS, "logps/chosen", "logps/rejected")


def logprob(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """log π(response | prompt) in nats: the sum over the response of log π(token | all before)."""
    ids_T = torch.tensor(prompt + response)
    logprob_TV = model(ids_T).log_softmax(-1)
    # what the model says at a token is about the next one
    logprob_T = logprob_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)
    return logprob_T[len(prompt) - 1 :].sum()


def dpo(chosen: Tensor, rejected: Tensor, beta: float, lengths: tuple[int, int]) -> Tensor:
    """Eq. 7: -log σ(β log π(y_w|x)/π_ref(y_w|x) - β log π(y_l|x)/π_ref(y_l|x)), given the
    log-ratios of the chosen response y_w and of the rejected y_l: ln 2 while they are equal.
    (`lengths`, in tokens, is for other objectives.)"""
    return -F.logsigmoid(beta * chosen - beta * rejected)


def train(
    policy: nn.Module,
    batches: Iterable[list[tuple]],
    rates: Iterable[float],
    beta: float = 0.1,
    objective: Callable[[Tensor, Tensor, float, tuple[int, int]], Tensor] = dpo,
) -> Iterator[dict[str, float]]:
    """Train the policy, a module from ids [T] to logits [T, V], a step for each batch of pairs (the
    token ids of prompt, chosen, rejected) and learning rate; yields what each step saw."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    for batch, rate in zip(batches, rates, strict=True):
        losses, seen = [], []
        for prompt, *responses in batch:
            of_policy = [logprob(policy, prompt, response) for response in responses]
            of_reference = [logprob(reference, prompt, response) for response in responses]
            chosen, rejected = (p - r for p, r in zip(of_policy, of_reference, strict=True))
            losses.append(objective(chosen, rejected, beta, tuple(map(len, responses))))
            numbers = beta * chosen, beta * rejected, beta * (chosen - rejected), chosen > rejected
            seen.append([x.item() for x in (*numbers, *of_policy)])
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        means = dict(zip(NAMES, torch.tensor(seen).mean(0).tolist(), strict=True))
        yield {"loss": loss.item(), "grad_norm": norm.item()} | means


class Alone(Mistral):
    """This project's Mistral, called with the ids of one sequence; gives its logits."""

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.logits(ids_T, Layout.alone(len(ids_T)))


def main() -> None:
    base = birds.ensure() / "base"
    birds.ensure_pairs()
    model, tokenizer = Alone(config_json.read(base)), Tokenizer(base)
    hub.initialise(model, seed=0)
    pairs = []
    for row in birds.rows(birds.FOLDER / "pairs.train.jsonl.gz")[:160]:
        prompt = tokenizer.prompt(row["chosen"][:-1])
        sides = (tokenizer.render(row[side]).ids for side in ("chosen", "rejected"))
        pairs.append((prompt, *(ids[len(prompt) :] for ids in sides)))
    batches = [pairs[k : k + 8] for k in range(0, len(pairs), 8)]
    for step, row in enumerate(train(model, batches, [1e-3] * len(batches)), 1):
        line = "step {:2}  loss {:.4f}  rewards {:+.4f} {:+.4f}  margin {:+.4f}"
        print(line.format(step, row["loss"], *(row[name] for name in REWARDS[:3])))


if __name__ == "__main__":
    exits.call(main)
