"""What upstreams say when they refuse, in our own errors. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import Struct

from llmstream.errors import ProviderError, UpstreamBroken, UpstreamLimited, UpstreamRejected
from llmstream.types import Clock

_LONGEST = 1000


class Complaint(Struct, frozen=True):
    """What an upstream says is wrong."""

    message: str = "it gave no reason"
    param: str | None = None
    code: str | None = None


def complaint(value: Any) -> Complaint:
    """Reads a decoded error: the OpenAI form and the variants that are in use."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict) and value.get("error"):
        value = value["error"]
    if not isinstance(value, dict):
        return Complaint(str(value)[:_LONGEST])
    said = next((value[key] for key in ("message", "detail", "msg", "reason") if value.get(key)), value)
    param, code = value.get("param"), value.get("code")
    return Complaint(
        (said if isinstance(said, str) else msgspec.json.encode(said).decode())[:_LONGEST],
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )


def read_complaint(body: bytes) -> Complaint:
    """Reads the body of an error response, which may be anything."""
    try:
        return complaint(msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="replace").strip()
        return Complaint(text[:_LONGEST]) if text and not text.startswith("<") else Complaint()


def refusal(status: int, headers: Mapping[str, str], body: bytes, *, provider: str) -> ProviderError:
    """Turns an HTTP answer that is not 200 into the error that says what to do about it."""
    said = read_complaint(body)
    what = f"The provider {provider!r} answered HTTP {status}: {said.message}"
    where = f"providers.{provider}"
    if status == 401:
        # Some upstreams repeat parts of the key in their message.
        return ProviderError(f"The provider {provider!r} did not accept the key (HTTP 401); check {where}.api_key")
    if status == 403:
        return ProviderError(f"{what}; check what {where}.api_key may do")
    if status == 429:
        return UpstreamLimited(what, code=said.code, retry_after=retry_after(headers))
    if status >= 500 or status in {408, 409, 425}:
        return UpstreamBroken(what, retry_after=retry_after(headers))
    if status == 402:
        return ProviderError(what)
    if status >= 400:
        return UpstreamRejected(what, param=said.param, code=said.code, status=status)
    return ProviderError(f"The provider {provider!r} answered HTTP {status} instead of 200; check {where}.base_url")


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
