"""The record of each job, and the steps that change it: create, begin, finish, end. Each step is one atomic script."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from llmstream.errors import NotFound
from llmstream.store.entry import FIELD, Entry, encode_payloads
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Pipeline, Script
from llmstream.types import TERMINAL, EventId, Failure, Finished, Job, JobState, Started, Usage

_CREATE = Script(
    "create",
    """
-- KEYS job; ARGV spec, ttl_ms. 1: created, or created before with the very same spec; 0: the id is taken.
local spec = redis.call('HGET', KEYS[1], 'spec')
if spec then return spec == ARGV[1] and 1 or 0 end
redis.call('HSET', KEYS[1], 'spec', ARGV[1], 'status', 'queued', 'attempt', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
""",
)

_BEGIN = Script(
    "begin",
    """
-- KEYS job, log; ARGV replica, at, max_attempts, entry, ttl_ms.
-- Opens the next attempt; from here on the log refuses every older one.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'spec', 'started_at', 'handed_over')
if not job[1] then return {'gone'} end
if job[1] ~= 'queued' and job[1] ~= 'in_progress' then return {'done'} end
local attempt = tonumber(job[2]) + 1
if attempt - tonumber(job[5] or 0) > tonumber(ARGV[3]) then return {'exhausted'} end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
redis.call('XADD', KEYS[2], attempt .. '-0', 'e', ARGV[4])
redis.call('HSET', KEYS[1], 'status', 'in_progress', 'attempt', attempt, 'replica', ARGV[1])
if not job[4] then redis.call('HSET', KEYS[1], 'started_at', ARGV[2]) end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return {'begun', job[3], attempt, last[1] and last[1][1] or '0-0', job[4] or ARGV[2]}
""",
)

_FINISH = Script(
    "finish",
    """
-- KEYS job, log; ARGV attempt, entry id, entry, status, outcome, ttl_ms.
-- Terminal event, status and expiry in one step, for the attempt that still owns the log.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt')
if not job[1] then return 'gone' end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local last_id = last[1] and last[1][1] or '0-0'
if job[1] ~= 'in_progress' then return last_id == ARGV[2] and job[1] == ARGV[4] and 'ok' or 'fenced' end
if job[2] ~= ARGV[1] then return 'fenced' end
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

_END = Script(
    "end",
    """
-- KEYS job, log; ARGV status, entry, outcome, ttl_ms, channel, job id.
-- Ends a job from outside: takes the next attempt, whose only event is the terminal one, so the owner is fenced.
local job = redis.call('HMGET', KEYS[1], 'status', 'attempt')
if not job[1] then return {'gone'} end
if job[1] ~= 'queued' and job[1] ~= 'in_progress' then return {'done', job[1]} end
local attempt = tonumber(job[2]) + 1
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
redis.call('XADD', KEYS[2], attempt .. '-0', 'e', ARGV[2])
redis.call('HSET', KEYS[1], 'status', ARGV[1], 'outcome', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
redis.call('PUBLISH', ARGV[5], ARGV[6])
return {'ended', ARGV[1], attempt, last[1] and last[1][1] or '0-0'}
""",
)

_HAND_OVER = Script(
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

_SESSION_JOBS = 100


class _Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    finished_at: float
    failure: Failure | None = None
    usage: Usage | None = None
    reason: str | None = None


class Begun(NamedTuple):
    """The right to write attempt ``attempt`` of a job."""

    job: Job
    attempt: int
    previous: EventId
    """Where the log ended before this attempt."""
    entry: Entry
    """The first entry of the attempt, already logged."""
    started_at: float
    """When the first attempt began, in seconds since the epoch."""


class Ended(NamedTuple):
    """What became of an attempt to end a job from outside."""

    status: str
    """The job's terminal status, whoever set it."""
    entry: Entry | None
    """The terminal entry, when this call wrote it."""
    previous: EventId


_spec_decoder = msgspec.json.Decoder(Job)
_outcome_decoder = msgspec.json.Decoder(_Outcome)


class Jobs:
    """Job records in the store."""

    def __init__(self, pipeline: Pipeline, keys: Keys, *, retention_s: float, unfinished_retention_s: float) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._retention_ms = int(retention_s * 1000)
        self._unfinished_ms = int(unfinished_retention_s * 1000)

    async def create(self, job: Job) -> bool:
        """Writes a new record; repeating it changes nothing. False when the id belongs to a different job."""
        created = await self._pipeline.run(
            _CREATE, [self._keys.job(job.id)], msgspec.json.encode(job), self._unfinished_ms
        )
        return bool(created)

    async def discard(self, job_id: str) -> None:
        """Removes a job that was not accepted after all."""
        await self._pipeline.call("DEL", self._keys.job(job_id), self._keys.log(job_id))

    async def get(self, job_id: str) -> JobState:
        """Reads the record. Raises NotFound for an unknown or expired id."""
        state = await self.find(job_id)
        if state is None:
            raise NotFound(f"There is no job {job_id!r}; it never existed or its retention time is over.")
        return state

    async def find(self, job_id: str) -> JobState | None:
        """Reads the record; None when there is none."""
        fields = await self._pipeline.call("HGETALL", self._keys.job(job_id))
        return _state(fields) if fields else None

    async def find_all(self, job_ids: list[str]) -> list[JobState]:
        """Reads several records in one round trip; unknown ids are left out."""
        calls = [self._pipeline.call("HGETALL", self._keys.job(job_id)) for job_id in job_ids]
        return [_state(fields) for call in calls if (fields := await call)]

    async def begin(self, job_id: str, started: Started, max_attempts: int) -> Begun | Literal["done", "exhausted"]:
        """Opens the next attempt: fences every older one by logging ``{attempt}-0``.

        Returns ``done`` when the job needs no more work (finished, cancelled, expired) and ``exhausted`` when it has
        had all its attempts.
        """
        data = encode_payloads([started])
        reply = await self._pipeline.run(
            _BEGIN,
            [self._keys.job(job_id), self._keys.log(job_id)],
            started.replica,
            repr(started.at),
            max_attempts,
            data,
            self._unfinished_ms,
        )
        if reply[0] != b"begun":
            return "exhausted" if reply[0] == b"exhausted" else "done"
        _, spec, attempt, previous, started_at = reply
        entry = Entry(EventId(attempt, 0), [started], len(data))
        return Begun(_spec_decoder.decode(spec), attempt, EventId.parse(previous), entry, float(started_at))

    async def finish(self, job_id: str, attempt: int, entry: Entry, data: bytes) -> bool:
        """Logs the attempt's last entry and closes the record. False when the attempt was superseded.

        Repeating a call whose answer was lost is accepted as done.
        """
        finished = entry.events[-1].data
        assert isinstance(finished, Finished)
        reply = await self._pipeline.run(
            _FINISH,
            [self._keys.job(job_id), self._keys.log(job_id)],
            attempt,
            str(entry.last),
            data,
            finished.status,
            _encode_outcome(finished),
            self._retention_ms,
        )
        return bool(reply == b"ok")

    async def hand_over(self, job_id: str, attempt: int) -> None:
        """Marks an attempt as given up on purpose, so that another replica goes on at no cost."""
        await self._pipeline.run(_HAND_OVER, [self._keys.job(job_id)], attempt)

    async def end(self, job_id: str, finished: Finished) -> Ended:
        """Ends a job that may be waiting or running anywhere. Raises NotFound for an unknown id."""
        data = encode_payloads([finished])
        reply = await self._pipeline.run(
            _END,
            [self._keys.job(job_id), self._keys.log(job_id)],
            finished.status,
            data,
            _encode_outcome(finished),
            self._retention_ms,
            self._keys.cancel,
            job_id,
        )
        if reply[0] == b"gone":
            raise NotFound(f"There is no job {job_id!r}; it never existed or its retention time is over.")
        if reply[0] == b"done":
            return Ended(reply[1].decode(), None, EventId(0, 0))
        entry = Entry(EventId(reply[2], 0), [finished], len(data))
        return Ended(finished.status, entry, EventId.parse(reply[3]))

    async def join_session(self, session_id: str, job: Job) -> None:
        """Notes a job as the latest of a session; a session remembers its last 100 jobs."""
        key = self._keys.session(session_id)
        calls = [
            self._pipeline.call("ZADD", key, repr(job.created_at), job.id),
            self._pipeline.call("ZREMRANGEBYRANK", key, 0, -_SESSION_JOBS - 1),
            self._pipeline.call("PEXPIRE", key, self._unfinished_ms),
        ]
        for call in calls:
            await call

    async def session_jobs(self, session_id: str) -> list[str]:
        """Ids of the jobs of a session, latest first; empty for an unknown session."""
        found = await self._pipeline.call("ZRANGE", self._keys.session(session_id), 0, -1, "REV")
        return [raw.decode() for raw in found]


def _encode_outcome(finished: Finished) -> bytes:
    return msgspec.json.encode(
        _Outcome(finished_at=finished.at, failure=finished.failure, usage=finished.usage, reason=finished.reason)
    )


def _state(flat: list[bytes]) -> JobState:
    fields: dict[bytes, Any] = dict(zip(flat[::2], flat[1::2], strict=True))
    outcome = _outcome_decoder.decode(fields[b"outcome"]) if b"outcome" in fields else None
    status = fields[b"status"].decode()
    started = fields.get(b"started_at")
    replica = fields.get(b"replica")
    return JobState(
        job=_spec_decoder.decode(fields[b"spec"]),
        status=status,
        attempt=int(fields[b"attempt"]),
        replica=replica.decode() if replica else None,
        started_at=float(started) if started else None,
        finished_at=outcome.finished_at if outcome and status in TERMINAL else None,
        failure=outcome.failure if outcome else None,
        usage=outcome.usage if outcome else None,
        reason=outcome.reason if outcome else None,
    )


assert FIELD == b"e", "the scripts above spell the field's name"
