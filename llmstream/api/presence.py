"""Whether the client is still there, also while nothing is sent to it."""

from __future__ import annotations

import asyncio
from types import TracebackType

from aiohttp import web

from llmstream.store.follower import Seat

LOOK_S = 0.25


class ClientGone(ConnectionError):
    """The client closed its connection."""


class Presence:
    """Looks at all connections of waiting handlers from time to time.

    A runner can be told to cancel handlers when their client leaves, but this application may run on somebody else's.
    """

    def __init__(self) -> None:
        self._watches: set[Attended] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, watch: Attended) -> None:
        self._watches.add(watch)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def discard(self, watch: Attended) -> None:
        self._watches.discard(watch)

    def _look(self) -> None:
        self._timer = None
        for watch in self._watches:
            watch.look()
        if self._watches:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)


PRESENCE = web.AppKey("presence", Presence)


class Attended:
    """Counts the client as a reader inside the context, where its leave raises ConnectionError.

    A stream that we end ourselves leaves its reader counted until the lease lapses: time to come back.
    """

    __slots__ = ("_cancelling", "_gone", "_presence", "_request", "_seat", "_task")

    def __init__(self, request: web.Request, seat: Seat | None = None) -> None:
        self._request = request
        self._presence = request.app[PRESENCE]
        self._seat = seat
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._presence.add(self)
        if self._seat is not None:
            try:
                await self._seat.take()
            except BaseException as error:
                await self.__aexit__(type(error), error, None)
                raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._presence.discard(self)
        left = self._gone and isinstance(error, asyncio.CancelledError) and self._task.uncancel() <= self._cancelling
        if self._seat is not None and (left or isinstance(error, ConnectionError)):
            await self._seat.leave()
        if left:
            raise ClientGone("the client is gone") from None

    def look(self) -> None:
        """Ends the context if the client has left."""
        if not self._gone and self._request.transport is None:
            self._gone = True
            self._task.cancel()
