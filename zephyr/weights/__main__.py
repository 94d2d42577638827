"""Make a Hugging Face folder of a run's checkpoint, of a LoRA adapter and its base, or of a model
in Mistral's own layout.

python -m zephyr.weights SOURCE TARGET
"""

import argparse
import sys
from pathlib import Path

from zephyr import files
from zephyr.run import checkpoint, exits
from zephyr.weights import hub, locate, mistral


def main(arguments: list[str] | None = None) -> None:

    parser = argparse.ArgumentParser(
        prog="python -m zephyr.weights",
        description="Make a Hugging Face folder of a run's checkpoint, of a LoRA adapter and its "
        "base, or of a model in Mistral's own layout.",
    )
    parser.add_argument(
        "source",
        help="RUN/checkpoints/step-..., RUN/adapter, or a folder with params.json and "
        "consolidated*.safetensors",
    )
    parser.add_argument("target", help="the Hugging Face folder to make")
    parser.add_argument(
        "--base",
        help="for a checkpoint: the folder its run started from, if that is no longer where it "
        "was; for an adapter: the folder of its base, likewise",
    )
    options = parser.parse_args(arguments)
    try:
        source, target = Path(files.home(options.source)), files.home(options.target)
        base = options.base and files.home(options.base)
        if (source / checkpoint.SUMS).exists():
            checkpoint.export(source, target, base)
        elif (source / locate.ADAPTER).exists():
            hub.merge(locate.parts(source, base), target)
        else:
            mistral.convert(source, target)
    except ValueError as error:
        print(f"weights: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    exits.call(main)
