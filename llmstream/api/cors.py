"""Lets pages of other origins call the server from a browser; only those that the configuration names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from llmstream.api import rates

METHODS = "GET, POST, DELETE"
OWN = ("Location", "Retry-After", "retry-after-ms", "x-job-id", "x-request-id", "x-should-retry", "X-Process-Time")
EXPOSED = ", ".join((*OWN, *rates.HEADERS))
MAX_AGE_S = 600
ANY = "*"

OnPrepare = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


class Cors:
    """What browsers are told. No cookie counts here, so no credentials have to be allowed."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Lets the page read the response, streams and errors included."""
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and self._allows(origin):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = ANY if ANY in self._origins else origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED

    @property
    def preflight(self) -> Middleware:
        """Answers a browser that asks before it sends a request; it shows no key yet."""

        @web.middleware
        async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method != hdrs.METH_OPTIONS or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers:
                return await handler(request)
            if not self._allows(request.headers.get(hdrs.ORIGIN, "")):
                return await handler(request)
            wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS)
            headers = {hdrs.ACCESS_CONTROL_ALLOW_METHODS: METHODS, hdrs.ACCESS_CONTROL_MAX_AGE: str(MAX_AGE_S)}
            if wanted is not None:
                headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = wanted
            return web.Response(status=204, headers=headers)

        return preflight

    def _allows(self, origin: str) -> bool:
        return origin in self._origins or ANY in self._origins
