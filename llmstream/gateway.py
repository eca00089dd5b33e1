"""The one object that HTTP and the command line talk to. Everything is two verbs: submit a job, follow its log."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from msgspec.structs import replace

from llmstream.acceptance import Acceptance, Submission, refuse_long_prompt
from llmstream.access.access import Access
from llmstream.cache import Cache
from llmstream.config import Settings
from llmstream.duplicates import Identity
from llmstream.errors import (
    BadRequest,
    Conflict,
    ContextLengthExceeded,
    ModelNotFound,
    NotFound,
    ShuttingDown,
)
from llmstream.filters.filters import Filters
from llmstream.providers.base import Provider
from llmstream.routing.router import Router
from llmstream.scheduler.audience import MemorySeat
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.budgets import Spent
from llmstream.store.follower import Follower
from llmstream.store.lanes import Census, Lives, Standing
from llmstream.store.memory import in_memory
from llmstream.store.owned import OWNED_JOBS
from llmstream.store.repeats import digest
from llmstream.store.store import Store
from llmstream.telemetry.observer import Observer
from llmstream.transcript import Transcript
from llmstream.types import (
    BEGINNING,
    LOCAL,
    Clock,
    EventId,
    Failure,
    Finished,
    GenerateRequest,
    Job,
    JobState,
    ModelInfo,
    Principal,
    Restart,
    own_id,
)

if TYPE_CHECKING:
    from llmstream.broker.core import OtherCore
    from llmstream.broker.inbox import Inbox
    from llmstream.broker.messages import Order
    from llmstream.webhooks.webhooks import Webhooks

MAX_ID = 128
"""Characters of the ids that other cores take."""

logger = logging.getLogger(__name__)


class Gateway:
    """Accepts jobs, reads their logs, ends them. Does not know HTTP, and does not know models."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        router: Router,
        scheduler: Scheduler,
        clock: Clock = time.time,
        observer: Observer | None = None,
        access: Access | None = None,
        filters: Filters | None = None,
    ) -> None:
        self.settings = settings
        self.filters = filters or Filters({}, settings.presidio)
        """What requests go through before anything of them is kept; those that become jobs do so by themselves."""
        self.access = access
        """Who may use the gateway; None: everybody who can reach it."""
        self.replica = scheduler.replica
        self.observer = observer or Observer()
        self._store = store
        self._router = router
        self._scheduler = scheduler
        self._clock = clock
        self.control = scheduler.control
        """Pauses and drains parts of the queue."""
        self.sessions = store.sessions(settings.chat_history.ttl_seconds)
        """The conversations on record."""
        self.cache = Cache(store, settings.cache, settings.store.retention_s)
        self.acceptance = Acceptance(
            settings, store, router, scheduler, clock, self.observer, access, self.filters, self.cancel
        )
        """How requests become jobs."""

    @property
    def inbox(self) -> Inbox | None:
        """The way through RabbitMQ, where that is configured."""
        return self.acceptance.inbox

    @property
    def webhooks(self) -> Webhooks | None:
        """Who tells others of the end of jobs, where that is configured."""
        return self.acceptance.webhooks

    async def submit(
        self, request: GenerateRequest, *, identity: Identity | None = None, **given: Unpack[Submission]
    ) -> Job:
        """Accepts a job; from here on it reaches a terminal state whatever happens to this process. Only a memory job
        ends with the process.

        A request whose ``identity`` was accepted before is that job, which may be running or over.

        Raises BadRequest or ModelNotFound for what can never run, Overloaded with ``retry_after`` when the queue is
        full, RateLimited with it when the principal's limits are reached, Draining, Conflict when the identity belongs
        to a different request, NobodyLeft, ShuttingDown, StoreUnavailable. After an error nothing is left behind.
        """
        job = await self.acceptance.admit(request, identity=identity, **given)
        principal = given.get("principal")
        if in_memory(job.id):
            return await self.acceptance.accept_here(job, identity, principal)
        job = await self.acceptance.duplicates.identify(job, identity)
        return await self.acceptance.accept(job, identity, principal)

    async def start(
        self, request: GenerateRequest, *, identity: Identity | None = None, **given: Unpack[Submission]
    ) -> tuple[Job, Follower]:
        """Like :meth:`submit`, and reads the job from its beginning; close the follower."""
        job = await self.acceptance.admit(request, identity=identity, **given)
        principal = given.get("principal")
        if in_memory(job.id):
            return job, self.read(await self.acceptance.accept_here(job, identity, principal))
        job = await self.acceptance.duplicates.identify(job, identity)
        follower = self._store.log.follow(job.id, newborn=identity is None or not identity.named)
        seat = follower.seat = self._scheduler.audience.seat()
        try:
            job = await self.acceptance.accept(job, identity, principal, seat)
        except BaseException:
            follower.close()
            raise
        return job, follower

    def follow(self, job_id: str, after: EventId = BEGINNING) -> Follower:
        """Follows a job's log from behind a position. Check with :meth:`job` that there is such a job."""
        return self._store.log.follow(job_id, after)

    def read(self, job: Job, after: EventId = BEGINNING) -> Follower:
        """Like :meth:`follow`, for a client whose leave may end the job: its seat is to be taken, and left."""
        follower = self.follow(job.id, after)
        if in_memory(job.id):
            follower.seat = MemorySeat(self._store.memory, job.id)
            return follower
        seat = follower.seat = self._scheduler.audience.seat()
        seat.bind(job, self._scheduler.lanes_of(job.pool), counted=False)
        return follower

    async def job(self, job_id: str) -> JobState:
        """The record of a job. Raises NotFound, and Conflict for a memory job of another replica."""
        return await self._store.records(job_id).get(job_id)

    @property
    def core(self) -> OtherCore | None:
        """Another core that runs orders in place of this service, where one is configured."""
        return self.inbox.core if self.inbox is not None else None

    async def order(
        self, order: Order, identity: Identity | None, principal: Principal, deadline_s: float | None
    ) -> tuple[str, str | Failure]:
        """Lets the other core run an order: the id it has there, and the answer.

        Raises what :meth:`OtherCore.ask` raises, and like :meth:`submit` for what may not be asked for.
        """
        assert self.core is not None
        if self.acceptance.closing:
            raise ShuttingDown("This replica is shutting down; try again, another one will answer.", retry_after=1)
        request = order.request("", {})
        refuse_long_prompt(request, self.settings.security.max_prompt_chars)
        if principal.models is not None and not principal.may_use(request.model):
            raise ModelNotFound(
                f"This API key has no model {order.meta.model!r}; say one of its models with meta.model.",
                param="meta.model",
            )
        await self._scheduler.charges.request(principal.metered)  # what it uses over there nobody tells
        request = await self.filters.masked(await self.filters.redacted(request))
        order = order.saying(request.messages)
        job = Job(order.job_id, request, pool="", created_at=self._clock(), principal=principal.id)
        job = await self.acceptance.duplicates.identify(job, identity)
        if len(job.id) > MAX_ID:
            raise BadRequest(
                f"job_id is too long: with the key's name it may have {MAX_ID} characters.", param="job_id"
            )
        try:
            answer = await self.core.ask(replace(order, job_id=job.id), deadline_s)
        except Conflict:
            raise identity.conflict() if identity is not None else Conflict("The order's id is taken.") from None
        return job.id, await self.filters.answered(request, answer) if isinstance(answer, str) else answer

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

    async def fits(self, request: GenerateRequest) -> bool:
        """Whether prompt and answer have room in the model's context, where that is known."""
        try:
            await self._router.route(request).check(request)
        except ContextLengthExceeded:
            return False
        return True

    async def count_request(self, principal: Principal) -> None:
        """Counts a request for an answer that is there already. Raises RateLimited, StoreUnavailable."""
        await self._scheduler.charges.request(principal.metered)

    async def came_before(self, identity: Identity, principal: Principal) -> bool:
        """Whether a request with this name is a job already."""
        return await self.acceptance.came_before(identity, principal)

    async def standing(self, state: JobState) -> Standing:
        """Position in the queue and the time until its turn comes."""
        if in_memory(state.job.id):
            return await self._scheduler.standing(state.job)
        return await self._scheduler.lanes_of(state.job.pool).standing(state.job.id)

    async def cancel(self, job_id: str) -> JobState:
        """Ends a job wherever it waits or runs; what it has produced stays readable. Cancelling twice is fine."""
        ended = await self._store.records(job_id).end(job_id, Finished(status="cancelled", at=self._clock()))
        self._scheduler.stop_job(job_id)
        self._store.log.note_end(job_id, ended)
        state = await self.job(job_id)
        if state.job.counted is not None:
            await self._scheduler.charges.settle(job_id)
        if not in_memory(job_id):
            # Also when it had ended before: the answer to an earlier call may have been lost half-way.
            # Between its record and its place in line nobody knows of it but whoever asks for its end.
            unseen = state.status == "cancelled" and state.attempt == 0
            await self._scheduler.lanes_of(state.job.pool).remove(job_id, state.job.receivers if unseen else ())
            if self.webhooks is not None and state.job.receivers:
                self.webhooks.wake()
            if state.job.counted is not None:
                self._scheduler.kick(state.job.pool)  # another one of the caller's may have its place
            if self.acceptance.posting is not None:
                self.acceptance.posting.over(job_id)
        return state

    async def requeue(self, job_id: str, principal: Principal | None = None) -> Job:
        """Runs a failed or cancelled job once more: as a new job, for the old one's log has its end, and every reader
        has seen it. The new one begins with the old one's answer where that can be continued. Repeating it is fine.
        It belongs to whom the old one belongs, and ``principal`` says what may be asked for.

        Raises NotFound, Conflict for a job that did not fail, and what :meth:`submit` raises.
        """
        state = await self.job(job_id)
        if in_memory(job_id):
            raise Conflict(f"Job {job_id!r} has durability 'memory' and cannot be requeued; send its request again.")
        if state.status not in {"failed", "cancelled"}:
            raise Conflict(f"Job {job_id!r} is {state.status}; only failed and cancelled jobs can be requeued.")
        old = state.job
        deadline_s = None if old.expires_at is None else old.expires_at - old.created_at
        principal = replace(principal or Principal(), id=old.principal)
        job = await self.acceptance.admit(
            old.request,
            principal=principal,
            priority=old.priority,
            session_id=old.session_id,
            deadline_s=deadline_s,
            durability=old.durability,
            restarts=old.restarts,
            webhook=old.webhook,
        )
        name = digest("requeue", old.id)
        new_id = await self._store.repeats.point(name, job.id, self.settings.store.retention_s)
        job = await self.acceptance.accept(
            replace(job, id=new_id, fingerprint=name, continues=old.id), None, principal, named=True
        )
        await self._scheduler.lanes_of(old.pool).revive(old.id)
        return job

    async def dead(self, limit: int = 50, principal: str | None = None) -> list[JobState]:
        """Jobs of all pools this replica knows that failed after all their attempts, latest first; those of one
        principal, if it is named."""
        most = limit if principal is None else OWNED_JOBS
        found = [job_id for pool in self._scheduler.pools.values() for job_id in await pool.lanes.dead(most)]
        if principal is not None:
            own = set(await self._store.owned.latest(principal))
            found = [job_id for job_id in found if job_id in own]
        states = await self._store.jobs.find_all(found)
        return sorted(states, key=lambda state: state.finished_at or 0.0, reverse=True)[:limit]

    async def latest_job(self, session_id: str, principal: str = LOCAL) -> str:
        """Id of the latest job of a principal's session; a job without a session is a session of its own. Raises
        NotFound."""
        if in_memory(session_id):
            return (await self.job(session_id)).job.id
        jobs = await self._store.jobs.session_jobs(session_id, principal)
        if own := self._store.memory.latest(session_id, principal):
            logged = await self._store.jobs.find(jobs[0]) if jobs else None
            if logged is None or logged.job.created_at < own.job.created_at:
                return own.job.id
        if jobs:
            return jobs[0]
        for job_id in dict.fromkeys((session_id, own_id(principal, session_id))):
            if await self._store.jobs.find(job_id) is not None:
                return job_id
        raise NotFound(f"There is no session {session_id!r}; it never existed or its retention time is over.")

    async def recent(self, limit: int = 50, principal: str | None = None) -> list[JobState]:
        """The latest jobs of all pools of all replicas, newest first; those of one principal, if it is named."""
        found = [] if principal is None else await self._store.owned.latest(principal, limit)
        for pool in await self._store.pools() if principal is None else ():
            found += await self._scheduler.lanes_of(pool).recent(limit)
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
        return {pool: await self._scheduler.lanes_of(pool).census() for pool in sorted(await self._store.pools())}

    async def alive(self) -> AsyncIterator[list[Lives]]:
        """All logged jobs that wait in a queue or run, in pages."""
        for pool in sorted(await self._store.pools()):
            async for page in self._scheduler.lanes_of(pool).alive():
                yield page

    def store_time(self) -> float:
        """Seconds since the epoch by the store's clock, about."""
        return self._scheduler.store_time(next(iter(self._scheduler.pools), ""))

    async def find_all(self, job_ids: Sequence[str]) -> list[JobState]:
        """The records of logged jobs; unknown ids are left out."""
        return await self._store.jobs.find_all(list(job_ids))

    async def spent(self, target: str) -> Spent:
        """What a target, ``provider/model``, has at the moment from all replicas, as far as it is limited. Raises
        StoreUnavailable."""
        return await self._scheduler.gates.budgets.spent(target)

    @property
    def breakers(self) -> Mapping[str, str]:
        """The targets whose breakers are not closed: ``open`` or ``half_open``."""
        return self._scheduler.gates.breakers.states

    @property
    def unready(self) -> str | None:
        """Why new work should go to another replica; None when this one takes it."""
        if self.acceptance.closing:
            return "This replica is shutting down."
        trouble = self._store.presence.trouble or (self.acceptance.posting and self.acceptance.posting.broker.trouble)
        return trouble.message if trouble else None

    async def health(self) -> dict[str, Any]:
        """Everything behind this replica, with the time each look took; never raises."""
        parts: dict[str, Any] = {"store": await _timed(self._store.health())}
        if self.inbox is not None:
            parts["broker"] = self.inbox.health()
        parts["providers"] = {provider.name: await _timed(provider.health()) for provider in self.providers}
        looked_at = [parts["store"], parts.get("broker", parts["store"]), *parts["providers"].values()]
        healthy = all(part["status"] == "ok" for part in looked_at)
        return {"status": "ok" if healthy else "degraded", "replica": self.replica, **parts}

    async def close(self) -> None:
        """Accepts no new job, lets running ones end within the grace time or hands them over; safe to call twice."""
        if not self.acceptance.closing:
            self.acceptance.closing = True
            if self.inbox is not None:
                await self.inbox.broker.stop_taking()
            await self._scheduler.close(self.settings.server.shutdown_grace_s)


async def _timed(look: Any) -> dict[str, Any]:
    start = time.perf_counter()
    found = await look
    return {**found, "took_ms": round((time.perf_counter() - start) * 1000, 3)}
