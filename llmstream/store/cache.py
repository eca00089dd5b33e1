"""Which job answers which request: names of requests that point to jobs, the least recently used ones given up first.

Each owner has an index of its own, in one hash slot. The answers themselves are the logs of the jobs.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender

ANY = "*"
STATISTICS_S = 7 * 24 * 3600
"""How long an index that nobody uses keeps its statistics."""

Count = Literal["hits", "misses", "shared", "evictions"]
COUNTS: tuple[Count, ...] = ("hits", "misses", "shared", "evictions")

_POINT = Script(
    "cache_point",
    """
-- KEYS entries, used, statistics; ARGV name, job id, job id to replace or '*' or '', ttl_ms, size, statistics' ttl_ms.
-- -> the job that the name points to from now on
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function fmt(number) return string.format('%.0f', number) end
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held and ARGV[3] ~= '*' then
  local job, expires = string.match(held, '^(.*)|(%d+)$')
  if tonumber(expires) > now and job ~= ARGV[3] then
    redis.call('ZADD', KEYS[2], fmt(now), ARGV[1])
    return job
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. '|' .. fmt(now + ARGV[4] * 1000))
redis.call('ZADD', KEYS[2], fmt(now), ARGV[1])
local over = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[5])
if over > 0 then
  for _, name in ipairs(redis.call('ZRANGE', KEYS[2], 0, over - 1)) do
    redis.call('HDEL', KEYS[1], name)
    redis.call('ZREM', KEYS[2], name)
  end
  redis.call('HINCRBY', KEYS[3], 'evictions', over)
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return ARGV[2]
""",
)
_COUNT = Script(
    "cache_count",
    """
-- KEYS statistics; ARGV field, ttl_ms.
redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
""",
)

logger = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """What an index holds, and what it was good for."""

    entries: int
    counts: dict[str, int]


class CacheIndex:
    """All indexes in the store."""

    def __init__(self, pipeline: Sender, keys: Keys) -> None:
        self._pipeline = pipeline
        self._keys = keys

    async def point(self, owner: str, name: str, job_id: str, *, ttl_s: float, size: int, instead_of: str = "") -> str:
        """Lets a free name point to ``job_id`` and returns what it points to; of many who try at once one succeeds.

        A name that points to ``instead_of`` counts as free; ``ANY`` frees every name.
        """
        step = (name, job_id, instead_of, max(1, int(ttl_s * 1000)), size, STATISTICS_S * 1000)
        held: bytes = await self._pipeline.run(_POINT, self._keys.cache(owner), *step)
        return held.decode()

    def count(self, owner: str, field: Count) -> None:
        """Counts one use. Travels with the next batch."""
        *_, statistics = self._keys.cache(owner)
        self._pipeline.defer_script(_COUNT, [statistics], (field, STATISTICS_S * 1000), _counted)

    async def statistics(self, owner: str) -> Statistics:
        entries, _, statistics = self._keys.cache(owner)
        held = await self._pipeline.call("HLEN", entries)
        counts = await self._pipeline.call("HMGET", statistics, *COUNTS)
        return Statistics(held, {field: int(count or 0) for field, count in zip(COUNTS, counts, strict=True)})


def _counted(_reply: Any, error: Exception | None) -> None:
    if error is not None:
        logger.warning("the cache's statistics miss a request: %s", error)
