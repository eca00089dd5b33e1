"""The place of one replica, with real processes that serve nothing."""

from __future__ import annotations

import asyncio
import socket
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest

from llmstream.replicas import slot as slot_module
from llmstream.replicas.process import NotStarted, ReplicaProcess
from llmstream.replicas.slot import Slot
from tests.waiting import wait_until

BACKOFF_S = 0.05


class Sleepers:
    """A crew whose processes only sleep; the next ``refusals`` of them do not start."""

    def __init__(self) -> None:
        self.refusals = 0
        self.launched: list[ReplicaProcess] = []
        self.asked_at: list[float] = []
        self.buried: list[ReplicaProcess] = []

    async def launch(self, sockets: list[socket.socket]) -> ReplicaProcess:
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.refusals:
            self.refusals -= 1
            raise NotStarted("refused")
        process = ReplicaProcess(await asyncio.create_subprocess_exec("sleep", "60", stdin=PIPE, stdout=PIPE))
        self.launched.append(process)
        return process

    async def retire(self, process: ReplicaProcess) -> None:
        await process.stop(5)
        await self.bury(process)

    async def bury(self, process: ReplicaProcess) -> None:
        self.buried.append(process)


@asynccontextmanager
async def kept() -> AsyncIterator[tuple[Slot, Sleepers]]:
    """A filled slot that replaces what dies in it."""
    crew = Sleepers()
    slot = Slot(crew, list, 60)
    await slot.fill()
    keeping = asyncio.create_task(slot.keep())
    try:
        yield slot, crew
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        for process in crew.launched:
            await process.kill()


async def test_a_dead_process_is_replaced_at_once_and_a_dying_one_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first death is followed by a start without a pause; each start that fails doubles the pause."""
    monkeypatch.setattr(slot_module, "BACKOFF_S", BACKOFF_S)
    async with kept() as (_, crew):
        crew.refusals = 3
        killed_at = asyncio.get_running_loop().time()
        await crew.launched[0].kill()
        await wait_until(lambda: len(crew.launched) == 2)
        assert crew.buried == crew.launched[:1]
        first, *_ = retries = crew.asked_at[1:]
        assert first - killed_at < BACKOFF_S
        pauses = [later - earlier for earlier, later in pairwise(retries)]
        assert all(pause >= BACKOFF_S * 2**number * 0.99 for number, pause in enumerate(pauses))


async def test_a_renewal_that_fails_keeps_what_runs() -> None:
    """When the successor does not start, the process in place goes on; when it does, the old one is retired."""
    async with kept() as (slot, crew):
        crew.refusals = 1
        with pytest.raises(NotStarted):
            await slot.renew()
        assert not crew.buried
        await slot.renew()
        old, new = crew.launched
        assert crew.buried == [old]
        await new.kill()
        await wait_until(lambda: len(crew.launched) == 3)
        assert crew.buried == [old, new]
