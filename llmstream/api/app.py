"""The aiohttp application: routes, what surrounds them, and the gateway's life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext

from aiohttp import web
from aiohttp.typedefs import Middleware

from llmstream.api import (
    chat,
    core,
    embeddings,
    health,
    jobs,
    metrics,
    openai,
    proxy,
    question,
    queues,
    rates,
    service,
    sessions,
    webhooks,
)
from llmstream.api.access import guard
from llmstream.api.cors import Cors
from llmstream.api.docs import pages
from llmstream.api.keys import BODY_TIMEOUT_S, GATEWAY, PINGS, STREAMS, Streams
from llmstream.api.middleware import errors
from llmstream.api.observing import observed, on_prepare
from llmstream.api.pings import Pings
from llmstream.api.presence import PRESENCE, Presence
from llmstream.config import Settings
from llmstream.gateway import Gateway
from llmstream.opening import open_gateway


def create_app(settings: Settings, *, gateway: Gateway | None = None) -> web.Application:
    """Returns the whole service as an application, to run or to mount with ``add_subapp``.

    The gateway (store, models, scheduler) starts and ends with the application, unless an open one is given.
    """
    middlewares: list[Middleware] = [observed, errors]
    cors = Cors(settings.security.cors_origins)
    if settings.security.cors_origins:
        middlewares.append(cors.preflight)
    metered = rates.by_address(settings.rate_limit) if not settings.authenticated else None
    if settings.authenticated:
        middlewares.append(guard(settings.security))
    elif metered is not None:
        middlewares.append(metered)
    app = web.Application(middlewares=middlewares, client_max_size=settings.server.max_body_bytes)
    app[STREAMS] = Streams()
    app[PRESENCE] = Presence()
    app[PINGS] = Pings(settings.server.ping_s)
    app[BODY_TIMEOUT_S] = settings.server.body_timeout_s
    families = (
        *(openai, chat, embeddings, jobs, queues, core, proxy, question, service, sessions, webhooks),
        *(health, metrics),
    )
    for family in families:
        app.add_routes(family.routes)
    if settings.server.docs:
        app[pages.DOCUMENT] = pages.Document(app)
        app.add_routes(pages.routes)
    app.on_response_prepare.append(on_prepare)
    if settings.authenticated or metered is not None:
        app.on_response_prepare.append(rates.on_prepare)
    if settings.security.cors_origins:
        app.on_response_prepare.append(cors.on_prepare)

    async def life(app: web.Application) -> AsyncIterator[None]:
        async with nullcontext(gateway) if gateway is not None else open_gateway(settings) as opened:
            app[GATEWAY] = opened
            opened.observer.metrics.subscribers.source = lambda: {(): len(app[STREAMS])}
            yield

    app.cleanup_ctx.append(life)
    app.on_shutdown.append(_shut_down)
    return app


async def _shut_down(app: web.Application) -> None:
    """Ends or hands over the jobs first, then the streams: clients reconnect and read on elsewhere."""
    await app[GATEWAY].close()
    await app[STREAMS].close()
