"""Rate limits of callers: token buckets that refill steadily and hold a burst, shared by all replicas exactly.

What is missing from a bucket is kept in units so small (one divided by the microseconds of its window) that every sum
is exact. What a job may use is taken when it is accepted and noted under its id; its end takes the note away and sets
right what it really used, however often it is told.
"""

from __future__ import annotations

import math
import os
from asyncio import Future
from typing import Any, NamedTuple

from llmstream.errors import StoreError, StoreUnavailable
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender

RECEIPT_MS = 30_000
"""For so long a repeated request to take is known for what it is."""
SETTLED_MS = 60_000
"""For so long it is known of a job that what it used is counted."""

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
-- KEYS receipt, note of the job or that again, buckets; ARGV receipt_ms, note_ms, which bucket the note is about or 0,
-- then of each bucket: limit, window_us, burst, cost.
-- -> of each: 1 when it has enough, what is missing, what was taken
local note, reply, enough = tonumber(ARGV[3]) + 2, {}, true
if note > 2 and redis.call('GET', KEYS[2]) then ARGV[4 * note - 5] = 0 end
local before = redis.call('GET', KEYS[1])
if before then
  for cost in string.gmatch(before, '%d+') do
    local i = #reply + 3
    reply[i - 2] = {1, fmt(missing(KEYS[i], ARGV[4 * i - 8])), tonumber(cost)}
  end
  return reply
end
for i = 3, #KEYS do
  local limit, window, burst, cost = unpack(ARGV, 4 * i - 8, 4 * i - 5)
  local debt = missing(KEYS[i], limit)
  local allowed = tonumber(cost) == 0 or debt + cost * window <= burst * window
  enough = enough and allowed
  reply[i - 2] = {allowed and 1 or 0, fmt(debt), tonumber(cost)}
end
if not enough then return reply end
local costs = {}
for i = 3, #KEYS do
  local limit, window, _, cost = unpack(ARGV, 4 * i - 8, 4 * i - 5)
  costs[i - 2] = cost
  if tonumber(cost) > 0 then
    local debt = reply[i - 2][2] + cost * window
    put(KEYS[i], debt, limit)
    reply[i - 2][2] = fmt(debt)
    if i == note then redis.call('SET', KEYS[2], cost .. '|' .. limit .. '|' .. window, 'PX', ARGV[2]) end
  end
end
redis.call('SET', KEYS[1], table.concat(costs, '|'), 'PX', ARGV[1])
return reply
""",
)

_GIVE_BACK = Script(
    "give_back",
    _PRELUDE
    + """
-- KEYS receipt, note of the job or that again, buckets, of which the note is about the last one;
-- ARGV of each bucket: limit, what was taken times its window.
if redis.call('DEL', KEYS[1]) == 0 then return 0 end
local last = #KEYS
if KEYS[2] ~= KEYS[1] then
  if redis.call('GET', KEYS[2]) == 'settled' then last = last - 1 else redis.call('DEL', KEYS[2]) end
end
for i = 3, last do
  local limit, less = ARGV[2 * i - 5], ARGV[2 * i - 4]
  put(KEYS[i], math.max(0, missing(KEYS[i], limit) - less), limit)
end
return 1
""",
)

_SETTLE = Script(
    "settle_tokens",
    _PRELUDE
    + """
-- KEYS note of the job, bucket; ARGV what was used, settled_ms.
local cost, limit, window = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+)|(%d+)|(%d+)$')
if not cost then return 0 end
put(KEYS[2], math.max(0, missing(KEYS[2], limit) + (ARGV[1] - cost) * window), limit)
redis.call('SET', KEYS[1], 'settled', 'PX', ARGV[2])
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

    name: str
    allowed: bool
    """Whether this bucket had enough; one that has not keeps the others from being charged."""
    size: int
    """What it holds when it is full."""
    remaining: int
    reset_s: float
    """Seconds until it is full again."""
    retry_after_s: float
    """Seconds until a refused bucket has enough; 0 when it had, infinite when it never will."""


class Taken(NamedTuple):
    """What came of asking several buckets of one caller."""

    who: str
    charges: tuple[Charge, ...]
    """What each was really charged."""
    verdicts: list[Verdict]
    receipt: str
    job_id: str | None

    @property
    def allowed(self) -> bool:
        return all(verdict.allowed for verdict in self.verdicts)


class RateLimits:
    """The buckets of all callers."""

    def __init__(self, pipeline: Sender, keys: Keys, *, note_s: float) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._note_ms = int(note_s * 1000)

    async def take(self, who: str, *charges: Charge, job_id: str | None = None) -> Taken:
        """Takes from several buckets of one caller, from all of them or from none. Raises StoreUnavailable.

        With ``job_id`` the last charge is for what that job may use: it is taken once for each job, and
        :meth:`settle` sets it right.
        """
        receipt = os.urandom(8).hex()
        args = [arg for rate, cost in charges for arg in (rate.limit, rate.window_us, rate.burst, cost)]
        noted = 0 if job_id is None else len(charges)
        keys = self._all(who, receipt, job_id, charges)
        args = [RECEIPT_MS, self._note_ms, noted, *args]
        try:
            found = await self._pipeline.run(_TAKE, keys, *args)
        except StoreUnavailable as error:
            if isinstance(error, StoreError):
                raise
            found = await self._pipeline.run(
                _TAKE, keys, *args
            )  # the answer was lost; the receipt says whether it was done
        verdicts = [_verdict(charge, *each) for charge, each in zip(charges, found, strict=True)]
        really = tuple(Charge(charge.rate, cost) for charge, (_, _, cost) in zip(charges, found, strict=True))
        return Taken(who, really, verdicts, receipt, job_id if really and really[-1].cost else None)

    async def give_back(self, taken: Taken) -> None:
        """Nothing came of what was asked for. Repeating it changes nothing."""
        args = [arg for rate, cost in taken.charges for arg in (rate.limit, cost * rate.window_us)]
        await self._pipeline.run(_GIVE_BACK, self._all(taken.who, taken.receipt, taken.job_id, taken.charges), *args)

    def settle(self, who: str, name: str, job_id: str, used: int) -> Future[Any]:
        """Sets right what a job took from bucket ``name``, also beyond what is there; repeating it changes nothing."""
        keys = [self._keys.noted(who, job_id), self._keys.bucket(who, name)]
        return self._pipeline.run(_SETTLE, keys, used, SETTLED_MS)

    def _all(self, who: str, receipt: str, job_id: str | None, charges: tuple[Charge, ...]) -> list[str]:
        first = self._keys.receipt(who, receipt)
        note = first if job_id is None else self._keys.noted(who, job_id)
        return [first, note, *(self._keys.bucket(who, charge.rate.name) for charge in charges)]


def _verdict(charge: Charge, allowed: int, missing: bytes, cost: int) -> Verdict:
    rate = charge.rate
    debt, window, size = int(missing), rate.window_us, rate.burst * rate.window_us
    remaining, reset_s = max(0, (size - debt) // window), debt / rate.limit / 1_000_000
    if allowed:
        return Verdict(rate.name, True, rate.burst, remaining, reset_s, 0.0)
    lacking = debt + cost * window - size
    after_s = math.inf if cost > rate.burst else lacking / rate.limit / 1_000_000
    return Verdict(rate.name, False, rate.burst, remaining, reset_s, after_s)
