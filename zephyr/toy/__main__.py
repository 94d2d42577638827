"""Make the village's files in a folder, or let its judge answer at an endpoint.

python -m zephyr.toy FOLDER [--seed N]
python -m zephyr.toy serve [--port N]
"""

import argparse
import sys
from pathlib import Path

from zephyr import files
from zephyr.run import exits
from zephyr.toy import serve


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:
        return serve.main(argv[1:])
    from zephyr.toy.birds import build, summary  # they need torch, which the judge starts without

    parser = argparse.ArgumentParser(
        prog="zephyr.toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
