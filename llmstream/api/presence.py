"""Whether the client is still there, also while nothing is sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web

from llmstream.store.follower import Follower

LOOK_S = 0.25


class ClientGone(ConnectionError):
    """The client closed its connection."""


class Presence:
    """Looks at all connections of waiting handlers from time to time.

    A runner can be told to cancel handlers when their client leaves, but this application may run on somebody else's.
    """

    def __init__(self) -> None:
        self._watches: set[_Watch] = set()
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watch(self, request: web.Request) -> Iterator[None]:
        """Raises ClientGone inside the context once the client has left."""
        watch = _Watch(request)
        self._watches.add(watch)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        try:
            yield
        except asyncio.CancelledError:
            if not watch.gone or watch.task.uncancel() > watch.cancelling:
                raise
            raise ClientGone("the client is gone") from None
        finally:
            self._watches.discard(watch)

    def _look(self) -> None:
        self._timer = None
        for watch in self._watches:
            watch.look()
        if self._watches:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)


class _Watch:
    def __init__(self, request: web.Request) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.cancelling = task.cancelling()
        self.gone = False
        self._request = request

    def look(self) -> None:
        if not self.gone and self._request.transport is None:
            self.gone = True
            self.task.cancel()


PRESENCE = web.AppKey("presence", Presence)


@asynccontextmanager
async def attended(request: web.Request, follower: Follower) -> AsyncIterator[None]:
    """Counts the client as a reader inside the context, where its leave raises ConnectionError.

    A stream that we end ourselves leaves its reader counted until the lease lapses: time to come back.
    """
    seat = follower.seat
    try:
        with request.app[PRESENCE].watch(request):
            if seat is not None:
                await seat.take()
            yield
    except ConnectionError:
        if seat is not None:
            await seat.leave()
        raise
