"""What must hold of the store's contents at the end of every schedule."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from llmstream.store.channel import Channel
from llmstream.store.entry import Entry, decode_entry, encode_payloads
from llmstream.store.keys import QUEUE_PARTS, Keys
from llmstream.types import BEGINNING, TERMINAL, Delta, Event, EventId, Finished, Job, Restart, Started
from tests.replica import MODEL, tokens
from tests.simulation.memory import Memory

LEFT_EMPTY = ("order", "ages", "meta", "claims", "deadlines", "scheduled", "paused", "hooked", "callers", "parked")
RECEIVER = "audit"
"""Is to hear of every job's end."""
"""Parts of a queue that hold nothing when every job has ended."""
KEYS = Keys("llmstream")
CLAIMS = KEYS.queue(MODEL)[QUEUE_PARTS.index("claims")].encode()


def record_of(memory: Memory, job_id: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = memory.data.get(KEYS.job(job_id).encode(), {})
    return found


@functools.cache
def _left_empty(pool: str) -> frozenset[bytes]:
    return frozenset(KEYS.queue(pool)[QUEUE_PARTS.index(part)].encode() for part in LEFT_EMPTY)


def queue_is_empty(memory: Memory, pool: str) -> bool:
    return memory.data.keys().isdisjoint(_left_empty(pool))


def _outbox(memory: Memory, pool: str) -> Collection[bytes]:
    found: Collection[bytes] = memory.data.get(KEYS.outbox(pool)[0].encode(), ())
    return found


def is_terminal(memory: Memory, job_id: str) -> bool:
    return record_of(memory, job_id).get(b"status", b"").decode() in TERMINAL


class Seen:
    """Everything that any process has shown to its readers."""

    def __init__(self, memory: Memory) -> None:
        self.faults: list[str] = []
        self.events: dict[str, dict[EventId, object]] = {}
        self._memory = memory
        self.crowds: list[str] = []
        """Moments at which more than one job ran."""

    def publish(self, channel: Channel, entry: Entry, previous: EventId) -> None:
        """Stands in for the channel's own method."""
        job_id, data = channel.job_id, encode_payloads([event.data for event in entry.events])
        if (KEYS.log(job_id).encode(), str(entry.last).encode(), data) not in self._memory.written:
            self.faults.append(f"job {job_id}: {entry.last} was seen before it was logged")
        running = self._memory.data.get(CLAIMS, {})
        if len(running) > 1:
            self.crowds.append(f"{len(running)} jobs ran at once")
        self.events.setdefault(job_id, {}).update((event.id, event.data) for event in entry.events)
        _publish(channel, entry, previous)


_publish = Channel.publish


class Limits(NamedTuple):
    """What a schedule gives reason for."""

    tries: int
    """Attempts that count, by the rules."""
    causes: int
    """Attempts that may be owed to the network or the store."""
    troubles: Mapping[str, int]
    """Troubles of each owner: each may cost those jobs an attempt that it had begun."""
    cancelled: Set[str]
    told: Mapping[str, str]
    """How jobs have ended, as a client was told."""
    forgets: bool
    """Whether the store came back without its last moments while somebody who knew them was away."""
    who: str | None = None
    """Whose jobs they are, where only one of theirs may run at once and their tokens are counted. A store that forgets
    what was taken counts less."""


def broken(memory: Memory, seen: Seen, jobs: Sequence[Job], pool: str, limits: Limits) -> Iterator[str]:
    """Says in words what does not hold."""
    if not limits.forgets:
        yield from seen.faults
    for key in memory.data:
        if key not in memory.expires:
            yield f"{key!r} has no time to live"
    for key in memory.data.keys() & _left_empty(pool):
        yield f"{key.decode()} still holds {memory.data[key]}"
    if limits.who is not None:
        yield from seen.crowds
        for job in jobs:
            if (note := memory.data.get(KEYS.noted(limits.who, job.id).encode())) != b"settled":
                yield f"job {job.id}: what it used is not counted: {note!r}"
    for job in jobs:
        for fault in _broken_job(memory, job, seen.events.get(job.id, {}), limits):
            yield f"job {job.id}: {fault}"


def _broken_job(memory: Memory, job: Job, seen: Mapping[EventId, object], limits: Limits) -> Iterator[str]:
    record = record_of(memory, job.id)
    status = record.get(b"status", b"nothing on record").decode()
    entries = [
        decode_entry(b"%d-%d" % entry_id, fields) for entry_id, fields in memory.data.get(KEYS.log(job.id).encode(), [])
    ]
    events = [event for entry in entries for event in entry.events]
    yield from _gaps(entries, limits)
    if not limits.forgets:
        logged = {event.id: event.data for event in events}
        yield from (
            f"{event_id} was seen and is not in the log" for event_id in seen if seen[event_id] != logged.get(event_id)
        )
    ends = [event.data for event in events if isinstance(event.data, Finished)]
    if status not in TERMINAL:
        yield f"it is {status} in the end"
        return
    if len(ends) != 1 or not isinstance(events[-1].data, Finished):
        yield f"{len(ends)} terminal events, the last event is {events[-1:]}"
    elif ends[0].status != status:
        yield f"its log says {ends[0].status}, its record {status}"
    if status == "cancelled" and job.id not in limits.cancelled:
        yield "nobody cancelled it"
    if not limits.forgets and f"{job.id}|{RECEIVER}".encode() not in _outbox(memory, job.pool):
        yield "nobody is told of its end"
    yield from _wrong_words(job, events, status, limits)
    if not limits.forgets and limits.told.get(job.id, status) != status:
        yield f"somebody was told that it is {limits.told[job.id]}, but it is {status}"
    yield from _needless_attempts(job, events, int(record.get(b"handed_over", b"0")), limits)


def _needless_attempts(job: Job, events: Sequence[Event], handed_over: int, limits: Limits) -> Iterator[str]:
    started = [event.data for event in events if isinstance(event.data, Started)]
    if len(started) - handed_over > limits.tries:
        yield f"{len(started) - handed_over} tries"
    owners = {begun.replica for begun in started}
    explained = 1 + limits.causes + sum(limits.troubles[owner] for owner in owners)
    explained += len(owners) * job.request.body["echo"].get("attempts", 0)
    if len(started) > explained:
        yield f"{len(started)} attempts although nothing happened that explains more than {explained}"
    if len({(begun.replica, begun.at) for begun in started}) < len(started):
        yield "an attempt whose answer was lost was begun twice"


def _wrong_words(job: Job, events: Sequence[Event], status: str, limits: Limits) -> Iterator[str]:
    whole = tokens(job.request.body["echo"]["tokens"])
    restarts = [event.id for event in events if isinstance(event.data, Restart)]
    if restarts and not limits.forgets:
        yield "it started over"
    start = max(restarts, default=BEGINNING)
    said = "".join(event.data.text for event in events if isinstance(event.data, Delta) and event.id > start)
    if status == "completed" and said != whole:
        yield f"it says {said!r} in place of {whole!r}"
    if not whole.startswith(said):
        yield f"{said!r} is no beginning of {whole!r}"


def _gaps(entries: Sequence[Entry], limits: Limits) -> Iterator[str]:
    """Every attempt counts from 0 without a gap and begins after the one before. Only what starts over may stand
    behind something forgotten."""
    last = EventId(0, 0)
    for entry in entries:
        expected = EventId(last.attempt, last.seq + 1)
        starts_over = limits.forgets and isinstance(entry.events[0].data, Restart)
        if entry.first != expected and entry.first != (last.attempt + 1, 0) and not starts_over:
            yield f"{entry.first} follows {last}"
        last = entry.last
