"""Jobs on their way through RabbitMQ: posted here, taken out by any replica, put on record and in line.

A message is acknowledged when its job is over and its result is stored. Until then RabbitMQ gives it to somebody else
if we are gone, and it may come any number of times: the job's id makes it the same job. So RabbitMQ says what has to be
done, and the store how far it is; where these differ, the message counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from msgspec.structs import replace

from llmstream.broker.core import OtherCore
from llmstream.broker.messages import JOB, Order, job_id_of, parse, refusal, result
from llmstream.broker.rabbitmq import Delivery, RabbitMQ, open_rabbitmq, queue_of
from llmstream.config_broker import BrokerSettings
from llmstream.errors import (
    BadRequest,
    BrokerUnavailable,
    Conflict,
    LLMStreamError,
    ShuttingDown,
    StoreUnavailable,
)
from llmstream.store.jobs import Created
from llmstream.store.repeats import digest
from llmstream.store.results import Results
from llmstream.store.store import Store
from llmstream.transcript import Transcript
from llmstream.types import TERMINAL, GenerateRequest, Job, ModelInfo, Webhook, encode

RETRY_S = 0.2
LOOK_S = 1.0
"""How often jobs in our hands are compared with their records; what ends is told, so this is for what got lost."""
LOOKS_AT_ONCE = 500
AWAY = (StoreUnavailable, BrokerUnavailable, ShuttingDown)

logger = logging.getLogger(__name__)


class Door(NamedTuple):
    """The service behind the queue."""

    models: Sequence[ModelInfo]
    """Those that can be asked for by name; the first is the default."""
    admit: Callable[[GenerateRequest, int, Webhook | None], Awaitable[Job]]
    """Makes a job of a request, its priority and who is to be told of its end. Raises what a client would get for
    it."""
    place: Callable[[Job], Awaitable[Created | None]]
    """Puts a job on record and in line, where it is not there already; None: its id belongs to another request."""

    accepted: Callable[[Job], None]
    """Hears of every order that has become a job."""
    paused: Callable[[Job], bool]
    """Whether a job that waits is to wait until a pause ends."""

    async def order(self, order: Order) -> Job:
        """The job that an order asks for, under the id its author chose. Raises BadRequest, ModelNotFound."""
        if order.meta.model is None and not self.models:
            raise BadRequest("No model is configured by name; say which one with 'meta.model'.", param="meta.model")
        default = self.models[0].name if self.models else ""
        request = order.request(default, {model.name: model.context for model in self.models})
        job = await self.admit(request, order.priority or 0, order.hook)
        return replace(job, id=order.job_id, fingerprint=digest(job.principal, order.fingerprint))


class Held:
    """A job that is not over, and the messages that stand for it."""

    def __init__(self, job: Job, delivery: Delivery, *, ordered: bool) -> None:
        self.job = job
        self.ordered = ordered
        """Whether somebody waits for its result."""
        self.deliveries = [delivery]
        self.placed = False
        self.tried = asyncio.Event()
        """Set when it is placed or could not be."""
        self.settling = False
        self.over = False
        """Whether it ended before it was known to be placed."""


class Inbox:
    """The replica's side of the queue."""

    def __init__(self, settings: BrokerSettings, store: Store, results: Results, door: Door) -> None:
        self.broker: RabbitMQ
        self._settings = settings
        self._store = store
        self._results = results
        self._door = door
        self._held: dict[str, Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def core(self) -> OtherCore | None:
        """Who runs orders where they are not run here."""
        return None if self.carries_jobs else OtherCore(self._settings, self._store, self._results, self.broker)

    def open(self) -> None:
        self._store.signals.on_over = self._ended
        self._watch = asyncio.create_task(self._look_after(), name="rabbitmq-held")

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._watch] if self._watch is not None else [])]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def carries_jobs(self) -> bool:
        """Whether all jobs go through RabbitMQ; else it only leads to another core."""
        return self._settings.consume

    @property
    def ready(self) -> int:
        """Jobs that wait in RabbitMQ, in nobody's hands, as of about a second ago."""
        return self.broker.ready

    def health(self) -> dict[str, Any]:
        health = self.broker.health()
        return {**health, "held": len(self._held)} if self.carries_jobs else health

    async def post(self, job: Job) -> None:
        """Puts a job on record into the queue of its lane. Raises BrokerUnavailable, Overloaded."""
        await self.broker.publish(queue_of(self._settings.queue, job.lane), encode(job), kind=JOB, message_id=job.id)

    async def take(self, delivery: Delivery) -> None:
        """Leads one message to a job in line, or to the dead letters."""
        while not delivery.void:
            try:
                await self._accept(delivery)
                return
            except AWAY as error:
                logger.warning("a message from RabbitMQ has to wait: %s", error.message)
            except LLMStreamError as error:
                await self._refuse(delivery, error)
                return
            except Exception:
                logger.exception("a message from RabbitMQ broke its reader")
                await self._refuse(delivery, LLMStreamError("Something went wrong inside llmstream."))
                return
            await asyncio.sleep(RETRY_S)

    async def _accept(self, delivery: Delivery) -> None:
        message = parse(delivery.body, delivery.kind, delivery.message_id)
        ordered = isinstance(message, Order)
        job = await self._door.order(message) if isinstance(message, Order) else message
        while (held := self._held.get(job.id)) is not None and not held.placed:
            await held.tried.wait()
        if held is None:
            known = await self._hold(job, ordered, delivery)
        else:
            known = held.job.fingerprint == job.fingerprint
            if known:
                held.ordered = held.ordered or ordered
                held.deliveries.append(delivery)
        if not known:
            raise Conflict(f"The job id {job.id!r} is taken by a different request.", param="job_id")

    async def _hold(self, job: Job, ordered: bool, delivery: Delivery) -> bool:
        """Places a job and keeps its message; False when the id belongs to another request."""
        held = self._held[job.id] = Held(job, delivery, ordered=ordered)
        try:
            created = await self._door.place(job)
            held.placed = created is not None
        finally:
            held.tried.set()
            if not held.placed:
                del self._held[job.id]
        if ordered and created is not None and created.job is job:
            self._door.accepted(job)
        if held.over or (created is not None and created.status in TERMINAL):
            self._ended(job.id)
        return held.placed

    async def _refuse(self, delivery: Delivery, error: LLMStreamError) -> None:
        """A message that can never be run."""
        logger.error("a message from RabbitMQ is a dead letter: %s", error.message)
        while not delivery.void:
            try:
                await self._tell(delivery, error)
                await delivery.bury(error.message)
                return
            except AWAY as away:
                logger.warning("a dead letter has to wait: %s", away.message)
            await asyncio.sleep(RETRY_S)

    async def _tell(self, delivery: Delivery, error: LLMStreamError) -> None:
        """Stores why there is no answer, unless the id has one or may still get one."""
        job_id = None if delivery.kind == JOB else job_id_of(delivery.body, delivery.message_id)
        if job_id is None or await self._store.jobs.find(job_id) or await self._results.get(job_id):
            return
        await self._results.put(job_id, refusal(error.failure()))

    def over(self, job_id: str) -> None:
        """Hears of a job that ended on this replica, which may be in the hands of another one."""
        if job_id in self._held:
            self._ended(job_id)
        else:
            self._store.announce_over(job_id)

    def _ended(self, job_id: str) -> None:
        held = self._held.get(job_id)
        if held is None or held.settling:
            return
        held.over = True
        if held.placed:
            held.settling = True
            settling = asyncio.create_task(self._settle(held), name=f"rabbitmq-settle-{job_id}")
            self._tasks.add(settling)
            settling.add_done_callback(self._tasks.discard)

    async def _settle(self, held: Held) -> None:
        """Stores the result of a job that is over, then acknowledges its messages."""
        job_id = held.job.id
        try:
            if not await self._delivered(held):
                return
            while held.deliveries:
                await held.deliveries.pop().ack()
            self._held.pop(job_id, None)
        except StoreUnavailable as error:
            logger.warning("a result has to wait: %s", error.message, extra={"job_id": job_id})
        except Exception:  # looked at again, and after us by somebody else
            logger.exception("a result could not be stored", extra={"job_id": job_id})
        finally:
            held.settling = False

    async def _delivered(self, held: Held) -> bool:
        (status,) = await self._store.jobs.statuses([held.job.id])
        if status not in TERMINAL:
            return False
        if held.ordered:
            state = await self._store.jobs.get(held.job.id)
            transcript = Transcript()
            async for event in self._store.log.events(held.job.id):
                transcript.add(event)
            await self._results.put(held.job.id, result(state, transcript))
        return True

    async def _let_go(self, held: Held) -> None:
        """A paused job must not take the place of others in our hands: from here on it is the store's alone, as jobs
        are without RabbitMQ. An order stays, for its result has to be stored."""
        if held.ordered or held.settling:
            return
        self._store.recent.remember(lambda: self._door.place(held.job), len(held.job.request.raw))
        while held.deliveries:
            await held.deliveries.pop().ack()
        self._held.pop(held.job.id, None)

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except StoreUnavailable as error:
                logger.debug("cannot look after jobs from RabbitMQ: %s", error.message)
            except Exception:  # without it a lost wake-up would keep a message for ever
                logger.exception("looking after jobs from RabbitMQ failed")

    async def look(self) -> None:
        """Compares the jobs in our hands with their records: those that are over are settled, lost ones begin again."""
        for job_id, held in list(self._held.items()):
            if all(delivery.void for delivery in held.deliveries) and not held.settling:
                del self._held[job_id]
        known = [job_id for job_id, held in self._held.items() if held.placed]
        for start in range(0, len(known), LOOKS_AT_ONCE):
            ids = known[start : start + LOOKS_AT_ONCE]
            for job_id, status in zip(ids, await self._store.jobs.statuses(ids), strict=True):
                if status in TERMINAL:
                    self._ended(job_id)
                elif status == "queued" and job_id in self._held and self._door.paused(self._held[job_id].job):
                    await self._let_go(self._held[job_id])
                elif status is None and job_id in self._held and not self._store.presence.recovering:
                    logger.warning("the store has lost a job that RabbitMQ still has", extra={"job_id": job_id})
                    await self._door.place(self._held[job_id].job)


@asynccontextmanager
async def open_inbox(settings: BrokerSettings, store: Store, door: Door, *, slots: int) -> AsyncIterator[Inbox]:
    """The way through RabbitMQ, open. Raises ConfigError when it cannot be reached."""
    inbox = Inbox(settings, store, store.results(settings.result_prefix), door)
    prefetch = settings.prefetch or max(64, 2 * slots)
    take = inbox.take if settings.consume else None
    async with open_rabbitmq(settings, prefetch, take) as inbox.broker:
        inbox.open()
        try:
            yield inbox
        finally:
            await inbox.close()
