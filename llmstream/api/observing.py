"""Around every request: its id, the time it took, its line in the log, its place in metrics and traces."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from llmstream.api.keys import GATEWAY
from llmstream.gateway import Gateway
from llmstream.store.follower import Follower
from llmstream.telemetry.origin import ORIGIN, Origin
from llmstream.telemetry.process import resident_bytes

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CLIENT_LEFT = 499
"""The status of what nobody reads any more; it keeps a client's leave out of the log of errors."""
UNKNOWN = "unknown"
"""The route of a request for which there is none."""
STARTED = web.RequestKey("started", float)
REQUEST_ID = web.RequestKey("request_id", str)
UPSTREAM_S = web.RequestKey("upstream_s", float)
"""What the provider took of the time of a request that asked for an answer."""
_MEMORY = web.RequestKey("memory", int)
_GIVEN_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_MB = 1024 * 1024
_SHOWN_PATH = 200

logger = logging.getLogger("llmstream.requests")


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Adds the headers that every response bears, streams included."""
    now = time.perf_counter()
    response.headers["X-Process-Time"] = f"{now - request.get(STARTED, now):.6f}"
    response.headers["x-request-id"] = request.get(REQUEST_ID) or secrets.token_hex(8)
    before = request.get(_MEMORY)
    if before is not None:
        used = resident_bytes()
        response.headers["X-Memory-Used"] = f"{used / _MB:.2f}"
        response.headers["X-Memory-Delta"] = f"{(used - before) / _MB:.2f}"


@web.middleware
async def observed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id and sees how it ends."""
    request[STARTED] = time.perf_counter()
    given = request.headers.get("x-request-id")
    request_id = given if given is not None and _GIVEN_ID.fullmatch(given) else secrets.token_hex(8)
    request[REQUEST_ID] = request_id
    ORIGIN.set(Origin(request_id))
    gateway = request.app[GATEWAY]
    if gateway.settings.telemetry.memory_headers:
        request[_MEMORY] = resident_bytes()
    tracing = gateway.observer.tracing
    response: web.StreamResponse | None = None
    try:
        if tracing is None:
            response = await handler(request)
        else:
            with tracing.request(request.method, endpoint(request), request.headers) as span:
                response = await handler(request)
                tracing.answered(span, response.status)
        return response
    finally:
        _note(request, response, gateway)


def _note(request: web.Request, response: web.StreamResponse | None, gateway: Gateway) -> None:
    status = response.status if response is not None else CLIENT_LEFT
    route, seconds = endpoint(request), time.perf_counter() - request[STARTED]
    gateway.observer.requested(request.method, route, status, seconds, request.get(UPSTREAM_S))
    if gateway.settings.logging.request_lines:
        _log(request, response, route, status, seconds)


def _log(request: web.Request, response: web.StreamResponse | None, route: str, status: int, seconds: float) -> None:
    told: dict[str, object] = {
        "method": request.method,
        "route": route,
        "status_code": status,
        "latency_ms": round(seconds * 1000, 2),
    }
    job_id = response.headers.get("x-job-id") if response is not None else None
    if job_id is not None:
        told["job_id"] = job_id
    logger.info("%s %s - %d", request.method, request.path[:_SHOWN_PATH], status, extra=told)


def endpoint(request: web.Request) -> str:
    """The route of a request with the names of its parts instead of what the client put there."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else UNKNOWN


def note_upstream(request: web.Request, follower: Follower) -> None:
    """Takes note of how long the provider took for the answer that a request asked for."""
    if request.method == "POST" and follower.upstream_s is not None:
        request[UPSTREAM_S] = follower.upstream_s
