"""The steps of a breaker, each one atomic script. All breakers lie in one hash slot: they are written rarely."""

from __future__ import annotations

from llmstream.store.pipeline import Script

_PRELUDE = """
local states = KEYS[1]
local function fmt(number) return string.format('%.0f', number) end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
-- times it opened, open until (0: closed), closed at, probe until, who probes. After a clock stepped back nothing lasts
-- longer than it would have.
local function read(target, max_open, lease)
  local found = redis.call('HGET', states, target) or '0|0|0|0|'
  local opened, til, closed, probe_til, prober = string.match(found, '^(%d+)|(%d+)|(%d+)|(%d+)|(.*)$')
  return {opened = tonumber(opened), til = math.min(til, now + max_open), closed = tonumber(closed),
          probe_til = math.min(probe_til, now + lease), prober = prober}
end
local function write(target, s, ttl)
  redis.call('HSET', states, target, fmt(s.opened) .. '|' .. fmt(s.til) .. '|' .. fmt(s.closed) .. '|'
             .. fmt(s.probe_til) .. '|' .. s.prober)
  redis.call('PEXPIRE', states, ttl)
end
"""

FAIL = Script(
    "fail",
    _PRELUDE
    + """
-- KEYS states, failures; ARGV target, channel, max_open_ms, lease_ms, ttl_ms, probe or '', successes since the last
-- failure, failures that open it, share of failures, window_ms, open_ms -> 1 when this opened it
local target, max_open, probe = ARGV[1], tonumber(ARGV[3]), ARGV[6]
local s = read(target, max_open, ARGV[4])
if s.til > 0 then
  -- Only the probe decides; what else fails began before it opened, or under a probe that lapsed.
  if probe == '' or s.prober ~= probe then return 0 end
else
  local width = math.ceil(ARGV[10] / 10)
  local slice = math.floor(now / width)
  local failures, successes, kept = 1, tonumber(ARGV[7]), redis.call('HGETALL', KEYS[2])
  for i = 1, #kept, 2 do
    local f, ok = string.match(kept[i + 1], '^(%d+)|(%d+)$')
    if tonumber(kept[i]) > slice or tonumber(kept[i]) <= slice - 10 then
      redis.call('HDEL', KEYS[2], kept[i])
    else
      failures, successes = failures + f, successes + ok
    end
  end
  local f, ok = string.match(redis.call('HGET', KEYS[2], slice) or '0|0', '^(%d+)|(%d+)$')
  redis.call('HSET', KEYS[2], slice, fmt(f + 1) .. '|' .. fmt(ok + ARGV[7]))
  redis.call('PEXPIRE', KEYS[2], ARGV[10])
  if failures < tonumber(ARGV[8]) or failures < ARGV[9] * (failures + successes) then return 0 end
end
-- One that stayed closed for long begins anew.
if s.til == 0 and now - s.closed > max_open then s.opened = 0 end
s.opened = math.min(s.opened + 1, 30)
s.til = now + math.min(max_open, ARGV[11] * 2 ^ (s.opened - 1))
s.probe_til, s.prober = 0, ''
write(target, s, ARGV[5])
redis.call('DEL', KEYS[2])
redis.call('PUBLISH', ARGV[2], target)
return 1
""",
)

PROBE = Script(
    "probe breaker",
    _PRELUDE
    + """
-- KEYS states; ARGV target, channel, max_open_ms, lease_ms, ttl_ms, probe
-- -> 1: this is the probe; 0: not yet, or another one is under way; 2: it is closed
local s = read(ARGV[1], ARGV[3], ARGV[4])
if s.til == 0 then return 2 end
if now < s.til or (now < s.probe_til and s.prober ~= ARGV[6]) then return 0 end
s.probe_til, s.prober = now + ARGV[4], ARGV[6]
write(ARGV[1], s, ARGV[5])
return 1
""",
)

DECIDE = Script(
    "decide",
    _PRELUDE
    + """
-- KEYS states; ARGV target, channel, max_open_ms, lease_ms, ttl_ms, probe, 1: it went well, 0: it said nothing
local s = read(ARGV[1], ARGV[3], ARGV[4])
if s.til == 0 or s.prober ~= ARGV[6] then return 0 end
s.probe_til, s.prober = 0, ''
if ARGV[7] == '1' then s.til, s.closed = 0, now end
write(ARGV[1], s, ARGV[5])
redis.call('PUBLISH', ARGV[2], ARGV[1])
return 1
""",
)

LOOK = Script(
    "look",
    _PRELUDE
    + """
-- KEYS states; ARGV max_open_ms, lease_ms, ttl_ms, then of each probe of the replica: target, probe
-- -> of each that is not closed: target, opens in (ms), probe lapses in (ms)
for i = 4, #ARGV, 2 do
  local s = read(ARGV[i], ARGV[1], ARGV[2])
  if s.til > 0 and s.prober == ARGV[i + 1] then
    s.probe_til = now + ARGV[2]
    write(ARGV[i], s, ARGV[3])
  end
end
local found = {}
for _, target in ipairs(redis.call('HKEYS', states)) do
  local s = read(target, ARGV[1], ARGV[2])
  if s.til > 0 then
    found[#found + 1] = {target, math.max(0, s.til - now), math.max(0, s.probe_til - now)}
  elseif now - s.closed > tonumber(ARGV[1]) then
    redis.call('HDEL', states, target)
  end
end
return found
""",
)
