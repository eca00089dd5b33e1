"""The record of each job, and the steps that change it: create, begin, finish, end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import Any, Literal, NamedTuple

import msgspec

from llmstream.errors import NotFound, StoreUnavailable
from llmstream.store.connection import Arg
from llmstream.store.entry import Entry, encode_payloads
from llmstream.store.insisting import insist
from llmstream.store.job_scripts import ABANDON, BEGIN, CREATE, DISCARD, END, FINISH, HAND_OVER, JOIN, RESTORE
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Command, Script, Sender
from llmstream.store.presence import Presence
from llmstream.store.readers import NOBODY, Lease
from llmstream.store.recent import Recent, Trail
from llmstream.types import LOCAL, TERMINAL, EventId, Failure, Finished, Job, JobState, Started, Usage

_SESSION_JOBS = 100


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
    size: int
    """Bytes of the record, about."""


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
    token: str
    """Tells this execution from another one under the same number."""
    life: int
    """The server's life, as of before it was asked."""

    def trail(self) -> Trail:
        """What it takes to write the attempt's record again."""
        (started,) = self.entry.payloads
        assert isinstance(started, Started)
        return Trail(self.job, self.attempt, started.replica, self.started_at, self.token)


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


_NOT_BEGUN: dict[bytes, Literal["done", "exhausted", "superseded"]] = {
    b"gone": "done",
    b"done": "done",
    b"exhausted": "exhausted",
    b"superseded": "superseded",
}
_FINISHES: dict[bytes, Literal["ok", "fenced", "behind"]] = {b"ok": "ok", b"fenced": "fenced", b"behind": "behind"}
_spec_decoder = msgspec.json.Decoder(Job)
_outcome_decoder = msgspec.json.Decoder(_Outcome)


class Jobs:
    """Job records in the store."""

    def __init__(
        self,
        pipeline: Sender,
        synced: Sender,
        keys: Keys,
        presence: Presence,
        recent: Recent,
        *,
        retention_s: float,
        unfinished_retention_s: float,
        outage_s: float,
    ) -> None:
        self._pipeline = pipeline
        self._synced = synced
        self._keys = keys
        self._presence = presence
        self._recent = recent
        self._outage_s = outage_s
        self._retention_ms = int(retention_s * 1000)
        self._unfinished_ms = int(unfinished_retention_s * 1000)

    async def create(self, job: Job, lease: Lease | None = None) -> Created | None:
        """Writes a new record, or finds that of the same request: equal fingerprints under one id.

        ``lease`` is that of the first reader, for jobs that end without. None when the id belongs to a different
        request.
        """
        reader, seconds = lease or Lease(NOBODY, 0.0)
        sender = self._synced if job.durability == "fsync" else self._pipeline
        reply = await sender.run(
            CREATE,
            [self._keys.job(job.id), self._keys.readers(job.id)],
            *self._record(job),
            reader,
            int(seconds * 1000),
        )
        if reply[0] == b"taken":
            return None
        known = job if reply[0] == b"created" else _spec_decoder.decode(reply[1])
        return Created(known, reply[2].decode(), len(reply[1]))

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
        if not fields:
            self._doubt(job_id)
        return _state(fields) if fields else None

    def _doubt(self, job_id: str) -> None:
        """Raises StoreUnavailable while a missing record may only not be back yet."""
        if self._presence.recovering:
            raise StoreUnavailable(f"The store has just come back; job {job_id!r} may follow.", retry_after=1)

    async def find_all(self, job_ids: list[str]) -> list[JobState]:
        """Reads several records in one round trip; unknown ids are left out."""
        found = await asyncio.gather(*(self._pipeline.call("HGETALL", self._keys.job(job_id)) for job_id in job_ids))
        return [_state(fields) for fields in found if fields]

    async def statuses(self, job_ids: list[str]) -> list[str | None]:
        """The status of each of several jobs; None for one that has no record."""
        asked = (self._pipeline.call("HGET", self._keys.job(job_id), "status") for job_id in job_ids)
        return [raw.decode() if raw is not None else None for raw in await asyncio.gather(*asked)]

    async def begin(
        self, job_id: str, started: Started, max_attempts: int, claim: int
    ) -> Begun | Literal["done", "exhausted", "superseded"]:
        """Opens the next attempt: fences every older one by logging ``{attempt}-0``.

        Returns ``done`` when the job needs no more work (finished, cancelled, expired), ``exhausted`` when it has had
        all its attempts, and ``superseded`` when it was begun under a later claim than number ``claim``, or this
        attempt had begun, but by the time the answer came another one had too. While the store is away it is asked
        again; a lost answer costs no attempt.
        """
        data, token = encode_payloads([started]), os.urandom(8).hex()
        keys = [self._keys.job(job_id), self._keys.log(job_id)]
        life = self._presence.life
        step = (started.replica, repr(started.at), max_attempts, data, self._unfinished_ms, token, claim)
        reply = await self._insist(BEGIN, keys, *step, settled=True)
        if reply[0] != b"begun":
            return _NOT_BEGUN[reply[0]]
        _, spec, attempt, previous, started_at, tries = reply
        entry = Entry(EventId(attempt, 0), [started], len(data))
        job = _spec_decoder.decode(spec)
        return Begun(job, attempt, EventId.parse(previous), entry, float(started_at), tries, token, life)

    def restoration(self, trail: Trail) -> Command:
        """The step that writes again what the store has lost of an attempt; repeating it changes nothing.

        Its reply: ``ok``, ``fenced`` when the job moved on, ``hole`` when more was lost than is kept.
        """
        job, kept, keys = trail.job, trail.entries, self._all(trail.job.id)
        record: list[Arg] = [*self._record(job), trail.attempt, trail.replica, repr(trail.started_at), trail.token]
        first = kept[0].previous if kept else trail.logged
        entries = [part for entry in kept for part in (str(entry.last), entry.data)]
        over = int(trail.over_a_hole)
        return ("EVAL", RESTORE.source, len(keys), *keys, *record, over, str(first), *entries)

    async def finish(
        self, sender: Sender, job_id: str, attempt: int, entry: Entry, data: bytes, previous: EventId
    ) -> Literal["ok", "fenced", "behind"]:
        """Logs the attempt's last entry through ``sender``, right after ``previous``, and closes the record.

        ``fenced`` when the attempt was superseded, ``behind`` when the log does not end at ``previous``. While the
        store is away it is asked again; repeating a call whose answer was lost is accepted as done.
        """
        finished = entry.payloads[-1]
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
            str(previous),
            sender=sender,
        )
        return _FINISHES[reply]

    async def hand_over(self, job_id: str, attempt: int) -> None:
        """Marks an attempt as given up on purpose, so that another replica goes on at no cost."""
        await self._pipeline.run(HAND_OVER, [self._keys.job(job_id)], attempt)

    async def end(self, job_id: str, finished: Finished) -> Ended:
        """Ends a job that may be waiting or running anywhere. Raises NotFound for an unknown id."""
        await self._presence.recovered()  # what is about to be written again comes first
        data = encode_payloads([finished])
        reply = await self._pipeline.run(END, self._all(job_id), *self._ending(job_id, finished, data))
        if reply[0] == b"gone":
            raise NotFound(f"There is no job {job_id!r}; it never existed or its retention time is over.")
        return self._ended(job_id, reply, finished, data)

    async def _end_again(self, job_id: str, finished: Finished, previous: EventId) -> None:
        """For a store that may have forgotten it. While it may get back what stood before, that is waited for."""
        ending: list[Arg] = self._ending(job_id, finished, encode_payloads([finished]))
        if self._presence.recovering:
            ending.append(str(previous))
        reply = await self._pipeline.run(END, self._all(job_id), *ending)
        if reply[0] in (b"gone", b"behind") and self._presence.recovering:
            raise StoreUnavailable("What stands before the end is not back yet.")

    async def abandon(self, job_id: str, finished: Finished) -> Ended | Kept | None:
        """Ends a job that nobody has read for as long as it allows; None for an unknown id."""
        await self._presence.recovered()
        data = encode_payloads([finished])
        reply = await self._pipeline.run(ABANDON, self._all(job_id), *self._ending(job_id, finished, data))
        if reply[0] == b"gone":
            return None
        return Kept(int(reply[1])) if reply[0] == b"kept" else self._ended(job_id, reply, finished, data)

    def _ended(self, job_id: str, reply: list[Any], finished: Finished, data: bytes) -> Ended:
        if reply[0] == b"done":
            return Ended(reply[1].decode(), None, EventId(0, 0))
        entry, previous = Entry(EventId(reply[2], 0), [finished], len(data)), EventId.parse(reply[3])
        self._recent.remember(lambda: self._end_again(job_id, finished, previous), len(data))
        return Ended(finished.status, entry, previous)

    async def join_session(self, session_id: str, job: Job) -> None:
        """Notes a job as the latest of a session; a session remembers its last 100 jobs."""
        key = self._keys.session(session_id, job.principal)
        ttl_ms = self._unfinished_ms + int(job.delay_s * 1000)
        await self._pipeline.run(JOIN, [key], repr(job.created_at), job.id, ttl_ms, _SESSION_JOBS)

    async def session_jobs(self, session_id: str, principal: str = LOCAL) -> list[str]:
        """Ids of the jobs of a principal's session, latest first; empty for an unknown session."""
        found = await self._pipeline.call("ZRANGE", self._keys.session(session_id, principal), 0, -1, "REV")
        return [raw.decode() for raw in found]

    def _all(self, job_id: str) -> list[str]:
        return [self._keys.job(job_id), self._keys.log(job_id), self._keys.readers(job_id)]

    def _record(self, job: Job) -> list[Arg]:
        grace_ms = "" if job.grace_s is None else int(job.grace_s * 1000)
        ttl_ms = self._unfinished_ms + int(job.delay_s * 1000)
        return [msgspec.json.encode(job), ttl_ms, job.fingerprint or "", grace_ms]

    def _ending(self, job_id: str, finished: Finished, data: bytes) -> list[Arg]:
        outcome = _encode_outcome(finished)
        return [finished.status, data, outcome, self._retention_ms, self._keys.cancel, job_id]

    def _insist(
        self, script: Script, keys: list[str], *args: Arg, sender: Sender | None = None, settled: bool = False
    ) -> Awaitable[Any]:
        """Runs a step that may be repeated, again and again while the store is away, for up to ``outage_s``.

        A ``settled`` one waits until nothing is missing any more that may still be written again.
        """
        sender = sender or self._pipeline

        async def run_settled() -> Any:
            await self._presence.recovered()
            return await sender.run(script, keys, *args)

        return insist(run_settled if settled else lambda: sender.run(script, keys, *args), self._outage_s)


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
