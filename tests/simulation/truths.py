"""What must hold of the store's contents at the end of every schedule."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

from llmstream.store.entry import Entry, decode_entry
from llmstream.store.keys import QUEUE_PARTS, Keys
from llmstream.types import TERMINAL, Delta, Event, EventId, Finished, Job, Restart, Started
from tests.replica import tokens
from tests.simulation.memory import Memory

LEFT_EMPTY = ("order", "ages", "meta", "claims", "deadlines")
"""Parts of a queue that hold nothing when every job has ended."""
KEYS = Keys("llmstream")


def record_of(memory: Memory, job_id: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = memory.data.get(KEYS.job(job_id).encode(), {})
    return found


@functools.cache
def _left_empty(pool: str) -> frozenset[bytes]:
    return frozenset(KEYS.queue(pool)[QUEUE_PARTS.index(part)].encode() for part in LEFT_EMPTY)


def queue_is_empty(memory: Memory, pool: str) -> bool:
    return memory.data.keys().isdisjoint(_left_empty(pool))


def is_terminal(memory: Memory, job_id: str) -> bool:
    return record_of(memory, job_id).get(b"status", b"").decode() in TERMINAL


class Limits(NamedTuple):
    """What a schedule gives reason for."""

    tries: int
    """Attempts that count, by the rules."""
    attempts: int
    """Attempts of all kinds that the troubles of the schedule explain."""
    cancelled: Set[str]


def broken(memory: Memory, jobs: Sequence[Job], pool: str, limits: Limits) -> Iterator[str]:
    """Says in words what does not hold."""
    for key in memory.data:
        if key not in memory.expires:
            yield f"{key!r} has no time to live"
    for key in memory.data.keys() & _left_empty(pool):
        yield f"{key.decode()} still holds {memory.data[key]}"
    for job in jobs:
        for fault in _broken_job(memory, job, limits):
            yield f"job {job.id}: {fault}"


def _broken_job(memory: Memory, job: Job, limits: Limits) -> Iterator[str]:
    record = record_of(memory, job.id)
    status = record.get(b"status", b"nothing on record").decode()
    entries = [
        decode_entry(b"%d-%d" % entry_id, fields) for entry_id, fields in memory.data.get(KEYS.log(job.id).encode(), [])
    ]
    events = [event for entry in entries for event in entry.events]
    yield from _gaps(entries)
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
    yield from _wrong_words(job, events, status)
    yield from _needless_attempts(events, int(record.get(b"handed_over", b"0")), limits)


def _needless_attempts(events: Sequence[Event], handed_over: int, limits: Limits) -> Iterator[str]:
    started = [event.data for event in events if isinstance(event.data, Started)]
    if len(started) - handed_over > limits.tries:
        yield f"{len(started) - handed_over} tries"
    if len(started) > limits.attempts:
        yield f"{len(started)} attempts although nothing happened that explains so many"
    if len({(begun.replica, begun.at) for begun in started}) < len(started):
        yield "an attempt whose answer was lost was begun twice"


def _wrong_words(job: Job, events: Sequence[Event], status: str) -> Iterator[str]:
    whole = tokens(job.request.body["echo"]["tokens"])
    said = "".join(event.data.text for event in events if isinstance(event.data, Delta))
    if any(isinstance(event.data, Restart) for event in events):
        yield "it started over"
    if status == "completed" and said != whole:
        yield f"it says {said!r} in place of {whole!r}"
    if not whole.startswith(said):
        yield f"{said!r} is no beginning of {whole!r}"


def _gaps(entries: Sequence[Entry]) -> Iterator[str]:
    """Every attempt counts from 0 without a gap and begins after the one before."""
    last = EventId(0, 0)
    for entry in entries:
        expected = EventId(last.attempt, last.seq + 1)
        if entry.first != expected and (entry.first != (last.attempt + 1, 0)):
            yield f"{entry.first} follows {last}"
        last = entry.last
