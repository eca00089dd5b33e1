"""Signs of life: real processes that show them, and then no more."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llmstream.replicas import process as process_module
from llmstream.replicas.process import NotStarted, ReplicaProcess
from tests.waiting import wait_until

SILENCE_S = 0.4
BEATING = """
import sys, time
for _ in range({beats}):
    print('{{"type": "Alive"}}', flush=True)
    time.sleep(0.05)
time.sleep(60)
"""


@asynccontextmanager
async def beating(beats: int) -> AsyncIterator[ReplicaProcess]:
    """A process that shows so many signs of life, twenty a second."""
    command = (sys.executable, "-c", BEATING.format(beats=beats))
    process = ReplicaProcess(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE))
    try:
        yield process
    finally:
        await process.kill()


async def test_only_a_process_without_signs_of_life_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    """One that beats outlives the deadline many times over, also while its supervisor sleeps; one that stops is
    killed when the deadline has passed."""
    async with beating(1000) as lively, beating(4) as hanging:
        watches = [asyncio.create_task(process.watch(SILENCE_S)) for process in (lively, hanging)]
        await wait_until(watches[1].done)
        assert hanging.ended() == "was ended by SIGKILL"
        assert f"Replica process {hanging.pid} showed no life for {SILENCE_S:g} s." in caplog.text
        time.sleep(SILENCE_S * 2)  # noqa: ASYNC251 (this process hangs, not the other)
        await asyncio.sleep(SILENCE_S)
        assert not watches[0].done()
        watches[0].cancel()


async def test_a_process_that_hangs_while_it_starts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a process to be ready ends when it shows no life."""
    monkeypatch.setattr(process_module, "START_SILENCE_S", 0.2)
    async with beating(0) as process:
        with pytest.raises(NotStarted, match="showed no life"):
            await process.ready()
