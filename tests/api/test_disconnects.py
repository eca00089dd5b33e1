"""Clients that leave without a word: the job goes on, the log stays quiet, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.api.protocol import Connection
from llmstream.config import ServerSettings
from llmstream.server import Server
from tests.api.reading import conversation, finished, status, submit, tokens
from tests.conftest import echo_settings
from tests.waiting import wait_until

STALL = {"tokens": 5, "fault": "stall", "at": 3}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that pings its streams all the time, so that a lost client is noticed at once."""
    given: Any = {"server": ServerSettings(port=0, shutdown_grace_s=2, ping_s=0.05)}
    async with Server(echo_settings(tmp_path, slots=1, **given)) as server:
        yield server


def troubles(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.exc_info or record.levelno >= logging.WARNING]


def readers() -> int:
    """Handlers that hold a stream open: tasks inside ``serve``."""
    handlers = (task.get_coro() for task in asyncio.all_tasks())
    return sum(getattr(coro, "__qualname__", "") == Connection._handle_request.__qualname__ for coro in handlers)


async def ask(server: Server, path: str, body: object = None) -> socket.socket:
    """Sends a request on a connection of its own that is reset, not closed, when it ends."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, (host, int(port)))
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    await loop.sock_sendall(connection, head.encode() + data)
    return connection


@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("path", ["/chat", "/v1/chat/completions", "/v1/chat/completions?whole"])
async def test_the_job_of_a_lost_client_completes(
    server: Server, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, path: str, read_first: bool
) -> None:
    """A client that resets its connection, before or after the first bytes, costs its job nothing."""
    body = conversation(echo={"tokens": 30, "delay_ms": 3}, stream=not path.endswith("whole"))
    if path == "/chat":
        del body["stream"]
    connection = await ask(server, path, body)
    if read_first and not path.endswith("whole"):
        await asyncio.get_running_loop().sock_recv(connection, 400)
    else:
        await wait_until(lambda: _has_jobs(server))
    connection.close()
    job = (await server.gateway.recent())[0].job
    assert (await finished(server, job.id)).status == "completed"
    assert (await server.gateway.transcript(job.id)).text == tokens(30)
    await wait_until(lambda: readers() == 0)
    assert not troubles(caplog)


async def _has_jobs(server: Server) -> bool:
    return bool(await server.gateway.recent())


async def test_lost_readers_of_a_silent_job_are_let_go(
    server: Server, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams of a stalled and of a waiting job end with their clients, not with their jobs."""
    stalled, waiting = await submit(http, echo=STALL), await submit(http)
    connections = [await ask(server, job["stream_url"]) for job in (stalled, waiting) for _ in range(3)]
    await wait_until(lambda: readers() == len(connections))
    for connection in connections:
        connection.close()
    await wait_until(lambda: readers() == 0)
    assert (await status(http, stalled["task_id"]))["status"] == "in_progress"
    async with http.delete(f"/chat/{stalled['task_id']}") as response:
        assert response.status == 200
    assert (await finished(server, waiting["task_id"])).status == "completed"
    assert not troubles(caplog)


async def test_clients_that_leave_a_full_buffer_are_no_error(
    server: Server, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """A reset while the server waits for a slow reader leaves no traceback."""
    job = await submit(http, echo={"tokens": 100_000})
    connections = [await ask(server, job["stream_url"]) for _ in range(3)]
    await finished(server, job["task_id"])
    await wait_until(lambda: readers() == len(connections))
    for connection in connections:
        connection.close()
    await wait_until(lambda: readers() == 0)
    assert not troubles(caplog)


async def test_clients_that_leave_at_once_are_no_error(
    server: Server, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests whose clients are gone before the answer begins leave no traceback."""
    job = await submit(http, echo={"tokens": 3})
    await finished(server, job["task_id"])
    for _ in range(20):
        for path in (job["stream_url"], f"/chat/{job['task_id']}", "/jobs", "/health/full"):
            (await ask(server, path)).close()
    async with http.get("/health") as response:
        assert response.status == 200
    await wait_until(lambda: readers() == 0)
    assert not troubles(caplog)


async def test_silent_streams_are_pinged(server: Server) -> None:
    """A stream on which nothing happens shows comments, one in each interval, between whole frames."""
    connection = await ask(server, "/v1/chat/completions", conversation(echo=STALL, stream=True))
    loop, heard = asyncio.get_running_loop(), b""
    while heard.count(b": ping\n\n") < 3:
        heard += await loop.sock_recv(connection, 4096)
    connection.close()
    pings = heard.split(b": ping\n\n")
    assert pings[0].count(b"data:") >= 3
    assert b"data:" not in pings[1] + pings[2]


async def test_a_client_that_takes_nothing_is_given_up(
    server: Server, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stalled connection does not stay open for ever; its job goes on and can be read by others."""
    monkeypatch.setattr("llmstream.api.sse.STALL_S", 0.2)
    answer = await submit(http, echo={"tokens": 100_000})
    connection = await ask(server, answer["stream_url"])
    await wait_until(lambda: readers() == 1)
    await wait_until(lambda: readers() == 0)
    connection.close()
    assert (await finished(server, answer["task_id"])).status == "completed"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such option")
async def test_a_vanished_host_is_noticed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives up every connection on which nothing is acknowledged for long."""
    made: list[int] = []
    before = Connection.connection_made

    def spy(self: Connection, transport: asyncio.BaseTransport) -> None:
        before(self, transport)
        own = transport.get_extra_info("socket")
        made.append(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))

    monkeypatch.setattr(Connection, "connection_made", spy)
    (await ask(server, "/health")).close()
    await wait_until(lambda: bool(made))
    assert made == [120_000]
