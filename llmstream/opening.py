"""Puts all parts of the service together. The only place where they meet."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from llmstream.access.access import open_access
from llmstream.config import Settings
from llmstream.errors import (
    ConfigError,
)
from llmstream.filters.filters import Filters
from llmstream.gateway import Gateway
from llmstream.providers.build import PullProgress, build_providers
from llmstream.providers.tokens import Tokenizer
from llmstream.routing.retry import Backoff
from llmstream.routing.router import Router, limits_of
from llmstream.scheduler.accounts import Accounts
from llmstream.scheduler.gauges import watch_pools
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.store import Store, open_store
from llmstream.telemetry.observer import Observer, open_tracing
from llmstream.types import (
    Clock,
)

if TYPE_CHECKING:
    from llmstream.broker.inbox import Inbox
    from llmstream.webhooks.webhooks import Webhooks


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
        tokenizer = Tokenizer(exact=bool(settings.providers))  # what runs here counts by itself
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
            gateway.acceptance.webhooks = await stack.enter_async_context(_open_webhooks(gateway, store, clock))
            scheduler.on_announced = gateway.acceptance.webhooks.wake
        if settings.broker.kind == "rabbitmq":
            gateway.acceptance.inbox = await stack.enter_async_context(_open_inbox(gateway, store, scheduler))
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
    door = Door(
        chatting,
        gateway.acceptance.admit_order,
        gateway.acceptance.take,
        gateway.observer.accepted,
        gateway.control.pauses,
    )
    async with open_inbox(gateway.settings.broker, store, door, slots=slots) as inbox:
        if inbox.carries_jobs:
            scheduler.on_over = inbox.over
        try:
            yield inbox
        finally:
            await gateway.close()
