"""Wake-ups between replicas. They only save time: whoever misses one finds out at its next heartbeat or append."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from llmstream.store.connection import LOST, Connect, Connection, Refusal, pack
from llmstream.store.keys import Keys

SILENCE_S = 10.0
"""A subscription that says nothing for so long is asked whether it lives."""

MESSAGES = 1000
"""Taken in at once."""

logger = logging.getLogger(__name__)


class Signals:
    """One connection that listens for what other replicas tell."""

    def __init__(self, connect: Connect, keys: Keys) -> None:
        self.on_work: Callable[[str], None] | None = None
        """Gets the name of a pool with new work."""
        self.on_cancel: Callable[[str], None] | None = None
        """Gets the id of a job that has just been ended from outside."""
        self.on_room: Callable[[str], None] | None = None
        """Gets a target that may take more requests."""
        self.on_breaker: Callable[[str], None] | None = None
        """Gets a target whose breaker opened, closed or may be probed."""
        self.on_revoked: Callable[[str], None] | None = None
        """Gets the id of an API key that is not valid any more."""
        self._connect = connect
        channels = (keys.wake, keys.cancel, keys.room, keys.breaker, keys.revoked)
        self._channels = [name.encode() for name in channels]
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name="store-signals")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def renew(self) -> None:
        """Begins a new connection."""
        if self._connection is not None:
            self._connection.abort()

    async def _run(self) -> None:
        delay = 0.05
        while True:
            connection = self._connection = self._connect()
            try:
                async with asyncio.timeout(SILENCE_S):
                    await connection.connect()
                    connection.write([pack(("SUBSCRIBE", *self._channels))])
                delay = 0.05
                await self._listen(connection)
            except Exception as error:
                if not isinstance(error, (*LOST, Refusal)):
                    logger.exception("the subscription failed and begins again")
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)
            finally:
                await connection.close()

    async def _listen(self, connection: Connection) -> None:
        unanswered = False
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    messages = await connection.receive(MESSAGES)
            except TimeoutError:
                if unanswered:
                    raise
                unanswered = True
                connection.write([pack(("PING",))])
                continue
            unanswered = False
            for message in messages:
                if isinstance(message, Refusal):
                    raise message
                self._take(message)

    def _take(self, message: list[bytes]) -> None:
        kind, channel, data = message[0], message[1], message[-1]
        if kind != b"message":
            return
        listeners = (self.on_work, self.on_cancel, self.on_room, self.on_breaker, self.on_revoked)
        hear = dict(zip(self._channels, listeners, strict=True)).get(channel)
        if hear is not None:
            hear(data.decode())
