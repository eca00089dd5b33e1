"""``python -m tests.simulation [--seed S] [--count N]``: runs schedules and prints what did not hold."""

from __future__ import annotations

import argparse
import sys

from tests.simulation.schedules import run_schedules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--count", type=int, default=1)
    given = parser.parse_args()
    total = run_schedules(given.seed, given.count)
    sys.stdout.write(f"{total}\n")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
