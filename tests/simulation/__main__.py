"""``python -m tests.simulation``: runs schedules and prints what did not hold, or takes out guards to see it fail."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.mutations import LIMIT, MUTATIONS
from tests.simulation.schedules import run_schedules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--count", type=int, help=f"how many schedules; 1, or at most {LIMIT} with --mutate")
    parser.add_argument(
        "--mutate", metavar="GUARD", choices=["all", *MUTATIONS], help="take out a guard, or each in turn"
    )
    given = parser.parse_args()
    if given.mutate:
        return mutate(list(MUTATIONS) if given.mutate == "all" else [given.mutate], given.count or LIMIT)
    total = run_schedules(given.seed, given.count or 1)
    sys.stdout.write(f"{total}\n")
    return 1 if total.failed else 0


def mutate(guards: list[str], limit: int) -> int:
    """Prints a row for each guard; 1 when the absence of one goes unnoticed."""
    unnoticed = 0
    for guard in guards:
        start = time.process_time()
        outcome = MUTATIONS[guard].first_fault(limit)
        seconds = time.process_time() - start
        unnoticed += outcome is None
        found = f"seed {outcome.seed}: {outcome.faults[0]}" if outcome else "nobody notices"
        sys.stdout.write(f"| {guard} | {seconds:.1f} s | {found[:90]} |\n")
        sys.stdout.flush()
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
