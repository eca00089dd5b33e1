"""The steps that hold the jobs of a pool back and let them go: schedules, pauses. Each is one atomic script."""

from __future__ import annotations

from llmstream.store.lane_lua import PRELUDE, WAITING
from llmstream.store.pipeline import Script

CONTROL_TTL_MS = 365 * 24 * 3600 * 1000
"""So long something stays paused without any replica; while one runs it never ends by itself."""

RIPEN = Script(
    "ripen",
    PRELUDE
    + WAITING
    + """
-- ARGV ttl_ms, wake channel, pool -> now, begin of the next scheduled job or ''
local now = now_ms()
if ripen(now, 500) > 0 then
  keep(ARGV[1], {order, ages, turns, paused, deadlines, index})
  redis.call('PUBLISH', ARGV[2], ARGV[3])
end
return {fmt(now), next_ripe()}
""",
)

CONTROL = Script(
    "control",
    PRELUDE
    + f"""
-- ARGV version, paused, draining. The later version stays.
if tonumber(redis.call('HGET', control, 'version') or 0) >= tonumber(ARGV[1]) then return 0 end
local swept = redis.call('HGET', control, 'swept') or '0'
redis.call('DEL', control)
redis.call('HSET', control, 'version', ARGV[1], 'swept', swept)
if ARGV[2] ~= '' then redis.call('HSET', control, 'paused', ARGV[2]) end
if ARGV[3] ~= '' then redis.call('HSET', control, 'draining', ARGV[3]) end
redis.call('PEXPIRE', control, {CONTROL_TTL_MS})
return 1
""",
)

SWEEP = Script(
    "sweep",
    PRELUDE
    + WAITING
    + """
-- ARGV 'order' or 'paused', where to begin, ttl_ms, wake channel, pool -> where to go on or ''
-- Looks at some of what waits there, in its order, and puts each job where it belongs by now.
local from = ARGV[1] == 'paused' and paused or order
local moved = 0
local function look(id)
  local m = redis.call('HGET', meta, id)
  local part = m and split(m)
  local aside = part and pausing and covered(pausing, tonumber(part[1]), part[6] or '') or false
  if part and aside == (from == paused) then return end
  redis.call('ZREM', from, id)
  if from == order then redis.call('ZREM', ages, id) end
  if part then wait(id, part) end
  moved = moved + 1
end
local page, last = redis.call('ZRANGEBYSCORE', from, ARGV[2], '+inf', 'WITHSCORES', 'LIMIT', 0, 500), nil
for i = 1, #page, 2 do
  look(page[i])
  last = page[i + 1]
end
if last then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', from, last, last)) do look(id) end
end
if moved > 0 then
  keep(ARGV[3], {order, ages, paused, deadlines})
  if from == paused then redis.call('PUBLISH', ARGV[4], ARGV[5]) end
end
return #page == 1000 and '(' .. last or ''
""",
)

SWEPT = Script(
    "swept",
    PRELUDE
    + """
-- ARGV version
if redis.call('HGET', control, 'version') == ARGV[1] then redis.call('HSET', control, 'swept', ARGV[1]) end
return 1
""",
)
