"""Takes events out of the outboxes of all pools and brings them to their receivers, until one says that it has them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from yarl import URL

from llmstream.config_webhooks import WebhookSettings
from llmstream.errors import BadRequest, LLMStreamError
from llmstream.store.outbox import Delivery, Outbox, Tries
from llmstream.store.store import Store
from llmstream.telemetry.metrics import Metrics
from llmstream.transcript import Transcript
from llmstream.types import Clock, JobState
from llmstream.webhooks.event import event_id, event_type, render
from llmstream.webhooks.receivers import Receiver, Receivers
from llmstream.webhooks.sender import Outcome, Sender
from llmstream.webhooks.signing import signed_headers

POLL_S = 1.0
"""How long it takes at most until an event is seen that another replica put here; those of this one are told."""
BUSY_S = 0.1
"""Pause after a round in which nothing could be sent."""
BUSY_HOST_S = 2.0
"""How long an event waits, at least, whose host has all the requests it may have; at most twice as long."""
LATER_S = 10.0
"""How long one waits that cannot be sent from here now."""
LEASE_MARGIN_S = 5.0
"""What reading a job and noting an outcome may take beside the request; the rest is spare."""

logger = logging.getLogger(__name__)


class _Parcel(NamedTuple):
    """An event that is ready to be sent."""

    state: JobState
    receiver: Receiver


class Dispatcher:
    """This replica's share of the deliveries. ``store_clock`` stands in for the store's clock."""

    def __init__(
        self,
        store: Store,
        receivers: Receivers,
        sender: Sender,
        settings: WebhookSettings,
        *,
        retention_s: float,
        clock: Clock,
        metrics: Metrics,
        store_clock: Clock | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._receivers = receivers
        self._sender = sender
        self._settings = settings
        self._give_up_s = min(settings.give_up_s, retention_s)
        self._clock = clock
        self._store_clock = store_clock
        self._chance = chance
        self._delivered = metrics.webhook_deliveries
        self._lease_s = settings.timeout_s + LEASE_MARGIN_S
        self._awake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hosts: Counter[str] = Counter()
        self._idle = True
        """Whether nothing of the last round could be sent."""
        self._loop: asyncio.Task[None] | None = None
        self._closing = False

    async def open(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="webhooks")

    async def close(self, grace_s: float) -> None:
        """Takes nothing more; what is being sent gets ``grace_s`` seconds, then it is left to others."""
        self._closing = True
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """Says that there is something to deliver."""
        self._awake.set()

    async def _run(self) -> None:
        while True:
            self._awake.clear()
            pause = POLL_S
            try:
                pause = await self._round()
            except LLMStreamError as error:
                logger.warning("webhooks have to wait: %s", error.message)
            except Exception:  # without it nothing would be delivered any more
                logger.exception("delivering webhooks failed")
            try:
                async with asyncio.timeout(pause):
                    await self._awake.wait()
            except TimeoutError:
                continue

    async def _round(self) -> float:
        """Takes what is due, as far as there is room for it; returns how long to wait for more."""
        pause, self._idle = POLL_S, True
        pools = await self._store.pools()
        for pool in random.sample(pools, len(pools)):  # none is always the last one to get room
            room = self._settings.concurrency - len(self._tasks)
            if room <= 0:
                break
            outbox = self._store.outbox(pool, self._store_clock)
            taken, next_s = await outbox.take(room, self._lease_s)
            for delivery in taken:
                self._start(outbox, delivery)
            pause = min(pause, POLL_S if next_s is None else max(next_s, BUSY_S))
        return pause

    def _start(self, outbox: Outbox, delivery: Delivery) -> None:
        task = asyncio.create_task(self._deliver(outbox, delivery), name=f"webhook-{delivery.name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._idle:
            self._awake.set()

    async def _deliver(self, outbox: Outbox, delivery: Delivery) -> None:
        try:
            async with asyncio.timeout(self._lease_s - LEASE_MARGIN_S / 5):
                parcel = await self._prepare(outbox, delivery)
                if parcel is not None:
                    await self._send(outbox, delivery, parcel)
        except asyncio.CancelledError:
            await self._leave(outbox, delivery)
            raise
        except (LLMStreamError, TimeoutError) as error:  # it comes back when the lease ends
            logger.warning("a webhook has to wait: %s", error, extra={"job_id": delivery.job_id})
        except Exception:
            logger.exception("a webhook could not be sent", extra={"job_id": delivery.job_id})

    async def _prepare(self, outbox: Outbox, delivery: Delivery) -> _Parcel | None:
        """The job and the receiver; None where there is nothing to send, or not now."""
        state = await self._store.jobs.find(delivery.job_id)
        if state is None:  # its retention time is over
            await outbox.done(delivery)
            return None
        if not state.done:  # the store has come back without its end, which will be told when it is written again
            await outbox.again(delivery, LATER_S)
            return None
        try:
            receiver = self._receivers.find(state.job, delivery.receiver)
        except BadRequest as error:
            await self._give_up(outbox, delivery, state, Outcome("refused", error=error.message))
            return None
        if receiver is None:
            await self._wait_for_receiver(outbox, delivery, state)
            return None
        if receiver.events is not None and event_type(state) not in receiver.events:
            await outbox.done(delivery)
            return None
        return _Parcel(state, receiver)

    async def _wait_for_receiver(self, outbox: Outbox, delivery: Delivery, state: JobState) -> None:
        """Another replica may know the receiver, which is not in this one's configuration."""
        if self._late(state, LATER_S):
            await self._give_up(outbox, delivery, state, Outcome("refused", error="no such receiver is configured"))
        else:
            await outbox.again(delivery, LATER_S)

    async def _send(self, outbox: Outbox, delivery: Delivery, parcel: _Parcel) -> None:
        state, receiver = parcel
        host = _host(receiver.url)
        if self._hosts[host] >= self._settings.host_concurrency:
            await outbox.again(delivery, BUSY_HOST_S * (1 + self._chance()))
            return
        self._hosts[host] += 1
        self._idle = False
        try:
            body = await self._body(state, receiver)
            headers = signed_headers(receiver.secrets, event_id(state.job), int(self._clock()), body)
            outcome = await self._sender.post(receiver.url, body, headers, trusted=receiver.trusted)
        finally:
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]
        await self._note(outbox, delivery, state, outcome)

    async def _body(self, state: JobState, receiver: Receiver) -> bytes:
        transcript: Transcript | None = None
        if receiver.include_text and state.job.request.kind != "embedding":
            transcript = Transcript()
            async for event in self._store.log.events(state.job.id):
                transcript.add(event)
        return render(state, transcript, self._settings.max_text_chars)

    async def _note(self, outbox: Outbox, delivery: Delivery, state: JobState, outcome: Outcome) -> None:
        wait_s = max(self._backoff(delivery.tries.count), min(outcome.retry_after_s, self._settings.cap_s))
        if outcome.kind == "delivered":
            self._count(delivery, "delivered")
            await outbox.done(delivery)
        elif outcome.kind == "failed" and not self._late(state, wait_s):
            self._count(delivery, "failed")
            logger.warning(
                "a webhook to %s is tried again in %.0f s: %s",
                delivery.receiver,
                wait_s,
                outcome.error,
                extra={"job_id": delivery.job_id},
            )
            await outbox.again(delivery, wait_s, self._tried(delivery, outcome))
        else:
            await self._give_up(outbox, delivery, state, outcome)

    async def _give_up(self, outbox: Outbox, delivery: Delivery, state: JobState, outcome: Outcome) -> None:
        self._count(delivery, "gone" if outcome.kind == "gone" else "dead")
        logger.error(
            "a webhook to %s is given up: %s", delivery.receiver, outcome.error, extra={"job_id": state.job.id}
        )
        await outbox.give_up(delivery, self._tried(delivery, outcome))

    async def _leave(self, outbox: Outbox, delivery: Delivery) -> None:
        """Lets another replica send it at once, instead of after the lease."""
        try:
            await outbox.again(delivery, 0.0)
        except LLMStreamError as error:
            logger.warning("a webhook waits for its lease to end: %s", error.message)

    def _late(self, state: JobState, wait_s: float) -> bool:
        return self._clock() + wait_s > (state.finished_at or state.job.created_at) + self._give_up_s

    def _backoff(self, tries: int) -> float:
        longest = min(self._settings.cap_s, self._settings.base_s * 2.0 ** min(tries, 40))
        return longest * (1 - self._chance() / 4)

    def _tried(self, delivery: Delivery, outcome: Outcome) -> Tries:
        return Tries(delivery.tries.count + 1, self._clock(), outcome.status, outcome.error)

    def _count(self, delivery: Delivery, outcome: str) -> None:
        self._delivered.add(delivery.receiver, outcome)


def _host(url: URL) -> str:
    return f"{url.host}:{url.port}"
