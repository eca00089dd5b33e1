"""Request bodies: read within bounds, parsed strictly, refused with the name of the field that is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from pydantic import BaseModel, ValidationError

from llmstream.api.keys import BODY_TIMEOUT_S
from llmstream.errors import BadRequest, BodyTooLarge

MAX_DEPTH = 100
"""Brackets inside brackets. What is read here is written and read again in places with less stack to spare."""
INVALID_JSON = "invalid_json"
MISSING = "missing_field"
ENCODINGS = frozenset({"", "identity", "gzip", "deflate", "br", "zstd"})
"""What aiohttp undoes, the last two where their packages are installed; it hands others on as they are."""

Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: web.Request) -> tuple[dict[str, Any], bytes]:
    """Reads a JSON object: what it says, and its bytes.

    Raises BadRequest, and BodyTooLarge before reading a body that is announced as too large.
    """
    raw = await _read(request)
    value = _decode(raw)
    if not isinstance(value, dict):
        raise BadRequest(f"The request body must be a JSON object, not {_kind(value)}.", code=INVALID_JSON)
    return value, raw


async def _read(request: web.Request) -> bytes:
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    if request.headers.get("Content-Encoding", "").strip().lower() not in ENCODINGS:
        raise unsupported_encoding()
    try:
        if request.content.is_eof():  # it came with the headers
            raw = request.content.read_nowait()
            if len(raw) > limit:
                raise _too_large(limit)
            return raw
        async with asyncio.timeout(request.app[BODY_TIMEOUT_S]):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except TimeoutError:
        raise slow_sender("body", "body_timeout_s", request.app[BODY_TIMEOUT_S]) from None
    except (BodyTooLarge, ConnectionError, asyncio.CancelledError):
        raise
    except Exception:  # whatever the decoder raises
        raise unreadable() from None


def _decode(raw: bytes) -> Any:
    if not raw:
        raise BadRequest("The request body is empty; a JSON object is expected.", code=INVALID_JSON)
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", code=INVALID_JSON) from None
    if raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH:
        return value
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return value
    raise _too_deep()


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def validate(schema: type[Model], value: dict[str, Any]) -> Model:
    """Checks a body against its schema. Raises BadRequest that names the field and what is allowed."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        path, said, input_, code = _complaint(error, value)
        given = "" if code == MISSING or not path else f" (got {_short(input_)})"
        raise BadRequest(f"{path}: {said}{given}." if path else f"{said}.", param=path or None, code=code) from None


def _complaint(error: ValidationError, value: dict[str, Any]) -> tuple[str, str, Any, str]:
    """The first thing that is wrong: where, what, the value found there, and a code.

    Where several types are allowed, pydantic complains once for each: the complaint that got furthest tells most.
    """
    found = [(_path(each["loc"], value), each) for each in error.errors(include_url=False, include_context=False)]
    start = found[0][0]
    path = max((path for path, _ in found if path[: len(start)] == start), key=len)
    same = [each for other, each in found if other == path]
    said = list(dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in same))
    words = ", or ".join([said[0], *(each.removeprefix("Input should be ") for each in said[1:])])
    code = MISSING if same[0]["type"] == "missing" else "invalid_value"
    return ".".join(path), words, same[0]["input"], code


def _path(loc: tuple[int | str, ...], value: Any) -> list[str]:
    """A location without the names of types that pydantic puts between the keys."""
    path: list[str] = []
    for last, part in enumerate(loc, 1 - len(loc)):
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
        if inside or (last == 0 and isinstance(value, dict)):
            path.append(str(part))
    return path


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes (server.max_body_bytes).")


def slow_sender(part: str, setting: str, limit_s: float) -> BadRequest:
    return BadRequest(
        f"The request's {part} did not arrive within {limit_s:g} s (server.{setting}); send it faster.",
        status=408,
        code="request_timeout",
    )


def unsupported_encoding() -> BadRequest:
    return BadRequest(
        "The body's Content-Encoding is not supported here; send it as it is, or with gzip or deflate.",
        status=415,
        code="unsupported_encoding",
    )


def unreadable() -> BadRequest:
    return BadRequest(
        "The request body cannot be read: it is not what its Content-Encoding or Transfer-Encoding says.",
        code="invalid_body",
    )


def _too_deep() -> BadRequest:
    return BadRequest(f"The request body is nested deeper than {MAX_DEPTH} levels.", code=INVALID_JSON)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a number or a boolean")
