"""Real processes on one store, real signals, many streams: nothing lost, nothing said twice, everything ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.cases import HEAD, cases, under_load
from tests.chaos.fleet import open_fleet
from tests.conftest import assert_every_key_expires


@pytest.mark.timeout(300)
async def test_nothing_is_lost_whatever_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every answer equals the undisturbed one and its log, and every job ends, through each trouble of the table."""
    rows = []
    async with open_fleet(tmp_path, seed=0) as fleet:
        for name, trouble in cases(outage_s=1.0).items():
            rows.append(await under_load(fleet, name, trouble, jobs=20, length=100))
        async with fleet.inside() as store:
            await assert_every_key_expires(store)
    with capsys.disabled():
        print("", HEAD, *rows, sep="\n")  # noqa: T201
    assert all(row.clean for row in rows)
