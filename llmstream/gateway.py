"""The one object that HTTP and the command line talk to. Everything is two verbs: submit a job, follow its log."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

from msgspec.structs import replace

from llmstream.access.access import Access, open_access
from llmstream.cache import Cache
from llmstream.config import Settings
from llmstream.config_webhooks import NOTHING_SIGNS
from llmstream.duplicates import Duplicates, Identity
from llmstream.errors import (
    BadRequest,
    BrokerUnavailable,
    ConfigError,
    Conflict,
    ContextLengthExceeded,
    Draining,
    LLMStreamError,
    ModelNotFound,
    NotFound,
    Overloaded,
    RateLimited,
    ShuttingDown,
    StoreUnavailable,
)
from llmstream.filters.filters import Filters
from llmstream.providers.base import Provider
from llmstream.providers.build import PullProgress, build_providers
from llmstream.providers.tokens import Tokenizer
from llmstream.routing.gates import NobodyLeft
from llmstream.routing.retry import Backoff
from llmstream.routing.router import Router, limits_of
from llmstream.scheduler.accounts import Accounts
from llmstream.scheduler.audience import MemorySeat, Seat
from llmstream.scheduler.charges import counted
from llmstream.scheduler.control import draining
from llmstream.scheduler.gauges import watch_pools
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.budgets import Spent
from llmstream.store.follower import Follower
from llmstream.store.jobs import Created
from llmstream.store.lanes import Census, Lanes, Lives, Pushed, Standing
from llmstream.store.memory import in_memory
from llmstream.store.owned import OWNED_JOBS
from llmstream.store.readers import NOBODY, Lease
from llmstream.store.repeats import digest
from llmstream.store.store import Store, open_store
from llmstream.telemetry.observer import Observer, open_tracing
from llmstream.telemetry.origin import ORIGIN
from llmstream.transcript import Transcript
from llmstream.types import (
    BEGINNING,
    LOCAL,
    TERMINAL,
    Clock,
    Durability,
    EventId,
    Failure,
    Finished,
    GenerateRequest,
    Job,
    JobState,
    Kind,
    ModelInfo,
    Principal,
    Restart,
    Webhook,
    new_id,
    own_id,
)

if TYPE_CHECKING:
    from llmstream.broker.core import OtherCore
    from llmstream.broker.inbox import Inbox
    from llmstream.broker.messages import Order
    from llmstream.webhooks.webhooks import Webhooks

DEFAULT_RETRY_AFTER_S = 1.0
STORE_RETRY_AFTER_S = 1.0
MAX_ID = 128
"""Characters of the ids that other cores take."""
_PROMPTS: Final[dict[Kind, str]] = {"chat": "messages", "completion": "prompt", "embedding": "input"}

logger = logging.getLogger(__name__)


class Submission(TypedDict, total=False):
    """What can be said about a job beside its request."""

    principal: Principal | None
    """Who asks; by default whoever may use a server without keys."""
    priority: int
    session_id: str | None
    deadline_s: float | None
    durability: Durability | None
    grace_s: float | None
    """The job is cancelled once nobody has read it for so long."""
    restarts: bool
    """False: an answer that its model breaks off where it cannot go on fails, and keeps what was said."""
    not_before: float | None
    """Seconds since the epoch before which the job does not begin, by the store's clock."""
    delay_s: float | None
    """The same, in seconds from now."""
    patience_s: float | None
    """Somebody waits for the answer: for so long at most while all its targets are left alone."""
    webhook: Webhook | None
    """Who is to be told of its end, beside the receivers of the configuration."""


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
        self._closing = False
        self.control = scheduler.control
        """Pauses and drains parts of the queue."""
        self.sessions = store.sessions(settings.chat_history.ttl_seconds)
        """The conversations on record."""
        self.cache = Cache(store, settings.cache, settings.store.retention_s)
        self.inbox: Inbox | None = None
        """The way through RabbitMQ, where that is configured."""
        self.webhooks: Webhooks | None = None
        """Who tells others of the end of jobs, where that is configured."""
        self._duplicates = Duplicates(
            store, key_s=settings.store.retention_s, retry_window_s=settings.server.retry_window_s
        )

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
        job = await self._admit(request, identity=identity, **given)
        principal = given.get("principal")
        if in_memory(job.id):
            return await self._accept_here(job, identity, principal)
        job = await self._duplicates.identify(job, identity)
        return await self._accept(job, identity, principal)

    async def start(
        self, request: GenerateRequest, *, identity: Identity | None = None, **given: Unpack[Submission]
    ) -> tuple[Job, Follower]:
        """Like :meth:`submit`, and reads the job from its beginning; close the follower."""
        job = await self._admit(request, identity=identity, **given)
        principal = given.get("principal")
        if in_memory(job.id):
            return job, self.read(await self._accept_here(job, identity, principal))
        job = await self._duplicates.identify(job, identity)
        follower = self._store.log.follow(job.id, newborn=identity is None or not identity.named)
        seat = follower.seat = self._scheduler.audience.seat()
        try:
            job = await self._accept(job, identity, principal, seat)
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
        seat.bind(job, self._lanes(job.pool), counted=False)
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
        if self._closing:
            raise ShuttingDown("This replica is shutting down; try again, another one will answer.", retry_after=1)
        request = order.request("", {})
        _refuse_long_prompt(request, self.settings.security.max_prompt_chars)
        if principal.models is not None and not principal.may_use(request.model):
            raise ModelNotFound(
                f"This API key has no model {order.meta.model!r}; say one of its models with meta.model.",
                param="meta.model",
            )
        await self._scheduler.charges.request(principal.metered)  # what it uses over there nobody tells
        request = await self.filters.masked(await self.filters.redacted(request))
        order = order.saying(request.messages)
        job = Job(order.job_id, request, pool="", created_at=self._clock(), principal=principal.id)
        job = await self._duplicates.identify(job, identity)
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
        return await self._duplicates.find(identity, principal.id) is not None

    async def standing(self, state: JobState) -> Standing:
        """Position in the queue and the time until its turn comes."""
        if in_memory(state.job.id):
            return await self._scheduler.standing(state.job)
        return await self._lanes(state.job.pool).standing(state.job.id)

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
            await self._lanes(state.job.pool).remove(job_id, state.job.receivers if unseen else ())
            if self.webhooks is not None and state.job.receivers:
                self.webhooks.wake()
            if state.job.counted is not None:
                self._scheduler.kick(state.job.pool)  # another one of the caller's may have its place
            if self._posting is not None:
                self._posting.over(job_id)
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
        job = await self._admit(
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
        job = await self._accept(
            replace(job, id=new_id, fingerprint=name, continues=old.id), None, principal, named=True
        )
        await self._lanes(old.pool).revive(old.id)
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

    async def alive(self) -> AsyncIterator[list[Lives]]:
        """All logged jobs that wait in a queue or run, in pages."""
        for pool in sorted(await self._store.pools()):
            async for page in self._lanes(pool).alive():
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
        if self._closing:
            return "This replica is shutting down."
        trouble = self._store.presence.trouble or (self._posting and self._posting.broker.trouble)
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
        if not self._closing:
            self._closing = True
            if self.inbox is not None:
                await self.inbox.broker.stop_taking()
            await self._scheduler.close(self.settings.server.shutdown_grace_s)

    async def _admit(
        self,
        request: GenerateRequest,
        *,
        principal: Principal | None = None,
        priority: int = 0,
        session_id: str | None = None,
        deadline_s: float | None = None,
        durability: Durability | None = None,
        grace_s: float | None = None,
        restarts: bool = True,
        not_before: float | None = None,
        delay_s: float | None = None,
        patience_s: float | None = None,
        identity: Identity | None = None,
        webhook: Webhook | None = None,
    ) -> Job:
        principal = principal or Principal()
        if self._closing:
            raise ShuttingDown("This replica is shutting down; try again, another one will answer.", retry_after=1)
        durability = durability or self.settings.store.durability
        if self._store.presence.trouble is not None and durability != "memory":
            raise StoreUnavailable(self._store.presence.trouble.message, retry_after=STORE_RETRY_AFTER_S)
        if self._posting is not None and self._posting.broker.trouble is not None and durability != "memory":
            raise self._posting.broker.trouble
        _refuse_long_prompt(request, self.settings.security.max_prompt_chars)
        if not principal.may_use(request.model):
            raise ModelNotFound(
                f"This API key has no model {request.model!r}; GET /v1/models lists its models.", param="model"
            )
        request = await self.filters.masked(await self.filters.redacted(request))
        route = self._router.route(request)
        await route.check(request)
        if patience_s is not None and (rest_s := self._scheduler.gates.rest_s(route.targets)) > patience_s:
            await self._refuse_new(identity, principal, NobodyLeft.for_s(rest_s))
        self._store.check(durability)
        receivers = self._receivers(principal, webhook, durability)
        now, job_id = self._clock(), new_id(self._clock)
        if not_before is not None or delay_s is not None:
            not_before = self._later(route.pool, not_before, delay_s, durability)
        expires_at = None if deadline_s is None else now + deadline_s
        if not_before is not None and expires_at is not None and expires_at <= not_before:
            raise BadRequest(
                "The job would pass its deadline before it may begin: deadline_s counts from now. Make it longer, or "
                "leave it out.",
                param="deadline_s",
            )
        return Job(
            id=self._store.memory.name(job_id) if durability == "memory" else job_id,
            request=request,
            pool=route.pool,
            created_at=now,
            principal=principal.id,
            priority=priority,
            session_id=session_id,
            expires_at=expires_at,
            durability=durability,
            grace_s=grace_s,
            request_id=ORIGIN.get().request_id,
            traceparent=self.observer.traceparent(),
            counted=counted(principal.metered),
            restarts=restarts,
            not_before=not_before,
            patience_s=patience_s,
            webhook=webhook,
            receivers=receivers,
        )

    def _receivers(self, principal: Principal, webhook: Webhook | None, durability: Durability) -> tuple[str, ...]:
        """Who is to be told of a job's end."""
        if self.webhooks is not None:
            return self.webhooks.receivers.choose(principal, webhook, durability)
        if webhook is None:
            return ()
        raise BadRequest(NOTHING_SIGNS, param="webhook")

    def _later(
        self, pool: str, not_before: float | None, delay_s: float | None, durability: Durability
    ) -> float | None:
        """When a job may begin, in seconds since the epoch; None: now. Raises BadRequest."""
        now, limit = self._scheduler.store_time(pool), self.settings.scheduler.max_delay_s
        param = "not_before" if not_before is not None else "delay_s"
        delay_s = not_before - now if not_before is not None else delay_s or 0.0
        if delay_s <= 0:
            return None
        if delay_s > limit:
            raise BadRequest(
                f"{param} lies {delay_s:.0f} s ahead, and {limit:.0f} s are allowed (scheduler.max_delay_s). A number "
                "in not_before is in seconds since the epoch.",
                param=param,
            )
        if durability == "memory":
            raise BadRequest(
                f"{param} needs a job on record, and durability 'memory' keeps none; leave one of the two out.",
                param=param,
            )
        return now + delay_s if not_before is None else not_before

    async def _refuse_new(self, identity: Identity | None, principal: Principal, error: LLMStreamError) -> None:
        """What came before is there to be read, whoever rests now."""
        if identity is None or not identity.named or not await self.came_before(identity, principal):
            raise error

    async def _accept(
        self,
        job: Job,
        identity: Identity | None,
        principal: Principal | None,
        seat: Seat | None = None,
        *,
        named: bool = False,
    ) -> Job:
        """Charges its caller for a job, and puts it on record and in line; ``named``: it may be there already."""
        metered = principal.metered if principal is not None else None
        if metered is None:
            return await self._enqueue(job, identity, seat)
        named = named or (identity is not None and identity.named)
        there = named and await self._on_record(job.id)
        taken = await self._scheduler.charges.job(job, metered, again=there)
        try:
            return await self._enqueue(job, identity, seat)
        except (BrokerUnavailable, Conflict, Draining, Overloaded, RateLimited):
            # Where an equal request was accepted meanwhile, the tokens are that one's.
            if taken is not None and not (named and await self._on_record(job.id)):
                await self._scheduler.charges.give_back(taken)
            raise

    async def _on_record(self, job_id: str) -> bool:
        (status,) = await self._store.jobs.statuses([job_id])
        return status is not None

    async def _accept_here(self, job: Job, identity: Identity | None, principal: Principal | None) -> Job:
        """Charges its caller for a memory job and accepts it."""
        metered = principal.metered if principal is not None else None
        if metered is None:
            return self._run_here(job, identity)
        if job.counted is not None and (job.counted.concurrent or job.counted.queued):
            self._scheduler.charges.refused("durability")
            raise BadRequest(
                "How many jobs this caller has at once is limited, and jobs of durability 'memory' are on no record "
                "where they could be counted; ask for another durability.",
                param="durability",
            )
        taken = await self._scheduler.charges.job(job, metered)
        try:
            return self._run_here(job, identity)
        except LLMStreamError:
            if taken is not None:
                await self._scheduler.charges.give_back(taken)
            raise

    def _run_here(self, job: Job, identity: Identity | None) -> Job:
        """Accepts a memory job. Other replicas know nothing of it, so it cannot be found under a name there."""
        if identity is not None and (identity.job_id is not None or identity.key is not None):
            name = "job_id" if identity.job_id is not None else "Idempotency-Key"
            raise BadRequest(
                f"{name} needs a job on record, and durability 'memory' keeps none; leave one of the two out.",
                param=name,
            )
        self._scheduler.run_here(job)
        self.observer.accepted(job)
        if job.grace_s is not None:
            self._store.memory.expect(job.id, max(self.settings.disconnect.grace_s, job.grace_s))
        return job

    async def _enqueue(self, job: Job, identity: Identity | None = None, seat: Seat | None = None) -> Job:
        """Puts a job on record and in line; both may have been done before by an equal request."""
        first_s = max(self.settings.disconnect.grace_s, job.grace_s or 0.0)
        expected = Lease(NOBODY, first_s - (job.grace_s or 0.0))
        if self.access is not None:
            self._store.owned.note(job)
        created = await self._store.jobs.create(job, seat.lease if seat else expected)
        if created is None:
            raise identity.conflict() if identity else Conflict(f"The job id {job.id!r} is taken.", param="job_id")
        new, job = created.job is job, created.job
        lanes = self._lanes(job.pool)
        if seat is not None:
            seat.bind(job, lanes, counted=True)
        unread_s = None if job.grace_s is None else seat.lease.seconds if seat else first_s
        if created.status not in TERMINAL:
            if self._posting is not None and not self._sleeps(job):
                if new:
                    await self._check_drain(job)
                await self._post(job, lanes, named=identity is not None and identity.named)
            else:
                # One that runs may have lost its place: the store forgot it, and its replica is gone since.
                wake, again = not self._scheduler.takes(job.pool), created.status != "queued"
                pushed = await lanes.push(job, unread_s, wake=wake, again=again)
                if not pushed:
                    await self._store.jobs.discard(job.id)
                    raise await self._refusal(pushed, job, lanes)
                self._scheduler.expect(job)
            if job.session_id is not None:
                await self._store.jobs.join_session(job.session_id, job)
        self._store.recent.remember(lambda: self._accept_again(job, expected, unread_s), created.size)
        self._scheduler.kick(job.pool)
        if new:
            self.observer.accepted(job)
        return job

    async def _enqueue_again(self, job: Job, expected: Lease, unread_s: float | None) -> Created | None:
        """For a store that may have forgotten an accepted job. One that it knows stays as it is."""
        created = await self._store.jobs.create(job, expected)
        if created is None:
            return None
        if self.access is not None:
            self._store.owned.note(job)
        if job.session_id is not None:  # also when its end was written again before
            await self._store.jobs.join_session(job.session_id, job)
        if created.status not in TERMINAL:
            await self._lanes(job.pool).push(job, unread_s, wake=not self._scheduler.takes(job.pool), again=True)
        return created

    async def _accept_again(self, job: Job, expected: Lease, unread_s: float | None) -> None:
        """For a store that comes back without its last moments."""
        created = await self._enqueue_again(job, expected, unread_s)
        if created is not None and created.status in TERMINAL and job.receivers:
            # Its end was written again, but it went through no queue that would lead to those who were to hear of it.
            await self._store.outbox(job.pool).send_again(job.id, job.receivers)

    @property
    def _posting(self) -> Inbox | None:
        """RabbitMQ, where all jobs go through it."""
        return self.inbox if self.inbox is not None and self.inbox.carries_jobs else None

    async def _post(self, job: Job, lanes: Lanes, *, named: bool) -> None:
        """Posts a job on record to RabbitMQ; after an error it is not run under a name nobody knows."""
        inbox = self._posting
        assert inbox is not None
        try:
            aside = (await lanes.census()).paused if self.control.rules.rules else 0
            if inbox.ready + aside >= self.settings.scheduler.max_waiting:
                raise await self._overloaded(lanes, inbox.ready)
            await inbox.post(job)
        except BrokerUnavailable:
            if named:
                await self._store.jobs.discard(job.id)
            else:  # the message may be there, although nobody confirmed it
                await self.cancel(job.id)
            raise
        except Overloaded:
            await self._store.jobs.discard(job.id)
            raise

    async def _admit_order(self, request: GenerateRequest, priority: int, webhook: Webhook | None) -> Job:
        """What somebody posted to RabbitMQ: never a memory job, as others have to find it."""
        await self._store.presence.recovered()
        durability: Durability = "fsync" if self.settings.store.durability == "fsync" else "full"
        return await self._admit(request, priority=priority, durability=durability, webhook=webhook)

    async def _take_job(self, job: Job) -> Created | None:
        """Puts a job from RabbitMQ on record and in line, whichever of both is still to be done."""
        first_s = max(self.settings.disconnect.grace_s, job.grace_s or 0.0)
        expected = Lease(NOBODY, first_s - (job.grace_s or 0.0))
        created = await self._enqueue_again(job, expected, None if job.grace_s is None else first_s)
        self._scheduler.kick(job.pool)
        return created

    def _sleeps(self, job: Job) -> bool:
        """Whether a job's time to begin is still to come. RabbitMQ never gets such a one: it would take the place of
        others in somebody's hands, while the store has it on record, in line and on disk as well."""
        return job.not_before is not None and job.not_before > self._scheduler.store_time(job.pool)

    async def _check_drain(self, job: Job) -> None:
        try:
            await self.control.check(job)
        except Draining:
            await self._store.jobs.discard(job.id)
            raise

    async def _refusal(self, pushed: Pushed, job: Job, lanes: Lanes) -> LLMStreamError:
        if pushed is Pushed.DRAINING:
            return draining(job)
        if pushed is Pushed.TOO_MANY_SCHEDULED:
            return Overloaded(
                f"{self.settings.scheduler.max_scheduled} jobs are scheduled already, which is the limit "
                "(scheduler.max_scheduled). Try again once some have begun.",
                code="too_many_scheduled",
                retry_after=DEFAULT_RETRY_AFTER_S,
            )
        if pushed is Pushed.CALLER_FULL and job.counted is not None:
            self._scheduler.charges.refused("queued_jobs")
            return RateLimited(
                f"{job.counted.queued} jobs of this caller wait already, which is the limit (queued_jobs). Try again "
                "once some have begun.",
                retry_after=(await self._overloaded(lanes)).retry_after,
            )
        return await self._overloaded(lanes)

    async def _overloaded(self, lanes: Lanes, elsewhere: int = 0) -> Overloaded:
        census = await lanes.census()
        waiting, slots = sum(census.waiting.values()) + census.paused + elsewhere, sum(census.slots.values())
        known = census.service_s is not None and slots > 0
        # A place is free as soon as one waiting job is claimed: one service time over all slots.
        wait = max(census.service_s / slots, 0.05) if known and census.service_s else DEFAULT_RETRY_AFTER_S
        return Overloaded(
            f"{waiting} jobs wait already, which is the limit (scheduler.max_waiting). Try again in {wait:.1f} s.",
            retry_after=wait,
        )

    def _lanes(self, pool: str) -> Lanes:
        return self._scheduler.lanes_of(pool)


def _refuse_long_prompt(request: GenerateRequest, limit: int | None) -> None:
    if limit is not None and (size := request.prompt_chars) > limit:
        raise BadRequest(
            f"The prompt has {size} characters, and {limit} are allowed (security.max_prompt_chars); shorten it.",
            param=_PROMPTS[request.kind],
            code="prompt_too_long",
        )


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
        limits = {name: limits_of(provider) for name, provider in settings.providers.items()}
        router = Router(providers, settings.routes, limits={name: each for name, each in limits.items() if any(each)})
        tokenizer = Tokenizer()
        if settings.providers:  # what runs here counts by itself
            await tokenizer.open()
        accounts = Accounts(settings.prices, tokenizer)
        tracing = await stack.enter_async_context(open_tracing(settings.telemetry, replica, settings.server.name))
        observer = Observer([model.name for model in router.models], tracing)
        filters = Filters(settings.filters, settings.presidio, observer.metrics.filtered)
        await filters.open()
        scheduler = Scheduler(
            store,
            router,
            replica,
            settings=settings.scheduler,
            deadlines=settings.deadlines,
            backoff=Backoff(settings.retry),
            breaker=settings.breaker,
            clock=clock,
            accounts=accounts,
            observer=observer,
            filters=filters,
        )
        watch_pools(observer, store, scheduler.pools, scheduler.control)
        await scheduler.open()
        access = await open_access(settings, store, clock)
        gateway = Gateway(settings, store, router, scheduler, clock, observer, access, filters)
        if settings.announces:
            gateway.webhooks = await stack.enter_async_context(_open_webhooks(gateway, store, clock))
            scheduler.on_announced = gateway.webhooks.wake
        if settings.broker.kind == "rabbitmq":
            gateway.inbox = await stack.enter_async_context(_open_inbox(gateway, store, scheduler))
        try:
            yield gateway
        finally:
            await gateway.close()


@asynccontextmanager
async def _open_webhooks(gateway: Gateway, store: Store, clock: Clock) -> AsyncIterator[Webhooks]:
    from llmstream.webhooks.webhooks import open_webhooks

    async with open_webhooks(gateway.settings, store, gateway.observer, clock) as webhooks:
        try:
            yield webhooks
        finally:
            await gateway.close()


@asynccontextmanager
async def _open_inbox(gateway: Gateway, store: Store, scheduler: Scheduler) -> AsyncIterator[Inbox]:
    try:
        from llmstream.broker.inbox import Door, open_inbox
    except ImportError as error:
        raise ConfigError(
            "broker.kind = 'rabbitmq' (BROKER) needs aio-pika; install it: pip install 'llmstream[rabbitmq]'"
        ) from error
    slots = sum(pool.slots for pool in scheduler.pools.values())
    chatting = [model for model in gateway.models if model.takes("chat")]
    door = Door(chatting, gateway._admit_order, gateway._take_job, gateway.observer.accepted, gateway.control.pauses)
    async with open_inbox(gateway.settings.broker, store, door, slots=slots) as inbox:
        if inbox.carries_jobs:
            scheduler.on_over = inbox.over
        try:
            yield inbox
        finally:
            await gateway.close()
