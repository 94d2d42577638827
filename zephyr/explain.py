"""One pair, end to end: from its line of JSON to the gradient of its loss and its line of metrics.

    python -m zephyr.explain        the first pair of the invented village

The reference is a small model of random weights, the policy the same model after one update on this
pair. Everything is in float64, so that each machine prints the same digits.

T tokens of the pack  N predicting places  2P responses, here the chosen and the rejected
"""

import contextlib
import copy
import json
import sys

import numpy as np
import torch
from torch import Tensor

from zephyr import losses
from zephyr.model import Mistral
from zephyr.packing import Batch, Pair, pack_pairs
from zephyr.run import exits
from zephyr.tokenizer import Tokenizer
from zephyr.toy import birds
from zephyr.weights import config_json, hub

BETA = 0.1
RATE = 1e-3  # of the one update
SIDES = ("chosen", "rejected")


def tokens(row: dict, tokenizer: Tokenizer) -> Pair:
    """Return the ids of a pair's prompt, which ends in the assistant's header, and of its two
    responses, each with its EOS."""
    prompt = tokenizer.prompt(row["chosen"][:-1])
    chosen, rejected = (tokenizer.render(row[side]).ids[len(prompt) :] for side in SIDES)
    return Pair(*map(np.array, (prompt, chosen, rejected)))


def step(model: Mistral, batch: Batch, reference_2P: Tensor) -> dict[str, Tensor]:
    """Return what `losses.preference` says of the pair, with the log-probs [N] that it is of and
    the gradient [N] of the loss with respect to them."""
    logprob_N = model(batch).detach().requires_grad_()
    found = losses.preference("dpo", logprob_N, batch.response_N, reference_2P, BETA)
    found["loss"].sum().backward()
    return found | {"logprob_N": logprob_N.detach(), "gradient_N": logprob_N.grad}


def sums(logprob_N: Tensor, batch: Batch) -> Tensor:
    """Return the summed log-probs of the responses [2P]."""
    return logprob_N.new_zeros(2).index_add_(0, batch.response_N, logprob_N)


def update(model: Mistral, batch: Batch, reference_2P: Tensor) -> Mistral:
    """Return a copy of the model after one step of AdamW on the pair's loss."""
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    loss = losses.preference("dpo", policy(batch), batch.response_N, reference_2P, BETA)["loss"]
    loss.sum().backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return policy


def packed(batch: Batch, piece) -> str:
    """Return the pack as a table, a line for each place: what stands there, at which position, and
    which token of which response it predicts."""
    wanted: dict[int, list[str]] = {}
    for place, target, response in zip(
        *(x.tolist() for x in (batch.predict_N, batch.targets_N, batch.response_N)), strict=True
    ):
        wanted.setdefault(place, []).append(f"{SIDES[response]} {piece(target)}")
    lines = ["place  position  token           predicts"]
    places = zip(batch.tokens_T.tolist(), batch.layout.position_T.tolist(), strict=True)
    for place, (token, position) in enumerate(places):
        if place == batch.layout.cu_seqlens_q[1]:
            lines.append("-- the rejected branch: it sees the prompt, and not the chosen response")
        line = f"{place:5}  {position:8}  {piece(token):14}  {', '.join(wanted.get(place, []))}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # which tells of the village, if it is new
        birds.ensure_pairs()
    base = birds.FOLDER / "base"
    row, tokenizer = birds.rows(birds.FOLDER / "pairs.train.jsonl.gz")[0], Tokenizer(base)
    model = Mistral(config_json.read(base))
    hub.initialise(model, seed=0)
    model.double()

    def piece(i: int) -> str:
        return repr(tokenizer.sp.id_to_piece(i).replace("\u2581", " "))

    print("1. A line of the data, and the conversation that is encoded")
    print(json.dumps({side: row[side] for side in SIDES}, indent=1))
    pair = tokens(row, tokenizer)
    for name, ids in zip(Pair._fields, pair, strict=True):
        text = "".join(map(tokenizer.sp.id_to_piece, ids.tolist())).replace("\u2581", " ")
        print(f"\n2. The {name}, {len(ids)} tokens\n{text!r}\n{' '.join(map(str, ids))}")

    batch = pack_pairs([pair], [0])
    # a response's last token predicts nothing, so it is no input
    apart = sum(len(pair.prompt) + len(response) - 1 for response in pair[1:])
    print(f"\n3. The pack: {len(batch.tokens_T)} tokens, where two sequences would be {apart}")
    print(packed(batch, piece))

    with torch.no_grad():
        reference_N = model(batch)
    reference_2P = sums(reference_N, batch)
    before = step(model, batch, reference_2P)
    print("\n4. Before the first update the policy is the reference")
    print(f"loss {before['loss'].item():.6f} = ln 2, margin {before['rewards/margins'].item():g}")

    policy = update(model, batch, reference_2P)
    after = step(policy, batch, reference_2P)
    print("\n5. After one update: log-probs in nats, and d loss / d log-prob of each token")
    print("response  token               policy  reference   gradient")
    for k, target in enumerate(batch.targets_N.tolist()):
        numbers = (x[k].item() for x in (after["logprob_N"], reference_N, after["gradient_N"]))
        side = SIDES[int(batch.response_N[k])]
        print(f"{side:8}  {piece(target):16}" + "".join(f"{x:11.4f}" for x in numbers))

    policy_2P = sums(after["logprob_N"], batch)
    ratios = [(p - r).item() for p, r in zip(policy_2P, reference_2P, strict=True)]
    h = ratios[0] - ratios[1]
    print("\n6. Summed over each response")
    for side, p, r, ratio in zip(SIDES, policy_2P, reference_2P, ratios, strict=True):
        print(f"log π({side}) = {p:.4f}, log π_ref = {r:.4f}, log-ratio {ratio:+.4f}")
    print(f"h = {ratios[0]:+.4f} - ({ratios[1]:+.4f}) = {h:+.4f}, margin βh = {BETA * h:+.4f}")
    print(f"loss = -log σ({BETA * h:.4f}) = {after['loss'].item():.4f}")
    weight = torch.sigmoid(torch.tensor(-BETA * h)).item()
    print(
        f"gradient: -β σ(-βh) = -{BETA} x {weight:.4f} = {-BETA * weight:.4f} for each token of "
        "the chosen response, and with + for the rejected one's"
    )

    print("\n7. The line of metrics.jsonl")
    print(json.dumps({name: round(after[name].item(), 4) for name in losses.METRICS}))


if __name__ == "__main__":
    exits.call(main)
