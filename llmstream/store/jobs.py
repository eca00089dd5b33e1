"""The record of each job, and the steps that change it: create, begin, finish, end."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Literal, NamedTuple

import msgspec

from llmstream.errors import NotFound, StoreError, StoreUnavailable
from llmstream.store.entry import Entry, encode_payloads
from llmstream.store.job_scripts import ABANDON, BEGIN, CREATE, DISCARD, END, FINISH, HAND_OVER, JOIN
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Arg, Pipeline, Script
from llmstream.store.readers import NOBODY, Lease
from llmstream.types import TERMINAL, EventId, Failure, Finished, Job, JobState, Started, Usage

_SESSION_JOBS = 100
RETRY_S = 0.1


class _Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    finished_at: float
    failure: Failure | None = None
    usage: Usage | None = None
    reason: str | None = None


class Created(NamedTuple):
    """A job on record."""

    job: Job
    """As it was first accepted, which may have been earlier and elsewhere."""
    status: str


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
    tries: int
    """Attempts that count against the limit, this one included: all but those handed over."""


class Kept(NamedTuple):
    """A job that goes on, for it has readers or may still get some."""

    until_ms: int
    """When to look again."""


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

    def __init__(
        self, pipeline: Pipeline, keys: Keys, *, retention_s: float, unfinished_retention_s: float, outage_s: float
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._outage_s = outage_s
        self._retention_ms = int(retention_s * 1000)
        self._unfinished_ms = int(unfinished_retention_s * 1000)

    async def create(self, job: Job, lease: Lease | None = None) -> Created | None:
        """Writes a new record, or finds that of the same request: equal fingerprints under one id.

        ``lease`` is that of the first reader, for jobs that end without. None when the id belongs to a different
        request.
        """
        reader, seconds = lease or Lease(NOBODY, 0.0)
        reply = await self._pipeline.run(
            CREATE,
            [self._keys.job(job.id), self._keys.readers(job.id)],
            msgspec.json.encode(job),
            self._unfinished_ms,
            job.fingerprint or "",
            "" if job.grace_s is None else int(job.grace_s * 1000),
            reader,
            int(seconds * 1000),
        )
        if reply[0] == b"taken":
            return None
        return Created(_spec_decoder.decode(reply[1]), reply[2].decode())

    async def discard(self, job_id: str) -> None:
        """Takes back a creation that was not accepted after all. The record stays while another submission of the
        same request may have been accepted."""
        await self._pipeline.run(DISCARD, self._all(job_id))

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
        found = await asyncio.gather(*(self._pipeline.call("HGETALL", self._keys.job(job_id)) for job_id in job_ids))
        return [_state(fields) for fields in found if fields]

    async def begin(self, job_id: str, started: Started, max_attempts: int) -> Begun | Literal["done", "exhausted"]:
        """Opens the next attempt: fences every older one by logging ``{attempt}-0``.

        Returns ``done`` when the job needs no more work (finished, cancelled, expired) and ``exhausted`` when it has
        had all its attempts. While the store is away it is asked again; a lost answer costs no attempt.
        """
        data = encode_payloads([started])
        reply = await self._insist(
            BEGIN,
            [self._keys.job(job_id), self._keys.log(job_id)],
            started.replica,
            repr(started.at),
            max_attempts,
            data,
            self._unfinished_ms,
            os.urandom(8).hex(),
        )
        if reply[0] != b"begun":
            return "exhausted" if reply[0] == b"exhausted" else "done"
        _, spec, attempt, previous, started_at, tries = reply
        entry = Entry(EventId(attempt, 0), [started], len(data))
        return Begun(_spec_decoder.decode(spec), attempt, EventId.parse(previous), entry, float(started_at), tries)

    async def finish(self, job_id: str, attempt: int, entry: Entry, data: bytes) -> bool:
        """Logs the attempt's last entry and closes the record. False when the attempt was superseded.

        While the store is away it is asked again; repeating a call whose answer was lost is accepted as done.
        """
        finished = entry.events[-1].data
        assert isinstance(finished, Finished)
        reply = await self._insist(
            FINISH,
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
        await self._pipeline.run(HAND_OVER, [self._keys.job(job_id)], attempt)

    async def end(self, job_id: str, finished: Finished) -> Ended:
        """Ends a job that may be waiting or running anywhere. Raises NotFound for an unknown id."""
        data = encode_payloads([finished])
        reply = await self._pipeline.run(END, self._all(job_id), *self._ending(job_id, finished, data))
        if reply[0] == b"gone":
            raise NotFound(f"There is no job {job_id!r}; it never existed or its retention time is over.")
        return _ended(reply, finished, data)

    async def abandon(self, job_id: str, finished: Finished) -> Ended | Kept | None:
        """Ends a job that nobody has read for as long as it allows; None for an unknown id."""
        data = encode_payloads([finished])
        reply = await self._pipeline.run(ABANDON, self._all(job_id), *self._ending(job_id, finished, data))
        if reply[0] == b"gone":
            return None
        return Kept(int(reply[1])) if reply[0] == b"kept" else _ended(reply, finished, data)

    async def join_session(self, session_id: str, job: Job) -> None:
        """Notes a job as the latest of a session; a session remembers its last 100 jobs."""
        key = self._keys.session(session_id)
        await self._pipeline.run(JOIN, [key], repr(job.created_at), job.id, self._unfinished_ms, _SESSION_JOBS)

    async def session_jobs(self, session_id: str) -> list[str]:
        """Ids of the jobs of a session, latest first; empty for an unknown session."""
        found = await self._pipeline.call("ZRANGE", self._keys.session(session_id), 0, -1, "REV")
        return [raw.decode() for raw in found]

    def _all(self, job_id: str) -> list[str]:
        return [self._keys.job(job_id), self._keys.log(job_id), self._keys.readers(job_id)]

    def _ending(self, job_id: str, finished: Finished, data: bytes) -> list[Arg]:
        outcome = _encode_outcome(finished)
        return [finished.status, data, outcome, self._retention_ms, self._keys.cancel, job_id]

    async def _insist(self, script: Script, keys: list[str], *args: Arg) -> Any:
        """Runs a step that may be repeated, again and again while the store is away, for up to ``outage_s``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._outage_s
        while True:
            try:
                return await self._pipeline.run(script, keys, *args)
            except StoreUnavailable as error:
                if isinstance(error, StoreError) or loop.time() >= deadline:
                    raise
            await asyncio.sleep(RETRY_S)


def _ended(reply: list[Any], finished: Finished, data: bytes) -> Ended:
    if reply[0] == b"done":
        return Ended(reply[1].decode(), None, EventId(0, 0))
    entry = Entry(EventId(reply[2], 0), [finished], len(data))
    return Ended(finished.status, entry, EventId.parse(reply[3]))


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
