"""The load test that users copy runs, and would notice wrong answers."""

from __future__ import annotations

import asyncio
import csv
import os
import shutil
from pathlib import Path

import pytest

from llmstream.server import Server
from tests.conftest import echo_settings

FILE = Path(__file__).parent.parent / "examples" / "locustfile.py"
LOCUST = shutil.which("locust")


@pytest.mark.skipif(LOCUST is None, reason="locust is not installed: pip install locust")
@pytest.mark.parametrize(("model", "status"), [("echo", 0), ("nobody", 1)])
async def test_it_runs(tmp_path: Path, model: str, status: int) -> None:
    """Every kind of request succeeds, and those to a model that is not there count as failures."""
    async with Server(echo_settings(tmp_path)) as server:
        process = await asyncio.create_subprocess_exec(
            *(LOCUST or "", "-f", str(FILE), "--host", server.url, "--headless", "--only-summary"),
            *("-u", "8", "-r", "8", "-t", "2s", "--csv", str(tmp_path / "out")),
            env={**os.environ, "LOADTEST_MODEL": model},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert await process.wait() == status
    rows = list(csv.DictReader((tmp_path / "out_stats.csv").open()))
    failures = {row["Name"]: int(row["Failure Count"]) for row in rows}
    streams = {"/v1/chat/completions", "/v1/chat/completions (stream)"}
    assert failures.keys() >= {"/question", "/health", *streams}
    assert failures["/question"] == failures["/health"] == 0
    assert all((failures[name] > 0) == (status == 1) for name in streams)
    assert ("first token" in failures) == (status == 0)
