"""Implicit-reward accuracy: which of two responses a model prefers, without a judge.

The implicit reward of a response is r = β log(π(y|x) / π_ref(y|x)) (arXiv:2305.18290, Section 4).
A model ranks a pair rightly if its reward of chosen is above that of rejected. A run logs that
share as `rewards/accuracies`. Longer responses are chosen more often, so a model that has learned
nothing but length has a good share too: of the pairs whose chosen is longer it ranks most rightly,
of the others few. So the share is shown for each.

P pairs
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from zephyr import config, files, generate, reference
from zephyr.data import arrays, readers
from zephyr.data.arrays import Tokens
from zephyr.data.batching import PairSteps, epoch
from zephyr.model import Mistral
from zephyr.packing import Pair
from zephyr.weights import base

COLUMNS = ("source", "score_chosen", "score_rejected")
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Ranked:
    """Held-out pairs and how a model ranks them."""

    margin_P: np.ndarray  # log-ratio of chosen less that of rejected, in nats; times β the reward's
    tokens_P2: np.ndarray  # of chosen and of rejected
    source_P: list[str | None]
    gap_P: np.ndarray  # score of chosen less that of rejected; NaN where a line has no scores


def interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `right` in `count`, after Wilson (1927):

    (p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

    It lies within 0 and 1 for few pairs too: 9 of 10 give 0.60 to 0.98.
    """
    p, n = right / count, count
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


def groups(ranked: Ranked) -> dict[str, np.ndarray]:
    """Return which of the pairs are in each group, by its title."""
    chosen_P, rejected_P = ranked.tokens_P2.T
    found = {
        "all": np.ones(len(chosen_P), bool),
        "chosen is longer": chosen_P > rejected_P,
        "chosen is shorter": chosen_P < rejected_P,
        "equally long": chosen_P == rejected_P,
    }
    scored_P = np.isfinite(ranked.gap_P)
    if scored_P.any():
        low, high = np.quantile(ranked.gap_P[scored_P], [1 / 3, 2 / 3])
        found[f"score gap up to {low:g}"] = ranked.gap_P <= low
        found[f"score gap above {low:g}, up to {high:g}"] = (low < ranked.gap_P) & (
            ranked.gap_P <= high
        )
        found[f"score gap above {high:g}"] = ranked.gap_P > high
    sources = np.array([source or "" for source in ranked.source_P])
    for source in sorted(set(sources) - {""}):
        found[f"source {source}"] = sources == source
    return {title: members for title, members in found.items() if members.any()}


def summary(ranked: Ranked) -> dict[str, dict]:
    """Return pairs, accuracy, its 95 % interval and mean margin of each group. A margin of exactly
    0 ranks nothing, so such a pair counts as wrong."""
    rows = {}
    for title, members in groups(ranked).items():
        margin = ranked.margin_P[members]
        right, count = int((margin > 0).sum()), len(margin)
        low, high = interval(right, count)
        rows[title] = {
            "pairs": count,
            "accuracy": right / count,
            "low": low,
            "high": high,
            "margin": float(margin.mean()),
        }
    return rows


def table(rows: dict[str, dict], beta: float) -> str:
    """Return the summary as text, and what to make of it."""
    names = [files.plain(title, 45) for title in rows]
    width = max(36, *map(len, names))
    lines = [f"{'':{width}}{'pairs':>7}{'right':>8}{'95 % interval':>19}{'margin':>10}"]
    for name, row in zip(names, rows.values(), strict=True):
        shares = f"{row['low']:.1%} to {row['high']:.1%}"
        margin = beta * row["margin"]
        lines.append(
            f"{name:{width}}{row['pairs']:>7,}{row['accuracy']:>8.1%}{shares:>19}{margin:>10.3f}"
        )
    longer, shorter = rows.get("chosen is longer"), rows.get("chosen is shorter")
    if longer and shorter and longer["low"] > 0.5 > shorter["high"]:
        lines.append("It prefers the longer response, whichever was chosen: it has learned length.")
    lines.append(f"Margins are those of rewards, at β = {beta:g}.")
    return "\n".join(lines)


class Data(Protocol):
    """What of `Tokens` is needed to pack pairs."""

    def __len__(self) -> int: ...
    def pair(self, k: int) -> Pair: ...
    def pair_lengths(self) -> np.ndarray: ...


def sums_P2(model: Mistral, data: Data, budget: int, title: str) -> np.ndarray:
    """Return the summed log-probs of every pair's chosen and rejected response under a model, in
    packs of `budget` tokens or, if a pair is longer, of as many as that has."""
    device = model.lm_head.weight.device
    budget = max(budget, int(data.pair_lengths().max()))
    plan = PairSteps(data, 64, budget, 0, 0, 1, shuffle=False)
    found, log_probs = np.zeros((len(data), 2)), reference.live(model)
    with tqdm(total=len(data), desc=title, delay=3, leave=False, disable=None) as bar:
        for batch in epoch(plan, device):
            found[batch.pairs.cpu()] = log_probs(batch).view(-1, 2).double().cpu().numpy()
            bar.update(len(batch.pairs))
    return found


def about(data: Tokens) -> list[tuple[str | None, float]]:
    """Return the source and the score gap of every pair, as its line has them; a line without has
    None and NaN."""
    found = {}
    for path in data.sources:
        for where, row in readers.read_rows(Path(path), columns=COLUMNS):
            source, *scores = (row.get(name) for name in COLUMNS)
            numbers = [x for x in scores if isinstance(x, int | float)]
            gap = float(numbers[0] - numbers[1]) if len(numbers) == 2 else math.nan
            found[where] = source if isinstance(source, str) else None, gap
    return [found[data.where(k)] for k in range(len(data))]


def check_tokenizers(model: str, against: str) -> None:
    """Raise ValueError unless the models of two folders have one tokenizer."""
    if base.open_folder(against).tokenizer.digest != base.open_folder(model).tokenizer.digest:
        raise ValueError(
            f"{against} has another tokenizer than {model}: log-probs of other tokens cannot be "
            "compared; give the model that training started from"
        )


def rank(model: str, against: str, c: config.DPOConfig) -> Ranked:
    """Rank the pairs of `c.data` by the model of a folder against that of another. Raises
    ValueError if a folder is no model's, if the two have not one tokenizer, or for bad data."""
    c, _, tokenizer, _ = base.look(c)
    check_tokenizers(model, against)
    data = arrays.preferences(c.data, tokenizer, c)
    ours_P2, theirs_P2 = (
        sums_P2(generate.load(folder)[0], data, c.microbatch_tokens, Path(folder).name)
        for folder in (model, against)
    )
    ratio_P2 = ours_P2 - theirs_P2
    pairs = [data.pair(k) for k in range(len(data))]
    sources, gaps = zip(*about(data), strict=True)
    return Ranked(
        margin_P=ratio_P2[:, 0] - ratio_P2[:, 1],
        tokens_P2=np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs]),
        source_P=list(sources),
        gap_P=np.array(gaps),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the folder of an aligned model, such as RUN/model")
    add("--reference", required=True, metavar="REF", help="the folder that its training began from")
    add("--data", required=True, nargs="+", metavar="PAIRS", help="held-out pairs")
    usual = config.DPOConfig.beta
    add("--beta", type=float, help=f"of the margins [that of the run, for RUN/model; else {usual}]")
    most = config.DPOConfig.max_length
    add("--max-length", type=int, help=f"of a pair [{most}, or the model's positions if fewer]")
    add("--max-prompt-length", type=int, help="of a prompt that is cut [half of --max-length]")
    add("--microbatch-tokens", type=int, default=8192, help="at a time [%(default)s]")
    add("--json", metavar="OUT", help="file for the figures")


def beta_of(model: str) -> float:
    """Return the β that a run's model was trained with; the usual one for another model."""
    try:
        settings = files.read_json(Path(model).parent / "run.json")["run"]["settings"]
        return float(settings["beta"])
    except (ValueError, KeyError, TypeError):
        return config.DPOConfig.beta


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    """Rank the pairs that the command line names, and return the table."""
    model, against = files.home(args.model), files.home(args.reference)
    positions = base.open_folder(model).shape.max_position_embeddings
    length = args.max_length or min(config.DPOConfig.max_length, positions)
    c = config.DPOConfig(
        model=model,
        data=tuple(files.home(path) for path in args.data),
        out="-",
        beta=beta_of(model) if args.beta is None else args.beta,
        max_length=length,
        max_prompt_length=args.max_prompt_length or length // 2,
        microbatch_tokens=args.microbatch_tokens,
    )
    c.check()
    json_out = args.json and files.home(args.json)
    files.check_outputs(readers.expand(c.data), {"--json": json_out})
    rows = summary(rank(model, against, c))
    if json_out:
        with files.atomic(json_out) as file:
            file.write(json.dumps(rows, indent=1).encode() + b"\n")
    return table(rows, c.beta)
