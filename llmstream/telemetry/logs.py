"""Logging: every message of the logger ``llmstream`` as a line for people or as one JSON object."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from llmstream.config import LoggingSettings
from llmstream.config_schema import MASK
from llmstream.telemetry.origin import ORIGIN

ROOT = "llmstream"

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET_FIELD = re.compile(
    r"(?i)pass(word|wd)?$|secret|api_?key|authorization|access_?token|auth_?token|cookie|credential"
)
_SECRETS = (
    (("://",), re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s@]+@"), rf"\1:{MASK}@"),
    (("bearer", "basic"), re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), rf"\1 {MASK}"),
    (
        ("key", "password", "secret", "token"),
        re.compile(
            r"(?i)\b((?:[\w-]{0,40}[_-])?(?:api[_-]?key|password|secret|access[_-]?token)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]+"
        ),
        rf"\1{MASK}",
    ),
    (("k-",), re.compile(r"\b(?:sk|pk|rk)-[\w-]{8,}"), MASK),
    (("token=",), re.compile(r"([?&]token=)[^\s\"'&#]+"), rf"\1{MASK}"),
)
"""What a secret looks like, behind what stands in all of its forms: to look for that first costs a tenth."""
_encode = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """``{"timestamp", "level", "logger", "message", …}`` on one line, then what the call gave as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "timestamp": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        entry.update((name, value) for name, value in fields(record) if name not in entry)
        if trace := _trace(self, record):
            entry["exception"] = trace
        return _encode(entry)


class ConsoleFormatter(logging.Formatter):
    """``time LEVEL logger: message name=value …``; only a traceback takes further lines."""

    def format(self, record: logging.LogRecord) -> str:
        extra = "".join(f" {name}={value}" for name, value in fields(record))
        text = f"{redact(record.getMessage())}{extra}"
        if not text.isprintable():
            text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        head = f"{_timestamp(record)} {record.levelname:<7} {record.name}: {text}"
        trace = _trace(self, record)
        return f"{head}\n{trace}" if trace else head


def setup_logging(settings: LoggingSettings, **context: str | int) -> None:
    """Sends the log to stderr in the chosen form, ``context`` on every line.

    Calling it again replaces what the earlier call set up.
    """
    logger = logging.getLogger(ROOT)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(handler)
    handler = _Handler(sys.stderr)
    handler.addFilter(_Context(context))
    handler.setFormatter(JsonFormatter() if settings.format == "json" else ConsoleFormatter())
    logger.addHandler(handler)
    logger.setLevel(settings.level)
    logger.propagate = False


def fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """What the caller gave as ``extra``, secrets masked."""
    for name, value in vars(record).items():
        if name in _STANDARD or name.startswith("_"):
            continue
        if _names_secret(name):
            yield name, MASK
        else:
            yield name, value if value is None or isinstance(value, bool | int | float) else redact(str(value))


def redact(text: str) -> str:
    """Masks what looks like a secret: passwords in URLs, bearer tokens, API keys."""
    lower = text.lower()
    for marks, pattern, masked in _SECRETS:
        for mark in marks:
            if mark in lower:
                text = pattern.sub(masked, text)
                break
    return text


@lru_cache(maxsize=256)
def _names_secret(field: str) -> bool:
    return _SECRET_FIELD.search(field) is not None


class _Handler(logging.StreamHandler[Any]):
    """Marks the handler as ours among those an application may have added."""


class _Context(logging.Filter):
    """Gives every record the same further fields, and the ids of the request and the job that it is about."""

    def __init__(self, context: Mapping[str, str | int]) -> None:
        super().__init__()
        self._context = context

    def filter(self, record: logging.LogRecord) -> bool:
        known = vars(record)
        known.update(self._context)
        origin = ORIGIN.get()
        if origin.request_id is not None:
            known.setdefault("request_id", origin.request_id)
        if origin.job_id is not None:
            known.setdefault("job_id", origin.job_id)
        return True


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return redact("\n".join(parts)) or None
