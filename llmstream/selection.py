"""Many jobs at once: those that wait or run and fit a filter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from llmstream.errors import NotFound
from llmstream.gateway import Gateway
from llmstream.store.lanes import Lives
from llmstream.types import JobState, Lane, lane_of

AT_ONCE = 50
"""Jobs that are cancelled at the same time."""
TIME_S = 10.0
"""What one call works for at most."""


class JobFilter(NamedTuple):
    """All of it must hold of a job; None: anything does."""

    status: Literal["queued", "scheduled", "in_progress"] | None = None
    """``scheduled``: those of the queued ones whose time to begin is still to come."""
    lane: Lane | None = None
    min_priority: int | None = None
    max_priority: int | None = None
    model: str | None = None
    """``*`` stands for any characters, ``?`` for any one."""
    session_id: str | None = None
    principal: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    """Seconds since the epoch; neither bound is included."""

    def may_fit(self, job: Lives) -> bool:
        """What the queue knows of a job says already whether the rest is worth a look."""
        return (
            self.lane in (None, lane_of(job.priority))
            and (self.min_priority is None or job.priority >= self.min_priority)
            and (self.max_priority is None or job.priority <= self.max_priority)
            and (self.model is None or fnmatchcase(job.model, self.model))
            and self.principal in (None, job.principal)
            and not (job.running and self.status == "scheduled")
        )

    def fits(self, state: JobState, now: float) -> bool:
        """For a job that :meth:`may_fit`, and its record."""
        job = state.job
        return (
            not state.done
            and self._has_status(state, now)
            and self.session_id in (None, job.session_id)
            and (self.created_after is None or job.created_at > self.created_after)
            and (self.created_before is None or job.created_at < self.created_before)
        )

    def _has_status(self, state: JobState, now: float) -> bool:
        if self.status == "scheduled":
            return state.status == "queued" and (state.job.not_before or 0.0) > now
        return self.status in (None, state.status)


class Cancelled(NamedTuple):
    ids: list[str]
    more: bool
    """Whether there was no time or no leave to look at all jobs: asking again goes on."""


async def cancel_all(gateway: Gateway, wanted: JobFilter, limit: int) -> Cancelled:
    """Cancels up to ``limit`` logged jobs that fit at the moment they are looked at, in bounded time. Those that are
    over do not fit any more, so repeating it goes on, and changes nothing in the end."""
    ids: list[str] = []
    deadline = asyncio.get_running_loop().time() + TIME_S
    async for found in _select(gateway, wanted):
        for start in range(0, len(found), AT_ONCE):
            some = found[start : start + AT_ONCE]
            room = limit - len(ids)
            if room <= 0 or asyncio.get_running_loop().time() >= deadline:
                return Cancelled(ids, more=True)
            done = await asyncio.gather(*(_cancel(gateway, job_id) for job_id in some[:room]))
            ids += [job_id for job_id, ended in zip(some, done, strict=False) if ended]
            if len(some) > room:
                return Cancelled(ids, more=True)
    return Cancelled(ids, more=False)


async def _select(gateway: Gateway, wanted: JobFilter) -> AsyncIterator[list[str]]:
    async for page in gateway.alive():
        candidates = [job.id for job in page if wanted.may_fit(job)]
        states = await gateway.find_all(candidates)
        now = gateway.store_time()
        yield [state.job.id for state in states if wanted.fits(state, now)]


async def _cancel(gateway: Gateway, job_id: str) -> bool:
    try:
        return (await gateway.cancel(job_id)).status == "cancelled"
    except NotFound:
        return False  # over since, and forgotten
