"""Bytes per GPU and hours per run, before renting one. No torch.

    python -m zephyr.plan zephyr-7b-dpo --gpu h200
    python -m zephyr.plan zephyr-7b-dpo --gpu a100 --gpus 8 --nodes 8 --replicas 8

Every flag of train_dpo.py or train_sft.py besides --help counts too: --recompute, --batch, ...
What is computed is in zephyr/plan/costs.py, with the GPUs' data sheets; what is assumed are the
efficiency, lengths of usual data, and the constants on top of zephyr/plan/fit.py.
"""

import argparse
import sys
from pathlib import Path

from zephyr import config, files
from zephyr.architecture import MistralConfig
from zephyr.config import DPOConfig, SFTConfig, Training
from zephyr.files import home
from zephyr.plan import costs
from zephyr.plan.costs import CARDS, Load
from zephyr.plan.job import Job
from zephyr.plan.page import report
from zephyr.run import exits
from zephyr.weights import config_json, locate

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
    ("chunks", int, 139_520, "of --max-length tokens in the data, for SFT"),
    ("prompt", int, 170, "tokens of a pair's prompt, on average"),
    ("chosen", int, 320, "of its chosen response"),
    ("rejected", int, 290, "of its rejected response"),
)


def architecture(name: str) -> MistralConfig:
    """Return the architecture that a name stands for: one of MODELS, a folder with a config.json,
    or the path of a config.json."""
    if name in MODELS:
        return MODELS[name]
    path = Path(home(name))
    path = locate.config_file(path) if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"--model {name}: no such folder or file; known are {', '.join(MODELS)}")
    return config_json.parse(files.read_json(path), path)


def settings(argv: list[str]) -> tuple[Training, str]:
    """Return the config that a recipe and flags make, for the stage that they fit; DPO if they fit
    both."""
    errors = []
    for stage in (DPOConfig, SFTConfig):
        try:
            return config.parse(stage, argv)
        except ValueError as error:
            errors.append(error)
    raise next((e for e in errors if "has no [" not in str(e)), errors[0])


def parse(argv: list[str] | None) -> tuple[Job, str]:
    """Return the job that the command line describes, and a title of two lines."""
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
    if a := costs.adapters(t):
        size += f" and {c.num_hidden_layers * costs.trained(c, a):,} of adapters"
    where = f"{args.gpus} x {args.gpu}" + f" on each of {args.nodes} nodes" * (args.nodes > 1)
    return job, f"{recipe or 'the defaults'}, {args.model}, {size}, {where}\n{items:,} {what}"


def _data(args: argparse.Namespace, c: MistralConfig, t: Training) -> tuple[int, Load, str]:
    """Return the number of items in an epoch, the load of one of them, and what they are in
    words."""
    if t.table == "sft":
        row = costs.document(t.max_length, c.sliding_window)
        return args.chunks, row, f"chunks of {row.tokens:,} tokens, each counted as one document"
    prompt = min(args.prompt, t.max_prompt_length)
    room = t.max_length - prompt
    lengths = prompt, min(args.chosen, room), min(args.rejected, room)
    pair = costs.pair(*lengths, c.sliding_window)
    what = "pairs of {} + {} + {} tokens: ".format(*lengths)
    what += f"{pair.tokens:,} packed, the prompt's once, and {pair.predicted:,} predictions"
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
