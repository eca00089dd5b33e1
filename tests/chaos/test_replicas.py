"""Real processes on one store, real signals, many streams: nothing lost, nothing said twice, everything ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.cases import plan
from tests.chaos.row import HEAD
from tests.chaos.table import Table

SEED = 0


@pytest.mark.timeout(300)
async def test_nothing_is_lost_whatever_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every answer equals the undisturbed one and its log, token by token, and every job ends as it should, through
    each trouble of the table. SmolLM2 goes on in another process behind its last logged token, and what a client has
    of its answer stays as it is."""
    table = Table(seed=SEED, say=lambda line: None)
    # Cases mostly wait for leases, so fleets beside each other take little longer than one.
    async with asyncio.TaskGroup() as group:
        group.create_task(table.echo(tmp_path / "echo"))
        group.create_task(table.providers(tmp_path / "providers"))
        group.create_task(table.smollm2(tmp_path / "smollm2"))
    with capsys.disabled():
        print("", f"seed {SEED}", HEAD, *table.rows, sep="\n")  # noqa: T201
    assert all(row.clean for row in table.rows)


def test_a_seed_decides_who_is_killed_and_when() -> None:
    """The same seed kills the same replicas in the same order."""
    assert plan(7, 20, 3) == plan(7, 20, 3)
    assert plan(7, 20, 3) != plan(8, 20, 3)
