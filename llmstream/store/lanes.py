"""The queue of one pool: waiting jobs in order of service, claims, leases. Each step is one atomic script.

Jobs wait on 21 *levels*, one for each priority. Inside a level principals take turns: a job's turn is one more than the
principal's last or the one being served, whichever is later. Between levels the most urgent is served, that is the one
whose oldest job has waited longest after adding ``ageing_s`` for every step of priority; so nothing waits for ever.
The position in the order follows from two sorted sets and costs O(log n) whatever the backlog.

Of a caller with a limit of jobs at once no more are claimed: what comes to its turn beyond is *parked*, out of the way
of the others, and stands in line again, at its old place, when one of the caller's has ended.

A replica's lease covers all its claims: one heartbeat renews them, and when it lapses they all go back to the front of
their levels.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from llmstream.store.connection import Arg
from llmstream.store.keys import QUEUE_PARTS, Keys
from llmstream.store.lane_control import CONTROL, RIPEN, SWEEP, SWEPT
from llmstream.store.lane_lua import ANNOUNCING, PAUSING, PRELUDE, WAITING
from llmstream.store.pipeline import Script, Sender
from llmstream.types import LANES, MAX_PRIORITY, Job, Lane, QueueRules, lane_of

DEAD_LETTERS = 1000
"""How many are kept for each pool."""
PAGE = 500
"""Jobs looked at in one step where all of them are."""
ANNOUNCED, OTHERS_MAY = 2, 4
"""What settling a job may bring: somebody is to hear of its end; others of its caller may run."""

_PUSH = Script(
    "push",
    PRELUDE
    + WAITING
    + """
-- ARGV id, level, principal, most waiting, ttl_ms, deadline_ms or '', retention_ms, wake channel or '', pool,
-- look for readers after (ms) or '', model, not before (ms), most scheduled, 1 if it stood there before,
-- who hears of its end or '', then of a caller with limits: who, most that run or '', most that wait or ''
-- -> 1 it waits or runs, 0 too many wait, 2 its lane or model is draining, 3 too many are scheduled, 4 too many of the
-- caller's wait
local id, level, again = ARGV[1], tonumber(ARGV[2]), ARGV[14] == '1'
if redis.call('HEXISTS', meta, id) == 1 then return 1 end
local draining = not again and rules_of(modes[2])
if draining and covered(draining, level, ARGV[11]) then return 2 end
local now, due = now_ms(), tonumber(ARGV[12])
local asleep = due > now
if not again then
  if asleep then
    if redis.call('ZCARD', scheduled) >= tonumber(ARGV[13]) then return 3 end
  else
    local waiting = redis.call('ZCARD', order) + redis.call('ZCARD', parked)
    if waiting + (pausing and redis.call('ZCARD', paused) or 0) >= tonumber(ARGV[4]) then return 0 end
    local most = tonumber(ARGV[18])
    if most and number_of('w', ARGV[16]) + number_of('p', ARGV[16]) >= most then return 4 end
  end
end
local part = {ARGV[2], fmt(math.max(now, due)), ARGV[3], ARGV[6], '0', ARGV[11], ARGV[16], ARGV[17], ARGV[16] and ''}
if asleep then
  redis.call('HSET', meta, id, table.concat(part, '|'))
  redis.call('ZADD', scheduled, fmt(due), id)
  if ARGV[6] ~= '' then redis.call('ZADD', deadlines, ARGV[6], id) end
else
  arrive(id, part)
end
if ARGV[10] ~= '' then redis.call('ZADD', unread, fmt(now + ARGV[10]), id) end
if ARGV[15] ~= '' then
  redis.call('HSET', hooked, id, ARGV[15])
  keep(ARGV[5] + math.max(0, due - now), {hooked})
end
redis.call('ZADD', index, fmt(now), id)
redis.call('ZREMRANGEBYSCORE', index, '-inf', fmt(now - ARGV[7]))
keep(ARGV[5] + math.max(0, due - now), {order, ages, meta, turns, index, deadlines, unread})
if ARGV[16] then keep(ARGV[5] + math.max(0, due - now), {callers}) end
if asleep or pausing then keep(ARGV[5] + math.max(0, due - now), {scheduled, paused}) end
if ARGV[8] ~= '' and not asleep then redis.call('PUBLISH', ARGV[8], ARGV[9]) end
return 1
""",
)

_CLAIM = Script(
    "claim",
    PRELUDE
    + PAUSING
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
local aside, parks = 0, 0
local limited = redis.call('ZCARD', callers) > 0
while #claimed < count and parks < 128 do
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
  local part = (pausing or limited) and split(redis.call('HGET', meta, id) or '')
  local own = part and (part[7] or '') ~= '' and part
  if pausing and part[6] and covered(pausing, best_level, part[6]) then
    -- It came before the pause did.
    forget_waiting(id)
    wait(id, part)
    aside = aside + 1
    if aside == 500 then
      first_left = fmt(best)
      break
    end
  elseif own and own[8] ~= '' and number_of('r', own[7]) >= tonumber(own[8]) then
    park(id, own, ARGV[3])
    parks = parks + 1
  else
    if turn > tonumber(redis.call('HGET', turns, best_level) or 0) then
      redis.call('HSET', turns, best_level, fmt(turn))
    end
    forget_waiting(id)
    if own then run_for_caller(id, own) end
    redis.call('HSET', claims, id, ARGV[1] .. '|' .. now .. '|' .. fmt(number))
    claimed[#claimed + 1] = id
  end
end
if limited then keep(ARGV[4], {callers, parked}) end
if aside > 0 then keep(ARGV[4], {paused, deadlines}) end
if #claimed > 0 then
  redis.call('HSET', stats, 'last_claim', fmt(number))
  -- A claim always stands under a lease, also where the replica was away and its own one is gone.
  redis.call('ZADD', replicas, 'NX', fmt(now + ARGV[5]), ARGV[1])
  if redis.call('ZCARD', order) + redis.call('ZCARD', paused) + redis.call('ZCARD', parked) == 0 then
    redis.call('DEL', turns)
  end
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
    PRELUDE
    + """
-- ARGV replica, lease_ms, ttl_ms, then of each running job whose claim was lost: id, what makes its meta, after how
-- many ms to look for its readers or '', number of the claim, who hears of its end or ''.
local now = now_ms()
for i = 4, #ARGV, 5 do
  local id = ARGV[i]
  if redis.call('HEXISTS', claims, id) == 0 then
    if redis.call('HEXISTS', meta, id) == 0 then
      local part = split(ARGV[i + 1])
      local m = part[1] .. '|' .. fmt(now) .. '|' .. part[2] .. '|' .. part[3] .. '|0|' .. part[4]
      if (part[5] or '') ~= '' then m = m .. '|' .. part[5] .. '|' .. part[6] .. '|' end
      redis.call('HSET', meta, id, m)
      redis.call('ZADD', index, 'NX', fmt(now), id)
      if ARGV[i + 2] ~= '' then redis.call('ZADD', unread, fmt(now + ARGV[i + 2]), id) end
      if ARGV[i + 4] ~= '' then redis.call('HSET', hooked, id, ARGV[i + 4]) end
    end
    local part = split(redis.call('HGET', meta, id))
    forget_waiting(id)
    forget_aside(id)
    if (part[7] or '') ~= '' then
      leave_callers(id, part)
      run_for_caller(id, part)
    end
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
    PRELUDE
    + ANNOUNCING
    + """
-- ARGV id, replica, ttl_ms, 1 for a dead letter, retention_ms, dead letters kept, number of the claim.
-- The job needs no more work; its service time goes into the measured rate. Only the claim it was found under is meant:
-- a job that the store had lost may have come back and been claimed again since.
-- -> 1, or the sum of 2 when somebody is to hear of it and 4 when others of its caller may run instead
local claim = redis.call('HGET', claims, ARGV[1])
if not claim then return 0 end
local part = split(claim)
if part[1] ~= ARGV[2] or part[3] ~= ARGV[7] then return 0 end
local caller, unparked = counted(ARGV[1]), 0
redis.call('HDEL', claims, ARGV[1])
redis.call('HDEL', meta, ARGV[1])
redis.call('ZREM', unread, ARGV[1])
if caller then
  leave_callers(ARGV[1], caller)
  unparked = unpark(caller[7])
  keep(ARGV[3], {order, ages, callers})
end
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
local brings = 2 * announced + (unparked > 0 and 4 or 0)
return brings > 0 and brings or 1
""",
)

_RELEASE = Script(
    "release",
    PRELUDE
    + WAITING
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
    PRELUDE
    + ANNOUNCING
    + """
-- ARGV id, ttl_ms, who hears of the end of a job that may have ended before it came into line, or ''.
-- Takes a cancelled job out; a running one stays claimed until its owner lets go.
local now = now_ms()
redis.call('ZADD', cancels, fmt(now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', cancels, '-inf', fmt(now - 60000))
redis.call('PEXPIRE', cancels, ARGV[2])
redis.call('ZREM', unread, ARGV[1])
if redis.call('HEXISTS', claims, ARGV[1]) == 1 then return 0 end
local caller = counted(ARGV[1])
forget_waiting(ARGV[1])
forget_aside(ARGV[1])
local waited = redis.call('HDEL', meta, ARGV[1])
if caller then
  leave_callers(ARGV[1], caller)
  unpark(caller[7])
  keep(ARGV[2], {order, ages, callers})
end
if waited == 0 and ARGV[3] ~= '' then redis.call('HSET', hooked, ARGV[1], ARGV[3]) end
if announce(ARGV[1], now) == 1 then keep(ARGV[2], {outbox}) end
return waited
""",
)

_HEARTBEAT = Script(
    "heartbeat",
    PRELUDE
    + WAITING
    + """
-- ARGV replica, slots, lease_ms, ttl_ms, cancelled since (ms), wake channel, pool
-- -> now, taken back, overdue, cancelled, unread, begin of the next scheduled job or '', version of the rules, that
-- up to which the queue was looked through
local now = now_ms()
if ripen(now, 500) > 0 then redis.call('PUBLISH', ARGV[6], ARGV[7]) end
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
local known = redis.call('HMGET', control, 'version', 'swept')
return {fmt(now), taken, overdue, cancelled, lonely, next_ripe(), known[1] or '0', known[2] or '0'}
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
    PRELUDE
    + WAITING
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
    PRELUDE
    + """
-- ARGV id, ageing_ms, urgency of a job that waits elsewhere or ''
-- -> jobs ahead, mean service ms, slots; -1 ahead: it is not waiting, -2: it is paused; then when it may begin or ''
local mean, offered = redis.call('HGET', stats, 'service_ms') or '', 0
for _, n in ipairs(redis.call('HVALS', slots)) do offered = offered + n end
local urgency, level, ahead = tonumber(ARGV[3]), nil, 0
if not urgency then
  local caller = counted(ARGV[1])
  local score = redis.call('ZSCORE', order, ARGV[1]) or redis.call('ZSCORE', parked, ARGV[1])
  if not score then
    local due = redis.call('ZSCORE', scheduled, ARGV[1])
    return {redis.call('ZSCORE', paused, ARGV[1]) and -2 or -1, mean, offered, due or ''}
  end
  level = math.floor(score / B)
  ahead = redis.call('ZCOUNT', order, fmt(level * B), '(' .. fmt(tonumber(score)))
  local age = redis.call('ZSCORE', ages, ARGV[1])
  urgency = (age and age - level * B or caller[2]) + level * ARGV[2]
  if not age then -- parked: its caller's others come first
    local own = 'p|' .. caller[7] .. '|'
    ahead = ahead + redis.call('ZLEXCOUNT', callers, '[' .. own, '(' .. own .. caller[9] .. '|' .. ARGV[1])
  end
end
for other = 0, 20 do
  if other ~= level then
    local upto = urgency - other * ARGV[2]
    if upto >= B then upto = B - 1 end
    if upto > 0 then ahead = ahead + redis.call('ZCOUNT', ages, fmt(other * B), '(' .. fmt(other * B + upto)) end
  end
end
return {ahead, mean, offered, ''}
""",
)

_CENSUS = Script(
    "census",
    PRELUDE
    + """
-- waiting per level, running, replicas with slots, mean service ms, served, scheduled, paused
local waiting = {}
for level = 0, 20 do
  local low, high = fmt(level * B), '(' .. fmt((level + 1) * B)
  waiting[level + 1] = redis.call('ZCOUNT', order, low, high) + redis.call('ZCOUNT', parked, low, high)
end
return {waiting, redis.call('HVALS', claims), redis.call('HGETALL', slots),
        redis.call('HGET', stats, 'service_ms') or '', redis.call('HGET', stats, 'served') or '0',
        redis.call('ZCARD', scheduled), redis.call('ZCARD', paused)}
""",
)


class Standing(NamedTuple):
    """Where a job stands in its queue."""

    ahead: int | None
    """Jobs that will be served before it; None when it does not wait."""
    service_s: float | None
    """Mean time a slot is busy with one job; None before the first was measured."""
    slots: int
    paused: bool = False
    """Whether it waits aside until a pause ends."""
    not_before: float | None = None
    """When it may begin, in seconds since the epoch, if that is still to come."""

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
    next_ms: int | None
    """When the next scheduled job may begin, in milliseconds since the epoch."""
    version: int
    """Which rules the queue has."""
    swept: int
    """Up to which rules all that waits was looked through."""


class Census(NamedTuple):
    waiting: dict[Lane, int]
    running: dict[str, int]
    """Claims by replica."""
    slots: dict[str, int]
    """Slots by living replica."""
    service_s: float | None
    served: int
    scheduled: int
    """Jobs whose time to begin is still to come."""
    paused: int
    """Jobs that wait aside until a pause ends. They are not among the ``waiting``."""


class Pushed(Enum):
    """What became of a job that was to be put in line; true when it stands there."""

    FULL = 0
    ACCEPTED = 1
    DRAINING = 2
    TOO_MANY_SCHEDULED = 3
    CALLER_FULL = 4
    """Too many of its caller's wait."""

    def __bool__(self) -> bool:
        return self is Pushed.ACCEPTED


class Lives(NamedTuple):
    """A job that waits or runs."""

    id: str
    priority: int
    principal: str
    model: str
    running: bool


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
        max_scheduled: int = 10_000,
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
        self._max_scheduled = max_scheduled
        self._lease_ms = int(lease_s * 1000)
        self._ttl_ms = int(ttl_s * 1000)
        self._retention_ms = int(max(retention_s, ttl_s) * 1000)

    async def push(self, job: Job, unread_s: float | None = None, *, wake: bool = True, again: bool = False) -> Pushed:
        """Puts an accepted job in line; repeating it changes nothing. Before its time it waits beside the line.

        After ``unread_s`` a heartbeat brings the job back to look for its readers. ``wake`` tells all replicas; without
        it they find the job at their next heartbeat, unless the caller takes it. ``again`` says that it stood there
        before, so that it is never refused.
        """
        level, principal, deadline, model, *_ = _meta(job)
        counted: tuple[Arg, ...] = ()
        if (own := job.counted) is not None and (own.concurrent or own.queued):
            counted = (*_counted(job), own.queued or "")
        reply = await self._pipeline.run(
            _PUSH,
            self._keys,
            job.id,
            level,
            principal,
            self._max_waiting,
            self._ttl_ms,
            deadline,
            self._retention_ms,
            self._wake if wake else "",
            self.pool,
            "" if unread_s is None else int(unread_s * 1000),
            model,
            0 if job.not_before is None else math.ceil(job.not_before * 1000),
            self._max_scheduled,
            int(again),
            ",".join(job.receivers),
            *counted,
        )
        return Pushed(reply)

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
        step = (replica, slots, int(lease_s * 1000), self._ttl_ms, cancelled_since_ms, self._wake, self.pool)
        now, taken, *found, next_ms, version, swept = await self._pipeline.run(_HEARTBEAT, self._keys, *step)
        await self._pipeline.run(_SEEN, [self._pools], self.pool, int(now), self._ttl_ms)
        overdue, cancelled, unread = ([raw.decode() for raw in ids] for ids in found)
        return Pulse(int(now), taken, overdue, cancelled, unread, _moment(next_ms), int(version), int(swept))

    async def ripen(self) -> tuple[int, int | None]:
        """Lets those wait in line whose time has come; everybody is told. Returns the store's time, and when the next
        one's comes, in milliseconds since the epoch."""
        now, next_ms = await self._pipeline.run(RIPEN, self._keys, self._ttl_ms, self._wake, self.pool)
        return int(now), _moment(next_ms)

    async def control(self, rules: QueueRules) -> None:
        """From here on the queue has these rules, unless it has later ones. What waits is sorted by :meth:`sweep`, but
        none of it is claimed against them."""
        await self._pipeline.run(CONTROL, self._keys, rules.version, rules.lines("paused"), rules.lines("draining"))

    async def sweep(self, version: int) -> None:
        """Puts aside what is paused and back in line what is not any more, in pages of bounded work."""
        for part in ("paused", "order"):
            start: bytes | str = "-inf"
            while start:
                start = await self._pipeline.run(SWEEP, self._keys, part, start, self._ttl_ms, self._wake, self.pool)
        await self._pipeline.run(SWEPT, self._keys, version)

    async def alive(self) -> AsyncIterator[list[Lives]]:
        """All jobs that wait or run, in pages; one that comes or goes meanwhile may be missing, or there twice."""
        cursor = b"0"
        while True:
            cursor, flat = await self._pipeline.call("HSCAN", self._key("meta"), cursor, "COUNT", PAGE)
            ids, metas = flat[::2], flat[1::2]
            if ids:
                claims = await self._pipeline.call("HMGET", self._key("claims"), *ids)
                yield [_lives(*found) for found in zip(ids, metas, claims, strict=True)]
            if cursor == b"0":
                return

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
        ahead, mean, slots, due = await self._pipeline.run(
            _POSITION, self._keys, job_id, self._ageing_ms, _finite(urgency)
        )
        not_before = float(due) / 1000 if due else None
        return Standing(None if ahead < 0 else ahead, _seconds(mean), int(slots), ahead == -2, not_before)

    async def census(self) -> Census:
        """Counts for ``/stats``."""
        levels, claims, slots, mean, served, scheduled, paused = await self._pipeline.run(_CENSUS, self._keys)
        waiting: dict[Lane, int] = dict.fromkeys(LANES, 0)
        for level, count in enumerate(levels):
            waiting[lane_of(MAX_PRIORITY - level)] += count
        running: dict[str, int] = {}
        for claim in claims:
            owner = claim.decode().partition("|")[0]
            running[owner] = running.get(owner, 0) + 1
        offered = {name.decode(): int(count) for name, count in zip(slots[::2], slots[1::2], strict=True)}
        return Census(waiting, running, offered, _seconds(mean), int(served), scheduled, paused)

    async def recent(self, limit: int) -> list[str]:
        """Ids of the pool's jobs, newest first."""
        found: list[Any] = await self._pipeline.call("ZRANGE", self._key("index"), 0, limit - 1, "REV")
        return [raw.decode() for raw in found]

    def _key(self, part: str) -> str:
        return self._keys[QUEUE_PARTS.index(part)]


def _meta(job: Job) -> tuple[int, str, int | str, str, str, int | str]:
    """A job's level, principal, deadline in milliseconds and model; then whose limits it counts against, and the most
    of theirs that may run."""
    deadline = "" if job.expires_at is None else int(job.expires_at * 1000)
    level, model = MAX_PRIORITY - job.priority, _part(job.request.model)
    return level, _part(job.principal), deadline, model, *_counted(job)


def _counted(job: Job) -> tuple[str, int | str]:
    own = job.counted
    if own is None or not (own.concurrent or own.queued):
        return "", ""
    return _part(own.who), own.concurrent or ""


def _part(text: str) -> str:
    return text.replace("%", "%25").replace("|", "%7C")


def _lives(job_id: bytes, meta: bytes, claim: bytes | None) -> Lives:
    level, _, principal, _, _, model, *_ = [*meta.decode().split("|"), ""]
    return Lives(job_id.decode(), MAX_PRIORITY - int(level), _whole(principal), _whole(model), claim is not None)


def _whole(part: str) -> str:
    return part.replace("%7C", "|").replace("%25", "%")


def _moment(text: bytes) -> int | None:
    return int(float(text)) if text else None


def _finite(urgency: float) -> int | str:
    return "" if urgency == math.inf else int(urgency)


def _seconds(mean_ms: bytes) -> float | None:
    return float(mean_ms) / 1000 if mean_ms else None
