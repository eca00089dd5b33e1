"""The way of a request into the queue: it is checked, its caller is charged, and its job put on record and in line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypedDict

from llmstream.access.access import Access
from llmstream.config import Settings
from llmstream.config_webhooks import NOTHING_SIGNS
from llmstream.duplicates import Duplicates, Identity
from llmstream.errors import (
    BadRequest,
    BrokerUnavailable,
    Conflict,
    Draining,
    LLMStreamError,
    ModelNotFound,
    Overloaded,
    RateLimited,
    ShuttingDown,
    StoreUnavailable,
)
from llmstream.filters.filters import Filters
from llmstream.routing.gates import NobodyLeft
from llmstream.routing.router import Router
from llmstream.scheduler.audience import Seat
from llmstream.scheduler.charges import counted
from llmstream.scheduler.control import draining
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.jobs import Created
from llmstream.store.lanes import Lanes, Pushed
from llmstream.store.readers import NOBODY, Lease
from llmstream.store.store import Store
from llmstream.telemetry.observer import Observer
from llmstream.telemetry.origin import ORIGIN
from llmstream.types import (
    TERMINAL,
    Clock,
    Durability,
    GenerateRequest,
    Job,
    Kind,
    Principal,
    Webhook,
    new_id,
)

if TYPE_CHECKING:
    from llmstream.broker.inbox import Inbox
    from llmstream.webhooks.webhooks import Webhooks

DEFAULT_RETRY_AFTER_S = 1.0
STORE_RETRY_AFTER_S = 1.0
_PROMPTS: Final[dict[Kind, str]] = {"chat": "messages", "completion": "prompt", "embedding": "input"}


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


class Acceptance:
    """Makes jobs of requests."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        router: Router,
        scheduler: Scheduler,
        clock: Clock,
        observer: Observer,
        access: Access | None,
        filters: Filters,
        cancel: Callable[[str], Awaitable[object]],
    ) -> None:
        """``cancel`` ends a job of which nobody knows whether it was accepted."""
        self.closing = False
        """Whether no new jobs are taken."""
        self.inbox: Inbox | None = None
        """The way through RabbitMQ, where that is configured."""
        self.webhooks: Webhooks | None = None
        """Who tells others of the end of jobs, where that is configured."""
        self.duplicates = Duplicates(
            store, key_s=settings.store.retention_s, retry_window_s=settings.server.retry_window_s
        )
        self._settings = settings
        self._store = store
        self._router = router
        self._scheduler = scheduler
        self._clock = clock
        self._observer = observer
        self._access = access
        self._filters = filters
        self._cancel = cancel

    async def came_before(self, identity: Identity, principal: Principal) -> bool:
        """Whether a request with this name is a job already."""
        return await self.duplicates.find(identity, principal.id) is not None

    async def admit(
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
        """The job that a request asks for, checked, and accepted by nobody yet. Raises what ``Gateway.submit`` does."""
        principal = principal or Principal()
        if self.closing:
            raise ShuttingDown("This replica is shutting down; try again, another one will answer.", retry_after=1)
        durability = durability or self._settings.store.durability
        if self._store.presence.trouble is not None and durability != "memory":
            raise StoreUnavailable(self._store.presence.trouble.message, retry_after=STORE_RETRY_AFTER_S)
        if self.posting is not None and self.posting.broker.trouble is not None and durability != "memory":
            raise self.posting.broker.trouble
        refuse_long_prompt(request, self._settings.security.max_prompt_chars)
        if not principal.may_use(request.model):
            raise ModelNotFound(
                f"This API key has no model {request.model!r}; GET /v1/models lists its models.", param="model"
            )
        request = await self._filters.masked(await self._filters.redacted(request))
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
            traceparent=self._observer.traceparent(),
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
        now, limit = self._scheduler.store_time(pool), self._settings.scheduler.max_delay_s
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

    async def accept(
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

    async def accept_here(self, job: Job, identity: Identity | None, principal: Principal | None) -> Job:
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
        self._observer.accepted(job)
        if job.grace_s is not None:
            self._store.memory.expect(job.id, max(self._settings.disconnect.grace_s, job.grace_s))
        return job

    async def _enqueue(self, job: Job, identity: Identity | None = None, seat: Seat | None = None) -> Job:
        """Puts a job on record and in line; both may have been done before by an equal request."""
        first_s = max(self._settings.disconnect.grace_s, job.grace_s or 0.0)
        expected = Lease(NOBODY, first_s - (job.grace_s or 0.0))
        if self._access is not None:
            self._store.owned.note(job)
        created = await self._store.jobs.create(job, seat.lease if seat else expected)
        if created is None:
            raise identity.conflict() if identity else Conflict(f"The job id {job.id!r} is taken.", param="job_id")
        new, job = created.job is job, created.job
        lanes = self._scheduler.lanes_of(job.pool)
        if seat is not None:
            seat.bind(job, lanes, counted=True)
        unread_s = None if job.grace_s is None else seat.lease.seconds if seat else first_s
        if created.status not in TERMINAL:
            if self.posting is not None and not self._sleeps(job):
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
            self._observer.accepted(job)
        return job

    async def _enqueue_again(self, job: Job, expected: Lease, unread_s: float | None) -> Created | None:
        """For a store that may have forgotten an accepted job. One that it knows stays as it is."""
        created = await self._store.jobs.create(job, expected)
        if created is None:
            return None
        if self._access is not None:
            self._store.owned.note(job)
        if job.session_id is not None:  # also when its end was written again before
            await self._store.jobs.join_session(job.session_id, job)
        if created.status not in TERMINAL:
            await self._scheduler.lanes_of(job.pool).push(
                job, unread_s, wake=not self._scheduler.takes(job.pool), again=True
            )
        return created

    async def _accept_again(self, job: Job, expected: Lease, unread_s: float | None) -> None:
        """For a store that comes back without its last moments."""
        created = await self._enqueue_again(job, expected, unread_s)
        if created is not None and created.status in TERMINAL and job.receivers:
            # Its end was written again, but it went through no queue that would lead to those who were to hear of it.
            await self._store.outbox(job.pool).send_again(job.id, job.receivers)

    @property
    def posting(self) -> Inbox | None:
        """RabbitMQ, where all jobs go through it."""
        return self.inbox if self.inbox is not None and self.inbox.carries_jobs else None

    async def _post(self, job: Job, lanes: Lanes, *, named: bool) -> None:
        """Posts a job on record to RabbitMQ; after an error it is not run under a name nobody knows."""
        inbox = self.posting
        assert inbox is not None
        try:
            aside = (await lanes.census()).paused if self._scheduler.control.rules.rules else 0
            if inbox.ready + aside >= self._settings.scheduler.max_waiting:
                raise await self._overloaded(lanes, inbox.ready)
            await inbox.post(job)
        except BrokerUnavailable:
            if named:
                await self._store.jobs.discard(job.id)
            else:  # the message may be there, although nobody confirmed it
                await self._cancel(job.id)
            raise
        except Overloaded:
            await self._store.jobs.discard(job.id)
            raise

    async def admit_order(self, request: GenerateRequest, priority: int, webhook: Webhook | None) -> Job:
        """What somebody posted to RabbitMQ: never a memory job, as others have to find it."""
        await self._store.presence.recovered()
        durability: Durability = "fsync" if self._settings.store.durability == "fsync" else "full"
        return await self.admit(request, priority=priority, durability=durability, webhook=webhook)

    async def take(self, job: Job) -> Created | None:
        """Puts a job from RabbitMQ on record and in line, whichever of both is still to be done."""
        first_s = max(self._settings.disconnect.grace_s, job.grace_s or 0.0)
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
            await self._scheduler.control.check(job)
        except Draining:
            await self._store.jobs.discard(job.id)
            raise

    async def _refusal(self, pushed: Pushed, job: Job, lanes: Lanes) -> LLMStreamError:
        if pushed is Pushed.DRAINING:
            return draining(job)
        if pushed is Pushed.TOO_MANY_SCHEDULED:
            return Overloaded(
                f"{self._settings.scheduler.max_scheduled} jobs are scheduled already, which is the limit "
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


def refuse_long_prompt(request: GenerateRequest, limit: int | None) -> None:
    if limit is not None and (size := request.prompt_chars) > limit:
        raise BadRequest(
            f"The prompt has {size} characters, and {limit} are allowed (security.max_prompt_chars); shorten it.",
            param=_PROMPTS[request.kind],
            code="prompt_too_long",
        )
