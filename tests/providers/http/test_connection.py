from __future__ import annotations

import asyncio
import itertools

import pytest

from llmstream.providers.http import connection as module
from llmstream.providers.http.connection import Broken, Connection

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Two: a\r\nX-Two: b\r\n"
BODY = b"data: one\n\ndata: two\n\n"
CHUNKED = (
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nb;ext=1\r\ndata: one\n\n\r\n0B\r\ndata: two\n\n\r\n0\r\nX-T: 1\r\n\r\n"
)
SIZED = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
UNTIL_CLOSED = HEAD + b"Connection: close\r\n\r\n" + BODY
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + SIZED
FRAMINGS = pytest.mark.parametrize(
    "data", [CHUNKED, SIZED, UNTIL_CLOSED, INTERIM], ids=["chunked", "sized", "until closed", "interim"]
)


class Wire(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = self.paused = False

    def reading(self) -> bool:
        return not self.paused

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Exchange:
    """A connection with a request under way, whose answer the test plays."""

    def __init__(self, *, enough: bool = False) -> None:
        self.wire = Wire()
        self._enough = enough
        self.connection = Connection(lambda connection: None)
        self.connection.connection_made(self.wire)
        self.got: list[bytes] = []
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> bool:
        await self.connection.request(b"POST")
        return await self.connection.read(self.take)

    def take(self, data: bytes) -> bool:
        self.got.append(data)
        return not self._enough

    async def play(self, *parts: bytes, close: bool = False) -> None:
        await asyncio.sleep(0)
        for part in parts:
            self.connection.data_received(part)
            await asyncio.sleep(0)
        if close:
            self.connection.connection_lost(None)
            await asyncio.sleep(0)


async def result(data: bytes, *cuts: int) -> tuple[object, ...]:
    """What becomes of an answer that arrives in pieces."""
    exchange = Exchange()
    bounds = [0, *cuts, len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(bounds)]
    await exchange.play(*parts, close=data is UNTIL_CLOSED)
    async with asyncio.timeout(5):
        more = await exchange.task
    connection = exchange.connection
    return more, connection.status, connection.headers, b"".join(exchange.got), connection.complete


@FRAMINGS
async def test_cut_anywhere(data: bytes) -> None:
    """An answer is the same wherever its bytes are cut, and when each comes alone, with its headers merged by name."""
    whole = await result(data)
    more, status, headers, body, complete = whole
    assert (more, status, body, complete) == (False, 200, BODY, True)
    assert isinstance(headers, dict)
    assert headers["x-two"] == "a, b"
    assert not {"link", "x-t"} & headers.keys()
    for cut in range(1, len(data)):
        assert await result(data, cut) == whole
    assert await result(data, *range(1, len(data))) == whole


@FRAMINGS
async def test_reusable_after_a_whole_answer(data: bytes) -> None:
    """A connection can be used again when the answer said where it ends, and only then."""
    exchange = Exchange()
    await exchange.play(data)
    assert exchange.connection.reusable == (data is not UNTIL_CLOSED)
    exchange.task.cancel()


@pytest.mark.parametrize(
    "data", [b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", HEAD + b"Connection: close\r\nContent-Length: 0\r\n\r\n"]
)
async def test_not_reusable(data: bytes) -> None:
    """What the other side is going to close is not used again."""
    exchange = Exchange()
    await exchange.play(data)
    assert await exchange.task is False
    assert not exchange.connection.reusable


@pytest.mark.parametrize("data", [CHUNKED, CHUNKED.replace(b"chunked", b"Chunked"), SIZED])
async def test_an_early_end(data: bytes) -> None:
    """An end before the answer's own is an error, behind all that came before it."""
    for cut in range(len(data) - 1):
        exchange = Exchange()
        await exchange.play(*[data[:cut]] * (cut > 0), close=True)
        with pytest.raises(Broken, match="not whole" if cut else "no answer"):
            await exchange.task
        assert BODY.startswith(b"".join(exchange.got))
        if data is SIZED and cut > data.index(BODY):
            assert b"".join(exchange.got) == data[data.index(BODY) : cut]


async def test_what_came_before_a_malformed_byte_is_handed_over() -> None:
    """Bytes that are not HTTP end the answer with an error; those before them, in the same read, are kept."""
    exchange = Exchange()
    head, first, rest = CHUNKED.partition(b"b;ext=1\r\ndata: one\n\n\r\n")
    await exchange.play(head, first + b"no hex\r\n" + rest)
    with pytest.raises(Broken, match="not HTTP"):
        await exchange.task
    assert exchange.got == [b"data: one\n\n"]
    assert not exchange.connection.reusable


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"])
async def test_headers_and_trailers_are_bounded(start: bytes) -> None:
    """Headers, or trailers, without end are given up."""
    exchange = Exchange()
    line = b"X-Filler: %b\r\n" % (b"x" * 1000)
    await exchange.play(start, *[line] * (module.MAX_HEAD_BYTES // len(line) + 1))
    with pytest.raises(Broken, match="headers"):
        await exchange.task
    exchange.connection.data_received(line)
    assert exchange.wire.closed


async def test_more_than_was_asked_for() -> None:
    """A second answer to one request is not handed over, and its connection not used again."""
    exchange = Exchange()
    await exchange.play(SIZED + SIZED)
    assert await exchange.task is False
    assert b"".join(exchange.got) == BODY
    assert not exchange.connection.reusable


@pytest.mark.parametrize("data", [SIZED, CHUNKED.partition(b"0\r\n")[0] + b"no hex\r\n"])
async def test_an_answer_outlives_what_follows_it(data: bytes) -> None:
    """What is not asked for, right behind an answer or a break, does not take away what nobody has read yet."""
    exchange = Exchange()
    await asyncio.sleep(0)
    exchange.connection.data_received(data)
    exchange.connection.data_received(b"junk")
    await asyncio.gather(exchange.task, return_exceptions=True)
    assert b"".join(exchange.got) == BODY
    assert exchange.wire.closed


async def test_words_out_of_turn() -> None:
    """A server that speaks on a resting connection is hung up on."""
    exchange = Exchange()
    await exchange.play(SIZED)
    assert exchange.connection.reusable
    exchange.connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert exchange.wire.closed
    assert not exchange.connection.reusable


async def test_a_reader_that_has_enough_stops_the_upstream() -> None:
    """The socket is not read while the reader wants no more; the next read goes on behind the last byte."""
    exchange = Exchange(enough=True)
    await exchange.play(HEAD + b"Content-Length: 6\r\n\r\n", b"ab")
    assert await exchange.task is True
    assert not exchange.wire.reading()
    await exchange.play(b"cd")  # was on its way
    assert exchange.got == [b"ab"]
    assert await exchange.connection.read(exchange.take) is True
    assert not exchange.wire.reading()
    last = asyncio.create_task(exchange.connection.read(exchange.take))
    await asyncio.sleep(0)
    assert exchange.wire.reading()
    await exchange.play(b"ef")
    assert await last is True
    assert exchange.got == [b"ab", b"cd", b"ef"]
    assert await exchange.connection.read(exchange.take) is False


async def test_a_broken_reader_breaks_no_loop() -> None:
    """An exception of the reader is raised where it reads."""
    exchange = Exchange()
    exchange.take = lambda data: 1 / 0 > 0  # type: ignore[method-assign]
    await exchange.play(SIZED[: -len(BODY)], BODY)
    with pytest.raises(ZeroDivisionError):
        await exchange.task


async def test_closing_is_no_end_of_an_answer() -> None:
    """An answer that would end with its connection does not do so when this side closes."""
    exchange = Exchange()
    await exchange.play(UNTIL_CLOSED)
    exchange.connection.abort()
    exchange.connection.connection_lost(None)
    with pytest.raises(Broken, match="from this side"):
        await exchange.task


async def test_a_lost_connection_takes_no_request() -> None:
    """A request on a connection that is gone fails without having been sent."""
    exchange = Exchange()
    await exchange.play(SIZED, close=True)
    with pytest.raises(Broken):
        await exchange.connection.request(b"again")
    assert exchange.wire.sent == b"POST"
