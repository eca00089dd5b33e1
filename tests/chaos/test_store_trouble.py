"""Two replicas over a store that is full, read-only, gone, or back without its last moments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from llmstream.config import ModelSettings, SchedulerSettings, StoreSettings
from llmstream.errors import StoreUnavailable
from llmstream.server import Server
from llmstream.store.store import Store
from tests.chaos.reader import Reader
from tests.chaos.truths import assert_exact, attempts_in
from tests.conftest import assert_every_key_expires, echo_settings
from tests.logs import stored
from tests.replica import tokens
from tests.valkey import Valkey, stores, valkey
from tests.waiting import wait_until

LENGTH = 80


class Service:
    """Replicas of one slot each over one store server."""

    def __init__(self, server: Valkey, replicas: list[Server], store: Store) -> None:
        self.server = server
        self.replicas = replicas
        self.store = store

    @property
    def url(self) -> str:
        return self.replicas[0].url

    async def submit(self, length: int = LENGTH) -> tuple[str, str]:
        body = {"message": "go", "model": "echo", "echo": {"tokens": length}}
        async with aiohttp.ClientSession(self.url) as http, http.post("/chat/async", json=body) as answer:
            assert answer.status == 202, await answer.text()
            told = await answer.json()
            return told["task_id"], told["stream_url"]

    async def status(self, path: str, url: str | None = None) -> int:
        async with aiohttp.ClientSession(url or self.url) as http, http.get(path) as answer:
            assert answer.status != 503 or float(answer.headers["Retry-After"]) >= 1
            return answer.status

    async def is_ready(self) -> bool:
        return await self.status("/ready") == 200

    async def is_red(self) -> bool:
        return not await self.is_ready()

    async def assert_refused(self) -> None:
        """New work is refused at once, with a time to come back; the process counts as alive."""
        start = asyncio.get_running_loop().time()
        body = {"message": "go", "model": "echo"}
        async with aiohttp.ClientSession(self.url) as http, http.post("/chat/async", json=body) as answer:
            assert answer.status == 503
            assert float(answer.headers["Retry-After"]) >= 1
            assert (await answer.json())["error"]["code"] == "store_unavailable"
        assert asyncio.get_running_loop().time() - start < 1
        assert await self.status("/health") == 200


@asynccontextmanager
async def service(folder: Path, replicas: int = 1) -> AsyncIterator[Service]:
    async with valkey(folder) as server, serving(folder, server, server.url, replicas) as running:
        yield running


@asynccontextmanager
async def serving(folder: Path, server: Valkey, url: str, replicas: int) -> AsyncIterator[Service]:
    async with stores(url) as (store,):
        settings = echo_settings(
            folder,
            models={"echo": ModelSettings(engine="echo", slots=1, delay_ms=10)},
            store=StoreSettings.model_validate({"url": url, "timeout_s": 1.0}),
            scheduler=SchedulerSettings(lease_s=0.5),
        )
        opened = [await Server(settings).__aenter__() for _ in range(replicas)]
        try:
            yield Service(server, opened, store)
            await assert_every_key_expires(store)
        finally:
            for each in opened:
                await each.__aexit__(None, None, None)


@asynccontextmanager
async def reading(service: Service, path: str) -> AsyncIterator[Reader]:
    """A client that has read some of an answer, and at the end all of it, on one connection."""
    client = Reader()
    task = asyncio.create_task(client.read_at(service.url, path))
    await wait_until(lambda: len(client.pieces) >= 10)
    yield client
    async with asyncio.timeout(20):
        await task
    assert (client.end, client.restarts) == ("complete", 0)
    assert client.text == tokens(LENGTH)


async def assert_undisturbed(service: Service, job: str, length: int = LENGTH) -> None:
    await wait_until(lambda: done(service, job))
    log = await stored(service.store, job)
    assert_exact(log, length)
    assert attempts_in(log) == 1


@pytest.mark.parametrize(
    ("trouble", "cure"),
    [("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"), ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE")],
    ids=["full", "read-only"],
)
async def test_a_store_that_takes_no_writes(tmp_path: Path, trouble: str, cure: str) -> None:
    """While the store is full or read-only the running answer is held, new work gets 503 at once and readiness is red;
    afterwards the same attempt goes on."""
    async with service(tmp_path) as running:
        job, path = await running.submit()
        waiting, _ = await running.submit(5)
        async with reading(running, path):
            await running.server.ask(trouble)
            await wait_until(running.is_red)
            await running.assert_refused()
            await running.server.ask(cure)
            await wait_until(running.is_ready)
        await assert_undisturbed(running, job)
        await wait_until(lambda: done(running, waiting))
        assert_exact(await stored(running.store, waiting), 5)


async def done(running: Service, job: str) -> bool:
    try:
        return (await running.store.jobs.get(job)).done
    except StoreUnavailable:  # the first who meets the new server, or one that still waits for what it lost
        return False


async def test_a_store_that_is_gone_for_a_while(tmp_path: Path) -> None:
    """While no server listens, new work gets 503 at once and readers wait; afterwards everything goes on."""
    async with service(tmp_path, replicas=2) as running:
        job, path = await running.submit()
        more = [await running.submit(5) for _ in range(4)]
        async with reading(running, path):
            await running.server.kill()
            await wait_until(running.is_red)
            await running.assert_refused()
            away = asyncio.get_running_loop().time() + 1.5
            await wait_until(lambda: asyncio.get_running_loop().time() > away)
            await running.server.start()
        await assert_undisturbed(running, job)
        for other, _ in more:
            await wait_until(lambda job=other: done(running, job))  # type: ignore[misc]
            assert_exact(await stored(running.store, other), 5)


async def test_a_power_loss_costs_no_job_and_no_token(tmp_path: Path) -> None:
    """Jobs that were submitted, claimed, said and finished within the moments that the store lost are answered once,
    exactly, by one attempt, and their readers notice nothing."""
    async with service(tmp_path, replicas=2) as running:
        early, early_path = await running.submit()
        async with reading(running, early_path):
            await running.server.snapshot()
            finished, finished_path = await running.submit(3)
            before = Reader()
            await before.read_at(running.url, finished_path)
            assert before.text == tokens(3)
            begun, begun_path = await running.submit()
            async with reading(running, begun_path):
                waiting = [await running.submit(7) for _ in range(3)]
                await running.server.set_back()
                await running.server.start()
        await assert_undisturbed(running, early)
        await assert_undisturbed(running, begun)
        for job, path in waiting:
            late = Reader()
            await late.read_at(running.url, path)
            assert late.text == tokens(7)
            log = await stored(running.store, job)
            assert_exact(log, 7)
            assert attempts_in(log) == 1
        again = Reader()
        await again.read_at(running.url, finished_path)
        assert (again.text, again.last_id) == (before.text, before.last_id)
        assert attempts_in(await stored(running.store, finished)) == 1


async def test_a_replica_that_drains_is_not_ready(tmp_path: Path) -> None:
    """Readiness is red from the moment the gateway closes; liveness stays green."""
    async with service(tmp_path) as running:
        assert await running.is_ready()
        await running.replicas[0].gateway.close()
        assert await running.is_red()
        assert await running.status("/health") == 200
