"""One reader of one log: nothing but a position."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from llmstream.errors import NotFound
from llmstream.store.channel import Channel
from llmstream.store.entry import Entry
from llmstream.store.jobs import Jobs
from llmstream.store.tail import Tail
from llmstream.types import EventId

PAGE = 500
"""Entries read from the store at once, at most."""
PAGE_BYTES = 512 * 1024
"""What a page should hold; the next one is made to fit."""
_FIRST_PAGE = 16


class Pages:
    """How many entries to read at once: entries of one token and of thousands are to take about the same memory."""

    def __init__(self) -> None:
        self.limit = _FIRST_PAGE

    def fit(self, entries: Sequence[Entry]) -> None:
        """Takes note of a page that was read."""
        size = sum(entry.size for entry in entries)
        if size > PAGE_BYTES:
            self.limit = max(1, self.limit // 2)
        elif size < PAGE_BYTES // 2:
            self.limit = min(PAGE, self.limit * 2)


class Reader(Protocol):
    """Reads a log from the store: a page of it, or where it ends."""

    async def read(self, job_id: str, after: EventId, limit: int) -> list[Entry]: ...
    async def end(self, job_id: str) -> EventId: ...


class Seat(Protocol):
    """A reader's place among those of a job that ends without readers."""

    async def take(self) -> None: ...
    async def leave(self) -> None: ...
    def close(self) -> None: ...


class Follower:
    """Yields every entry behind a position once and in order, as they are logged, up to the terminal one.

    Recent entries come from the shared channel, older ones from the store. Iterating raises NotFound when the log has
    expired, StoreUnavailable when history cannot be read now; iterating again after that goes on at the same place.
    """

    def __init__(
        self,
        reader: Reader,
        jobs: Jobs,
        tail: Tail,
        channel: Channel,
        position: EventId,
        *,
        on_close: Callable[[Channel], None],
    ) -> None:
        self.position = position
        self.seat: Seat | None = None
        """Where somebody reads who counts; closed with the follower."""
        self._reader = reader
        self._jobs = jobs
        self._tail = tail
        self._channel = channel
        self._finished = False
        self._ahead: list[Entry] = []
        self._pages = Pages()
        self._on_close: Callable[[Channel], None] | None = on_close
        channel.followers += 1
        tail.expect(channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops following; safe to call twice."""
        if self.seat is not None:
            self.seat.close()
        if self._on_close is not None:
            self._channel.followers -= 1
            self._on_close(self._channel)
            self._on_close = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Entry]:
        if self._finished:
            raise StopAsyncIteration
        entries, self._ahead = self._ahead or await self._next(), []
        self.position = entries[-1].last
        self._finished = entries[-1].terminal
        return entries

    async def ready(self, timeout_s: float) -> bool:
        """Waits for something to read; False when ``timeout_s`` passed without."""
        if self._ahead or self._finished:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                self._ahead = await self._next()
        except TimeoutError:
            return False
        return True

    @property
    def upstream_s(self) -> float | None:
        """Seconds that the job's provider took; None when it ran elsewhere, or not yet."""
        return self._channel.upstream_s

    def hurry(self) -> None:
        """Says that somebody waits for each token."""
        self._channel.hurried = True

    async def push(self, take: Callable[[Entry], bool]) -> None:
        """Hands each new entry to ``take`` at the moment it is logged, without waking anybody, while ``take`` returns
        True. Returns after the terminal entry, and whenever iterating has to say what comes next."""
        channel = self._channel
        current = channel.located and self.position == channel.tip and not self._ahead
        if self._finished or not current:
            return
        self._tail.listen(channel)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def hear(entry: Entry | None, previous: EventId) -> None:
            if ended.done():
                return
            try:
                if entry is not None and previous == self.position:
                    self.position, self._finished = entry.last, entry.terminal
                    if take(entry) and not self._finished:
                        return
                ended.set_result(None)
            except Exception as error:
                ended.set_exception(error)

        await channel.listen(hear, ended)

    async def _next(self) -> list[Entry]:
        channel = self._channel
        while True:
            if channel.located and channel.holds(self.position):
                if self.position < channel.tip:
                    return channel.behind(self.position)
                if not channel.finished and not self._tail.suspect(channel):
                    await channel.changed()
                    continue
            if entries := await self._read():
                return entries

    async def _read(self) -> list[Entry]:
        channel, position = self._channel, self.position
        known = channel.tip
        limit = self._pages.limit
        entries = await self._reader.read(channel.job_id, position, limit)
        self._pages.fit(entries)
        for entry in entries:
            channel.publish(entry, position)
            position = entry.last
        if not entries:
            await self._locate(known)
        elif len(entries) < limit:
            channel.located = True
        self._tail.update(channel)
        return entries

    async def _locate(self, known: EventId) -> None:
        """Nothing behind the position: fine while the job goes on, an error when there is nothing left to come."""
        job_id, position = self._channel.job_id, self.position
        state = await self._jobs.find(job_id)
        if state is None:
            raise NotFound(f"The log of job {job_id!r} has expired; its retention time is over.")
        end = await self._reader.end(job_id)
        if end <= position and (state.done or known > position):
            raise NotFound(f"The log of job {job_id!r} holds nothing behind {position}; read it from the beginning.")
        self._channel.locate(end)
