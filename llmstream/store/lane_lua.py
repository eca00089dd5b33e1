"""What the scripts on the queue of a pool have in common: the names of its keys, and how a job waits.

``ANNOUNCING``, ``PAUSING`` and ``WAITING`` go behind ``PRELUDE`` in the scripts that need them.
"""

from __future__ import annotations

from llmstream.store.keys import QUEUE_PARTS

_NAMES = "\n".join(f"local {name} = KEYS[{index}]" for index, name in enumerate(QUEUE_PARTS, 1))
PRELUDE = (
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
local function forget_aside(id)
  redis.call('ZREM', scheduled, id)
  redis.call('ZREM', paused, id)
end
-- Jobs of callers with limits stand among callers, all with score 0: r|WHO|id run, w|WHO|id wait in line, and
-- p|WHO|urgency|id are parked until one of the caller's has ended. Each part of a caller's meta stands for itself, so
-- that nothing can be counted twice.
local function number_of(state, who)
  return redis.call('ZLEXCOUNT', callers, '[' .. state .. '|' .. who .. '|', '(' .. state .. '|' .. who .. '}')
end
local function counted(id)
  local m = redis.call('ZCARD', callers) > 0 and redis.call('HGET', meta, id)
  local part = m and split(m)
  return part and (part[7] or '') ~= '' and part
end
local function run_for_caller(id, part)
  redis.call('ZREM', callers, 'w|' .. part[7] .. '|' .. id)
  redis.call('ZADD', callers, 0, 'r|' .. part[7] .. '|' .. id)
end
local function leave_callers(id, part)
  redis.call('ZREM', callers, 'r|' .. part[7] .. '|' .. id)
  redis.call('ZREM', callers, 'w|' .. part[7] .. '|' .. id)
  if redis.call('ZREM', parked, id) == 1 then
    redis.call('ZREM', callers, 'p|' .. part[7] .. '|' .. part[9] .. '|' .. id)
  end
end
local function wait_for_caller(id, part)
  if (part[7] or '') ~= '' then
    leave_callers(id, part)
    redis.call('ZADD', callers, 0, 'w|' .. part[7] .. '|' .. id)
  end
end
local function park(id, part, ageing)
  redis.call('ZREM', order, id)
  redis.call('ZREM', ages, id)
  leave_callers(id, part)
  part[9] = string.format('%016.0f%012.0f', part[2] + part[1] * ageing, part[5])
  redis.call('HSET', meta, id, table.concat(part, '|', 1, 9))
  redis.call('ZADD', parked, fmt(part[1] * B + part[5]), id)
  redis.call('ZADD', callers, 0, 'p|' .. part[7] .. '|' .. part[9] .. '|' .. id)
end
-- Lets as many of a caller's parked jobs stand in line as may run beside those that do, the most urgent first.
-- -> how many
local function unpark(who)
  local low, high, back = '[p|' .. who .. '|', '(p|' .. who .. '}', 0
  local able = number_of('r', who)
  while true do
    local first = redis.call('ZRANGEBYLEX', callers, low, high, 'LIMIT', 0, 1)[1]
    local id = first and string.match(first, '^p|[^|]*|[^|]*|(.*)$')
    local part = id and split(redis.call('HGET', meta, id) or '')
    if not first or (part[8] or '') ~= '' and able >= tonumber(part[8]) then return back end
    redis.call('ZREM', callers, first)
    redis.call('ZREM', parked, id)
    if part[7] then
      redis.call('ZADD', order, fmt(part[1] * B + part[5]), id)
      redis.call('ZADD', ages, fmt(part[1] * B + part[2]), id)
      wait_for_caller(id, part)
      able, back = able + 1, back + 1
    end
  end
end
"""
)
ANNOUNCING = """
-- Puts the events that tell of a job's end into the outbox, in the step that takes it off the queue: a claim that was
-- not settled comes back to somebody, so none is lost.
local function announce(id, now)
  local names = redis.call('HGET', hooked, id)
  if not names then return 0 end
  redis.call('HDEL', hooked, id)
  for name in string.gmatch(names, '[^,]+') do redis.call('ZADD', outbox, 'NX', fmt(now), id .. '|' .. name) end
  return 1
end
"""
PAUSING = """
-- Rules come as lines 'first level|last level|pattern of models;'. Where there are none nothing is looked at.
local function rules_of(text)
  if not text then return nil end
  local rules = {}
  for first, last, pattern in string.gmatch(text, '(%d+)|(%d+)|([^;]*);') do
    rules[#rules + 1] = {tonumber(first), tonumber(last), pattern}
  end
  return rules
end
-- '*' stands for any bytes and '?' for any one. Takes no longer than both lengths multiplied.
local function fits(pattern, name)
  local p, n, star, mark = 1, 1, nil, nil
  while n <= #name do
    local c = string.sub(pattern, p, p)
    if c == '*' then
      star, mark, p = p, n, p + 1
    elseif c ~= '' and (c == '?' or c == string.sub(name, n, n)) then
      p, n = p + 1, n + 1
    elseif star then
      mark = mark + 1
      p, n = star + 1, mark
    else
      return false
    end
  end
  return string.match(pattern, '^%**$', p) ~= nil
end
local function covered(rules, level, model)
  for _, rule in ipairs(rules) do
    if level >= rule[1] and level <= rule[2] and fits(rule[3], model) then return true end
  end
  return false
end
local modes = redis.call('HMGET', control, 'paused', 'draining')
local pausing = rules_of(modes[1])
-- Lets a job wait: in line, or aside where its lane or model is paused. 'part' is its meta.
local function wait(id, part)
  local level = tonumber(part[1])
  if pausing and covered(pausing, level, part[6] or '') then
    redis.call('ZADD', paused, fmt(level * B + part[5]), id)
  else
    redis.call('ZADD', order, fmt(level * B + part[5]), id)
    redis.call('ZADD', ages, fmt(level * B + part[2]), id)
  end
  if part[4] ~= '' then redis.call('ZADD', deadlines, part[4], id) end
  wait_for_caller(id, part)
end
"""
WAITING = (
    PAUSING
    + """
local function requeue(id)
  local m = redis.call('HGET', meta, id)
  redis.call('HDEL', claims, id)
  if not m then return 0 end
  wait(id, split(m))
  return 1
end
-- Lets a job wait behind those of its principal that came before. 'part' is its meta, but for the turn.
local function arrive(id, part)
  local field = part[1] .. ':' .. part[3]
  local served = tonumber(redis.call('HGET', turns, part[1]) or 0)
  local turn = math.max(served, tonumber(redis.call('HGET', turns, field) or 0)) + 1
  redis.call('HSET', turns, field, turn)
  part[5] = fmt(turn)
  redis.call('HSET', meta, id, table.concat(part, '|', 1, (part[7] or '') ~= '' and 9 or 6))
  wait(id, part)
end
-- Lets those wait in line whose time has come -> how many these are
local function ripen(now, most)
  local ripe = redis.call('ZRANGEBYSCORE', scheduled, '-inf', fmt(now), 'LIMIT', 0, most)
  for _, id in ipairs(ripe) do
    redis.call('ZREM', scheduled, id)
    local m = redis.call('HGET', meta, id)
    if m then
      arrive(id, split(m))
      redis.call('ZADD', index, 'NX', fmt(now), id)
    end
  end
  return #ripe
end
local function next_ripe()
  return redis.call('ZRANGEBYSCORE', scheduled, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2] or ''
end
"""
)
