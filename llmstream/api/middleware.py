"""Around every request: an id, the time it took, and errors in one shape."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from llmstream.errors import BadRequest, LLMStreamError, error_body
from llmstream.types import Failure

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

logger = logging.getLogger(__name__)


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Adds the headers that every response bears, streams included."""
    started = request.get("started")
    if started is not None:
        response.headers["X-Process-Time"] = f"{time.perf_counter() - started:.6f}"
    response.headers["x-request-id"] = request.get("request_id") or secrets.token_hex(8)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id and turns every error into the OpenAI error body."""
    request["started"] = time.perf_counter()
    given = request.headers.get("x-request-id", "")
    request["request_id"] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
    try:
        return await handler(request)
    except LLMStreamError as error:
        return _response(error.failure(), error.http_status, error.retry_after)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _response(_http_failure(request, error), error.status, None, dict(error.headers))
    except (asyncio.CancelledError, ConnectionResetError):
        raise
    except Exception:
        logger.exception("%s %s failed", request.method, request.path, extra={"request_id": request["request_id"]})
        failure = Failure(
            message=f"Something went wrong inside llmstream; its log has the details under {request['request_id']}.",
            code="internal_error",
        )
        return _response(failure, 500, None)


def _response(
    failure: Failure, status: int, retry_after: float | None, headers: dict[str, str] | None = None
) -> web.Response:
    kept = {"Allow": headers["Allow"]} if headers and "Allow" in headers else {}
    if retry_after is None and status in {429, 503}:
        retry_after = 1.0
    if retry_after is not None:
        kept["Retry-After"] = str(max(1, math.ceil(retry_after)))
        kept["retry-after-ms"] = str(max(1, math.ceil(retry_after * 1000)))
    return web.json_response(error_body(failure), status=status, headers=kept)


def _http_failure(request: web.Request, error: web.HTTPException) -> Failure:
    if error.status == 404:
        message = f"There is no route {request.method} {request.path}."
    elif error.status == 405:
        allowed = error.headers.get("Allow", "other methods")
        message = f"{request.path} does not take {request.method}; it takes {allowed}."
    else:
        message = error.text or error.reason
    return Failure(message=message, type=BadRequest.type, code=error.reason.lower().replace(" ", "_"))
