"""Draw runs, each a line in every panel:   python -m zephyr.metrics RUN... [--out PNG]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from zephyr.files import home
from zephyr.metrics.log import read
from zephyr.metrics.plots import draw
from zephyr.run import exits


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m zephyr.metrics", description="draw runs")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", metavar="PNG", help="default: RUN/metrics.png")
    args = parser.parse_args(argv)
    try:
        runs = [Path(home(run)) for run in args.runs]
        out = Path(home(args.out)) if args.out else runs[0] / "metrics.png"
        names = [run.resolve().name for run in runs]
        labels = names if len(set(names)) == len(names) else map(str, runs)
        draw(dict(zip(labels, map(read, runs), strict=True)), out)
    except ValueError as error:
        print(f"metrics: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))
    print(out)


if __name__ == "__main__":
    exits.call(main)
