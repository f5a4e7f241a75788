"""`python -m tests.simulation`: one seed again, or one after another; exit code 1 at the first that fails."""

import argparse
import itertools
import shutil
import sys
import tempfile
from pathlib import Path

import uvloop

from tests.simulation.plan import LONG, SHORT
from tests.simulation.run import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default: 1)")
    parser.add_argument(
        "--count", type=int, default=1, help="how many seeds, one after another; 0: without end"
    )
    parser.add_argument("--long", action="store_true", help="the size of `make soak`")
    parser.add_argument(
        "--keep", action="store_true", help="keep the folder (stores, logs, engines' records) at the end"
    )
    args = parser.parse_args()
    seeds = itertools.count(args.seed) if args.count == 0 else range(args.seed, args.seed + args.count)
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix=f"poolgate-simulation-{seed}-"))
        try:
            uvloop.run(simulate(seed, LONG if args.long else SHORT, folder))
        except AssertionError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            if args.keep:
                print(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
