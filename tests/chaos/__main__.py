"""``python -m tests.chaos [--kills 200] [--seed 7]``: the long form of the table, with default settings."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.chaos.row import HEAD, total
from tests.chaos.table import Table

TAKEOVER_S = 3.0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _run(table: Table) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        await table.echo(folder / "echo", jobs=24)
        await table.providers(folder / "providers", jobs=24)
        await table.smollm2(folder / "smollm2", jobs=6, rounds=5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="replica processes killed in front of the echo model")
    parser.add_argument("--seed", type=int, default=0, help="decides who is struck, and when")
    given = parser.parse_args()
    _say(f"seed {given.seed}\n{HEAD}")
    table = Table(seed=given.seed, kills=given.kills, longest=150, outage_s=10, say=_say)
    asyncio.run(_run(table))
    killed = total(table.rows)
    _say("\n".join(["", f"seed {given.seed}", HEAD, *map(str, table.rows), str(killed)]))
    slow = killed.percentile(0.99) or 0.0
    return 0 if all(row.clean for row in table.rows) and slow <= TAKEOVER_S else 1


if __name__ == "__main__":
    sys.exit(main())
