"""Real processes, real signals: what was accepted is answered, once and exactly."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from llmstream.types import EventId
from tests.chaos.reader import Reader
from tests.chaos.service import Service
from tests.chaos.truths import assert_exact, attempts_in
from tests.conftest import assert_every_key_expires
from tests.logs import stored
from tests.replica import tokens
from tests.waiting import wait_until

LENGTH = 60


SETTINGS = {
    "models.echo.engine": "echo",
    "models.echo.slots": 1,
    "models.echo.delay_ms": 15,
    "scheduler.lease_s": 0.5,
    "store.sync": "always",  # with everysec a slow fsync may hold back what was acknowledged
    "server.shutdown_grace_s": 10,
}


@asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[Service]:
    service = Service(data_dir, SETTINGS)
    try:
        await service.start()
        yield service
    finally:
        await service.close()


async def until_said(reader: Reader, count: int) -> None:
    await wait_until(lambda: len(reader.pieces) >= count)


async def test_a_killed_server_goes_on_where_it_was(tmp_path: Path) -> None:
    """After ``kill -9`` and a new start the running job goes on from its last logged token, waiting jobs run, finished
    logs read as before, and every key expires."""
    async with running(tmp_path) as service:
        done, done_path = await service.submit(tokens=5)
        before = Reader()
        await before.read_at(service.url, done_path)
        assert before.text == tokens(5)
        job, path = await service.submit(tokens=LENGTH)
        waiting = [await service.submit(tokens=7) for _ in range(3)]
        client = Reader()
        reading = asyncio.create_task(client.read_at(service.url, path))
        await until_said(client, 10)
        async with service.store() as store:
            finished_log = await stored(store, done)
        await service.end(signal.SIGKILL)
        await reading
        seen = client.text

        await service.start()
        await client.read_at(service.url, path)
        assert client.end == "complete"
        assert client.text == tokens(LENGTH)
        assert client.text.startswith(seen)
        for _, other in waiting:
            late = Reader()
            await late.read_at(service.url, other)
            assert late.text == tokens(7)
        again = Reader()
        await again.read_at(service.url, done_path)
        assert (again.text, again.last_id) == (before.text, before.last_id)
        async with service.store() as store:
            assert await stored(store, done) == finished_log
            log = await stored(store, job)
            assert_exact(log, LENGTH)
            assert attempts_in(log) == 2
            for other, _ in waiting:
                assert_exact(await stored(store, other), 7)
            await assert_every_key_expires(store)


async def test_a_killed_store_interrupts_nothing(tmp_path: Path) -> None:
    """``kill -9`` of the Valkey process in the middle of an answer costs neither the attempt nor the stream."""
    async with running(tmp_path) as service:
        job, path = await service.submit(tokens=LENGTH)
        client = Reader()
        reading = asyncio.create_task(client.read_at(service.url, path))
        await until_said(client, 10)
        async with service.store() as store:
            info: bytes = await store.writes.call("INFO", "server")
        (pid,) = (int(line.split(b":")[1]) for line in info.splitlines() if line.startswith(b"process_id:"))
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            await reading
        assert client.end == "complete"
        assert client.text == tokens(LENGTH)
        async with service.store() as store:
            log = await stored(store, job)
            assert_exact(log, LENGTH)
            assert attempts_in(log) == 1
            assert log[-1].id == EventId.parse(client.last_id)
            await assert_every_key_expires(store)


async def test_a_stopped_server_hands_over(tmp_path: Path) -> None:
    """SIGTERM ends the process well before the grace time with exit status 0; started again it goes on at the next
    token, and the hand-over has cost no attempt."""
    async with running(tmp_path) as service:
        job, path = await service.submit(tokens=LENGTH)
        _, other = await service.submit(tokens=7)
        client = Reader()
        reading = asyncio.create_task(client.read_at(service.url, path))
        await until_said(client, 10)
        start = asyncio.get_running_loop().time()
        assert await service.end(signal.SIGTERM) == 0
        assert asyncio.get_running_loop().time() - start < 8
        await reading
        await service.start()
        await client.read_at(service.url, path)
        assert client.end == "complete"
        assert client.text == tokens(LENGTH)
        late = Reader()
        await late.read_at(service.url, other)
        assert late.text == tokens(7)
        async with service.store() as store:
            log = await stored(store, job)
            assert_exact(log, LENGTH)
            assert attempts_in(log) == 2
            assert await store.writes.call("HGET", store.keys.job(job), "handed_over") == b"1"
            await assert_every_key_expires(store)
