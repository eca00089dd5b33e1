"""The queue of one pool: waiting jobs in order of service, claims, leases. Each step is one atomic script.

Jobs wait on 21 *levels*, one for each priority. Inside a level principals take turns: a job's turn is one more than the
principal's last or the one being served, whichever is later. Between levels the most urgent is served, that is the one
whose oldest job has waited longest after adding ``ageing_s`` for every step of priority; so nothing waits for ever.
The position in the order follows from two sorted sets and costs O(log n) whatever the backlog.

A replica's lease covers all its claims: one heartbeat renews them, and when it lapses they all go back to the front of
their levels.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llmstream.store.connection import Arg
from llmstream.store.keys import QUEUE_PARTS, Keys
from llmstream.store.pipeline import Script, Sender
from llmstream.types import LANES, MAX_PRIORITY, Job, Lane, lane_of

DEAD_LETTERS = 1000
"""How many are kept for each pool."""
_UNLIMITED = 2**53
ANNOUNCED = 2

_NAMES = "\n".join(f"local {name} = KEYS[{index}]" for index, name in enumerate(QUEUE_PARTS, 1))
_PRELUDE = (
    _NAMES
    + """
local B = 4398046511104 -- 2^42: one level in a score; above every turn and every time in milliseconds
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function fmt(number) return string.format('%.0f', number) end
-- Lets keys live for ttl more at least: a little longer, so that this need not be written at each step. A step looks
-- after those that it may have made; a heartbeat after all.
local function keep(ttl, keys)
  for _, key in ipairs(keys) do
    local left = redis.call('PTTL', key)
    if left ~= -2 and left < tonumber(ttl) then redis.call('PEXPIRE', key, fmt(ttl * 17 / 16)) end
  end
end
local function split(text)
  local parts = {}
  for part in string.gmatch(text, '([^|]*)|?') do parts[#parts + 1] = part end
  return parts
end
local function forget_waiting(id)
  redis.call('ZREM', order, id)
  redis.call('ZREM', ages, id)
  redis.call('ZREM', deadlines, id)
end
-- Puts the events that tell of a job's end into the outbox, in the step that takes it off the queue: a claim that was
-- not settled comes back to somebody, so none is lost.
local function announce(id, now)
  local names = redis.call('HGET', hooked, id)
  if not names then return 0 end
  redis.call('HDEL', hooked, id)
  for name in string.gmatch(names, '[^,]+') do redis.call('ZADD', outbox, 'NX', fmt(now), id .. '|' .. name) end
  return 1
end
local function requeue(id)
  local m = redis.call('HGET', meta, id)
  redis.call('HDEL', claims, id)
  if not m then return 0 end
  local part = split(m)
  redis.call('ZADD', order, fmt(part[1] * B + part[5]), id)
  redis.call('ZADD', ages, fmt(part[1] * B + part[2]), id)
  if part[4] ~= '' then redis.call('ZADD', deadlines, part[4], id) end
  return 1
end
"""
)

_PUSH = Script(
    "push",
    _PRELUDE
    + """
-- ARGV id, level, principal, max waiting, ttl_ms, deadline_ms or '', retention_ms, wake channel or '', pool,
-- look for readers after (ms) or '', who hears of its end or ''
local id, level, who = ARGV[1], tonumber(ARGV[2]), ARGV[3]
if redis.call('HEXISTS', meta, id) == 1 then return {1} end
local waiting = redis.call('ZCARD', order)
if waiting >= tonumber(ARGV[4]) then return {0} end
local now = now_ms()
local field = level .. ':' .. who
local served = tonumber(redis.call('HGET', turns, level) or 0)
local turn = math.max(served, tonumber(redis.call('HGET', turns, field) or 0)) + 1
redis.call('HSET', turns, field, turn)
redis.call('ZADD', order, fmt(level * B + turn), id)
redis.call('ZADD', ages, fmt(level * B + now), id)
redis.call('HSET', meta, id, level .. '|' .. fmt(now) .. '|' .. who .. '|' .. ARGV[6] .. '|' .. fmt(turn))
if ARGV[6] ~= '' then redis.call('ZADD', deadlines, ARGV[6], id) end
if ARGV[10] ~= '' then redis.call('ZADD', unread, fmt(now + ARGV[10]), id) end
if ARGV[11] ~= '' then
  redis.call('HSET', hooked, id, ARGV[11])
  keep(ARGV[5], {hooked})
end
redis.call('ZADD', index, fmt(now), id)
redis.call('ZREMRANGEBYSCORE', index, '-inf', fmt(now - ARGV[7]))
keep(ARGV[5], {order, ages, meta, turns, index, deadlines, unread})
if ARGV[8] ~= '' then redis.call('PUBLISH', ARGV[8], ARGV[9]) end
return {1}
""",
)

_CLAIM = Script(
    "claim",
    _PRELUDE
    + """
-- ARGV replica, count, ageing_ms, ttl_ms, lease_ms, jobs it has or '', wake channel, pool, least urgency or ''
-- -> ids, jobs left, urgency of the first one left where that ended the claim, number
local claimed, now = {}, fmt(now_ms())
-- Grows with every claim, also where the store has forgotten the last ones.
local number = math.max(tonumber(now), (redis.call('HGET', stats, 'last_claim') or 0) + 1)
local least, first_left = tonumber(ARGV[9]), '0'
local count, held, others = tonumber(ARGV[2]), tonumber(ARGV[6]), 0
if held then
  -- Its part of all work, by slots. A little more is still even and spares jobs the way to another replica.
  local own = tonumber(redis.call('HGET', slots, ARGV[1]) or 0)
  for _, n in ipairs(redis.call('HVALS', slots)) do others = others + n end
  others = others - own
  if others > 0 then
    local share = math.ceil((redis.call('HLEN', claims) + redis.call('ZCARD', order)) * own / (own + others))
    count = math.min(count, share + math.floor(share / 8) - held)
  end
end
for _ = 1, count do
  local best, best_level, cursor = nil, nil, 0
  while true do
    local oldest = redis.call('ZRANGEBYSCORE', ages, fmt(cursor), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    if not oldest[1] then break end
    local score = tonumber(oldest[2])
    local level = math.floor(score / B)
    local urgency = score - level * B + level * ARGV[3]
    if not best or urgency < best then best, best_level = urgency, level end
    cursor = (level + 1) * B
  end
  if not best or (least and best > least) then
    first_left = best and fmt(best) or 'inf'
    break
  end
  local first = redis.call('ZRANGEBYSCORE', order, fmt(best_level * B), '(' .. fmt((best_level + 1) * B),
                           'WITHSCORES', 'LIMIT', 0, 1)
  local id = first[1]
  local turn = first[2] - best_level * B
  if turn > tonumber(redis.call('HGET', turns, best_level) or 0) then
    redis.call('HSET', turns, best_level, fmt(turn))
  end
  forget_waiting(id)
  redis.call('HSET', claims, id, ARGV[1] .. '|' .. now .. '|' .. fmt(number))
  claimed[#claimed + 1] = id
end
if #claimed > 0 then
  redis.call('HSET', stats, 'last_claim', fmt(number))
  -- A claim always stands under a lease, also where the replica was away and its own one is gone.
  redis.call('ZADD', replicas, 'NX', fmt(now + ARGV[5]), ARGV[1])
  if redis.call('ZCARD', order) == 0 then redis.call('DEL', turns) end
  keep(ARGV[4], {claims, turns, stats, replicas})
end
local left = redis.call('ZCARD', order)
if left > 0 and held and others > redis.call('HLEN', claims) - held - #claimed then
  redis.call('PUBLISH', ARGV[7], ARGV[8])
end
return {claimed, left, left == 0 and 'inf' or first_left, number}
""",
)

_RECLAIM = Script(
    "reclaim",
    _PRELUDE
    + """
-- ARGV replica, lease_ms, ttl_ms, then of each running job whose claim was lost: id, what makes its meta, after how
-- many ms to look for its readers or '', number of the claim, who hears of its end or ''.
local now = now_ms()
for i = 4, #ARGV, 5 do
  local id = ARGV[i]
  if redis.call('HEXISTS', claims, id) == 0 then
    if redis.call('HEXISTS', meta, id) == 0 then
      local part = split(ARGV[i + 1])
      redis.call('HSET', meta, id, part[1] .. '|' .. fmt(now) .. '|' .. part[2] .. '|' .. part[3] .. '|0')
      redis.call('ZADD', index, 'NX', fmt(now), id)
      if ARGV[i + 2] ~= '' then redis.call('ZADD', unread, fmt(now + ARGV[i + 2]), id) end
      if ARGV[i + 4] ~= '' then redis.call('HSET', hooked, id, ARGV[i + 4]) end
    end
    forget_waiting(id)
    redis.call('HSET', claims, id, ARGV[1] .. '|' .. fmt(now) .. '|' .. ARGV[i + 3])
  end
end
redis.call('ZADD', replicas, 'NX', fmt(now + ARGV[2]), ARGV[1])
keep(ARGV[3], KEYS)
return 1
""",
)

_SETTLE = Script(
    "settle",
    _PRELUDE
    + """
-- ARGV id, replica, ttl_ms, 1 for a dead letter, retention_ms, dead letters kept, number of the claim.
-- The job needs no more work; its service time goes into the measured rate. Only the claim it was found under is meant:
-- a job that the store had lost may have come back and been claimed again since. 2: somebody is to hear of it.
local claim = redis.call('HGET', claims, ARGV[1])
if not claim then return 0 end
local part = split(claim)
if part[1] ~= ARGV[2] or part[3] ~= ARGV[7] then return 0 end
redis.call('HDEL', claims, ARGV[1])
redis.call('HDEL', meta, ARGV[1])
redis.call('ZREM', unread, ARGV[1])
local now = now_ms()
if ARGV[4] == '1' then
  redis.call('ZADD', dead, fmt(now), ARGV[1])
  redis.call('ZREMRANGEBYSCORE', dead, '-inf', fmt(now - ARGV[5]))
  redis.call('ZREMRANGEBYRANK', dead, 0, -ARGV[6] - 1)
  redis.call('PEXPIRE', dead, ARGV[5])
end
local took = now - part[2]
local mean = tonumber(redis.call('HGET', stats, 'service_ms') or took)
redis.call('HSET', stats, 'service_ms', string.format('%.3f', mean + (took - mean) * 0.1))
redis.call('HINCRBY', stats, 'served', 1)
local announced = announce(ARGV[1], now)
keep(ARGV[3], announced == 1 and {stats, outbox} or {stats})
return 1 + announced
""",
)

_RELEASE = Script(
    "release",
    _PRELUDE
    + """
-- ARGV id, replica, ttl_ms, wake channel or '', pool. Back to the front of its level, for anybody.
local claim = redis.call('HGET', claims, ARGV[1])
if not claim or split(claim)[1] ~= ARGV[2] then return 0 end
requeue(ARGV[1])
keep(ARGV[3], KEYS)
if ARGV[4] ~= '' then redis.call('PUBLISH', ARGV[4], ARGV[5]) end
return 1
""",
)

_REMOVE = Script(
    "remove",
    _PRELUDE
    + """
-- ARGV id, ttl_ms, who hears of the end of a job that may have ended before it came into line, or ''.
-- Takes a cancelled job out; a running one stays claimed until its owner lets go.
local now = now_ms()
redis.call('ZADD', cancels, fmt(now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', cancels, '-inf', fmt(now - 60000))
redis.call('PEXPIRE', cancels, ARGV[2])
redis.call('ZREM', unread, ARGV[1])
if redis.call('HEXISTS', claims, ARGV[1]) == 1 then return 0 end
forget_waiting(ARGV[1])
local waited = redis.call('HDEL', meta, ARGV[1])
if waited == 0 and ARGV[3] ~= '' then redis.call('HSET', hooked, ARGV[1], ARGV[3]) end
if announce(ARGV[1], now) == 1 then keep(ARGV[2], {outbox}) end
return waited
""",
)

_HEARTBEAT = Script(
    "heartbeat",
    _PRELUDE
    + """
-- ARGV replica, slots, lease_ms, ttl_ms, cancelled since (ms) -> now, taken back, overdue, cancelled, unread
local now = now_ms()
local own = redis.call('ZSCORE', replicas, ARGV[1])
-- Our own lease lapsed too: the store was away, or we were. Everybody gets the time to come back.
local away = own and tonumber(own) <= now
redis.call('ZADD', replicas, fmt(now + ARGV[3]), ARGV[1])
redis.call('HSET', slots, ARGV[1], ARGV[2])
local taken = 0
for _, lapsed in ipairs(redis.call('ZRANGEBYSCORE', replicas, '-inf', fmt(now))) do
  if away then
    redis.call('ZADD', replicas, fmt(now + ARGV[3]), lapsed)
  else
    local all = redis.call('HGETALL', claims)
    for i = 1, #all, 2 do
      if split(all[i + 1])[1] == lapsed then taken = taken + requeue(all[i]) end
    end
    redis.call('ZREM', replicas, lapsed)
    redis.call('HDEL', slots, lapsed)
  end
end
keep(ARGV[4], KEYS)
local overdue = redis.call('ZRANGEBYSCORE', deadlines, '-inf', fmt(now), 'LIMIT', 0, 100)
local cancelled = redis.call('ZRANGEBYSCORE', cancels, ARGV[5], '+inf')
local lonely = redis.call('ZRANGEBYSCORE', unread, '-inf', fmt(now), 'LIMIT', 0, 100)
-- One replica looks at a time; should it die meanwhile, the next does.
for _, id in ipairs(lonely) do redis.call('ZADD', unread, fmt(now + ARGV[3]), id) end
return {fmt(now), taken, overdue, cancelled, lonely}
""",
)

_SEEN = Script(
    "seen",
    """
-- KEYS pools; ARGV pool, now_ms, ttl_ms
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[2] - ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
""",
)

_LEAVE = Script(
    "leave",
    _PRELUDE
    + """
-- ARGV replica, ttl_ms, wake channel, pool. A replica goes: whatever it still holds is for the others.
local all = redis.call('HGETALL', claims)
for i = 1, #all, 2 do
  if split(all[i + 1])[1] == ARGV[1] then requeue(all[i]) end
end
redis.call('ZREM', replicas, ARGV[1])
redis.call('HDEL', slots, ARGV[1])
keep(ARGV[2], KEYS)
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 1
""",
)

_POSITION = Script(
    "position",
    _PRELUDE
    + """
-- ARGV id, ageing_ms, urgency of a job that waits elsewhere or ''
-- -> jobs ahead, mean service ms, slots; -1 ahead: it is not waiting
local mean, offered = redis.call('HGET', stats, 'service_ms') or '', 0
for _, n in ipairs(redis.call('HVALS', slots)) do offered = offered + n end
local urgency, level, ahead = tonumber(ARGV[3]), nil, 0
if not urgency then
  local score = redis.call('ZSCORE', order, ARGV[1])
  if not score then return {-1, mean, offered} end
  level = math.floor(score / B)
  ahead = redis.call('ZCOUNT', order, fmt(level * B), '(' .. fmt(tonumber(score)))
  urgency = redis.call('ZSCORE', ages, ARGV[1]) - level * B + level * ARGV[2]
end
for other = 0, 20 do
  if other ~= level then
    local upto = urgency - other * ARGV[2]
    if upto >= B then upto = B - 1 end
    if upto > 0 then ahead = ahead + redis.call('ZCOUNT', ages, fmt(other * B), '(' .. fmt(other * B + upto)) end
  end
end
return {ahead, mean, offered}
""",
)

_CENSUS = Script(
    "census",
    _PRELUDE
    + """
-- waiting per level, running, replicas with slots, mean service ms, served
local waiting = {}
for level = 0, 20 do
  waiting[level + 1] = redis.call('ZCOUNT', order, fmt(level * B), '(' .. fmt((level + 1) * B))
end
return {waiting, redis.call('HVALS', claims), redis.call('HGETALL', slots),
        redis.call('HGET', stats, 'service_ms') or '', redis.call('HGET', stats, 'served') or '0'}
""",
)


class Standing(NamedTuple):
    """Where a job stands in its queue."""

    ahead: int | None
    """Jobs that will be served before it; None when it does not wait."""
    service_s: float | None
    """Mean time a slot is busy with one job; None before the first was measured."""
    slots: int

    @property
    def eta_s(self) -> float | None:
        """Seconds until its turn comes, from the measured service rate; None while nothing is known."""
        if self.ahead is None or self.service_s is None or not self.slots:
            return None
        return round((self.ahead + 1) * self.service_s / self.slots, 3)


class Claimed(NamedTuple):
    """What a claim got, most urgent first, and how many jobs still wait."""

    ids: list[str]
    left: int
    first_left: float
    """How urgent the next of them is; infinite when there is none, 0 when nobody looked."""
    number: int
    """Greater than that of any earlier claim: whoever began a job under a later one has superseded this one."""


class Pulse(NamedTuple):
    """What a heartbeat brings back."""

    now_ms: int
    taken_back: int
    """Jobs of lapsed replicas that wait again."""
    overdue: list[str]
    """Waiting jobs whose own deadline has passed."""
    cancelled: list[str]
    unread: list[str]
    """Jobs for whose readers it is time to look."""


class Census(NamedTuple):
    waiting: dict[Lane, int]
    running: dict[str, int]
    """Claims by replica."""
    slots: dict[str, int]
    """Slots by living replica."""
    service_s: float | None
    served: int


class Lanes:
    """The waiting and running jobs of one pool."""

    def __init__(
        self,
        pipeline: Sender,
        keys: Keys,
        pool: str,
        *,
        ageing_s: float,
        max_waiting: int,
        lease_s: float,
        ttl_s: float,
        retention_s: float,
    ) -> None:
        self.pool = pool
        self._pipeline = pipeline
        self._keys = keys.queue(pool)
        self._pools = keys.pools
        self._wake = keys.wake
        self._ageing_ms = int(ageing_s * 1000)
        self._max_waiting = max_waiting
        self._lease_ms = int(lease_s * 1000)
        self._ttl_ms = int(ttl_s * 1000)
        self._retention_ms = int(max(retention_s, ttl_s) * 1000)

    async def push(self, job: Job, unread_s: float | None = None, *, wake: bool = True, again: bool = False) -> bool:
        """Puts an accepted job in line; repeating it changes nothing. False when the queue is full.

        After ``unread_s`` a heartbeat brings the job back to look for its readers. ``wake`` tells all replicas; without
        it they find the job at their next heartbeat, unless the caller takes it. ``again`` says that it stood there
        before, so that it is never refused.
        """
        level, principal, deadline = _meta(job)
        reply = await self._pipeline.run(
            _PUSH,
            self._keys,
            job.id,
            level,
            principal,
            _UNLIMITED if again else self._max_waiting,
            self._ttl_ms,
            deadline,
            self._retention_ms,
            self._wake if wake else "",
            self.pool,
            "" if unread_s is None else int(unread_s * 1000),
            ",".join(job.receivers),
        )
        return bool(reply[0])

    async def look_again(self, job_id: str, at_ms: int) -> None:
        """Sets when to look next for the readers of a job that is not over."""
        await self._pipeline.call("ZADD", self._key("unread"), "XX", at_ms, job_id)

    async def look_no_more(self, job_id: str) -> None:
        """The job is over, or goes on without readers."""
        await self._pipeline.call("ZREM", self._key("unread"), job_id)

    async def claim(self, replica: str, count: int, least: float = math.inf) -> Claimed:
        """Takes up to ``count`` jobs, most urgent first, none of them less urgent than ``least``."""
        return await self._take(replica, count, "", least)

    async def claim_share(self, replica: str, count: int, held: int, least: float = math.inf) -> Claimed:
        """Like :meth:`claim`, but no more than keeps a replica that has ``held`` jobs level with the others.

        Wakes the others when it leaves jobs that they have slots for.
        """
        return await self._take(replica, count, held, least)

    async def _take(self, replica: str, count: int, held: int | str, least: float) -> Claimed:
        limits = (self._ageing_ms, self._ttl_ms, self._lease_ms)
        found, left, first_left, number = await self._pipeline.run(
            _CLAIM, self._keys, replica, count, *limits, held, self._wake, self.pool, _finite(least)
        )
        return Claimed([raw.decode() for raw in found], left, float(first_left), number)

    async def reclaim(self, replica: str, jobs: Iterable[tuple[Job, int]]) -> None:
        """Takes jobs that run on this replica, each with the number of its claim, out of the line, where the store has
        lost that they were claimed."""
        known: list[Arg] = []
        for job, claim in jobs:
            unread_ms = "" if job.grace_s is None else int(job.grace_s * 1000)
            known += job.id, "|".join(map(str, _meta(job))), unread_ms, claim, ",".join(job.receivers)
        await self._pipeline.run(_RECLAIM, self._keys, replica, self._lease_ms, self._ttl_ms, *known)

    def settle(self, job_id: str, replica: str, claim: int, *, dead: bool = False) -> asyncio.Future[Any]:
        """Gives back claim number ``claim`` of a job that needs no more work; ``dead`` notes it as one that may be
        requeued.

        What is asked of this queue after the call comes after it, so nobody needs to wait for the future, which brings
        ``ANNOUNCED`` when somebody is to hear of the job's end.
        """
        limits = (self._retention_ms, DEAD_LETTERS)
        return self._pipeline.run(_SETTLE, self._keys, job_id, replica, self._ttl_ms, int(dead), *limits, claim)

    async def dead(self, limit: int) -> list[str]:
        """Ids of the jobs that failed after all their attempts, latest first."""
        found: list[bytes] = await self._pipeline.call("ZRANGE", self._key("dead"), 0, limit - 1, "REV")
        return [raw.decode() for raw in found]

    async def revive(self, job_id: str) -> None:
        """Takes a job that was requeued off the list of dead letters."""
        await self._pipeline.call("ZREM", self._key("dead"), job_id)

    async def release(self, job_id: str, replica: str, *, wake: bool = True) -> None:
        """Hands a claimed job to whoever claims next, who is told with ``wake``; it goes to the front of its level."""
        channel = self._wake if wake else ""
        await self._pipeline.run(_RELEASE, self._keys, job_id, replica, self._ttl_ms, channel, self.pool)

    async def remove(self, job_id: str, receivers: Sequence[str] = ()) -> bool:
        """Takes a job that has ended out of the line; True when it was still waiting. ``receivers`` hear of the end
        of one that never came into line."""
        return bool(await self._pipeline.run(_REMOVE, self._keys, job_id, self._ttl_ms, ",".join(receivers)))

    async def heartbeat(self, replica: str, slots: int, lease_s: float, cancelled_since_ms: int) -> Pulse:
        """Renews the lease of all claims of a replica and takes back those of lapsed ones."""
        now, taken, *found = await self._pipeline.run(
            _HEARTBEAT, self._keys, replica, slots, int(lease_s * 1000), self._ttl_ms, cancelled_since_ms
        )
        await self._pipeline.run(_SEEN, [self._pools], self.pool, int(now), self._ttl_ms)
        return Pulse(int(now), taken, *([raw.decode() for raw in ids] for ids in found))

    async def leave(self, replica: str) -> None:
        """Ends a replica's lease at once."""
        await self._pipeline.run(_LEAVE, self._keys, replica, self._ttl_ms, self._wake, self.pool)

    async def claimed_by(self, replica: str) -> set[str]:
        """Ids of the jobs that a replica holds according to the store."""
        flat: list[bytes] = await self._pipeline.call("HGETALL", self._key("claims"))
        own = f"{replica}|".encode()
        return {job.decode() for job, claim in zip(flat[::2], flat[1::2], strict=True) if claim.startswith(own)}

    async def standing(self, job_id: str, urgency: float = math.inf) -> Standing:
        """Position and measured service rate; with ``urgency``, of a job that waits elsewhere."""
        ahead, mean, slots = await self._pipeline.run(_POSITION, self._keys, job_id, self._ageing_ms, _finite(urgency))
        return Standing(None if ahead < 0 else ahead, _seconds(mean), int(slots))

    async def census(self) -> Census:
        """Counts for ``/stats``."""
        levels, claims, slots, mean, served = await self._pipeline.run(_CENSUS, self._keys)
        waiting: dict[Lane, int] = dict.fromkeys(LANES, 0)
        for level, count in enumerate(levels):
            waiting[lane_of(MAX_PRIORITY - level)] += count
        running: dict[str, int] = {}
        for claim in claims:
            owner = claim.decode().partition("|")[0]
            running[owner] = running.get(owner, 0) + 1
        offered = {name.decode(): int(count) for name, count in zip(slots[::2], slots[1::2], strict=True)}
        return Census(waiting, running, offered, _seconds(mean), int(served))

    async def recent(self, limit: int) -> list[str]:
        """Ids of the pool's jobs, newest first."""
        found: list[Any] = await self._pipeline.call("ZRANGE", self._key("index"), 0, limit - 1, "REV")
        return [raw.decode() for raw in found]

    def _key(self, part: str) -> str:
        return self._keys[QUEUE_PARTS.index(part)]


def _meta(job: Job) -> tuple[int, str, int | str]:
    """A job's level, principal and deadline in milliseconds."""
    deadline = "" if job.expires_at is None else int(job.expires_at * 1000)
    return MAX_PRIORITY - job.priority, job.principal.replace("|", "%7C"), deadline


def _finite(urgency: float) -> int | str:
    return "" if urgency == math.inf else int(urgency)


def _seconds(mean_ms: bytes) -> float | None:
    return float(mean_ms) / 1000 if mean_ms else None
