"""What is kept in memory only behaves as what is logged."""

from __future__ import annotations

import asyncio
import time

import pytest

from llmstream.errors import Conflict, Fenced, NotFound
from llmstream.store.jobs import Begun
from llmstream.store.memory import MemoryWriter
from llmstream.store.store import Store
from llmstream.types import BEGINNING, Delta, EventId, Finished, Job, Started, new_id
from tests.logs import REQUEST, drain, finished, say, text_of


def new_job(store: Store) -> Job:
    job = Job(id=store.memory.name(new_id()), request=REQUEST, pool="p", created_at=time.time())
    store.memory.create(job)
    return job


async def open_writer(store: Store, job: Job) -> MemoryWriter:
    begun = await store.memory.begin(job.id, Started(replica="r", at=time.time()), 100, 0)
    assert isinstance(begun, Begun)
    return store.memory.writer(begun)


async def test_followers_get_every_event_once(store: Store) -> None:
    """Followers from the beginning, from the middle and after the end get every event behind it, in order."""
    job = new_job(store)
    early = asyncio.create_task(drain(store.log.follow(job.id)))
    for attempt in range(2):
        writer = await open_writer(store, job)
        for word in "abc":
            say(writer, word, word)
            await asyncio.sleep(0)
        await writer.flush()
        if attempt == 1:
            await writer.finish(finished())
        writer.close()
    log = await early
    assert [event.id for event in log] == [EventId(1, n) for n in range(7)] + [EventId(2, n) for n in range(8)]
    assert text_of(log) == "aabbcc" * 2
    assert isinstance(log[-1].data, Finished)
    for position in [BEGINNING, *(event.id for event in log[:-1])]:
        assert await drain(store.log.follow(job.id, position)) == [event for event in log if event.id > position]


async def test_nothing_comes_behind_the_end(store: Store) -> None:
    """Once a job was ended from outside, its writer adds nothing, and cannot end it otherwise."""
    job = new_job(store)
    writer = await open_writer(store, job)
    say(writer, "seen")
    await writer.flush()
    say(writer, "late")
    store.memory.note_end(job.id, await store.memory.end(job.id, finished("cancelled")))
    await asyncio.sleep(0)
    with pytest.raises(Fenced):
        await writer.finish(finished())
    writer.close()
    with pytest.raises(Fenced):
        writer.append(Delta(text="later"), 5)
    log = await drain(store.log.follow(job.id))
    assert text_of(log) == "seen"
    assert [event.data.status for event in log if isinstance(event.data, Finished)] == ["cancelled"]
    assert (await store.memory.get(job.id)).status == "cancelled"
    assert (await store.memory.end(job.id, finished())).entry is None
    assert await store.memory.begin(job.id, Started(replica="r", at=0.0), 100, 0) == "done"


async def test_whose_job_it_is(store: Store) -> None:
    """An unknown job of this replica is gone; one of another replica is a conflict."""
    with pytest.raises(NotFound, match="any more"):
        await store.memory.get(store.memory.name("x"))
    with pytest.raises(Conflict, match="another replica"):
        await store.memory.get("0000~x")
