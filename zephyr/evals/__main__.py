"""Evaluate a model, and the judge that does.

python -m zephyr.evals show FILE... [--alpaca-data DIR]         figures of a judge's annotations
python -m zephyr.evals answer mt-bench|alpaca MODEL ...         a model's answers, to be judged
python -m zephyr.evals judge mt-bench|alpaca ANSWERS --judge NAME@URL ...    what a judge says
python -m zephyr.evals pairs MODEL --reference REF --data PAIRS  accuracy of the implicit reward
"""

import importlib
import sys
from collections.abc import Sequence

from zephyr.client import interrupt
from zephyr.run import exits

COMMANDS = {
    "show": "the figures in files of annotations or judgments, and what they tell of the judge",
    "answer": "a model's answers to MT-Bench or AlpacaEval, in the files that are judged",
    "judge": "have a model judge answers to MT-Bench or AlpacaEval",
    "pairs": "which held-out pairs a model's implicit reward ranks rightly",
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = exits.Parser("python -m zephyr.evals", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about, allow_abbrev=False)
        if argv[:1] == [name]:  # `pairs` needs torch, and `show` should not wait for it
            module = importlib.import_module(f"zephyr.evals.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    try:
        args = parser.parse_args(argv)
        exits.refuse_empty(args, argv)
        interrupt.heed()
        print(args.run(args))
    except ValueError as error:
        print(f"evals: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    exits.call(main)
