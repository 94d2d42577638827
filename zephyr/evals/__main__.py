"""Evaluate a model, and the judge that does.

python -m zephyr.evals show FILE... [--alpaca-data DIR]     the figures in a judge's annotations
"""

import argparse
import sys
from collections.abc import Sequence

from zephyr.evals import show
from zephyr.run import exits


class Parser(argparse.ArgumentParser):
    """A parser for which a wrong flag is a user's mistake like any other: one line."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; --help shows what there is")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "python -m zephyr.evals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("show", help=show.__doc__.partition("\n")[0])
    show.add_arguments(command)
    command.set_defaults(run=show.run)
    try:
        args = parser.parse_args(argv)
        print(args.run(args))
    except ValueError as error:
        print(f"evals: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    exits.call(main)
