"""Around every request: errors in one shape."""

from __future__ import annotations

import asyncio
import logging
import math

from aiohttp import web

from llmstream.api.observing import CLIENT_LEFT, REQUEST_ID, Handler
from llmstream.errors import BadRequest, Forbidden, LLMStreamError, Unauthorized, error_body
from llmstream.types import Failure

CHALLENGE = 'Bearer realm="llmstream"'

logger = logging.getLogger(__name__)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every error into the OpenAI error body."""
    response = await _answer(request, handler)
    if response.status >= 400 and not request.content.is_eof():
        response.force_close()  # nobody will read the rest of the body
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except LLMStreamError as error:
        return _response(error.failure(), error.http_status, error.retry_after, _challenge(error))
    except web.HTTPException as error:
        return refusal(request, error)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        if isinstance(error, ConnectionError) and request.transport is None:
            return web.Response(status=CLIENT_LEFT)
        logger.exception("%s %s failed", request.method, request.path)
        failure = Failure(
            message=f"Something went wrong inside llmstream; its log has the details under {request[REQUEST_ID]}.",
            code="internal_error",
        )
        return _response(failure, 500, None)


def refusal(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals with our error body. Raises what is no refusal again."""
    if error.status < 400:
        raise error
    return _response(_http_failure(request, error), error.status, None, dict(error.headers))


def _challenge(error: LLMStreamError) -> dict[str, str] | None:
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": CHALLENGE}
    return {"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope"'} if isinstance(error, Forbidden) else None


def _response(
    failure: Failure, status: int, after_s: float | None, headers: dict[str, str] | None = None
) -> web.Response:
    kept = {name: value for name, value in (headers or {}).items() if name in {"Allow", "WWW-Authenticate"}}
    if status == 409:
        kept["x-should-retry"] = "false"  # official SDKs would otherwise repeat what stays refused
    if after_s is None and status in {429, 503}:
        after_s = 1.0
    if after_s is not None:
        kept.update(retry_after(after_s))
    return web.json_response(error_body(failure), status=status, headers=kept)


def retry_after(seconds: float) -> dict[str, str]:
    """What tells a client when to try again."""
    return {
        "Retry-After": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
    }


def _http_failure(request: web.BaseRequest, error: web.HTTPException) -> Failure:
    if error.status == 404:
        message = f"There is no route {request.method} {request.path}."
    elif error.status == 405:
        allowed = error.headers.get("Allow", "other methods")
        message = f"{request.path} does not take {request.method}; it takes {allowed}."
    else:
        message = error.text or error.reason
    return Failure(message=message, type=BadRequest.type, code=error.reason.lower().replace(" ", "_"))
