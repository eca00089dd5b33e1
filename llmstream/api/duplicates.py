"""By what a request may be known when it comes again: headers and the caller's own id."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from llmstream.duplicates import Identity
from llmstream.errors import BadRequest
from llmstream.store.repeats import digest

KEY_HEADER = "Idempotency-Key"
RETRY_HEADER = "x-stainless-retry-count"
MAX_KEY = 255
READING = frozenset({"stream", "stream_options", "encoding_format"})
"""Fields that say how an answer is read and not what it is."""


def identity(request: web.Request, job_id: str | None, body: dict[str, Any]) -> Identity | None:
    """What the caller says about repeating this request; None for one that says nothing. Raises BadRequest."""
    key, count = request.headers.get(KEY_HEADER), request.headers.get(RETRY_HEADER, "")
    if key is not None and not (1 <= len(key) <= MAX_KEY and key.isprintable()):
        raise BadRequest(f"{KEY_HEADER} must be 1 to {MAX_KEY} printable characters.", param=KEY_HEADER)
    retry = int(count) if count.isascii() and count.isdigit() and len(count) < 9 else None
    if job_id is None and key is None and retry is None:
        return None
    return Identity(fingerprint=fingerprint(body), job_id=job_id, key=key, retry=retry)


def fingerprint(body: dict[str, Any]) -> str:
    """Equal for bodies that ask for the same answer, whatever the order of their fields."""
    asked = {name: value for name, value in body.items() if name not in READING}
    return digest(msgspec.json.encode(asked, order="deterministic").decode())
