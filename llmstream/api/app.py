"""The aiohttp application: routes, what surrounds them, and the gateway's life."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from llmstream.api import chat, health, jobs, openai
from llmstream.api.keys import GATEWAY, PINGS, STREAMS, Streams
from llmstream.api.middleware import errors, on_prepare
from llmstream.api.pings import Pings
from llmstream.api.presence import PRESENCE, Presence
from llmstream.config import Settings
from llmstream.gateway import Gateway, open_gateway


def create_app(settings: Settings, *, gateway: Gateway | None = None) -> web.Application:
    """Returns the whole service as an application, to run or to mount with ``add_subapp``.

    The gateway (store, models, scheduler) starts and ends with the application, unless an open one is given.
    """
    app = web.Application(middlewares=[errors], client_max_size=settings.server.max_body_bytes)
    app[STREAMS] = Streams()
    app[PRESENCE] = Presence()
    app[PINGS] = Pings(settings.server.ping_s)
    for family in (openai, chat, jobs, health):
        app.add_routes(family.routes)
    app.on_response_prepare.append(on_prepare)

    async def life(app: web.Application) -> AsyncIterator[None]:
        if gateway is not None:
            app[GATEWAY] = gateway
            yield
            return
        async with open_gateway(settings) as opened:
            app[GATEWAY] = opened
            yield

    app.cleanup_ctx.append(life)
    app.on_shutdown.append(_shut_down)
    return app


async def _shut_down(app: web.Application) -> None:
    """Ends or hands over the jobs first, then the streams: clients reconnect and read on elsewhere."""
    await app[GATEWAY].close()
    await app[STREAMS].close()
