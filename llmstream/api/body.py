"""Request bodies: read within bounds, parsed strictly, refused with the name of the field that is wrong."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from pydantic import BaseModel, ValidationError

from llmstream.errors import BadRequest, BodyTooLarge

READ_TIMEOUT_S = 30.0
"""What a sender gets for its whole body."""

Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: web.Request) -> dict[str, Any]:
    """Reads a JSON object. Raises BadRequest, and BodyTooLarge before reading a body that is announced as too large."""
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(request, limit)
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(request, limit) from None
    except TimeoutError:
        _close_after(request)
        raise BadRequest(f"The request body did not arrive within {READ_TIMEOUT_S:g} s.", status=408) from None
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:  # an undecodable Content-Encoding surfaces as whatever the decoder raises
        _close_after(request)
        raise BadRequest(f"The request body cannot be read ({error}); check its Content-Encoding.") from None
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise BadRequest(f"The request body must be a JSON object, not {_kind(value)}.")
    return value


def validate(schema: type[Model], value: dict[str, Any]) -> Model:
    """Checks a body against its schema. Raises BadRequest that names the field and what is allowed."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        missing = first["type"] == "missing"
        given = "" if missing or not path else f" (got {_short(first['input'])})"
        raise BadRequest(
            f"{path}: {said}{given}." if path else f"{said}.",
            param=path or None,
            code="missing_field" if missing else "invalid_value",
        ) from None


def _too_large(request: web.Request, limit: int) -> BodyTooLarge:
    _close_after(request)
    return BodyTooLarge(f"The request body is larger than {limit} bytes (server.max_body_bytes).")


def _close_after(request: web.Request) -> None:
    """What is left of the body is not worth reading: the connection ends with the answer."""
    request.protocol.force_close()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a number or a boolean")
