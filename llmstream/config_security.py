"""Who may use the server: API keys of the configuration, stream URLs, browsers, the length of prompts."""

from __future__ import annotations

import ipaddress
import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator

from llmstream.config_schema import Section, comma_separated
from llmstream.config_webhooks import checked_secrets
from llmstream.types import CallerLimits, Scope

KEY_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY_NAME_RULE = "up to 64 letters, digits and . _ - that begin with a letter or digit"
MIN_API_KEY = 16
"""Characters: shorter ones can be guessed, or are the mask of --print-config."""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


MAX_LIMIT = 1_000_000_000
Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)]


class RateLimitSettings(Section):
    """Limits of each caller: of each API key, and of each IP address where no keys are asked for."""

    enabled: bool = True
    """``false`` takes all limits of callers off, those of single keys too."""
    requests_per_minute: Limit | None = None
    """Requests for an answer that one caller may send in a minute, over all replicas; None or 0: no limit. So with the
    others."""
    burst_size: Limit | None = None
    """So many of them may come at once after a pause; None: those of a minute."""
    tokens_per_minute: Limit | None = None
    """Tokens of one caller's prompts and answers in a minute."""
    concurrent_jobs: Limit | None = None
    """Jobs of one caller that run at once in one pool (all remote models, or one local one); more wait in line, and
    others pass them."""
    queued_jobs: Limit | None = None
    """Jobs of one caller that wait in one pool; more are refused with 429."""
    trusted_proxies: list[str] = []
    """Addresses and networks whose ``X-Forwarded-For`` says where a request comes from, for example ``10.0.0.0/8``."""

    _lists = field_validator("trusted_proxies", mode="before")(comma_separated)

    @property
    def defaults(self) -> CallerLimits:
        """The limits of callers about whom nothing else is said."""
        return limits_in(self)

    @property
    def networks(self) -> list[Network]:
        """``trusted_proxies``, read."""
        return [ipaddress.ip_network(each) for each in self.trusted_proxies]

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, proxies: list[str]) -> list[str]:
        for each in proxies:
            try:
                ipaddress.ip_network(each)
            except ValueError as error:
                raise ValueError(f"a list of addresses and networks such as 10.0.0.0/8 ({error})") from None
        return proxies


class KeySettings(Section):
    """One API key of the configuration."""

    value: SecretStr
    """The key itself, 16 characters or more, for example ``openssl rand -hex 32``."""
    scopes: Annotated[list[Scope], Field(min_length=1)] = ["generate"]
    """``read``: see one's own jobs; ``generate``: also make, cancel and requeue them; ``admin``: all that with
    everybody's."""
    models: list[str] = ["*"]
    """Models that may be asked for, as patterns such as ``gpt-*``."""
    expires: datetime | None = None
    """From then on the key is refused; UTC unless it says otherwise."""
    webhook_secret: SecretStr | None = None
    """Signs events of its jobs instead of the secret made of ``webhooks.secret``; in the same form."""
    requests_per_minute: Limit | None = None
    """What this key may do instead of what ``rate_limit`` says; 0: no limit. So with the next four."""
    burst_size: Limit | None = None
    """Requests at once after a pause."""
    tokens_per_minute: Limit | None = None
    """Tokens of prompts and answers in a minute."""
    concurrent_jobs: Limit | None = None
    """Jobs that run at once in one pool."""
    queued_jobs: Limit | None = None
    """Jobs that wait in one pool."""

    _lists = field_validator("scopes", "models", mode="before")(comma_separated)

    @field_validator("value")
    @classmethod
    def _not_guessable(cls, value: SecretStr) -> SecretStr:
        return SecretStr(_api_key(value.get_secret_value()))

    @field_validator("webhook_secret")
    @classmethod
    def _well_formed(cls, value: SecretStr | None) -> SecretStr | None:
        return checked_secrets(value)

    @field_validator("expires")
    @classmethod
    def _with_time_zone(cls, expires: datetime | None) -> datetime | None:
        return expires.replace(tzinfo=UTC) if expires is not None and expires.tzinfo is None else expires


class SecuritySettings(Section):
    api_key: SecretStr | None = None
    """API keys without a name, separated by commas, each with the scope ``generate``. ``API_KEYS`` sets it too."""
    keys_required: bool = False
    """Asks for API keys also when the configuration names none: those of ``llmstream keys create``."""
    open: list[Literal["health", "metrics", "docs"]] = ["health", "metrics", "docs"]
    """Routes that need no key where others do."""
    stream_url_s: Annotated[float, Field(ge=1, le=7 * 86400)] = 3600.0
    """How long the signed ``stream_url`` of a job can be opened without a key."""
    stream_secret: SecretStr | None = None
    """Signs stream URLs, 16 characters or more; without one the replicas share one that is kept in the store."""
    cors_origins: list[str] = []
    """Origins whose pages may call this server from a browser, for example ``https://app.example.com``; ``*``: all."""
    max_prompt_chars: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt, all messages together; a longer one is refused with 400."""

    _lists = field_validator("open", "cors_origins", mode="before")(comma_separated)

    @property
    def api_keys(self) -> list[str]:
        """The single keys of ``api_key``."""
        return split_keys(self.api_key.get_secret_value()) if self.api_key is not None else []

    @field_validator("api_key")
    @classmethod
    def _not_guessable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            for key in split_keys(value.get_secret_value()) or [""]:
                _api_key(key)
        return value

    @field_validator("stream_secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        return value and SecretStr(_api_key(value.get_secret_value()))

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s*]+", origin):
                raise ValueError("a list of origins such as https://app.example.com, without a path, or *")
        return origins


def limits_in(section: RateLimitSettings | KeySettings) -> CallerLimits:
    """What a section says about limits."""
    return CallerLimits(**{name: getattr(section, name) for name in CallerLimits.__struct_fields__})


def split_keys(text: str) -> list[str]:
    """Single API keys of a list that was written as one text, or as the lines of a file."""
    return [key for key in re.split(r"[,\s]+", text) if key]


def _api_key(value: str) -> str:
    if len(value) < MIN_API_KEY or not re.fullmatch(r"[!-~]+", value) or "," in value:
        raise ValueError(
            f"{MIN_API_KEY} or more printable ASCII characters without spaces and commas, for example what "
            "'openssl rand -hex 32' prints"
        )
    return value
