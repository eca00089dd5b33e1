"""Connections to the store. Whoever makes one owns it, so their number is known.

redis-py parses the URL, connects, speaks TLS and logs in; from then on the socket is ours: hiredis packs and parses a
batch at a time, and replies go straight to who waits for them. One awaited read per reply costs six times as much.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from llmstream.errors import ConfigError

Arg = bytes | str | int | float


class Refusal(Exception):
    """The server's error reply to one command, in its own words."""


Heard = Callable[[list[Any]], None]
Lost = Callable[[Exception], None]


class Connection(asyncio.Protocol):
    """One connection: commands go out, replies come back in the same order; an error reply is a :class:`Refusal`.

    Has no deadlines of its own, since reads may block on purpose; callers set them. Raises OSError, TimeoutError or
    redis-py's RedisError when the server cannot be reached or goes away.
    """

    def __init__(self, link: AbstractConnection) -> None:
        self._link = link
        self._parser = hiredis.Reader()
        self._transport: asyncio.WriteTransport | None = None
        self._ended: Exception | None = None
        self._heard: Heard | None = None
        self._lost: Lost | None = None
        self._replies: deque[Any] = deque()
        """What came while nobody listened."""
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_connected(self) -> bool:
        return bool(self._link.is_connected)

    async def connect(self) -> None:
        """Connects and logs in."""
        await self._link.connect()  # type: ignore[no-untyped-call]
        self._parser = hiredis.Reader(replyError=Refusal)
        self._ended = self._heard = self._lost = None
        self._replies.clear()
        # redis-py offers its socket to nobody else; the contract test in tests/store watches that it stays there.
        writer = self._link._writer
        if writer is None:
            raise ConnectionError("the connection is not open")
        self._transport = writer.transport
        self._transport.set_protocol(self)

    async def close(self) -> None:
        self._heard = self._lost = None
        await self._link.disconnect(nowait=True)

    def abort(self) -> None:
        """Breaks the connection, so that whoever waits for a reply finds out."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def closed_by_server(self) -> bool:
        """True when the server ended an idle connection."""
        return self._ended is not None or self._transport is None or self._transport.is_closing()

    def listen(self, heard: Heard, lost: Lost) -> None:
        """From now on all replies go to ``heard`` as they come, and the end of the connection to ``lost``."""
        self._heard, self._lost = heard, lost

    def write(self, packed: Iterable[bytes]) -> None:
        """Sends packed commands."""
        if self._transport is None or self.closed_by_server or not self.is_connected:
            raise ConnectionError("the connection is not open")
        self._transport.write(b"".join(packed))

    async def receive(self, at_most: int) -> list[Any]:
        """Waits for a reply, where nobody listens, and returns it with those that came along."""
        while not self._replies:
            if self._ended is not None:
                raise self._ended
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return [self._replies.popleft() for _ in range(min(at_most, len(self._replies)))]

    async def ask(self, *command: Arg) -> Any:
        """Sends one command and waits for its reply. Raises Refusal."""
        self.write([pack(command)])
        (reply,) = await self.receive(1)
        if isinstance(reply, Refusal):
            raise reply
        return reply

    def data_received(self, data: bytes) -> None:
        replies: list[Any] = []
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not False:
                replies.append(reply)
        except hiredis.HiredisError as error:
            self._end(ConnectionError(f"the server does not speak the store's protocol ({error})"))
            self.abort()
            return
        if not replies:
            return
        if self._heard is not None:
            self._heard(replies)
        else:
            self._replies.extend(replies)
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionError("the server closed the connection"))

    def _end(self, error: Exception) -> None:
        if self._ended is not None:
            return
        self._ended = error
        self._wake()
        if self._lost is not None:
            self._lost(error)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


Connect = Callable[[], Connection]


# Its stub knows commands of one word only.
pack = cast(Callable[[tuple[Arg, ...]], bytes], hiredis.pack_command)
"""One command in the store's protocol. Raises ValueError or TypeError for what cannot be sent."""


def connector(url: str, timeout_s: float) -> Connect:
    """Returns a function that makes unconnected connections to ``url``. Raises ConfigError for a bad URL."""
    try:
        pool = ConnectionPool.from_url(
            url, socket_timeout=None, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
        )
    except ValueError as error:
        raise ConfigError(
            "store.url (REDIS_URL) is not a store URL; expected redis://, rediss:// or unix://, "
            "for example redis://localhost:6379/0."
        ) from error
    return lambda: Connection(pool.make_connection())  # type: ignore[no-untyped-call]


LOST = (exceptions.RedisError, OSError, TimeoutError)
"""What using a connection raises when the server cannot be reached or went away."""
