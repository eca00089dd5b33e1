"""All about telling others of the end of jobs, as the gateway sees it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from llmstream.config import Settings
from llmstream.config_webhooks import NOTHING_SIGNS
from llmstream.errors import Conflict, NotFound, StoreUnavailable
from llmstream.store.outbox import Delivery, Kind
from llmstream.store.owned import OWNED_JOBS
from llmstream.store.store import Store
from llmstream.telemetry.metrics import Labels
from llmstream.telemetry.observer import Observer
from llmstream.types import REQUESTED, Clock, JobState, Principal
from llmstream.webhooks.dispatcher import Dispatcher
from llmstream.webhooks.event import event_id
from llmstream.webhooks.receivers import Receivers
from llmstream.webhooks.sender import Sender
from llmstream.webhooks.signing import written

CLOSE_S = 5.0
"""What requests under way get at a shutdown."""


class Webhooks:
    """Receivers, the deliveries to them, and the secrets that sign these."""

    def __init__(self, store: Store, receivers: Receivers, dispatcher: Dispatcher) -> None:
        self.receivers = receivers
        self.wake = dispatcher.wake
        self._store = store

    async def deliveries(self, kind: Kind, limit: int, principal: str | None) -> list[dict[str, Any]]:
        """Events that wait, or were given up; of a principal those to the URLs that its requests named, None: all."""
        found: list[Delivery] = []
        if principal is None:
            for pool in await self._store.pools():
                found += await self._store.outbox(pool).latest(kind, limit)
        else:
            names = [f"{job_id}|{REQUESTED}" for job_id in await self._store.owned.latest(principal, OWNED_JOBS)]
            for pool in await self._store.pools() if names else ():
                found += await self._store.outbox(pool).find(kind, names)
        found = sorted(found, key=lambda each: each.at_ms, reverse=kind == "dead")[:limit]
        states = {state.job.id: state for state in await self._store.jobs.find_all([each.job_id for each in found])}
        return [_row(kind, each, states[each.job_id]) for each in found if each.job_id in states]

    async def send_again(self, state: JobState, *, all_receivers: bool) -> list[str]:
        """Sends the event of a job that is over once more, to the URL that its request named or to all receivers;
        returns who they are. Raises Conflict for a job that is not over, NotFound where there is nobody to tell."""
        names = [name for name in state.job.receivers if all_receivers or name == REQUESTED]
        if not names:
            raise NotFound(f"Nobody is to hear of the end of job {state.job.id!r}: its request names no webhook.")
        if not state.done:
            raise Conflict(f"Job {state.job.id!r} is {state.status}; its webhook is sent when it is over.")
        await self._store.outbox(state.job.pool).send_again(state.job.id, names)
        self.wake()
        return names

    def secrets(self, principal: Principal) -> list[str]:
        """What verifies events of a principal's jobs, the newest first. Raises NotFound for secrets of the
        configuration, which are not shown."""
        secrets = self.receivers.secrets
        found = secrets.of(principal.id)
        if not found:
            raise NotFound(NOTHING_SIGNS)
        if secrets.configured(principal.id):
            raise NotFound(
                "Your webhooks are signed with the secret in this server's configuration, as it stands there."
            )
        return [written(secret) for secret in found]


@asynccontextmanager
async def open_webhooks(settings: Settings, store: Store, observer: Observer, clock: Clock) -> AsyncIterator[Webhooks]:
    """Starts to deliver; stops with the context."""
    receivers, limits = Receivers(settings), settings.webhooks
    sender = Sender(receivers.reach, limits.timeout_s, limits.concurrency)
    dispatcher = Dispatcher(
        store,
        receivers,
        sender,
        limits,
        retention_s=settings.store.retention_s,
        clock=clock,
        metrics=observer.metrics,
        store_clock=None if clock is time.time else clock,
    )
    _watch(store, observer)
    await sender.open()
    try:
        await dispatcher.open()
        try:
            yield Webhooks(store, receivers, dispatcher)
        finally:
            await dispatcher.close(min(CLOSE_S, settings.server.shutdown_grace_s))
    finally:
        await sender.close()


def _watch(store: Store, observer: Observer) -> None:
    waiting: dict[Labels, float] = {}

    async def refresh() -> None:
        waiting.clear()
        try:
            waiting[()] = sum([await store.outbox(pool).waiting() for pool in await store.pools()])
        except StoreUnavailable:
            waiting.clear()

    observer.before_scrape.append(refresh)
    observer.metrics.webhooks_waiting.source = lambda: waiting


def _row(kind: Kind, delivery: Delivery, state: JobState) -> dict[str, Any]:
    tries, at = delivery.tries, delivery.at_ms / 1000
    return {
        "id": event_id(state.job),
        "task_id": delivery.job_id,
        "receiver": delivery.receiver,
        "status": kind,
        "attempts": tries.count,
        "last_attempt_at": tries.at,
        "last_status": tries.status,
        "error": tries.error,
        "next_attempt_at": at if kind == "waiting" else None,
        "given_up_at": at if kind == "dead" else None,
    }
