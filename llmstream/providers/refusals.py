"""What upstreams say when they refuse, in our own errors. Pure.

A refusal comes as an HTTP status or, behind a 200, as an error object in place of an answer or of its next piece. What
kind it is follows from its code where that is known, and from the status otherwise.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import Struct

from llmstream.errors import (
    ProviderError,
    UpstreamDenied,
    UpstreamFailed,
    UpstreamFiltered,
    UpstreamLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamTooLong,
    UpstreamUnknown,
)
from llmstream.types import Clock

_LONGEST = 1000
_CODES: Mapping[str, type[ProviderError]] = {
    "authentication_error": UpstreamDenied,
    "content_filter": UpstreamFiltered,
    "content_policy_violation": UpstreamFiltered,
    "context_length_exceeded": UpstreamTooLong,
    "exceed_context_size_error": UpstreamTooLong,
    "insufficient_quota": UpstreamDenied,
    "invalid_api_key": UpstreamDenied,
    "invalid_request_error": UpstreamRejected,
    "model_not_found": UpstreamUnknown,
    "overloaded_error": UpstreamFailed,
    "permission_error": UpstreamDenied,
    "rate_limit_error": UpstreamLimited,
    "rate_limit_exceeded": UpstreamLimited,
    "rate_limited": UpstreamLimited,
    "request_too_large": UpstreamTooLong,
    "string_above_max_length": UpstreamTooLong,
    "tokens_exceeded_error": UpstreamTooLong,
}
"""What codes, and types where the code says nothing, mean at any upstream."""
_TOO_LONG = re.compile(
    r"context (length|window|size)|maximum context|prompt is too long|too many (input )?tokens|input is too long"
    r"|exceeds? the (model's )?(maximum|available) (number of tokens|context)",
    re.IGNORECASE,
)
_KINDS: Mapping[int, type[ProviderError]] = {
    401: UpstreamDenied,
    402: UpstreamDenied,
    403: UpstreamDenied,
    404: UpstreamUnknown,
    408: UpstreamTimeout,
    409: UpstreamFailed,
    413: UpstreamTooLong,
    425: UpstreamFailed,
    429: UpstreamLimited,
    504: UpstreamTimeout,
}


class Complaint(Struct, frozen=True):
    """What an upstream says is wrong."""

    message: str = "it gave no reason"
    param: str | None = None
    code: str | None = None
    type: str | None = None
    status: int | None = None
    """An HTTP status inside the body, as gateways send it behind a 200."""


def complaint(value: Any) -> Complaint:
    """Reads a decoded error: the OpenAI form and the variants that are in use."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict) and value.get("error"):
        value = value["error"]
    if not isinstance(value, dict):
        return Complaint(str(value)[:_LONGEST])
    said = next((value[key] for key in ("message", "detail", "msg", "reason") if value.get(key)), value)
    param, code, kind = value.get("param"), value.get("code"), value.get("type")
    status = next((each for each in (code, value.get("status")) if type(each) is int and 400 <= each < 600), None)
    return Complaint(
        (said if isinstance(said, str) else msgspec.json.encode(said).decode())[:_LONGEST],
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
        type=kind if isinstance(kind, str) else None,
        status=status,
    )


def read_complaint(body: bytes) -> Complaint:
    """Reads the body of an error response, which may be anything."""
    try:
        return complaint(msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="replace").strip()
        return Complaint(text[:_LONGEST]) if text and not text.startswith("<") else Complaint()


def kind_of(said: Complaint, status: int | None) -> type[ProviderError]:
    """What an upstream means: with ``status`` None, by what it says alone."""
    told = _CODES.get(said.code or "")
    if told is None and status in (None, 400, 422) and _TOO_LONG.search(said.message):
        told = UpstreamTooLong
    if told is None and status is None:
        told = _CODES.get(said.type or "")
    if told is not None and (told is not UpstreamRejected or status is None):
        return told
    if status is None or status >= 500:
        return _KINDS.get(status or 0, UpstreamFailed)
    return _KINDS.get(status, UpstreamRejected)


def refusal(status: int, headers: Mapping[str, str], body: bytes, *, provider: str) -> ProviderError:
    """Turns an HTTP answer that is not 200 into the error that says what to do about it."""
    if status < 400:
        return ProviderError(
            f"The provider {provider!r} answered HTTP {status} instead of 200; check providers.{provider}.base_url"
        )
    said = read_complaint(body)
    return _error(kind_of(said, status), said, status, f"answered HTTP {status}", provider, retry_after(headers))


def reported(said: Complaint, *, provider: str) -> ProviderError:
    """The error for what an upstream says behind a 200, in place of an answer or in the middle of one."""
    return _error(kind_of(said, said.status), said, said.status, "reported an error", provider, None)


def _error(
    kind: type[ProviderError], said: Complaint, status: int | None, how: str, provider: str, after: float | None
) -> ProviderError:
    what, key = f"The provider {provider!r} {how}: {said.message}", f"providers.{provider}.api_key"
    if kind is UpstreamDenied:
        if status == 401 or said.code == "invalid_api_key":
            # Some upstreams repeat parts of the key in their message.
            return kind(f"The provider {provider!r} did not accept the key ({how}); check {key}")
        return kind(f"{what}; check what {key} may do")
    if issubclass(kind, UpstreamRejected):
        return kind(what, param=said.param, code=said.code, status=status)
    return kind(what, code=said.code if kind is UpstreamLimited else None, retry_after=after)


def retry_after(headers: Mapping[str, str], clock: Clock = time.time) -> float | None:
    """Seconds from ``retry-after-ms`` or ``retry-after``, a number or a date; None when there is no sense in them."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000
        elif value is not None and value.strip()[:1].isalpha():
            seconds = max(0.0, parsedate_to_datetime(value).timestamp() - clock())
        else:
            seconds = float(value or "nan")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
