"""One llmstream behind another: whatever breaks between them or in front, the inner one runs the job once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from llmstream.config import ModelSettings, ProviderSettings
from llmstream.server import Server
from llmstream.types import Delta, JobState, Restart
from tests.api.reading import finished, log_of, tokens
from tests.chaos.reader import Reader
from tests.chaos.service import Service
from tests.conftest import echo_settings
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

LENGTH = 60


class Wire:
    """The connections between the two, which can be cut."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._ends: set[asyncio.StreamWriter] = set()
        self.cuts = 0

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        self.cuts += 1
        for end in self._ends:
            end.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, away = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._ends |= {writer, away}
        await asyncio.gather(self._carry(reader, away), self._carry(there, writer))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.transport.abort()


def nested(data_dir: Path, url: str) -> Server:
    """A server whose only provider is another llmstream."""
    provider = ProviderSettings(base_url=url, preset="llmstream", models=["*"])
    return Server(echo_settings(data_dir, models={}, providers={"inner": provider}))


@pytest.fixture
async def inner(tmp_path: Path) -> AsyncIterator[Server]:
    models = {"echo": ModelSettings(engine="echo", slots=4, delay_ms=15)}
    async with Server(echo_settings(tmp_path / "inner", models=models)) as server:
        yield server


@asynccontextmanager
async def service(data_dir: Path, url: str) -> AsyncIterator[Service]:
    settings = {
        "providers.inner.base_url": url,
        "providers.inner.preset": "llmstream",
        "scheduler.lease_s": 0.5,
        "store.sync": "always",
    }
    outer = Service(data_dir, settings)
    try:
        await outer.start()
        yield outer
    finally:
        await outer.close()


async def submit(server: Server, **body: Any) -> str:
    request = {"message": "go", "model": "echo", **body}
    async with aiohttp.ClientSession(server.url) as http, http.post("/chat/async", json=request) as answer:
        assert answer.status == 202, await answer.text()
        return str((await answer.json())["task_id"])


async def the_only_job(inner: Server) -> JobState:
    """What the inner one ran, which has to be one job."""
    (state,) = await inner.gateway.recent()
    return state


async def said(server: Server, job_id: str, pieces: int) -> bool:
    return len((await server.gateway.transcript(job_id)).text) >= pieces * len(tokens(1))


async def test_a_cut_between_the_two_is_not_noticed(inner: Server, tmp_path: Path) -> None:
    """When the connection between the two breaks the outer one reads on; the inner one ran the job once."""
    async with Wire(f"{inner.url}/v1") as wire, nested(tmp_path / "outer", wire.url) as outer:
        job_id = await submit(outer, echo={"tokens": LENGTH})
        for count in (10, 25):
            await wait_until(partial(said, outer, job_id, count))
            wire.cut()
        state, log = await finished(outer, job_id), await log_of(outer, job_id)
    assert (state.status, state.attempt, wire.cuts) == ("completed", 3, 3)
    assert "".join(event.data.text for event in log if isinstance(event.data, Delta)) == tokens(LENGTH)
    assert not any(isinstance(event.data, Restart) for event in log)
    ran = await the_only_job(inner)
    assert (ran.status, ran.attempt) == ("completed", 1)
    assert state.usage is not None
    assert ran.usage is not None
    assert state.usage.completion_tokens == ran.usage.completion_tokens == LENGTH


async def test_a_killed_outer_one_goes_on(inner: Server, tmp_path: Path) -> None:
    """After ``kill -9`` of the outer server and a new start its answer goes on; the inner one ran the job once."""
    async with service(tmp_path / "outer", f"{inner.url}/v1") as outer:
        _, path = await outer.submit(tokens=LENGTH)
        client = Reader()
        reading = asyncio.create_task(client.read_at(outer.url, path))
        await wait_until(lambda: len(client.pieces) >= 10)
        await outer.end(signal.SIGKILL)
        await reading
        seen = client.text
        await outer.start()
        await client.read_at(outer.url, path)
        assert (client.end, client.text, client.restarts) == ("complete", tokens(LENGTH), 0)
        assert client.text.startswith(seen)
        assert len(seen) < len(client.text)
    ran = await the_only_job(inner)
    assert (ran.status, ran.attempt) == ("completed", 1)


async def test_cancelling_reaches_the_inner_one(inner: Server, tmp_path: Path) -> None:
    """Who cancels the outer job cancels the inner one, at once."""
    async with nested(tmp_path / "outer", f"{inner.url}/v1") as outer:
        job_id = await submit(outer, echo={"tokens": 10_000})
        await wait_until(lambda: said(outer, job_id, 5))
        await outer.gateway.cancel(job_id)

        async def cancelled() -> bool:
            return (await the_only_job(inner)).status == "cancelled"

        await wait_until(cancelled)


async def test_an_outer_one_that_stops_cancels_nothing(inner: Server, tmp_path: Path) -> None:
    """A shutdown of the outer server hands the job over: the inner one goes on, and its answer is read later."""
    async with nested(tmp_path / "outer", f"{inner.url}/v1") as outer:
        job_id = await submit(outer, echo={"tokens": 400})
        await wait_until(lambda: said(outer, job_id, 5))
    assert (await the_only_job(inner)).status == "in_progress"
    async with nested(tmp_path / "outer", f"{inner.url}/v1") as outer:
        state = await finished(outer, job_id)
        assert (await outer.gateway.transcript(job_id)).text == tokens(400)
    assert state.status == "completed"
    assert (await the_only_job(inner)).attempt == 1


async def test_an_inner_one_that_starts_over_is_not_stitched(tmp_path: Path) -> None:
    """When the inner answer starts over the outer one does, too, and says so."""
    gate = asyncio.Event()
    async with Upstream() as upstream:
        upstream.replies += [Reply(fault="cut", at=2, gates={2: gate}), Reply(pieces=("Quite", " another"))]
        provider = ProviderSettings(base_url=upstream.url)
        settings = echo_settings(tmp_path / "inner", models={}, providers={"far": provider})
        async with Server(settings) as inner, nested(tmp_path / "outer", f"{inner.url}/v1") as outer:
            job_id = await submit(outer)

            async def begun() -> bool:
                return (await outer.gateway.transcript(job_id)).text == "Hello there"

            await wait_until(begun)
            gate.set()
            state, log = await finished(outer, job_id), await log_of(outer, job_id)
            assert (state.status, (await outer.gateway.transcript(job_id)).text) == ("completed", "Quite another")
            assert [event.data for event in log if isinstance(event.data, Restart)]
            assert (await the_only_job(inner)).attempt == 2


async def test_an_inner_failure_is_final(inner: Server, tmp_path: Path) -> None:
    """A job that fails inside, after whatever was tried there, fails outside with the same words and what it said."""
    async with nested(tmp_path / "outer", f"{inner.url}/v1") as outer:
        job_id = await submit(outer, echo={"tokens": 9, "fault": "error", "at": 4})
        state = await finished(outer, job_id)
        assert (await outer.gateway.transcript(job_id)).text == tokens(4)
    assert state.failure is not None
    assert (state.status, state.attempt, state.failure.code) == ("failed", 1, "upstream_job_failed")
    assert "failed before token 4" in state.failure.message
    assert (await the_only_job(inner)).status == "failed"


async def test_equal_requests_stay_apart(inner: Server, tmp_path: Path) -> None:
    """Equal requests of different jobs are different jobs inside."""
    async with nested(tmp_path / "outer", f"{inner.url}/v1") as outer:
        for job_id in [await submit(outer, echo={"tokens": 3}) for _ in range(2)]:
            assert (await finished(outer, job_id)).status == "completed"
    assert len(await inner.gateway.recent()) == 2
