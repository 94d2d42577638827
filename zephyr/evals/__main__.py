"""Evaluate a model.

python -m zephyr.evals pairs MODEL --reference REF --data PAIRS     by its implicit reward
"""

import argparse
import sys
from collections.abc import Sequence

from zephyr.run import exits


def main(argv: Sequence[str] | None = None) -> None:
    from zephyr.evals import pairs

    parser = argparse.ArgumentParser(
        "python -m zephyr.evals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("pairs", help=pairs.__doc__.partition("\n")[0])
    pairs.add_arguments(command)
    command.set_defaults(run=pairs.run)
    args = parser.parse_args(argv)
    try:
        print(args.run(args))
    except ValueError as error:
        print(f"evals: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    exits.call(main)
