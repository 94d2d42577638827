"""Make the village's files in a folder:   python -m zephyr.toy FOLDER [--seed N]"""

import argparse
import sys
from pathlib import Path

from zephyr import files
from zephyr.run import exits
from zephyr.toy.birds import build, summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="zephyr.toy", description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        folder = Path(files.home(options.folder))
        build(folder, options.seed)
    except ValueError as error:
        print(f"zephyr.toy: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 2))
    print(summary(folder))


if __name__ == "__main__":
    exits.call(main)
