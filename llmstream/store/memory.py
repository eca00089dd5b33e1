"""Jobs that are kept nowhere but in this process: durability ``memory``.

For their workers this takes the place of :class:`Jobs` and :class:`Log`: it keeps their records, and their logs are
channels that let nothing go. Nothing of such a job is ever sent to the store. No other replica knows it or takes it
over, and it is gone with the process.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec.structs import replace

from llmstream.errors import Conflict, Fenced, LLMStreamError, NotFound, Overloaded
from llmstream.store.channel import Channel
from llmstream.store.entry import Entry
from llmstream.store.jobs import Begun, Ended
from llmstream.store.log import Log
from llmstream.store.writer import Writer
from llmstream.types import BEGINNING, LOCAL, EventId, Finished, Job, JobState, Payload, Started, encode

_MARK = "~"
"""Stands in the ids of memory jobs, ``{replica's tag}~{id}``, and may not stand in a caller's own."""


def in_memory(job_id: str) -> bool:
    """Whether the id is that of a memory job, of whichever replica."""
    return _MARK in job_id


class AnswerTooLarge(LLMStreamError):
    status, code = 507, "answer_too_large"


class _Kept:
    """One job: its record, its log and its readers."""

    __slots__ = ("channel", "expires", "prompt_bytes", "readers", "size", "state", "unread")

    def __init__(self, job: Job, prompt_bytes: int) -> None:
        self.state = JobState(job)
        self.channel = Channel(job.id, whole=True)
        self.prompt_bytes = self.size = prompt_bytes
        self.readers = 0
        self.unread: asyncio.TimerHandle | None = None
        """Runs while the job has no reader but needs one."""
        self.expires = 0.0


class Memory:
    """The memory jobs of this replica. Together they hold no more than ``max_bytes``; those that ended give way."""

    def __init__(self, log: Log, *, max_bytes: int, max_answer_bytes: int, retention_s: float) -> None:
        self.on_unread: Callable[[str], None] | None = None
        """Gets the id of a job that nobody has read for as long as it allows."""
        self._log = log
        self._max_bytes = max_bytes
        self._max_answer_bytes = max_answer_bytes
        self._retention_s = retention_s
        self._tag = os.urandom(4).hex()
        self._kept: dict[str, _Kept] = {}
        self._ended: deque[_Kept] = deque()
        self._sessions: dict[tuple[str, str], str] = {}
        self._bytes = 0

    def name(self, job_id: str) -> str:
        """The id of a memory job of this replica."""
        return f"{self._tag}{_MARK}{job_id}"

    def create(self, job: Job) -> None:
        """Keeps a new job. Raises Overloaded when there is no room for it."""
        kept = _Kept(job, len(encode(job)))
        if not self._make_room(kept.size):
            raise Overloaded(
                f"The memory jobs of this replica take {self._bytes} bytes, and this one does not fit in any more "
                "(store.memory_bytes). Try again in a moment, or with durability 'full'.",
                retry_after=1.0,
            )
        self._bytes += kept.size
        self._kept[job.id] = kept
        if job.session_id is not None:
            self._sessions[job.principal, job.session_id] = job.id
        self._log.adopt(kept.channel)

    async def get(self, job_id: str) -> JobState:
        """The record of a job. Raises NotFound, or Conflict for another replica's."""
        return self._get(job_id).state

    def job(self, job_id: str) -> Job:
        """A job of this replica that waits or runs."""
        return self._kept[job_id].state.job

    async def find(self, job_id: str) -> JobState | None:
        kept = self._kept.get(job_id)
        return kept.state if kept is not None else None

    def latest(self, session_id: str, principal: str = LOCAL) -> JobState | None:
        """The latest memory job of a principal's session."""
        job_id = self._sessions.get((principal, session_id))
        return self._kept[job_id].state if job_id is not None else None

    async def begin(
        self, job_id: str, started: Started, _max_attempts: int, _claim: int
    ) -> Begun | Literal["done", "exhausted", "superseded"]:
        """Opens the next attempt. Its worker counts them: none is lost unseen, as in a crash."""
        kept = self._kept.get(job_id)
        if kept is None or kept.state.done:
            return "done"
        attempt, started_at = kept.state.attempt + 1, kept.state.started_at or started.at
        kept.state = replace(
            kept.state, status="in_progress", attempt=attempt, replica=started.replica, started_at=started_at
        )
        entry = Entry(EventId(attempt, 0), [started], 0)
        return Begun(kept.state.job, attempt, kept.channel.tip, entry, started_at, attempt, "", 0)

    async def end(self, job_id: str, finished: Finished) -> Ended:
        return self.stop(job_id, finished)

    def stop(self, job_id: str, finished: Finished) -> Ended:
        """Ends a job that may be waiting or running. Raises NotFound, or Conflict for another replica's."""
        kept = self._get(job_id)
        if kept.state.done:
            return Ended(kept.state.status, None, BEGINNING)
        self._close(kept, finished)
        entry = Entry(EventId(kept.state.attempt + 1, 0), [finished], 0)
        return Ended(finished.status, entry, kept.channel.tip)

    async def hand_over(self, job_id: str, attempt: int) -> None:
        """Nobody else can go on: whoever runs the job has to end it."""

    def writer(self, begun: Begun) -> MemoryWriter:
        """The writer of an attempt that has begun."""
        return MemoryWriter(self, self._kept[begun.job.id], begun)

    async def read(self, job_id: str, after: EventId) -> list[Entry]:
        return await self._log.read(job_id, after)

    recall = read

    def note_end(self, job_id: str, ended: Ended) -> None:
        self._log.note_end(job_id, ended)

    def expect(self, job_id: str, seconds: float) -> None:
        """Gives the first reader of a job time to come."""
        self._start_waiting(self._kept[job_id], seconds)

    def join(self, job_id: str) -> None:
        """Counts a reader from now on."""
        if (kept := self._kept.get(job_id)) is not None:
            kept.readers += 1
            _stop_waiting(kept)

    def leave(self, job_id: str) -> None:
        """Counts a reader no more."""
        if (kept := self._kept.get(job_id)) is not None:
            kept.readers -= 1
            if not kept.readers and not kept.state.done and kept.state.job.grace_s is not None:
                self._start_waiting(kept, kept.state.job.grace_s)

    def sweep(self) -> None:
        """Lets go of what has ended long enough ago."""
        now = asyncio.get_running_loop().time()
        while self._ended and self._ended[0].expires <= now:
            self._forget()

    def grow(self, kept: _Kept, size: int) -> AnswerTooLarge | None:
        """Takes ``size`` more bytes of an answer into account, or says why there is no room for them."""
        if kept.size - kept.prompt_bytes + size > self._max_answer_bytes:
            limit = f"is larger than {self._max_answer_bytes} bytes (store.memory_answer_bytes)"
        elif not self._make_room(size):
            limit = f"finds no room beside those of other memory jobs (store.memory_bytes: {self._max_bytes})"
        else:
            self._bytes += size
            kept.size += size
            return None
        return AnswerTooLarge(f"The answer {limit}; it was cut here. Ask again with durability 'full'.")

    def finish(self, kept: _Kept, finished: Finished) -> None:
        """Closes the record of a job that its writer ends. Raises Fenced when it was ended from outside."""
        if kept.state.done:
            raise Fenced(f"Job {kept.state.job.id} was ended from outside.")
        self._close(kept, finished)

    def _get(self, job_id: str) -> _Kept:
        kept = self._kept.get(job_id)
        if kept is not None:
            return kept
        if job_id.partition(_MARK)[0] != self._tag:
            raise Conflict(
                f"Job {job_id!r} has durability 'memory': it runs on another replica and keeps no log. Only the "
                "replica that accepted it can show or end it."
            )
        raise NotFound(
            f"There is no job {job_id!r} any more; memory jobs can be read for {self._retention_s:g} s after their end."
        )

    def _close(self, kept: _Kept, finished: Finished) -> None:
        kept.state = replace(
            kept.state,
            status=finished.status,
            finished_at=finished.at,
            failure=finished.failure,
            usage=finished.usage,
            reason=finished.reason,
        )
        _stop_waiting(kept)
        kept.expires = asyncio.get_running_loop().time() + self._retention_s
        self._ended.append(kept)

    def _make_room(self, size: int) -> bool:
        while self._ended and self._bytes + size > self._max_bytes:
            self._forget()
        return self._bytes + size <= self._max_bytes

    def _forget(self) -> None:
        """Lets go of the job that ended first."""
        kept = self._ended.popleft()
        job = kept.state.job
        del self._kept[job.id]
        if job.session_id is not None and self._sessions[job.principal, job.session_id] == job.id:
            del self._sessions[job.principal, job.session_id]
        self._bytes -= kept.size
        self._log.drop(kept.channel)

    def _start_waiting(self, kept: _Kept, seconds: float) -> None:
        kept.unread = asyncio.get_running_loop().call_later(seconds, self._tell, kept.state.job.id)

    def _tell(self, job_id: str) -> None:
        if self.on_unread is not None:
            self.on_unread(job_id)


def _stop_waiting(kept: _Kept) -> None:
    if kept.unread is not None:
        kept.unread.cancel()
        kept.unread = None


class MemoryWriter:
    """Takes the place of a Writer: what is appended in one turn of the event loop becomes visible in the next.

    An answer that outgrows its limits is lost: ``on_lost`` is called, and the job can only end as failed.
    """

    def __init__(self, memory: Memory, kept: _Kept, begun: Begun) -> None:
        self.lost: LLMStreamError | None = None
        self.on_lost: Callable[[LLMStreamError], None] | None = None
        self.channel = kept.channel
        self._memory = memory
        self._kept = kept
        self._pending: list[Payload] = []
        self._pending_bytes = 0
        kept.channel.publish(begun.entry, begun.previous)

    def append(self, payload: Payload, size: int) -> None:
        """Queues one event of about ``size`` bytes. Raises what made the writer lose the log."""
        self.extend((payload,), size)

    def extend(self, payloads: Sequence[Payload], size: int) -> bool:
        """Queues events, like :meth:`append`; nothing ever waits here for long, so there is always room for more."""
        if self.lost is not None:
            raise self.lost
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._publish)
        self._pending += payloads
        self._pending_bytes += size
        return True

    async def flush(self) -> None:
        """Shows everything appended so far."""
        self._publish()

    async def finish(self, finished: Finished) -> None:
        """Shows the terminal event and closes the job's record. Raises Fenced when the job was ended from outside."""
        self._publish()
        if self.lost is not None:
            finished = Finished(status="failed", at=finished.at, failure=self.lost.failure())
        self._memory.finish(self._kept, finished)
        self._show([finished])

    def close(self) -> None:
        """Gives the log up."""
        self.on_lost = None
        self._pending = []
        self.lost = self.lost or Fenced("The writer is closed.")

    def _publish(self) -> None:
        payloads, size = self._pending, self._pending_bytes
        self._pending, self._pending_bytes = [], 0
        if not payloads or self.lost is not None or self._kept.state.done:
            return
        self.lost = self._memory.grow(self._kept, size)
        if self.lost is None:
            self._show(payloads)
        elif self.on_lost is not None:
            self.on_lost(self.lost)

    def _show(self, payloads: list[Payload]) -> None:
        channel = self._kept.channel
        attempt, seq = channel.tip
        channel.publish(Entry(EventId(attempt, seq + len(payloads)), payloads, 0), channel.tip)


AnyWriter = Writer | MemoryWriter
