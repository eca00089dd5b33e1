"""The readers on this replica, and the end of jobs that nobody reads.

Only jobs with a grace time are counted. Each reader has a lease in the store; the pool keeps, for each such job, when
to look at its readers again, so that a replica that dies with its readers is noticed by the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from llmstream.errors import StoreUnavailable
from llmstream.store.jobs import Kept
from llmstream.store.lanes import Lanes
from llmstream.store.memory import Memory
from llmstream.store.readers import Lease
from llmstream.store.store import Store
from llmstream.types import Clock, Finished, Job

LEASE_S = 10.0
"""For so long readers count whose replica says nothing: what a client that was cut off by us gets to come back."""
RENEW_STEPS = 32

logger = logging.getLogger(__name__)


class Audience:
    """Everybody who reads here and counts."""

    def __init__(
        self,
        store: Store,
        replica: str,
        *,
        clock: Clock,
        stop_job: Callable[[str], None],
        settle: Callable[[str], Awaitable[None]],
    ) -> None:
        self._store = store
        self._replica = replica
        self._clock = clock
        self._stop_job = stop_job
        self._settle = settle
        self._taken: set[Seat] = set()
        self._number = 0
        self._renewing: asyncio.Task[None] | None = None
        self._due = asyncio.Event()
        store.presence.on_rebirth.append(self._due.set)

    async def open(self) -> None:
        self._renewing = asyncio.create_task(self._renew(), name="audience")

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    def seat(self) -> Seat:
        """A place for one reader."""
        self._number += 1
        return Seat(self, self._store, Lease(f"{self._replica}:{self._number}", LEASE_S))

    async def look(self, job_id: str, lanes: Lanes) -> None:
        """Ends a job that nobody has read for as long as it allows. Raises StoreUnavailable."""
        found = await self._store.jobs.abandon(job_id, Finished(status="cancelled", at=self._clock()))
        if isinstance(found, Kept):
            await lanes.look_again(job_id, found.until_ms)
        elif found is None or found.entry is None:
            await lanes.look_no_more(job_id)
        else:
            logger.info("nobody reads the job any more; it is cancelled", extra={"job_id": job_id})
            self._stop_job(job_id)
            self._store.log.note_end(job_id, found)
            await self._settle(job_id)
            await lanes.remove(job_id)

    def keep(self, seat: Seat) -> None:
        self._taken.add(seat)

    def drop(self, seat: Seat) -> None:
        self._taken.discard(seat)

    async def _renew(self) -> None:
        """Goes round all readers, a few at each step, so that thousands are no burst; at once when the store may have
        forgotten them."""
        while True:
            readers = list(self._taken)
            steps = max(min(len(readers), RENEW_STEPS), 1)
            for step in range(steps):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEASE_S / 3 / steps):
                        await self._due.wait()
                if self._due.is_set():
                    self._due.clear()
                    await self._renew_some(list(self._taken))
                    break
                await self._renew_some([seat for seat in readers[step::steps] if seat in self._taken])

    @staticmethod
    async def _renew_some(seats: Sequence[Seat]) -> None:
        outcomes = await asyncio.gather(*(seat.renew() for seat in seats), return_exceptions=True)
        for error in outcomes:
            if isinstance(error, BaseException):
                logger.warning("readers could not be counted: %s", error)
                break


class Seat:
    """One reader's place. For a job that goes on without readers it is nothing."""

    def __init__(self, audience: Audience, store: Store, lease: Lease) -> None:
        self.lease = lease
        self._audience = audience
        self._store = store
        self._job_id: str | None = None
        self._lanes: Lanes | None = None
        self._counted = False

    def bind(self, job: Job, lanes: Lanes, *, counted: bool) -> None:
        """Says which job is read; ``counted`` where its record knows this reader already."""
        if job.grace_s is not None:
            self._job_id, self._lanes, self._counted = job.id, lanes, counted
            if counted:
                self._audience.keep(self)

    async def take(self) -> None:
        """Counts the reader from now on."""
        if self._job_id is None or self._counted:
            return
        self._counted = True
        self._audience.keep(self)
        try:
            await self.renew()
        except StoreUnavailable as error:
            logger.warning("a reader is counted later: %s", error.message, extra={"job_id": self._job_id})

    def renew(self) -> asyncio.Future[Any]:
        """Goes on counting the reader; the future may bring StoreUnavailable. Only for a seat with a job."""
        assert self._job_id is not None
        return self._store.readers.join(self._job_id, self.lease)

    async def leave(self) -> None:
        """The client went away by itself. Where the store cannot be told, the lease lapses."""
        self.close()
        if self._job_id is None or self._lanes is None:
            return
        try:
            due_ms = await self._store.readers.leave(self._job_id, self.lease.reader)
            # A store that has just come back may have forgotten other readers; a heartbeat looks for them later.
            if due_ms is not None and not self._store.presence.recovering:
                # Tells when to look again, or ends the job at once where it allows no time.
                await self._audience.look(self._job_id, self._lanes)
        except StoreUnavailable as error:
            logger.warning("a reader's leave is noticed later: %s", error.message, extra={"job_id": self._job_id})

    def close(self) -> None:
        """Stops renewing the lease; safe to call twice."""
        self._audience.drop(self)


class MemorySeat:
    """One reader's place at a memory job: all its readers are in this process."""

    def __init__(self, memory: Memory, job_id: str) -> None:
        self._memory = memory
        self._job_id = job_id
        self._taken = False

    async def take(self) -> None:
        """Counts the reader from now on."""
        self._taken = True
        self._memory.join(self._job_id)

    async def leave(self) -> None:
        """The client went away by itself."""
        self.close()

    def close(self) -> None:
        """Counts the reader no more; safe to call twice."""
        if self._taken:
            self._taken = False
            self._memory.leave(self._job_id)
