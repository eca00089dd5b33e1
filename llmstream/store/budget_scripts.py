"""The steps that count what goes to one target, each one atomic script on keys of one hash slot.

Requests and tokens are counted in slices of a sixtieth of the window. A slice counts until every moment of it lies
more than a window back, so that no window, wherever it begins, ever holds more than the limit. A slot is held under the
lease of its replica; what a request has used of the window stays counted whatever becomes of its replica.
"""

from __future__ import annotations

from llmstream.store.keys import BUDGET_PARTS
from llmstream.store.pipeline import Script

_NAMES = "\n".join(f"local {name} = KEYS[{index}]" for index, name in enumerate(BUDGET_PARTS, 1))
_PRELUDE = (
    _NAMES
    + """
-- ARGV of all: replica, lease_ms, ttl_ms, window_ms, slice_ms, wake channel, target.
local replica, lease, window_ms, slice_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4]), tonumber(ARGV[5])
local function fmt(number) return string.format('%.0f', number) end
local function keep()
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[3]) end
end
-- A clock that never steps back, also where the server's does: what was counted would leave its window too late, and
-- what is counted next too early.
local function now_ms()
  local t = redis.call('TIME')
  local real = t[1] * 1000 + math.floor(t[2] / 1000)
  local kept = redis.call('HMGET', window, 'at', 'ahead')
  local at, now = tonumber(kept[1] or 0), real + tonumber(kept[2] or 0)
  if now < at then
    now = at
    redis.call('HSET', window, 'ahead', fmt(at - real))
  end
  redis.call('HSET', window, 'at', fmt(now))
  return now
end
local now = now_ms()
local current = math.floor(now / slice_ms)
local first
-- Lets go of the slices that have wholly left the window.
local function roll()
  local oldest = math.floor((now - window_ms) / slice_ms)
  local kept = redis.call('HMGET', window, 'first', 'last')
  first = tonumber(kept[1] or oldest)
  for slice = first, math.min(oldest - 1, tonumber(kept[2] or 0)) do
    local gone = redis.call('HMGET', window, 'r' .. slice, 't' .. slice)
    if gone[1] then
      redis.call('HINCRBY', window, 'requests', 0 - gone[1])
      redis.call('HINCRBY', window, 'tokens', 0 - gone[2])
      redis.call('HDEL', window, 'r' .. slice, 't' .. slice)
    end
  end
  if first < oldest or not kept[1] then
    first = oldest
    redis.call('HSET', window, 'first', fmt(first))
  end
end
roll()
local function count(slice, requests, tokens)
  redis.call('HINCRBY', window, 'r' .. slice, fmt(requests))
  redis.call('HINCRBY', window, 't' .. slice, fmt(tokens))
  redis.call('HINCRBY', window, 'requests', fmt(requests))
  redis.call('HINCRBY', window, 'tokens', fmt(tokens))
end
local function charge(requests, tokens)
  count(current, requests, tokens)
  redis.call('HSET', window, 'last', fmt(current))
end
local function refund(slice, requests, tokens)
  if slice >= first then count(slice, 0 - requests, 0 - tokens) end -- never -0
end
-- A hold: slice it was counted in, tokens reserved, number.
local function read(hold)
  local slice, tokens, number = string.match(hold, '^(-?%d+)|(%d+)|(%d+)$')
  return tonumber(slice), tonumber(tokens), tonumber(number)
end
local function hold(name, slice, tokens, number)
  redis.call('HSET', holds, name, fmt(slice) .. '|' .. fmt(tokens) .. '|' .. number)
end
local function owner(name) return string.match(name, '^[^|]*') end
local function wake()
  if redis.call('ZCARD', line) > 0 then redis.call('PUBLISH', ARGV[6], ARGV[7]) end
end
-- A replica that asks is alive, so its own slots never lapse here. 1: its lease had been forgotten.
local function renew()
  return redis.call('ZADD', leases, fmt(now + lease), replica)
end
"""
)

RESERVE = Script(
    "reserve",
    _PRELUDE
    + """
-- ARGV name, number, tokens, limits of slots, requests and tokens or '', urgency, patience_ms of a place in line
-- -> {1, 0, lease was forgotten}, or {0, after_ms or 0, lease was forgotten, reason}
local name, number, tokens = ARGV[8], ARGV[9], tonumber(ARGV[10])
local most_slots, most_requests, most_tokens = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local urgency = tonumber(ARGV[14])
local forgotten = renew()
local held = redis.call('HGET', holds, name)
if held then
  local slice, reserved, known = read(held)
  -- What arrives late is not the latest.
  if known < tonumber(number) then hold(name, slice, reserved, number) end
  keep()
  return {1, 0, forgotten}
end
local lapsed = redis.call('ZRANGEBYSCORE', leases, '-inf', fmt(now))
if #lapsed > 0 then
  local gone = {}
  for _, other in ipairs(lapsed) do
    gone[other] = true
    redis.call('ZREM', leases, other)
  end
  for _, held_name in ipairs(redis.call('HKEYS', holds)) do
    if gone[owner(held_name)] then redis.call('HDEL', holds, held_name) end
  end
end
-- Who waits in line and does not ask any more has gone.
for _, other in ipairs(redis.call('ZRANGEBYSCORE', asked, '-inf', fmt(now))) do
  redis.call('ZREM', asked, other)
  redis.call('ZREM', line, other)
end
local after, reason = 0, nil
local function full(field, prefix, limit, wanted)
  local counted = tonumber(redis.call('HGET', window, field) or 0)
  if not limit or counted + wanted <= limit then return end
  reason = field
  for slice = first, current do
    counted = counted - tonumber(redis.call('HGET', window, prefix .. slice) or 0)
    if counted + wanted <= limit then
      after = math.max(after, (slice + 1) * slice_ms + window_ms - now)
      return
    end
  end
end
if most_slots and redis.call('HLEN', holds) >= most_slots then reason = 'slots' end
full('requests', 'r', most_requests, 1)
full('tokens', 't', most_tokens, tokens)
local ahead = redis.call('ZRANGEBYSCORE', line, '-inf', '(' .. ARGV[14], 'LIMIT', 0, 2)
if not reason and ahead[1] and (ahead[1] ~= replica or ahead[2]) then reason = 'line' end
if reason then
  redis.call('ZADD', line, ARGV[14], replica)
  redis.call('ZADD', asked, fmt(now + ARGV[15]), replica)
  keep()
  return {0, after, forgotten, reason}
end
redis.call('ZREM', line, replica)
redis.call('ZREM', asked, replica)
charge(1, tokens)
hold(name, current, tokens, number)
wake()
keep()
return {1, 0, forgotten}
""",
)

SETTLE = Script(
    "settle budget",
    _PRELUDE
    + """
-- ARGV name, number, tokens used or '' where nothing was sent. Only the hold of that number is meant: the same name may
-- have been reserved again since.
local held = redis.call('HGET', holds, ARGV[8])
if not held then return 0 end
local slice, tokens, number = read(held)
if number ~= tonumber(ARGV[9]) then return 0 end
redis.call('HDEL', holds, ARGV[8])
local used = tonumber(ARGV[10])
if not used then
  refund(slice, 1, tokens)
elseif used < tokens then
  refund(slice, 0, tokens - used)
elseif used > tokens then
  charge(0, used - tokens)
end
wake()
keep()
return 1
""",
)

STEP_BACK = Script(
    "step back",
    _PRELUDE
    + """
-- The replica gives its place in line up.
redis.call('ZREM', asked, replica)
redis.call('ZREM', line, replica)
wake()
keep()
return 1
""",
)

RENEW = Script(
    "renew",
    _PRELUDE
    + """
-- -> whether the lease had been forgotten, and with it perhaps slots
local forgotten = renew()
keep()
return forgotten
""",
)

RECONCILE = Script(
    "reconcile",
    _PRELUDE
    + """
-- ARGV number, then of each reservation: name, number, tokens or '' where it may be on its way, 1 to count it again.
-- Reservations of the replica that it does not know, older than the number, are those whose answer was lost; those that
-- the store does not know lapsed or were lost with an older server.
renew()
local known = {}
for i = 9, #ARGV, 4 do
  local name, number, tokens = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  known[name] = true
  if tokens and redis.call('HEXISTS', holds, name) == 0 then
    if ARGV[i + 3] == '1' then
      charge(1, tokens)
      hold(name, current, tokens, number)
    else
      hold(name, -1, tokens, number)
    end
  end
end
for _, name in ipairs(redis.call('HKEYS', holds)) do
  if owner(name) == replica and not known[name] then
    local slice, tokens, number = read(redis.call('HGET', holds, name))
    if number < tonumber(ARGV[8]) then
      redis.call('HDEL', holds, name)
      refund(slice, 1, tokens)
      wake()
    end
  end
end
keep()
return 1
""",
)

SPENT = Script(
    "spent",
    _PRELUDE
    + """
-- -> slots held, requests and tokens in the window
keep()
local counted = redis.call('HMGET', window, 'requests', 'tokens')
return {redis.call('HLEN', holds), tonumber(counted[1] or 0), tonumber(counted[2] or 0)}
""",
)
