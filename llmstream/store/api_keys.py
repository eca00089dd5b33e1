"""API keys on record, for all replicas: everything but their secrets."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable
from typing import Any

import msgspec

from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender
from llmstream.types import ApiKey

SECRET_DAYS = 30
"""A secret that signs stream URLs outlives its last use by so long."""

_ADD = Script(
    "add-key",
    """
-- KEYS keys; ARGV id, record, ttl_ms. The hash lives as long as its longest-lived key.
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
""",
)
_REVOKE = Script(
    "revoke-key",
    """
-- KEYS keys; ARGV id, channel. -> 1 when there was such a key
local known = redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('PUBLISH', ARGV[2], ARGV[1])
return known
""",
)
_KEEP = Script(
    "keep-secret",
    """
-- KEYS secret; ARGV a new one, ttl_ms. -> the one that is kept
local secret = redis.call('GET', KEYS[1]) or ARGV[1]
redis.call('SET', KEYS[1], secret, 'PX', ARGV[2])
return secret
""",
)
_decoder = msgspec.json.Decoder(ApiKey)


class ApiKeys:
    """Keys made with ``llmstream keys create``, and the secret behind signed URLs."""

    def __init__(self, pipeline: Sender, surest: Callable[[], Sender], keys: Keys) -> None:
        self._pipeline = pipeline
        self._surest = surest
        """Where changes go: a revocation has to survive the store."""
        self._keys = keys

    async def add(self, key: ApiKey, now: float) -> None:
        """Puts a key on record until it expires."""
        for other in await self.all():
            if other.expires_at <= now:
                await self._pipeline.call("HDEL", self._keys.api_keys, other.id)
        life_ms = max(1, int((key.expires_at - now) * 1000))
        await self._surest().run(_ADD, [self._keys.api_keys], key.id, msgspec.json.encode(key), life_ms)

    async def find(self, key_id: str) -> ApiKey | None:
        """The record of a key, which may have expired."""
        record = await self._pipeline.call("HGET", self._keys.api_keys, key_id)
        return None if record is None else _decoder.decode(record)

    async def all(self) -> list[ApiKey]:
        """All keys on record, oldest first."""
        records: list[Any] = await self._pipeline.call("HVALS", self._keys.api_keys)
        return sorted(map(_decoder.decode, records), key=lambda key: key.created_at)

    async def revoke(self, key_id: str) -> bool:
        """Takes a key off the record and tells all replicas; False when there was no such key."""
        return bool(await self._surest().run(_REVOKE, [self._keys.api_keys], key_id, self._keys.revoked))

    def keep_secret(self, secret: bytes) -> Future[bytes]:
        """Keeps the secret that signs URLs unless there is one; the future resolves to the one that is kept."""
        return self._pipeline.run(_KEEP, [self._keys.stream_secret], secret, SECRET_DAYS * 86_400_000)
