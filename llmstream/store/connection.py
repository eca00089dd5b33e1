"""Connections to the store. Whoever makes one owns it, so their number is known.

redis-py parses the URL, connects, speaks TLS and logs in; from then on bytes are packed and parsed by hiredis directly,
a batch at a time, which costs a sixth of redis-py's one awaited read per reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from llmstream.errors import ConfigError

READ_BYTES = 1 << 18

Arg = bytes | str | int | float


class Refusal(Exception):
    """The server's error reply to one command, in its own words."""


class Connection:
    """One connection: commands go out, replies come back in the same order.

    Has no deadlines of its own, since reads may block on purpose; callers set them. Raises OSError, TimeoutError or
    redis-py's RedisError when the server cannot be reached or goes away.
    """

    def __init__(self, link: AbstractConnection) -> None:
        self._link = link
        self._parser = hiredis.Reader()

    @property
    def is_connected(self) -> bool:
        return bool(self._link.is_connected)

    async def connect(self) -> None:
        """Connects and logs in."""
        await self._link.connect()  # type: ignore[no-untyped-call]
        self._parser = hiredis.Reader(replyError=Refusal)

    async def close(self) -> None:
        await self._link.disconnect(nowait=True)

    @property
    def closed_by_server(self) -> bool:
        """True when the server ended an idle connection."""
        reader = self._streams[0]
        return reader.at_eof() or self._streams[1].is_closing()

    async def send(self, packed: Iterable[bytes]) -> None:
        """Sends packed commands."""
        writer = self._streams[1]
        writer.write(b"".join(packed))
        await writer.drain()

    async def receive(self, at_most: int) -> list[Any]:
        """Waits for a reply and returns it with those that came along; an error reply is a :class:`Refusal`."""
        reader, replies = self._streams[0], list[Any]()
        while True:
            while len(replies) < at_most and (reply := self._parser.gets()) is not False:
                replies.append(reply)
            if replies:
                return replies
            data = await reader.read(READ_BYTES)
            if not data:
                raise ConnectionError("the server closed the connection")
            self._parser.feed(data)

    async def ask(self, *command: Arg) -> Any:
        """Sends one command and waits for its reply. Raises Refusal."""
        await self.send([pack(command)])
        (reply,) = await self.receive(1)
        if isinstance(reply, Refusal):
            raise reply
        return reply

    @property
    def _streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # redis-py offers its streams to nobody else; the contract test in tests/store watches that they stay there.
        reader, writer = self._link._reader, self._link._writer
        if reader is None or writer is None:
            raise ConnectionError("the connection is not open")
        return reader, writer


Connect = Callable[[], Connection]


def pack(command: tuple[Arg, ...]) -> bytes:
    """One command in the store's protocol. Raises ValueError or TypeError for what cannot be sent."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub knows commands of one word only
    return packed


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
