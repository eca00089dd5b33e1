"""From a shown secret to its principal: keys of the configuration, and keys of the store, remembered for a while."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from typing import NamedTuple

from msgspec.structs import replace

from llmstream.access import credentials
from llmstream.config import Settings
from llmstream.config_security import limits_in
from llmstream.errors import StoreUnavailable, Unauthorized
from llmstream.store.api_keys import ApiKeys
from llmstream.types import ApiKey, CallerLimits, Clock, Metered, Principal, scopes_upto

FRESH_S = 30.0
"""A key of the store is looked up again after so long: a revocation takes effect by then even if nobody heard of it."""
MAX_REMEMBERED = 10_000

logger = logging.getLogger(__name__)


class _Known(NamedTuple):
    principal: Principal
    expires_at: float
    fresh_until: float
    key_id: str | None = None
    """None for a key of the configuration."""


class KeyRing:
    """All keys that this replica takes. A key it has seen lately costs no look into the store."""

    def __init__(self, settings: Settings, keys: ApiKeys, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock
        self._limits = settings.rate_limit
        self._posts = settings.broker.kind == "rabbitmq" and settings.broker.consume
        # Lookups take their time from a digest that nobody outside can compute: timing says nothing about a secret.
        self._pepper = os.urandom(32)
        self._configured = dict(self._of(settings))
        self._known = dict(self._configured)
        self._revoked = 0

    def recall(self, secret: str) -> Principal | None:
        """Who shows a known key; None when :meth:`find` has to look."""
        known = self._known.get(self._digest(secret))
        return known.principal if known is not None and self._clock() < known.fresh_until else None

    async def find(self, secret: str) -> Principal:
        """Who shows a key. Raises Unauthorized; StoreUnavailable when nobody can tell for now."""
        digest, key_id, now = self._digest(secret), credentials.id_of(secret), self._clock()
        known = self._known.get(digest)
        if known is not None and now < known.fresh_until:
            return known.principal
        if key_id is not None and (known is None or known.key_id is not None):
            revoked = self._revoked
            try:
                key = await self._keys.find(key_id)
            except StoreUnavailable:
                if known is not None and now < known.expires_at:
                    return known.principal
                raise
            if key is not None and credentials.matches(key, secret) and now < key.expires_at:
                principal = self._metered(key.principal, key.limits or CallerLimits())
                if self._posts and key.limits is not None and key.limits.queued_jobs:
                    logger.warning(
                        "queued_jobs of key %s does not hold: jobs wait in RabbitMQ, where they are not counted", key.id
                    )
                if revoked == self._revoked:
                    self._remember(digest, key, principal, now)
                return principal
            self._known.pop(digest, None)
        raise Unauthorized(
            "The API key is not valid here: it is misspelt, has expired or was revoked. Ask whoever runs this server."
        )

    def forget(self, key_id: str) -> None:
        """Takes note that a key of the store was revoked."""
        self._revoked += 1
        self._known = {digest: known for digest, known in self._known.items() if known.key_id != key_id}

    def _remember(self, digest: bytes, key: ApiKey, principal: Principal, now: float) -> None:
        if len(self._known) >= MAX_REMEMBERED + len(self._configured):
            self._known = dict(self._configured)
        self._known[digest] = _Known(principal, key.expires_at, min(key.expires_at, now + FRESH_S), key.id)

    def _of(self, settings: Settings) -> list[tuple[bytes, _Known]]:
        found: list[tuple[bytes, _Known]] = []
        for name, key in settings.keys.items():
            models = None if "*" in key.models else tuple(key.models)
            until = key.expires.timestamp() if key.expires is not None else math.inf
            principal = Principal(id=name, scopes=scopes_upto(key.scopes), models=models)
            principal = self._metered(principal, limits_in(key))
            found.append((self._digest(key.value.get_secret_value()), _Known(principal, until, until)))
        for secret in settings.security.api_keys:
            principal = Principal(id=credentials.name_of(secret), scopes=scopes_upto(["generate"]))
            principal = self._metered(principal, CallerLimits())
            found.append((self._digest(secret), _Known(principal, math.inf, math.inf)))
        return found

    def _metered(self, principal: Principal, own: CallerLimits) -> Principal:
        limits = own.over(self._limits.defaults) if self._limits.enabled else None
        return principal if limits is None else replace(principal, metered=Metered(principal.id, limits))

    def _digest(self, secret: str) -> bytes:
        return hashlib.blake2b(secret.encode("utf-8", "surrogatepass"), key=self._pepper, digest_size=16).digest()
