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
from llmstream.types import EventId, Job

KEEP_S = 5.0
SPAN_S = 0.5
"""The steps in which time is counted here: keeping books of single entries would cost more than the entries."""
KEEP_BYTES = 64 * 1024 * 1024
"""Of all jobs of the process together."""
KEEP_BYTES_OF_ONE = 512 * 1024
RETRY_S = 0.1
SPAN_BYTES = KEEP_BYTES // 16
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

    __slots__ = ("attempt", "bytes", "entries", "job", "logged", "over_a_hole", "replica", "started_at", "token")

    def __init__(self, job: Job, attempt: int, replica: str, started_at: float, token: str) -> None:
        self.job = job
        self.attempt = attempt
        self.replica = replica
        self.started_at = started_at
        self.token = token
        self.entries: list[Kept] = []
        self.bytes = 0
        """What the entries weigh."""
        self.logged = EventId(attempt, 0)
        """The last event acknowledged, kept or not."""
        self.over_a_hole = False
        """Whether the entries may stand behind a hole in the log."""

    def forget(self, upto: EventId) -> None:
        """Lets go of what is safe by now."""
        safe = 0
        while safe < len(self.entries) and self.entries[safe].last <= upto:
            self.bytes -= len(self.entries[safe].data) + _OVERHEAD
            safe += 1
        del self.entries[:safe]

    def bridge(self, last: EventId, data: bytes) -> None:
        """Replaces what is left by one entry that makes up for all that was lost before it."""
        self.entries = [Kept(self.logged, last, data)]
        self.bytes = len(data) + _OVERHEAD
        self.over_a_hole = True


class _Span:
    """What was acknowledged during ``SPAN_S`` seconds, or sooner came to ``SPAN_BYTES``."""

    __slots__ = ("bytes", "ends", "redo_bytes", "redos", "trails")

    def __init__(self, since: float) -> None:
        self.ends = since + SPAN_S
        self.trails: dict[Trail, EventId] = {}
        """Up to where each log was written by then."""
        self.redos: list[Redo] = []
        self.redo_bytes = 0
        self.bytes = 0
        """What came in, whatever is left of it by now."""


class Recent:
    """Everything worth keeping for ``KEEP_S`` seconds, within ``KEEP_BYTES``."""

    def __init__(self, presence: Presence, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._presence = presence
        self._spans: deque[_Span] = deque([_Span(clock())])
        self.bytes = 0
        """What is kept weighs about so much."""
        self._task: asyncio.Task[None] | None = None
        presence.on_rebirth.append(self._begin)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def keep(self, trail: Trail, previous: EventId, last: EventId, data: bytes) -> None:
        """Keeps an acknowledged entry, and of the others of its log as much as one log may have."""
        span, size = self._spans[-1], len(data) + _OVERHEAD
        if span.bytes >= SPAN_BYTES or self._clock() >= span.ends:
            span = self._span()
        trail.entries.append(Kept(previous, last, data))
        trail.logged = last
        trail.bytes += size
        span.trails[trail] = last
        span.bytes += size
        self.bytes += size
        if self.bytes > KEEP_BYTES:
            self._shrink()
        if trail.bytes > KEEP_BYTES_OF_ONE:
            self._trim(trail)

    def _trim(self, trail: Trail) -> None:
        before = trail.bytes
        while trail.bytes > KEEP_BYTES_OF_ONE and len(trail.entries) > 1:
            trail.forget(trail.entries[0].last)
        self.bytes += trail.bytes - before

    def bridge(self, trail: Trail, last: EventId, data: bytes) -> None:
        """Replaces what is left of a log by one entry that makes up for all that was lost before it."""
        before = trail.bytes
        trail.bridge(last, data)
        self._span().trails[trail] = last
        self.bytes += trail.bytes - before

    def remember(self, redo: Redo, size: int) -> None:
        """Keeps a step that holds about ``size`` bytes."""
        span, size = self._span(), size + _OVERHEAD
        span.redos.append(redo)
        span.redo_bytes += size
        span.bytes += size
        self.bytes += size
        self._shrink()

    def _span(self) -> _Span:
        """The current span; when it is full a new one, which lets go of those that are old enough."""
        span, now = self._spans[-1], self._clock()
        if now < span.ends and span.bytes < SPAN_BYTES:
            return span
        self._spans.append(_Span(now))
        # Time stands still while the server is away or has not got everything back.
        if self._presence.trouble is None and not self._presence.recovering:
            while self._spans[0].ends <= now - KEEP_S:
                self._drop()
        return self._spans[-1]

    def let_go(self) -> None:
        """To be called now and then: what is old goes also when nothing is written."""
        self._span()

    def _shrink(self) -> None:
        while self.bytes > KEEP_BYTES and len(self._spans) > 1:
            self._drop()

    def _drop(self) -> None:
        span = self._spans.popleft()
        self.bytes -= span.redo_bytes
        for trail, last in span.trails.items():
            before = trail.bytes
            trail.forget(last)
            self.bytes += trail.bytes - before

    def _begin(self) -> None:
        if self._task is not None:
            self._task.cancel()
        redos = [redo for span in self._spans for redo in span.redos]
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
