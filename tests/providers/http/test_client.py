from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llmstream.providers.http import client as module
from llmstream.providers.http.client import Client
from llmstream.providers.http.connection import Broken
from llmstream.providers.http.origin import Origin, target
from tests.providers.http.raw import Heard, RawServer, answer
from tests.waiting import wait_until

TLS = Path(__file__).parent / "tls"
OPTIONS: dict[str, Any] = {"headers": {}, "limit": 4, "connect_s": 5.0}
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Client]:
    client = Client(url, **OPTIONS | options)
    try:
        yield client
    finally:
        client.close()


async def post(client: Client, body: bytes = b"{}", where: bytes = b"/") -> bytes:
    """The whole body of an answer."""
    got: list[bytes] = []

    def take(data: bytes) -> bool:
        got.append(data)
        return True

    async with client.post(where, body) as response:
        await response.read(take)
    return b"".join(got)


async def plainly(heard: Heard) -> None:
    await heard.say(answer(b"ok"))


async def test_request() -> None:
    """A request says where it goes, who asks and how long it is; a user in the URL becomes Basic credentials."""
    async with RawServer(plainly) as server:
        url = f"http://us%40er:p@127.0.0.1:{server.port}"
        async with opened(url, headers={"X-Key": "k"}) as client:
            assert await post(client, b"four", target("http://x/a b/ü?q=ö&x=%20")) == b"ok"
    heard = server.requests[0]
    assert heard.body == b"four"
    assert heard.head.decode().splitlines() == [
        "POST /a%20b/%C3%BC?q=%C3%B6&x=%20 HTTP/1.1",
        f"Host: 127.0.0.1:{server.port}",
        "X-Key: k",
        f"Authorization: Basic {b64encode(b'us@er:p').decode()}",
        "Content-Length: 4",
        "",
    ]


@pytest.mark.parametrize(
    ("url", "netloc", "authority"),
    [
        ("https://x/v1", "x", "x:443"),
        ("http://x:443", "x:443", "x:443"),
        ("http://[::1]:8000", "[::1]:8000", "[::1]:8000"),
        ("https://[::1]/", "[::1]", "[::1]:443"),
        ("https://bücher.example", "xn--bcher-kva.example", "xn--bcher-kva.example:443"),
    ],
)
def test_names(url: str, netloc: str, authority: str) -> None:
    """Origins are named as the protocol wants them."""
    assert (Origin.of(url).netloc, Origin.of(url).authority) == (netloc, authority)


async def test_a_connection_is_kept() -> None:
    """Requests one after another share a connection."""
    async with RawServer(plainly) as server, opened(server.url) as client:
        assert [await post(client) for _ in range(3)] == [b"ok"] * 3
        assert server.connections == 1


async def test_an_unused_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that nobody uses is given up after a while."""
    monkeypatch.setattr(module, "KEEP_S", 0.0)
    monkeypatch.setattr(module, "SWEEP_S", 0.01)
    async with RawServer(plainly) as server, opened(server.url) as client:
        await post(client)
        await wait_until(lambda: server.open == 0)
        assert not client._open


async def test_a_stale_connection_is_replaced() -> None:
    """A request that meets a connection the server closed meanwhile is sent again, once, on a new one."""

    async def script(heard: Heard) -> None:
        if len(server.requests) == 2:
            heard.writer.close()
        else:
            await heard.say(answer(b"ok"))

    async with RawServer(script) as server, opened(server.url) as client:
        assert await post(client) == b"ok"
        assert await post(client, b"again") == b"ok"
        assert [heard.connection for heard in server.requests] == [1, 1, 2]
        assert server.requests[1].body == server.requests[2].body == b"again"


async def test_a_connection_closed_at_rest_is_not_used() -> None:
    """A connection whose end was seen while it rested carries no further request."""
    async with RawServer(plainly) as server, opened(server.url) as client:
        await post(client)
        server.requests[0].writer.close()
        await wait_until(lambda: not client._idle)
        await post(client)
        assert [heard.connection for heard in server.requests] == [1, 2]


@pytest.mark.parametrize("first_words", [b"", b"HTTP/1.1 2", HEAD, HEAD + b"1\r\nx\r\n"])
async def test_what_may_have_been_answered_is_not_sent_again(first_words: bytes) -> None:
    """A new connection that fails is an error at once, and a kept one as soon as a byte of an answer came."""

    async def script(heard: Heard) -> None:
        if first_words and len(server.requests) == 1:
            await heard.say(answer(b"ok"))
        else:
            await heard.say(first_words)
            heard.writer.close()

    async with RawServer(script) as server, opened(server.url) as client:
        if first_words:
            await post(client)
        before = len(server.requests)
        with pytest.raises(Broken):
            await post(client)
        assert len(server.requests) == before + 1


@pytest.mark.parametrize("reset", [False, True])
async def test_what_came_before_a_break_is_handed_over(reset: bool) -> None:
    """Bytes that arrived before the connection broke come before the error, however close together they are."""

    async def script(heard: Heard) -> None:
        await heard.say(HEAD + b"5\r\nhello\r\n")
        if reset:
            raw = heard.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        heard.writer.transport.abort()

    got: list[bytes] = []

    def take(data: bytes) -> bool:
        got.append(data)
        return True

    async with RawServer(script) as server, opened(server.url) as client:
        with pytest.raises(Broken):
            async with client.post(b"/", b"") as response:
                await response.read(take)
        assert got == [b"hello"]
        assert not client._idle


@pytest.mark.parametrize("stage", ["sent", "headers", "a part"])
async def test_cancelling_hangs_up(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled request closes its connection at once, whatever has been answered by then."""
    monkeypatch.setattr(module, "LINGER_S", 60.0)
    said = {"sent": b"", "headers": HEAD, "a part": HEAD + b"1\r\nx\r\n"}[stage]
    reached = {"sent"}

    async def script(heard: Heard) -> None:
        await heard.say(said)
        await asyncio.Event().wait()

    def take(data: bytes) -> bool:
        reached.add("a part")
        return True

    async def ask(client: Client) -> None:
        async with client.post(b"/", b"") as response:
            reached.add("headers")
            await response.read(take)

    async with RawServer(script) as server, opened(server.url) as client:
        task = asyncio.create_task(ask(client))
        await wait_until(lambda: bool(server.requests) and stage in reached)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: server.requests[0].hung_up)
        assert not client._idle


async def test_the_end_is_waited_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has heard enough waits no longer; the connection is kept when the end comes soon, and closed otherwise."""
    monkeypatch.setattr(module, "LINGER_S", 0.0)
    monkeypatch.setattr(module, "SWEEP_S", 0.05)
    end = asyncio.Event()

    async def script(heard: Heard) -> None:
        await heard.say(HEAD + b"1\r\nx\r\n")
        await end.wait()
        await heard.say(b"1\r\ny\r\n0\r\n\r\n")

    async def hear_a_part(client: Client) -> None:
        async with client.post(b"/", b"") as response:
            assert await response.read(lambda data: False)

    async with RawServer(script) as server, opened(server.url) as client:
        await hear_a_part(client)
        end.set()
        await wait_until(lambda: bool(client._idle))
        end.clear()
        await hear_a_part(client)
        assert server.connections == 1
        await wait_until(lambda: server.requests[1].hung_up)


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests beyond the limit wait for a connection; one that only waits for an end makes room."""
    monkeypatch.setattr(module, "LINGER_S", 60.0)
    gate = asyncio.Event()

    async def script(heard: Heard) -> None:
        await heard.say(HEAD + b"1\r\nx\r\n")
        await gate.wait()
        await heard.say(b"0\r\n\r\n")

    async with RawServer(script) as server, opened(server.url, limit=2) as client:
        async with client.post(b"/", b"") as response:
            await response.read(lambda data: False)
        tasks = [asyncio.create_task(post(client)) for _ in range(5)]
        await wait_until(lambda: len(server.requests) == 3)
        await wait_until(lambda: len(client._open) == 2)
        gate.set()
        assert await asyncio.gather(*tasks) == [b"x"] * 5
        assert server.connections == 3


async def test_a_slow_reader_stops_the_upstream() -> None:
    """While the reader wants no more, what the server can send is bounded by the buffers of the sockets."""
    piece, pieces = b"x" * 65536, 400
    sent = 0

    async def script(heard: Heard) -> None:
        nonlocal sent
        await heard.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * pieces))
        for _ in range(pieces):
            await heard.say(piece)
            sent += 1

    got = 0

    def take(data: bytes) -> bool:
        nonlocal got
        got += len(data)
        return False

    async with RawServer(script) as server, opened(server.url) as client, client.post(b"/", b"") as response:
        assert await response.read(take)
        before = -1
        while sent > before:
            before = sent
            await asyncio.sleep(0.02)
        assert sent < pieces
        while await response.read(take):
            pass
        assert got == len(piece) * pieces


def trusting(monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Makes the test's authority trusted; the context is a server's."""
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "localhost.pem")
    return context


async def test_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS requests share a connection, and cancelling hangs up."""

    async def script(heard: Heard) -> None:
        if len(server.requests) == 3:
            await heard.say(HEAD + b"1\r\nx\r\n")
            await asyncio.Event().wait()
        await heard.say(answer(b"ok" * 100_000))

    async with RawServer(script, trusting(monkeypatch)) as server, opened(server.url) as client:
        assert [len(await post(client)) for _ in range(2)] == [200_000] * 2
        assert server.connections == 1
        task = asyncio.create_task(post(client))
        await wait_until(lambda: len(server.requests) == 3)
        task.cancel()
        await wait_until(lambda: server.requests[2].hung_up)


async def test_unknown_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose certificate nobody vouches for gets no request, nor does one with another's name."""
    context = trusting(monkeypatch)
    async with RawServer(plainly, context) as server:
        async with opened(f"https://127.0.0.1:{server.port}") as client:
            with pytest.raises(Broken, match="not valid for '127"):
                await post(client)
        monkeypatch.delenv("SSL_CERT_FILE")
        async with opened(server.url) as client:
            with pytest.raises(Broken, match="certificate verify failed"):
                await post(client)
            assert not client._open
        assert server.requests == []


async def test_proxy_without_tls() -> None:
    """A proxy gets the whole URL and its own credentials."""
    async with RawServer(plainly) as proxy:
        client = Client("http://far.example:81/v1", proxy=f"http://u:p@127.0.0.1:{proxy.port}", **OPTIONS)
        assert await post(client, where=b"/v1/x?y") == b"ok"
        client.close()
    assert proxy.requests[0].line == "POST http://far.example:81/v1/x?y HTTP/1.1"
    assert b"Host: far.example:81\r\n" in proxy.requests[0].head
    assert b"Proxy-Authorization: Basic " + b64encode(b"u:p") in proxy.requests[0].head


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def test_proxy_with_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a proxy's tunnel the origin proves who it is and alone sees the request; connections are kept."""
    context = trusting(monkeypatch)

    async def tunnel(heard: Heard) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", origin.port)
        await heard.say(b"HTTP/1.1 200 Connection established\r\n\r\n")
        async with asyncio.TaskGroup() as both:
            both.create_task(carry(heard.reader, writer))
            both.create_task(carry(reader, heard.writer))

    async with RawServer(plainly, context) as origin, RawServer(tunnel) as proxy:
        client = Client(origin.url, proxy=f"http://u:p@127.0.0.1:{proxy.port}", **OPTIONS)
        assert [await post(client) for _ in range(2)] == [b"ok"] * 2
        client.close()
    assert [heard.line for heard in proxy.requests] == [f"CONNECT localhost:{origin.port} HTTP/1.1"]
    assert b"Proxy-Authorization: Basic " in proxy.requests[0].head
    assert b"Proxy-Authorization" not in origin.requests[0].head


async def test_a_proxy_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that gives no tunnel is named, with its status."""

    async def refuse(heard: Heard) -> None:
        await heard.say(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    async with RawServer(refuse) as proxy, opened("https://far.example", proxy=proxy.url) as client:
        with pytest.raises(Broken, match=f"127.0.0.1:{proxy.port} answered HTTP 407"):
            await post(client)
        assert not client._open


async def test_closing_breaks_off_what_runs() -> None:
    """A client that is closed ends its requests and takes no further ones."""

    async def script(heard: Heard) -> None:
        await heard.say(HEAD)
        await asyncio.Event().wait()

    async with RawServer(script) as server, opened(server.url) as client:
        task = asyncio.create_task(post(client))
        await wait_until(lambda: bool(server.requests))
        client.close()
        with pytest.raises(Broken):
            await task
        with pytest.raises(Broken, match="closed"):
            await post(client)
