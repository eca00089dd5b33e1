"""What can be configured about webhooks: who signs, where events may go, how often they are tried."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator

from llmstream.config_schema import Section, comma_separated, split_url

EventType = Literal["response.completed", "response.failed", "response.cancelled", "response.incomplete"]
SECRET_PREFIX = "whsec_"  # noqa: S105 - what every secret begins with
NOTHING_SIGNS = "Requests may name no webhook here, as nothing is configured to sign it with: set webhooks.secret."
_MIN_SECRET, _MAX_SECRET = 24, 64
_RULE = (
    f"{SECRET_PREFIX} and the base64 of {_MIN_SECRET} to {_MAX_SECRET} bytes, for example what "
    f"'echo {SECRET_PREFIX}$(openssl rand -base64 32)' prints; two, separated by a comma, while one replaces the other"
)


class WebhookSettings(Section):
    secret: SecretStr | None = None
    """Signs what goes to the URLs that requests name: ``whsec_`` and base64. Two, separated by a comma, sign side by
    side while one replaces the other. None: requests may name no URL."""
    allow: list[str] = []
    """Hosts (``hooks.internal``, ``*.corp``) and networks (``10.0.0.0/8``) that requests may name although they are not
    public; hosts named here may also be reached by ``http`` and on any port."""
    timeout_s: Annotated[float, Field(gt=0, le=120)] = 15.0
    """What a receiver gets to answer."""
    base_s: Annotated[float, Field(gt=0)] = 5.0
    """Wait before the second try; it doubles with every further one. Up to a quarter is taken off it by chance."""
    cap_s: Annotated[float, Field(gt=0)] = 3600.0
    """Longest wait between two tries."""
    give_up_s: Annotated[float, Field(gt=0)] = 12 * 3600.0
    """Seconds after a job's end from which on its event is not tried again; never longer than ``store.retention_s``."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 32
    """Requests that one replica makes at once."""
    host_concurrency: Annotated[int, Field(ge=1)] = 4
    """The same to one host."""
    max_text_chars: Annotated[int, Field(ge=0)] = 262_144
    """Longest text in an event; more is cut off, and ``text_truncated`` says so."""

    _lists = field_validator("allow", mode="before")(comma_separated)

    @field_validator("allow")
    @classmethod
    def _hosts_or_networks(cls, allow: list[str]) -> list[str]:
        for entry in allow:
            if not re.fullmatch(r"[A-Za-z0-9*_.-]+|[0-9A-Fa-f:.]+(/[0-9]{1,3})?", entry):
                raise ValueError("a list of hosts and networks, such as hooks.internal, *.corp or 10.0.0.0/8")
        return allow

    @field_validator("secret")
    @classmethod
    def _well_formed(cls, value: SecretStr | None) -> SecretStr | None:
        return checked_secrets(value)


class ReceiverSettings(Section):
    url: SecretStr
    """Where events go; shown to nobody, as such addresses may hold a secret. May be private, and ``http``."""
    secret: SecretStr
    """Signs what goes there, like ``webhooks.secret``."""
    events: Annotated[list[EventType], Field(min_length=1)] = [
        "response.completed",
        "response.failed",
        "response.cancelled",
        "response.incomplete",
    ]
    """Which ends it hears of."""
    principals: list[str] = ["*"]
    """Whose jobs it hears of: names of API keys, as patterns such as ``team-*``."""
    include_text: bool = True
    """Whether events hold the answer's text."""

    _lists = field_validator("events", "principals", mode="before")(comma_separated)

    @field_validator("url")
    @classmethod
    def _http_url(cls, url: SecretStr) -> SecretStr:
        parts = split_url(url.get_secret_value())
        if not parts or parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError("an http:// or https:// URL with a host and without a user")
        return url

    @field_validator("secret")
    @classmethod
    def _well_formed(cls, value: SecretStr) -> SecretStr:
        return checked_secrets(value) or value


def split_secrets(text: str) -> tuple[bytes, ...]:
    """The single secrets of a list that was written as one text. Raises ValueError."""
    return tuple(map(_decode, filter(None, re.split(r"[,\s]+", text))))


def checked_secrets(value: SecretStr | None) -> SecretStr | None:
    """For validators: one secret, or two. Raises ValueError."""
    if value is not None and not 1 <= len(split_secrets(value.get_secret_value())) <= 2:
        raise ValueError(_RULE)
    return value


def _decode(secret: str) -> bytes:
    try:
        decoded = b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if not secret.startswith(SECRET_PREFIX) or not _MIN_SECRET <= len(decoded) <= _MAX_SECRET:
        raise ValueError(_RULE)
    return decoded
