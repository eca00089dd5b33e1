"""Rate limits of callers: token buckets that refill steadily and hold a burst, shared by all replicas exactly.

What is missing from a bucket is kept in units so small (one divided by the microseconds of its window) that every sum
is exact.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

from llmstream.store.connection import Arg
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender

logger = logging.getLogger(__name__)

_PRELUDE = """
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local function fmt(number) return string.format('%.0f', number) end
local function put(key, debt, limit)
  redis.call('SET', key, fmt(now) .. '|' .. fmt(debt), 'PX', fmt(math.ceil(debt / limit / 1000) + 1000))
end
-- A bucket: when it was looked at, and what was missing then. A clock that steps back refills nothing, and from there
-- on goes on.
local function missing(key, limit)
  local at, debt = string.match(redis.call('GET', key) or '0|0', '^(%d+)|(%d+)$')
  if tonumber(at) > now then put(key, debt, limit) end
  return math.max(0, debt - math.max(0, now - at) * limit)
end
"""

_TAKE = Script(
    "take",
    _PRELUDE
    + """
-- KEYS buckets; ARGV of each: limit, window_us, burst, cost. -> of each: 1 when it has enough, what was missing before
local debts, enough, reply = {}, true, {}
for i, key in ipairs(KEYS) do
  local limit, window, burst, cost = unpack(ARGV, 4 * i - 3, 4 * i)
  debts[i] = missing(key, limit)
  local allowed = debts[i] + cost * window <= burst * window
  enough = enough and allowed
  reply[i] = {allowed and 1 or 0, fmt(debts[i])}
end
if enough then
  for i, key in ipairs(KEYS) do put(key, debts[i] + ARGV[4 * i] * ARGV[4 * i - 2], ARGV[4 * i - 3]) end
end
return reply
""",
)

_CORRECT = Script(
    "correct",
    _PRELUDE
    + """
-- KEYS bucket; ARGV limit, window_us, more that was used or, below 0, less
local debt = math.max(0, missing(KEYS[1], ARGV[1]) + ARGV[3] * ARGV[2])
put(KEYS[1], debt, ARGV[1])
return 1
""",
)


class Rate(NamedTuple):
    """A bucket that refills with ``limit`` in ``window_s`` seconds and holds ``burst``."""

    name: str
    """What is counted, for example ``requests``."""
    limit: int
    window_s: float
    burst: int

    @property
    def window_us(self) -> int:
        return round(self.window_s * 1_000_000)


class Charge(NamedTuple):
    """So much of a bucket."""

    rate: Rate
    cost: int = 1


class Verdict(NamedTuple):
    """How full a bucket is, as ``X-RateLimit-*`` headers tell it."""

    allowed: bool
    """Whether this bucket had enough; one that has not keeps the others from being charged."""
    limit: int
    remaining: int
    reset_s: float
    """Seconds until it is full again."""
    retry_after_s: float
    """Seconds until a refused bucket has enough; 0 when it had, infinite when it never will."""


class RateLimits:
    """The buckets of all callers."""

    def __init__(self, pipeline: Sender, keys: Keys) -> None:
        self._pipeline = pipeline
        self._keys = keys

    async def take(self, who: str, *charges: Charge) -> list[Verdict]:
        """Takes from several buckets of one caller, from all of them or from none. Raises StoreUnavailable."""
        keys = [self._keys.bucket(who, charge.rate.name) for charge in charges]
        args = [arg for rate, cost in charges for arg in (rate.limit, rate.window_us, rate.burst, cost)]
        reply = await self._pipeline.run(_TAKE, keys, *args)
        taken = all(allowed for allowed, _ in reply)
        found = zip(charges, reply, strict=True)
        return [_verdict(charge, bool(allowed), int(debt), taken) for charge, (allowed, debt) in found]

    def correct(self, who: str, rate: Rate, by: int) -> None:
        """Takes ``by`` more, also where there is not enough, or gives back where it is negative: what was really used
        is known only later. Travels with the next batch."""

        def told(_reply: Any, error: Exception | None) -> None:
            if error is not None:
                logger.warning("what a caller used is not counted exactly: %s", error)

        args: tuple[Arg, ...] = (rate.limit, rate.window_us, by)
        self._pipeline.defer_script(_CORRECT, [self._keys.bucket(who, rate.name)], args, told)


def _verdict(charge: Charge, allowed: bool, debt: int, taken: bool) -> Verdict:
    rate, cost = charge
    window, limit, size = rate.window_us, rate.limit, rate.burst * rate.window_us
    lacking = max(0, debt + cost * window - size)
    retry_after_s = math.inf if cost > rate.burst else lacking / limit / 1_000_000
    if taken:
        debt += cost * window
    return Verdict(allowed, limit, max(0, (size - debt) // window), debt / limit / 1_000_000, retry_after_s)
