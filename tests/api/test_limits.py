"""Senders that send too much, or too slowly: real sockets, real time, short limits."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from llmstream.config import ServerSettings
from llmstream.server import Server
from tests.api.reading import Json, conversation
from tests.conftest import echo_settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT_S = 0.5
GOOD = json.dumps(conversation("Hello")).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(GOOD)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    settings = ServerSettings(
        port=0, shutdown_grace_s=1, header_timeout_s=LIMIT_S, body_timeout_s=LIMIT_S, max_header_bytes=2048
    )
    given = {"server": settings, "security": {"max_prompt_chars": 20}}
    async with Server(echo_settings(tmp_path_factory.mktemp("limits"), **given)) as server:  # type: ignore[arg-type]
        yield server


class Sender:
    """A connection that sends what a test wants, when it wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def trickle(self, data: bytes, pause_s: float) -> None:
        """Sends byte by byte until the server has enough."""
        for byte in data:
            try:
                await self.send(bytes([byte]))
            except ConnectionError:
                return
            await asyncio.sleep(pause_s)

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        async with asyncio.timeout(10):
            return await self._reader.read()

    async def answer(self) -> tuple[int, Json]:
        """One answer of a connection that stays open."""
        async with asyncio.timeout(10):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return int(head.split()[1]), json.loads(await self._reader.readexactly(length))


@asynccontextmanager
async def sender(server: Server) -> AsyncIterator[Sender]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        yield Sender(reader, writer)
    finally:
        writer.close()


def refused(raw: bytes) -> tuple[int, Json]:
    """Status and error of an answer after which the connection was closed."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("sent", [b"P", b"POST /chat HTTP/1.1\r\n", HEAD[:-2], b"\r\n"])
async def test_headers_that_never_end(server: Server, sent: bytes) -> None:
    """A sender whose headers stop half-way is told so and cut off."""
    async with sender(server) as slow:
        started = time.monotonic()
        await slow.send(sent)
        code, error = refused(await slow.rest())
    assert (code, error["code"]) == (408, "request_timeout")
    assert "server.header_timeout_s" in error["message"]
    assert time.monotonic() - started >= LIMIT_S * 0.9


async def test_headers_that_trickle(server: Server) -> None:
    """Time counts from the first byte: another byte now and then does not help."""
    async with sender(server) as slow:
        trickling = asyncio.create_task(slow.trickle(b"GET /health HTTP/1.1\r\n" + b"x-y: z\r\n" * 1000, LIMIT_S / 20))
        code, _ = refused(await slow.rest())
        trickling.cancel()
    assert code == 408


async def test_a_connection_that_says_nothing(server: Server) -> None:
    """A new connection without any request is closed without a word."""
    async with sender(server) as silent:
        assert await silent.rest() == b""


async def test_a_second_request_that_never_ends(server: Server) -> None:
    """Between two requests a connection may be silent for longer; once the second has begun, it has to end."""
    async with sender(server) as slow:
        await slow.send(HEAD + GOOD)
        assert (await slow.answer())[0] == 200
        await asyncio.sleep(LIMIT_S * 2)
        await slow.send(HEAD + GOOD)
        assert (await slow.answer())[0] == 200
        await slow.send(HEAD[:20])
        assert refused(await slow.rest())[0] == 408


@pytest.mark.parametrize("sent", [b"", GOOD[:-1]])
async def test_a_body_that_never_ends(server: Server, sent: bytes) -> None:
    """A sender whose body stops half-way is told so and cut off."""
    async with sender(server) as slow:
        await slow.send(HEAD + sent)
        code, error = refused(await slow.rest())
    assert (code, error["code"]) == (408, "request_timeout")
    assert "server.body_timeout_s" in error["message"]


async def test_a_body_that_trickles(server: Server) -> None:
    """Time counts for the whole body."""
    async with sender(server) as slow:
        await slow.send(HEAD)
        trickling = asyncio.create_task(slow.trickle(GOOD, LIMIT_S / 10))
        code, _ = refused(await slow.rest())
        trickling.cancel()
    assert code == 408


async def test_a_long_stream_is_no_slow_sender(server: Server) -> None:
    """A client that has sent its request may read for longer than any of these limits."""
    body = conversation(stream=True, echo={"tokens": 4, "delay_ms": LIMIT_S * 500})
    async with aiohttp.ClientSession(server.url) as http, http.post("/v1/chat/completions", json=body) as response:
        assert "[DONE]" in await response.text()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 3000 + b"\r\n\r\n",
        b"GET /health?" + b"x" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % number for number in range(1000)) + b"\r\n",
    ],
    ids=["header", "line", "many"],
)
async def test_large_headers_are_refused(server: Server, sent: bytes) -> None:
    """A line or header beyond server.max_header_bytes, or far too many of them, are refused."""
    async with sender(server) as greedy:
        await greedy.send(sent)
        code, error = refused(await greedy.rest())
    assert code in (400, 431)
    assert error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", conversation("x" * 21)),
        ("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": "x" * 11}] * 2}),
        (
            "/v1/chat/completions",
            conversation() | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 21}]}]},
        ),
        ("/chat", {"message": "x" * 21}),
        ("/chat/async", {"message": "x" * 21}),
    ],
)
async def test_long_prompts_are_refused(server: Server, path: str, body: Json) -> None:
    """A prompt beyond security.max_prompt_chars gets 400 with both numbers; one that just fits is answered."""
    async with aiohttp.ClientSession(server.url) as http:
        async with http.post(path, json=body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"], error["param"]) == (400, "prompt_too_long", "messages")
            assert "20 are allowed (security.max_prompt_chars)" in error["message"]
        async with http.post("/chat", json={"message": "x" * 20}) as response:
            assert response.status == 200


async def test_closing_with_slow_senders(tmp_path: Path) -> None:
    """A server that shuts down does not wait for them, and leaves no timer behind."""
    server = Server(echo_settings(tmp_path))
    await server.__aenter__()
    async with sender(server) as slow:
        await slow.send(b"POST /chat")
        async with asyncio.timeout(5):
            await server.__aexit__(None, None, None)
            assert await slow.rest() == b""
