"""``python -m tests.chaos [--kills 200] [--seed S]``: the long form of the table, with default settings."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.chaos.cases import HEAD, Row, cases, many_kills, under_load
from tests.chaos.fleet import open_fleet
from tests.conftest import assert_every_key_expires


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _run(kills: int, seed: int, readers: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        async with open_fleet(Path(folder), seed) as fleet:
            for name, trouble in cases(outage_s=10).items():
                rows.append(await under_load(fleet, name, trouble, jobs=24, length=200))
                _say(str(rows[-1]))
            rows.append(await many_kills(fleet, kills, readers, _say))
            async with fleet.inside() as store:
                await assert_every_key_expires(store)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="decides who is killed, and when")
    parser.add_argument("--readers", type=int, default=16, help="answers that are read at the same time")
    given = parser.parse_args()
    _say(f"seed {given.seed}\n{HEAD}")
    rows = asyncio.run(_run(given.kills, given.seed, given.readers))
    _say("\n".join([HEAD, *map(str, rows)]))
    return 0 if all(row.clean for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
