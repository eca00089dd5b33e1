"""What the store has acknowledged during the last seconds, for a server that comes back without it.

With ``appendfsync everysec`` a power loss costs up to two seconds of acknowledged writes, and a failover costs what had
not reached the promoted replica. Whoever wrote it writes it again, under the same ids.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from llmstream.errors import LLMStreamError, StoreError, StoreUnavailable
from llmstream.store.presence import Presence
from llmstream.types import BEGINNING, EventId, Job

KEEP_S = 5.0
KEEP_BYTES = 64 * 1024 * 1024
"""Of all jobs of the process together."""
KEEP_BYTES_OF_ONE = 512 * 1024
RETRY_S = 0.1
_OVERHEAD = 300

Redo = Callable[[], Awaitable[object]]
"""Does a step again that the store may have forgotten; doing it twice changes nothing."""

logger = logging.getLogger(__name__)


class Kept(NamedTuple):
    """One entry that the store has acknowledged."""

    previous: EventId
    last: EventId
    data: bytes


class Trail:
    """The latest entries of one attempt, oldest first, and what it takes to write its record again."""

    def __init__(self, job: Job, attempt: int, replica: str, started_at: float, token: str) -> None:
        self.job = job
        self.attempt = attempt
        self.replica = replica
        self.started_at = started_at
        self.token = token
        self.entries: deque[Kept] = deque()
        self._bytes = 0
        self.logged = EventId(attempt, 0)
        """The last event acknowledged, kept or not."""
        self.over_a_hole = False
        """Whether the entries may stand behind a hole in the log."""

    def add(self, kept: Kept) -> None:
        """Keeps an entry, and of the others as much as one job may have."""
        self.entries.append(kept)
        self.logged = kept.last
        self._bytes += len(kept.data)
        while self._bytes > KEEP_BYTES_OF_ONE and len(self.entries) > 1:
            self.forget(self.entries[0].last)

    def forget(self, upto: EventId) -> None:
        """Lets go of what is safe by now."""
        while self.entries and self.entries[0].last <= upto:
            self._bytes -= len(self.entries.popleft().data)

    def bridge(self, last: EventId, data: bytes) -> None:
        """Replaces what is left by one entry that makes up for all that was lost before it."""
        self.entries = deque([Kept(self.logged, last, data)])
        self.over_a_hole = True


class _Item(NamedTuple):
    at: float
    size: int
    trail: Trail | None
    last: EventId
    redo: Redo | None


class Recent:
    """Everything worth keeping for ``KEEP_S`` seconds, within ``KEEP_BYTES``."""

    def __init__(self, presence: Presence, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._presence = presence
        self._items: deque[_Item] = deque()
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None
        presence.on_rebirth.append(self._begin)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def keep(self, trail: Trail, previous: EventId, last: EventId, data: bytes) -> None:
        """Keeps an acknowledged entry."""
        trail.add(Kept(previous, last, data))
        self._add(_Item(self._clock(), len(data), trail, last, None))

    def remember(self, redo: Redo, size: int) -> None:
        """Keeps a step that holds about ``size`` bytes."""
        self._add(_Item(self._clock(), size, None, BEGINNING, redo))

    def _add(self, item: _Item) -> None:
        self._items.append(item)
        self._bytes += item.size + _OVERHEAD
        # Time stands still while the server is away or has not got everything back.
        still = self._presence.trouble is not None or self._presence.recovering
        while self._bytes > KEEP_BYTES or (not still and self._items[0].at < item.at - KEEP_S):
            oldest = self._items.popleft()
            self._bytes -= oldest.size + _OVERHEAD
            if oldest.trail is not None:
                oldest.trail.forget(oldest.last)

    def _begin(self) -> None:
        if self._task is not None:
            self._task.cancel()
        redos = [item.redo for item in self._items if item.redo is not None]
        self._task = asyncio.create_task(self._recover(redos), name="store-recovery")

    async def _recover(self, redos: list[Redo]) -> None:
        for start in range(0, len(redos), 100):
            await asyncio.gather(*(self._again(redo) for redo in redos[start : start + 100]))

    async def _again(self, redo: Redo) -> None:
        while True:
            try:
                await redo()
                return
            except StoreError as error:
                logger.error("a step could not be done again: %s", error.message)
                return
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)
            except LLMStreamError as error:
                logger.warning("a step was not done again: %s", error.message)
                return
            except Exception:  # one broken step must not keep the others from being done
                logger.exception("doing a step again failed")
                return
