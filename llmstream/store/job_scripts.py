"""The steps that change a job's record and log, each one atomic script on keys of one hash slot."""

from __future__ import annotations

from llmstream.store.entry import FIELD
from llmstream.store.pipeline import Script

_READERS = """
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function fmt(number) return string.format('%.0f', number) end
-- '-' stands for the reader that a job without one may still expect.
local function seat(job, readers, who, lease)
  redis.call('ZADD', readers, fmt(now_ms() + lease), who)
  if who ~= '-' then redis.call('ZREM', readers, '-') end
  redis.call('HDEL', job, 'alone_since')
  local ttl = lease + 60000
  if redis.call('PTTL', readers) < ttl then redis.call('PEXPIRE', readers, fmt(ttl)) end
end
"""

_ORDER = """
local function pair(id)
  local attempt, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(attempt), tonumber(seq)
end
local function before(a, b)
  local a1, a2 = pair(a)
  local b1, b2 = pair(b)
  return a1 < b1 or (a1 == b1 and a2 < b2)
end
"""

_END = """
local attempt = tonumber(job[2]) + 1
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
redis.call('XADD', KEYS[2], attempt .. '-0', 'e', ARGV[2])
redis.call('HSET', KEYS[1], 'status', ARGV[1], 'outcome', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
redis.call('PUBLISH', ARGV[5], ARGV[6])
return {'ended', ARGV[1], attempt, last[1] and last[1][1] or '0-0'}
"""

_RECORD = (
    _READERS
    + """
-- ARGV[1], [3] and [4]: spec, fingerprint or '', grace_ms or ''.
local function write_down(job, readers, who, lease)
  redis.call('HSET', job, 'spec', ARGV[1])
  if ARGV[3] ~= '' then redis.call('HSET', job, 'fingerprint', ARGV[3]) end
  if ARGV[4] ~= '' then
    redis.call('HSET', job, 'grace_ms', ARGV[4])
    seat(job, readers, who, tonumber(lease))
  end
end
"""
)

CREATE = Script(
    "create",
    _RECORD
    + """
-- KEYS job, readers; ARGV spec, ttl_ms, fingerprint or '', grace_ms or '', reader, its lease_ms.
-- The record made now or, for the same request, before.
local job = redis.call('HMGET', KEYS[1], 'spec', 'fingerprint', 'status')
if job[1] then
  if job[1] == ARGV[1] then return {'created', job[1], job[3]} end
  if ARGV[3] == '' or job[2] ~= ARGV[3] then return {'taken'} end
  if job[3] == 'queued' then redis.call('HINCRBY', KEYS[1], 'submits', 1) end
  if (job[3] == 'queued' or job[3] == 'in_progress') and redis.call('HEXISTS', KEYS[1], 'grace_ms') == 1 then
    seat(KEYS[1], KEYS[2], ARGV[5], tonumber(ARGV[6]))
  end
  return {'same', job[1], job[3]}
end
redis.call('HSET', KEYS[1], 'status', 'queued', 'attempt', 0, 'submits', 1)
write_down(KEYS[1], KEYS[2], ARGV[5], ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'created', ARGV[1], 'queued'}
""",
)

DISCARD = Script(
    "discard",
    """
-- KEYS job, log, readers. One submission of a waiting job was refused; the record goes when all were.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt')
if job[1] ~= 'queued' or job[2] ~= '0' then return 0 end
if redis.call('HINCRBY', KEYS[1], 'submits', -1) > 0 then return 0 end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return 1
""",
)

BEGIN = Script(
    "begin",
    """
-- KEYS job, log; ARGV replica, at, max_attempts, entry, ttl_ms, token, number of the claim.
-- Opens the next attempt; from here on the log refuses every older one. The token tells a repeated call: the latest
-- ones are kept, newest first, because a repetition that comes after the next attempt must not begin another one.
-- The number tells a call that comes after the job was begun under a later claim: it must not take the job back.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'spec', 'started_at', 'handed_over', 'token', 'claim')
if not job[1] then return {'gone'} end
if job[1] ~= 'queued' and job[1] ~= 'in_progress' then return {'done'} end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 2)
local handed_over = tonumber(job[5] or 0)
local tokens = job[6] or ''
local known = string.find(tokens, ARGV[6], 1, true)
if known and known > 1 then return {'superseded'} end
if known then
  return {'begun', job[3], tonumber(job[2]), last[2] and last[2][1] or '0-0', job[4], job[2] - handed_over}
end
if tonumber(ARGV[7]) < tonumber(job[7] or 0) then return {'superseded'} end
local attempt = tonumber(job[2]) + 1
if attempt - handed_over > tonumber(ARGV[3]) then return {'exhausted'} end
redis.call('XADD', KEYS[2], attempt .. '-0', 'e', ARGV[4])
redis.call('HSET', KEYS[1], 'status', 'in_progress', 'attempt', attempt, 'replica', ARGV[1],
           'token', string.sub(ARGV[6] .. tokens, 1, 128), 'claim', ARGV[7])
if not job[4] then redis.call('HSET', KEYS[1], 'started_at', ARGV[2]) end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return {'begun', job[3], attempt, last[1] and last[1][1] or '0-0', job[4] or ARGV[2], attempt - handed_over}
""",
)

FINISH = Script(
    "finish",
    """
-- KEYS job, log; ARGV attempt, entry id, entry, status, outcome, ttl_ms, previous id.
-- Terminal event, status and expiry in one step, for the attempt that still owns the log. 'behind': the store lost
-- what stood before.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt')
if not job[1] then return 'behind' end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local last_id = last[1] and last[1][1] or '0-0'
if (job[1] == 'queued' or job[1] == 'in_progress') and tonumber(job[2]) < tonumber(ARGV[1]) then return 'behind' end
if job[1] ~= 'in_progress' then return last_id == ARGV[2] and job[1] == ARGV[4] and 'ok' or 'fenced' end
if job[2] ~= ARGV[1] then return 'fenced' end
if last_id ~= ARGV[7] then return 'behind' end
local added = redis.pcall('XADD', KEYS[2], ARGV[2], 'e', ARGV[3])
if type(added) == 'table' and added.err then
  if string.find(added.err, 'equal or smaller') then return 'fenced' end
  return added
end
redis.call('HSET', KEYS[1], 'status', ARGV[4], 'outcome', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return 'ok'
""",
)

RESTORE = Script(
    "restore",
    _RECORD
    + _ORDER
    + """
-- KEYS job, log, readers; ARGV spec, ttl_ms, fingerprint or '', grace_ms or '', attempt, replica, started at, token,
-- 1 to pass over a hole, the event before the first entry, then id and entry of each.
-- Writes again what the store has lost of an attempt. Its readers get the time to be counted again.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'token', 'started_at')
local attempt, known = tonumber(ARGV[5]), tonumber(job[2] or 0)
local open = not job[1] or job[1] == 'queued' or job[1] == 'in_progress'
local tokens = job[3] or ''
local ours = string.sub(tokens, 1, #ARGV[8]) == ARGV[8]
if known > attempt or (known == attempt and not ours) then return 'fenced' end
if not open then return known == attempt and 'ok' or 'fenced' end
if known == attempt and job[1] == 'queued' then return 'fenced' end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local at, position, first = last[1] and last[1][1] or '0-0', ARGV[10], nil
if at == position or ARGV[9] == '1' then first = 11 end
for i = 11, #ARGV, 2 do
  position = ARGV[i]
  if at == position then first = i + 2 end
end
if not first then
  if before(at, position) then return 'hole' end
  first = #ARGV + 1
end
for i = first, #ARGV, 2 do redis.call('XADD', KEYS[2], ARGV[i], 'e', ARGV[i + 1]) end
if not job[1] then write_down(KEYS[1], KEYS[3], '-', 10000) end
redis.call('HSET', KEYS[1], 'status', 'in_progress', 'attempt', attempt, 'replica', ARGV[6],
           'token', ours and tokens or string.sub(ARGV[8] .. tokens, 1, 128), 'started_at', job[4] or ARGV[7])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 'ok'
""",
)

END = Script(
    "end",
    _ORDER
    + """
-- KEYS job, log; ARGV status, entry, outcome, ttl_ms, channel, job id, what the log has to hold at least or nothing.
-- Ends a job from outside: takes the next attempt, whose only event is the terminal one, so the owner is fenced.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt')
if not job[1] then return {'gone'} end
if job[1] ~= 'queued' and job[1] ~= 'in_progress' then return {'done', job[1]} end
if ARGV[7] then
  local latest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
  if before(latest and latest[1] or '0-0', ARGV[7]) then return {'behind'} end
end
"""
    + _END,
)

ABANDON = Script(
    "abandon",
    _READERS
    + """
-- KEYS job, log, readers; ARGV as for "end". Ends a job that nobody has read for as long as it allows; otherwise tells
-- when to look again. Deciding and ending are one step, so no reader is cut off who came before it.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'grace_ms', 'alone_since')
if not job[1] then return {'gone'} end
if not job[3] or (job[1] ~= 'queued' and job[1] ~= 'in_progress') then return {'done', job[1]} end
local now = now_ms()
local latest = tonumber(redis.call('ZREVRANGE', KEYS[3], 0, 0, 'WITHSCORES')[2])
if latest and latest > now then return {'kept', fmt(latest)} end
local since = tonumber(job[4]) or latest or now
if not job[4] then redis.call('HSET', KEYS[1], 'alone_since', fmt(since)) end
if since + job[3] > now then return {'kept', fmt(since + job[3])} end
"""
    + _END,
)

JOIN_READERS = Script(
    "join_readers",
    _READERS
    + """
-- KEYS job, readers; ARGV reader, lease_ms. Also renews.
local job = redis.call('HMGET', KEYS[1], 'status', 'grace_ms')
if not job[2] or (job[1] ~= 'queued' and job[1] ~= 'in_progress') then return 0 end
seat(KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2]))
return 1
""",
)

LEAVE_READERS = Script(
    "leave_readers",
    _READERS
    + """
-- KEYS job, readers; ARGV reader -> when the job ends unless somebody comes; '' when somebody is there or it is over.
local now = now_ms()
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', fmt(now))
local job = redis.call('HMGET', KEYS[1], 'status', 'grace_ms')
if not job[2] or (job[1] ~= 'queued' and job[1] ~= 'in_progress') then return '' end
if redis.call('ZCARD', KEYS[2]) > 0 then return '' end
redis.call('HSETNX', KEYS[1], 'alone_since', fmt(now))
return fmt(now + job[2])
""",
)

HAND_OVER = Script(
    "hand_over",
    """
-- KEYS job; ARGV attempt. An attempt given up on purpose does not count against the limit.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt')
if job[1] ~= 'in_progress' or job[2] ~= ARGV[1] then return 0 end
redis.call('HINCRBY', KEYS[1], 'handed_over', 1)
redis.call('HSET', KEYS[1], 'status', 'queued')
return 1
""",
)

JOIN = Script(
    "join",
    """
-- KEYS session; ARGV created at, job id, ttl_ms, jobs kept.
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -ARGV[4] - 1)
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
""",
)

assert FIELD == b"e", "the scripts above spell the field's name"
