"""The best of N answers by the model's own implicit reward, r = β log(π(y|x) / π_ref(y|x)).

This is what DPO spares its users: sampling N times and keeping what a reward model likes best
(best-of-N, rejection sampling). Which of the answers is best does not depend on β > 0, so rewards
are in nats here, as if β were 1.

P pairs  N answers
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from zephyr import generate
from zephyr.endpoint import Answer, Failure, Request
from zephyr.evals import pairs
from zephyr.evals.converse import Said
from zephyr.model import Mistral
from zephyr.packing import Pair
from zephyr.source import Folder

PACK = 8192  # tokens at a time


class Responses(list[Pair]):
    """Pairs of responses to one prompt, which stand in a pack with the prompt once."""

    def pair(self, k: int) -> Pair:
        return self[k]

    def pair_lengths(self) -> np.ndarray:
        return np.array([sum(map(len, pair)) - 2 for pair in self])


class Kept(NamedTuple):
    reward: float
    length: int  # characters


class BestOf:
    """Picks the best of `count` answers by the model of a folder, against that of `reference`.

    `best` is what is known of the answers that were picked, `all` of those they were picked from.
    Raises ValueError if `reference` is no model's folder, or has another tokenizer.
    """

    def __init__(self, policy: Folder, reference: str, count: int):
        pairs.check_tokenizers(policy.path, reference)
        self.policy, self.path, self.count = policy, reference, count
        self.best: list[Kept] = []
        self.all: list[Kept] = []
        self.greedy = 0

    @cached_property
    def reference(self) -> Mistral:
        return generate.load(self.path)[0]

    def answers(
        self, requests: Sequence[Request], ask: Callable[[list[Request]], Said]
    ) -> list[Answer | Failure]:
        """Return the best answer to each request, of `count` with seeds of their own; the first of
        equals. A request at temperature 0 has but one answer."""
        found = ask([sample for request in requests for sample in samples(request, self.count)])
        groups = [found[k : k + self.count] for k in range(0, len(found), self.count)]
        answered = [[a for a in group if isinstance(a, Answer)] for group in groups]
        rewards = self.rewards(requests, [[a.text for a in answers] for answers in answered])
        picked = []
        for group, answers, reward_N in zip(groups, answered, rewards, strict=True):
            both = [Kept(r, len(a.text)) for r, a in zip(reward_N.tolist(), answers, strict=True)]
            k = int(reward_N.argmax()) if answers else 0
            picked.append(answers[k] if answers else group[0])
            self.best += both[k : k + 1]
            self.all += both
        self.greedy += sum(not request.parameters["temperature"] for request in requests)
        return picked

    def rewards(
        self, requests: Sequence[Request], texts: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """Return log π(y|x) - log π_ref(y|x), in nats, of each of the answers to each request. y is
        the answer with the EOS behind it, whether the answer was cut off or not."""
        model, tokenizer = self.policy.loaded
        system = self.policy.empty_system
        packed, places = Responses(), []
        for request, answers in zip(requests, texts, strict=True):
            messages = list(request.messages)
            begin = len(tokenizer.prompt(messages, system))
            distinct = list(dict.fromkeys(answers))
            own = {text: (len(packed) + k // 2, k % 2) for k, text in enumerate(distinct)}
            places.append([own[text] for text in answers])
            ids = [
                np.array(tokenizer.render([*messages, said(text)], system).ids) for text in distinct
            ]
            # an answer that is left over stands beside itself
            for one, other in zip(ids[::2], ids[1::2] + ids[-1:] * (len(ids) % 2), strict=True):
                packed.append(Pair(one[:begin], one[begin:], other[begin:]))
        if not packed:
            return [np.zeros(0) for _ in places]
        ours_P2, theirs_P2 = (
            pairs.sums_P2(m, packed, PACK, "rewards") for m in (model, self.reference)
        )
        ratio_P2 = ours_P2 - theirs_P2
        return [np.array([ratio_P2[place] for place in those]) for those in places]

    def report(self) -> list[str]:
        """Return lines that say what picking has gained."""
        (best, length), (mean, usual) = (np.mean(those, 0) for those in (self.best, self.all))
        lines = [
            f"best of {self.count}: log π/π_ref is {best:.2f} nats in the mean, of all "
            f"{len(self.all):,} answers {mean:.2f}; times β it is the reward",
            f"they have {length:.0f} characters in the mean, all answers {usual:.0f}",
        ]
        if self.greedy:
            lines.append(
                f"{self.greedy} of {len(self.best)} turns were asked at temperature 0, where all "
                f"answers are one; --temperature T samples them"
            )
        return lines


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def samples(request: Request, count: int) -> list[Request]:
    """Return the request with `count` seeds: of seed 0 they are 0, 1 .., of seed 1 the next ones. A
    greedy one is the same whatever its seed."""
    p = request.parameters
    if not p["temperature"]:
        return [request] * count
    return [Request(request.messages, p | {"seed": p["seed"] * count + k}) for k in range(count)]
