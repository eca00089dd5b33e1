"""What requests are known by when they come again: names that point to jobs.

A name is claimed before its job exists and is never given back, only left to expire. That is what makes it exact: who
finds a name whose job has no record (its owner crashed, or was refused) creates the job under the very id it points to,
and of all who try one succeeds.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender
from llmstream.store.recent import Recent

_POINT = Script(
    "point",
    """
-- KEYS name; ARGV job id, ttl_ms, job id to replace or ''. -> the job the name points to from now on
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[3] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
""",
)

logger = logging.getLogger(__name__)


class Repeats:
    """Names in the store, each under a hash slot of its own."""

    def __init__(self, pipeline: Sender, keys: Keys, recent: Recent) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._recent = recent

    async def point(self, name: str, job_id: str, ttl_s: float, *, instead_of: str = "") -> str:
        """Lets a free name point to ``job_id`` and returns what it points to; of many who try at once one succeeds.

        A name that points to ``instead_of`` counts as free.
        """
        key = self._keys.repeat(name)

        async def point() -> str:
            held: bytes = await self._pipeline.run(_POINT, [key], job_id, _ms(ttl_s), instead_of)
            return held.decode()

        held = await point()
        if held == job_id:
            self._recent.remember(point, len(key) + len(job_id))
        return held

    async def find(self, name: str) -> str | None:
        """What a name points to; None for a free one."""
        held: bytes | None = await self._pipeline.call("GET", self._keys.repeat(name))
        return held.decode() if held is not None else None

    def note(self, name: str, job_id: str, ttl_s: float) -> None:
        """Lets a name point to ``job_id`` from now on, whatever it meant before. Travels with the next batch."""
        command = ("SET", self._keys.repeat(name), job_id, "PX", _ms(ttl_s))
        self._pipeline.defer(command, _noted)
        self._recent.remember(lambda: self._pipeline.call(*command), len(name) + len(job_id))


def digest(*parts: str) -> str:
    """A short name for texts of any length."""
    whole = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(whole.encode(), digest_size=20).hexdigest()


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _noted(_reply: Any, error: Exception | None) -> None:
    if error is not None:
        logger.warning("a retry of this request will not be recognised: %s", error)
