"""The recent end of one job's log, shared by everybody who follows it in this process. No I/O."""

from __future__ import annotations

import asyncio
from collections import deque

from llmstream.store.entry import Entry
from llmstream.types import BEGINNING, EventId, Finished

RING_BYTES = 64 * 1024
_ENTRY_OVERHEAD = 200


class Channel:
    """Entries that the store has acknowledged, newest last, bounded in bytes.

    A follower owns nothing but its position. What the ring no longer holds, or never held, is read from the log, so a
    slow follower costs no memory.
    """

    __slots__ = ("_changed", "_ring", "_size", "base", "followers", "job_id", "located", "owned", "tip")

    def __init__(self, job_id: str, *, newborn: bool = False) -> None:
        self.job_id = job_id
        self.tip = BEGINNING
        """The last event known to be logged; never what a client merely claims to have seen."""
        self.base = BEGINNING
        """The ring holds every event behind this one, up to ``tip``."""
        self.located = newborn
        """True once ``tip`` was the end of the log and whatever comes behind it will be published here."""
        self.followers = 0
        self.owned = False
        """True while this process writes the log; otherwise the tail reader watches it."""
        self._ring: deque[Entry] = deque()
        self._size = 0
        self._changed = asyncio.Event()

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
        while self._size > RING_BYTES and len(self._ring) > 1:
            dropped = self._ring.popleft()
            self._size -= dropped.size + _ENTRY_OVERHEAD
            self.base = dropped.last
        self.wake()

    def locate(self, end: EventId) -> None:
        """Takes note that the log ended at ``end`` a moment ago."""
        if end > self.tip:
            self._ring.clear()
            self._size = 0
            self.base = self.tip = end
        self.located = True
        self.wake()

    def wake(self) -> None:
        """Lets every follower look again."""
        self._changed.set()
        self._changed.clear()

    async def changed(self) -> None:
        await self._changed.wait()

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
        return bool(self._ring) and isinstance(self._ring[-1].events[-1].data, Finished)

    @property
    def empty(self) -> bool:
        """True while nothing is known to be logged."""
        return self.tip == BEGINNING
