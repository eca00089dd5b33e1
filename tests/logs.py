"""Jobs and their logs, as tests write and read them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llmstream.store.entry import Entry
from llmstream.store.follower import Follower
from llmstream.store.jobs import Begun
from llmstream.store.memory import AnyWriter
from llmstream.store.store import Store
from llmstream.store.writer import Writer
from llmstream.types import Delta, Event, Finished, GenerateRequest, Job, Started, new_id

REQUEST = GenerateRequest.of(kind="chat", model="echo", body={})


async def new_job(store: Store, **fields: object) -> Job:
    """A job on record that nobody runs."""
    job = Job(id=new_id(), request=REQUEST, pool="p", created_at=time.time(), **fields)  # type: ignore[arg-type]
    assert await store.jobs.create(job)
    return job


async def begin(store: Store, job: Job, max_attempts: int = 100, claim: int = 0) -> Begun:
    begun = await store.jobs.begin(job.id, Started(replica="r", at=time.time()), max_attempts, claim)
    assert isinstance(begun, Begun)
    return begun


async def open_writer(store: Store, job: Job) -> Writer:
    """Begins the next attempt of a job."""
    return store.log.writer(await begin(store, job))


def finished(status: str = "completed") -> Finished:
    return Finished(status=status, at=time.time())  # type: ignore[arg-type]


def say(writer: AnyWriter, *words: str) -> None:
    for word in words:
        writer.append(Delta(text=word), len(word))


def events_of(entries: Sequence[Entry]) -> list[Event]:
    return [event for entry in entries for event in entry.events]


async def drain(follower: Follower) -> list[Event]:
    """Everything a follower gets, to the end."""
    with follower:
        return [event async for entries in follower for event in events_of(entries)]


async def stored(store: Store, job_id: str) -> list[Event]:
    """What the store holds."""
    return events_of(await store.log.read(job_id, limit=1_000_000))


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.data.text for event in events if isinstance(event.data, Delta))
