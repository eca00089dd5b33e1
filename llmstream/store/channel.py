"""The recent end of one job's log, shared by everybody who follows it in this process. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmstream.store.entry import Entry
from llmstream.types import BEGINNING, EventId

RING_BYTES = 4 * 1024
"""Enough to bridge the moment between reading the log and following it; each open stream pays for it."""
_ENTRY_OVERHEAD = 1000
"""What an entry takes beside its bytes: objects, and its wire forms."""

Listener = Callable[[Entry | None, EventId], None]
"""Called at once with each entry and the position right before it; with None when there may be something else to see.
Must not raise."""


class Channel:
    """Entries that the store has acknowledged, newest last, bounded in bytes.

    A follower owns nothing but its position. What the ring no longer holds, or never held, is read from the log, so a
    slow follower costs no memory.
    """

    __slots__ = (
        "_ring",
        "_size",
        "base",
        "followers",
        "hurried",
        "job_id",
        "listeners",
        "located",
        "owned",
        "tip",
        "upstream_s",
        "whole",
    )

    def __init__(self, job_id: str, *, newborn: bool = False, whole: bool = False) -> None:
        self.job_id = job_id
        self.whole = whole
        """True while this is the log itself, which stands nowhere else: the ring lets nothing go."""
        self.tip = BEGINNING
        """The last event known to be logged; never what a client merely claims to have seen."""
        self.base = BEGINNING
        """The ring holds every event behind this one, up to ``tip``."""
        self.located = newborn or whole
        """True once ``tip`` was the end of the log and whatever comes behind it will be published here."""
        self.followers = 0
        self.hurried = False
        """Whether somebody in this process waits for each token."""
        self.owned = False
        """True while this process writes the log; otherwise the tail reader watches it."""
        self.upstream_s: float | None = None
        """What the job's provider took, where all of that was in this process."""
        self._ring: list[Entry] = []
        self._size = 0
        self.listeners: set[Listener] = set()

    def publish(self, entry: Entry, previous: EventId) -> None:
        """Takes in an acknowledged entry; ``previous`` is the event that stands right before it in the log."""
        if entry.last <= self.tip:
            return
        if previous != self.tip:
            self._ring.clear()
            self._size = 0
            self.base = previous
        self._ring.append(entry)
        self._size += entry.size + _ENTRY_OVERHEAD
        self.tip = entry.last
        while self._size > RING_BYTES and len(self._ring) > 1 and not self.whole:
            dropped = self._ring.pop(0)
            self._size -= dropped.size + _ENTRY_OVERHEAD
            self.base = dropped.last
        for hear in self.listeners:
            hear(entry, previous)
        if self.followers < 2:
            entry.rendered.clear()  # nobody is left to share it with

    def locate(self, end: EventId) -> None:
        """Takes note that the log ended at ``end`` a moment ago."""
        if end > self.tip:
            self._ring.clear()
            self._size = 0
            self.base = self.tip = end
        self.located = True
        self.wake()

    def clear(self) -> None:
        """Lets everything go: who has not read it by now finds nothing more."""
        self.whole = False
        self._ring.clear()
        self._size = 0
        self.base = self.tip
        self.wake()

    def wake(self) -> None:
        """Lets every follower look again."""
        for hear in self.listeners:
            hear(None, self.tip)

    async def changed(self) -> None:
        """Waits until there is something new to see."""
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def hear(_entry: Entry | None, _previous: EventId) -> None:
            if not changed.done():
                changed.set_result(None)

        await self.listen(hear, changed)

    async def listen(self, hear: Listener, ended: asyncio.Future[None]) -> None:
        """Lets ``hear`` have every entry until ``ended`` is."""
        self.listeners.add(hear)
        try:
            await ended
        finally:
            self.listeners.discard(hear)

    def holds(self, position: EventId) -> bool:
        """Whether everything behind ``position`` that is known to be logged can be had from memory."""
        return self.base <= position

    def behind(self, position: EventId) -> list[Entry]:
        """Entries after ``position``, which must be held."""
        found: list[Entry] = []
        for entry in reversed(self._ring):
            if entry.last <= position:
                break
            found.append(entry.after(position))
        found.reverse()
        return found

    @property
    def finished(self) -> bool:
        return bool(self._ring) and self._ring[-1].terminal

    @property
    def empty(self) -> bool:
        """True while nothing is known to be logged."""
        return self.tip == BEGINNING
