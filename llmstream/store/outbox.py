"""The events of one pool that are still to be delivered. They are put here in the step that takes their job off the
queue (see :mod:`llmstream.store.lanes`).

A delivery is ``job|receiver``. Its score is when to try it; who takes it moves that behind the end of a lease, and
may only say what came of it while the score is still the one it set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from llmstream.store.connection import Arg
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender
from llmstream.types import Clock

UNDELIVERED = 1000
"""So many that were given up are kept for each pool."""
Kind = Literal["waiting", "dead"]

_CLOCK = """
local function fmt(number) return string.format('%.0f', number) end
local function now_ms(given)
  if given ~= '' then return tonumber(given) end
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function keep(ttl, keys)
  for _, key in ipairs(keys) do
    local left = redis.call('PTTL', key)
    if left ~= -2 and left < tonumber(ttl) then redis.call('PEXPIRE', key, fmt(ttl * 17 / 16)) end
  end
end
"""

_TAKE = Script(
    "take-deliveries",
    _CLOCK
    + """
-- KEYS outbox, tries, undelivered; ARGV now or '', count, lease_ms, ttl_ms
-- -> end of the lease, ms until more is due or -1, then delivery and what is known of its tries or ''
local now = now_ms(ARGV[1])
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', fmt(now), 'LIMIT', 0, ARGV[2])
local lease, found = fmt(now + ARGV[3]), {}
for _, id in ipairs(due) do
  redis.call('ZADD', KEYS[1], lease, id)
  found[#found + 1] = id
  found[#found + 1] = redis.call('HGET', KEYS[2], id) or ''
end
keep(ARGV[4], {KEYS[1]})
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
return {lease, first and fmt(math.max(0, first - now)) or '-1', found}
""",
)

_SETTLE = Script(
    "settle-delivery",
    _CLOCK
    + """
-- KEYS as above; ARGV now or '', delivery, end of the lease it was taken under, 'done', 'again' or 'dead', after how
-- many ms again, what is known of its tries, ttl_ms, most to keep. 0: somebody else has taken it since.
local score = redis.call('ZSCORE', KEYS[1], ARGV[2])
if not score or tonumber(score) ~= tonumber(ARGV[3]) then return 0 end
local now = now_ms(ARGV[1])
if ARGV[4] == 'again' then
  redis.call('ZADD', KEYS[1], fmt(now + ARGV[5]), ARGV[2])
else
  redis.call('ZREM', KEYS[1], ARGV[2])
end
if ARGV[4] == 'done' then
  redis.call('HDEL', KEYS[2], ARGV[2])
  return 1
end
if ARGV[6] ~= '' then redis.call('HSET', KEYS[2], ARGV[2], ARGV[6]) end
if ARGV[4] == 'dead' then
  redis.call('ZADD', KEYS[3], fmt(now), ARGV[2])
  for _, old in ipairs(redis.call('ZRANGE', KEYS[3], 0, -ARGV[8] - 1)) do
    redis.call('ZREM', KEYS[3], old)
    redis.call('HDEL', KEYS[2], old)
  end
end
keep(ARGV[7], KEYS)
return 1
""",
)

_SEND_AGAIN = Script(
    "send-again",
    _CLOCK
    + """
-- KEYS as above; ARGV now or '', ttl_ms, then deliveries. What waits already stays where it is.
local now = fmt(now_ms(ARGV[1]))
for i = 3, #ARGV do
  if redis.call('ZADD', KEYS[1], 'NX', now, ARGV[i]) == 1 then redis.call('HDEL', KEYS[2], ARGV[i]) end
  redis.call('ZREM', KEYS[3], ARGV[i])
end
keep(ARGV[2], KEYS)
return 1
""",
)

_LIST = Script(
    "list-deliveries",
    """
-- KEYS set, tries; ARGV 'ZRANGE' or 'ZREVRANGE', most or '', then deliveries to look for
-- -> delivery, score, tries or ''
local found = {}
local function add(id, score)
  found[#found + 1] = id
  found[#found + 1] = score
  found[#found + 1] = redis.call('HGET', KEYS[2], id) or ''
end
if ARGV[2] ~= '' then
  local all = redis.call(ARGV[1], KEYS[1], 0, ARGV[2] - 1, 'WITHSCORES')
  for i = 1, #all, 2 do add(all[i], all[i + 1]) end
end
for i = 3, #ARGV do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score then add(ARGV[i], score) end
end
return found
""",
)


class Tries(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of the tries of one delivery."""

    count: int = 0
    at: float | None = None
    """When the last one ended, in seconds since the epoch."""
    status: int | None = None
    """The HTTP status of the last one, where there was an answer."""
    error: str | None = None


class Delivery(NamedTuple):
    """An event on its way to one receiver."""

    job_id: str
    receiver: str
    tries: Tries
    at_ms: float
    """When it is tried, or the end of the lease that it was taken under; of one that was given up, when."""

    @property
    def name(self) -> str:
        return f"{self.job_id}|{self.receiver}"


_tries = msgspec.json.Decoder(Tries)


class Outbox:
    """The deliveries of one pool. ``clock`` stands in for the store's where it is given."""

    def __init__(self, pipeline: Sender, keys: Keys, pool: str, *, ttl_s: float, clock: Clock | None = None) -> None:
        self.pool = pool
        self._pipeline = pipeline
        self._keys = keys.outbox(pool)
        self._ttl_ms = int(ttl_s * 1000)
        self._clock = clock

    async def take(self, count: int, lease_s: float) -> tuple[list[Delivery], float | None]:
        """Takes up to ``count`` deliveries that are due, for ``lease_s`` seconds; also tells after how many seconds
        the next one is due, None when there is none."""
        step = (count, int(lease_s * 1000), self._ttl_ms)
        lease, pause, found = await self._pipeline.run(_TAKE, self._keys, self._now(), *step)
        taken = [_delivery(name, lease, tries) for name, tries in zip(found[::2], found[1::2], strict=True)]
        return taken, None if pause == b"-1" else int(pause) / 1000

    async def done(self, delivery: Delivery) -> bool:
        """Forgets a delivery. Like all three, False when somebody else has taken it since."""
        return await self._settle(delivery, "done", 0.0, None)

    async def again(self, delivery: Delivery, after_s: float, tries: Tries | None = None) -> bool:
        """Puts it back for ``after_s`` seconds."""
        return await self._settle(delivery, "again", after_s, tries)

    async def give_up(self, delivery: Delivery, tries: Tries) -> bool:
        """Takes it out; it stays on the list of those that were given up."""
        return await self._settle(delivery, "dead", 0.0, tries)

    async def send_again(self, job_id: str, receivers: Sequence[str]) -> None:
        """Tries at once, and from the beginning, what was delivered or given up; what waits stays as it is."""
        names = [f"{job_id}|{receiver}" for receiver in receivers]
        await self._pipeline.run(_SEND_AGAIN, self._keys, self._now(), self._ttl_ms, *names)

    async def latest(self, kind: Kind, limit: int) -> list[Delivery]:
        """Those that wait, the next one first, or those that were given up, the latest first."""
        return await self._list(kind, limit)

    async def find(self, kind: Kind, names: Sequence[str]) -> list[Delivery]:
        """Those of these names."""
        return await self._list(kind, "", *names)

    async def waiting(self) -> int:
        """How many are to be delivered."""
        return int(await self._pipeline.call("ZCARD", self._keys[0]))

    def _now(self) -> int | str:
        return "" if self._clock is None else int(self._clock() * 1000)

    async def _list(self, kind: Kind, *step: Arg) -> list[Delivery]:
        part, order = (0, "ZRANGE") if kind == "waiting" else (2, "ZREVRANGE")
        found = await self._pipeline.run(_LIST, [self._keys[part], self._keys[1]], order, *step)
        return [_delivery(*row) for row in zip(found[::3], found[1::3], found[2::3], strict=True)]

    async def _settle(self, delivery: Delivery, how: str, after_s: float, tries: Tries | None) -> bool:
        known = "" if tries is None else msgspec.json.encode(tries)
        lease, after_ms = f"{delivery.at_ms:.0f}", int(after_s * 1000)
        step = (delivery.name, lease, how, after_ms, known, self._ttl_ms, UNDELIVERED)
        return bool(await self._pipeline.run(_SETTLE, self._keys, self._now(), *step))


def _delivery(name: bytes, at_ms: bytes, tries: bytes) -> Delivery:
    job_id, _, receiver = name.decode().rpartition("|")
    return Delivery(job_id, receiver, _tries.decode(tries) if tries else Tries(), float(at_ms))
