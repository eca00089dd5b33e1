"""The one object that HTTP and the command line talk to. Everything is two verbs: submit a job, follow its log."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from llmstream.config import Settings
from llmstream.errors import Conflict, NotFound, Overloaded, ShuttingDown
from llmstream.providers.base import Provider
from llmstream.providers.build import PullProgress, build_providers
from llmstream.routing.router import Router
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.follower import Follower
from llmstream.store.lanes import Census, Lanes, Standing
from llmstream.store.store import Store, open_store
from llmstream.transcript import Transcript
from llmstream.types import (
    BEGINNING,
    Clock,
    EventId,
    Finished,
    GenerateRequest,
    Job,
    JobState,
    ModelInfo,
    Principal,
    Restart,
    new_id,
)

DEFAULT_RETRY_AFTER_S = 1.0

logger = logging.getLogger(__name__)


class Gateway:
    """Accepts jobs, reads their logs, ends them. Does not know HTTP, and does not know models."""

    def __init__(
        self, settings: Settings, store: Store, router: Router, scheduler: Scheduler, clock: Clock = time.time
    ) -> None:
        self.settings = settings
        self.replica = scheduler.replica
        self._store = store
        self._router = router
        self._scheduler = scheduler
        self._clock = clock
        self._closing = False

    async def submit(
        self,
        request: GenerateRequest,
        *,
        principal: Principal | None = None,
        priority: int = 0,
        session_id: str | None = None,
        deadline_s: float | None = None,
    ) -> Job:
        """Accepts a job; from here on it reaches a terminal state whatever happens to this process.

        Raises BadRequest or ModelNotFound for what can never run, Overloaded with ``retry_after`` when the queue is
        full, ShuttingDown, StoreUnavailable. After an error nothing is left behind.
        """
        job = await self._admit(request, principal or Principal(), priority, session_id, deadline_s)
        await self._enqueue(job)
        return job

    async def start(
        self,
        request: GenerateRequest,
        *,
        principal: Principal | None = None,
        priority: int = 0,
        session_id: str | None = None,
        deadline_s: float | None = None,
    ) -> tuple[Job, Follower]:
        """Like :meth:`submit`, and follows the job from its beginning; close the follower."""
        job = await self._admit(request, principal or Principal(), priority, session_id, deadline_s)
        follower = self._store.log.follow(job.id, newborn=True)
        try:
            await self._enqueue(job)
        except BaseException:
            follower.close()
            raise
        return job, follower

    def follow(self, job_id: str, after: EventId = BEGINNING) -> Follower:
        """Follows a job's log from behind a position. Check with :meth:`job` that there is such a job."""
        return self._store.log.follow(job_id, after)

    async def job(self, job_id: str) -> JobState:
        """The record of a job. Raises NotFound."""
        return await self._store.jobs.get(job_id)

    async def transcript(self, job_id: str) -> Transcript:
        """The answer so far, read from the log."""
        transcript = Transcript()
        async for event in self._store.log.events(job_id):
            transcript.add(event)
        return transcript

    async def last_restart(self, job_id: str) -> EventId | None:
        """Where the answer last started over; None when it never did."""
        found: EventId | None = None
        async for event in self._store.log.events(job_id):
            if isinstance(event.data, Restart):
                found = event.id
        return found

    async def exhausted(self, state: JobState, after: EventId) -> bool:
        """True when the job is over and its log holds nothing behind ``after``."""
        return state.done and not await self._store.log.read(state.job.id, after, 1)

    async def standing(self, state: JobState) -> Standing:
        """Position in the queue and the time until its turn comes."""
        return await self._lanes(state.job.pool).standing(state.job.id)

    async def cancel(self, job_id: str) -> JobState:
        """Ends a job wherever it waits or runs; what it has produced stays readable. Cancelling twice is fine."""
        ended = await self._store.jobs.end(job_id, Finished(status="cancelled", at=self._clock()))
        self._scheduler.stop_job(job_id)
        self._store.log.note_end(job_id, ended)
        state = await self.job(job_id)
        # Also when it had ended before: the answer to an earlier call may have been lost half-way.
        await self._lanes(state.job.pool).remove(job_id)
        return state

    async def latest_job(self, session_id: str) -> str:
        """Id of the latest job of a session; a job without a session is a session of its own. Raises NotFound."""
        if jobs := await self._store.jobs.session_jobs(session_id):
            return jobs[0]
        if await self._store.jobs.find(session_id) is None:
            raise NotFound(f"There is no session {session_id!r}; it never existed or its retention time is over.")
        return session_id

    async def recent(self, limit: int = 50) -> list[JobState]:
        """The latest jobs of all pools of all replicas, newest first."""
        found: list[str] = []
        for pool in await self._store.pools():
            found += await self._lanes(pool).recent(limit)
        states = await self._store.jobs.find_all(found)
        return sorted(states, key=lambda state: state.job.created_at, reverse=True)[:limit]

    @property
    def models(self) -> list[ModelInfo]:
        return self._router.models

    @property
    def pools(self) -> list[str]:
        """Names of the pools this replica claims from."""
        return list(self._scheduler.pools)

    @property
    def providers(self) -> Sequence[Provider]:
        return self._router.providers

    async def stats(self) -> dict[str, Census]:
        """Counts by pool, whichever replica serves it."""
        return {pool: await self._lanes(pool).census() for pool in sorted(await self._store.pools())}

    async def health(self) -> dict[str, Any]:
        """Everything behind this replica, with the time each look took; never raises."""
        parts: dict[str, Any] = {"store": await _timed(self._store.health())}
        parts["providers"] = {provider.name: await _timed(provider.health()) for provider in self.providers}
        healthy = parts["store"]["status"] == "ok" and all(
            part["status"] == "ok" for part in parts["providers"].values()
        )
        return {"status": "ok" if healthy else "degraded", "replica": self.replica, **parts}

    async def close(self) -> None:
        """Accepts no new job, lets running ones end within the grace time or hands them over; safe to call twice."""
        if not self._closing:
            self._closing = True
            await self._scheduler.close(self.settings.server.shutdown_grace_s)

    async def _admit(
        self,
        request: GenerateRequest,
        principal: Principal,
        priority: int,
        session_id: str | None,
        deadline_s: float | None,
    ) -> Job:
        if self._closing:
            raise ShuttingDown("This replica is shutting down; try again, another one will answer.", retry_after=1)
        target = self._router.target(request)
        await target.provider.check(request)
        now = self._clock()
        return Job(
            id=new_id(self._clock),
            request=request,
            pool=target.provider.pool,
            created_at=now,
            principal=principal.id,
            priority=priority,
            session_id=session_id,
            expires_at=None if deadline_s is None else now + deadline_s,
        )

    async def _enqueue(self, job: Job) -> None:
        lanes = self._lanes(job.pool)
        if not await self._store.jobs.create(job):
            raise Conflict(f"The job id {job.id!r} is taken by a different request.", param="job_id")
        if not await lanes.push(job, wake=not self._scheduler.takes(job.pool)):
            await self._store.jobs.discard(job.id)
            raise await self._overloaded(lanes)
        if job.session_id is not None:
            await self._store.jobs.join_session(job.session_id, job)
        self._scheduler.kick(job.pool)

    async def _overloaded(self, lanes: Lanes) -> Overloaded:
        census = await lanes.census()
        waiting, slots = sum(census.waiting.values()), sum(census.slots.values())
        known = census.service_s is not None and slots > 0
        # A place is free as soon as one waiting job is claimed: one service time over all slots.
        wait = max(census.service_s / slots, 0.05) if known and census.service_s else DEFAULT_RETRY_AFTER_S
        return Overloaded(
            f"{waiting} jobs wait already, which is the limit (scheduler.max_waiting). Try again in {wait:.1f} s.",
            retry_after=wait,
        )

    def _lanes(self, pool: str) -> Lanes:
        known = self._scheduler.pools.get(pool)
        return known.lanes if known is not None else self._store.lanes(pool, self.settings.scheduler)


async def _timed(look: Any) -> dict[str, Any]:
    start = time.perf_counter()
    found = await look
    return {**found, "took_ms": round((time.perf_counter() - start) * 1000, 3)}


@asynccontextmanager
async def open_gateway(
    settings: Settings, *, clock: Clock = time.time, progress: PullProgress | None = None
) -> AsyncIterator[Gateway]:
    """Puts all parts together: store, providers, router, scheduler. The only place where they meet.

    ``progress`` hears how far the download of missing weights is.
    """
    replica = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(settings.store, settings.data_dir))
        providers = await build_providers(settings, progress)
        for provider in providers:
            stack.push_async_callback(provider.close)
            await provider.open()
        router = Router(providers)
        scheduler = Scheduler(
            store, router, replica, settings=settings.scheduler, deadlines=settings.deadlines, clock=clock
        )
        await scheduler.open()
        gateway = Gateway(settings, store, router, scheduler, clock)
        try:
            yield gateway
        finally:
            await gateway.close()
