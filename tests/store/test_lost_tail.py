"""A server that comes back without the last moments: whoever wrote them writes them again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstream.errors import Fenced, NotFound, StoreUnavailable
from llmstream.store.presence import RECOVERY_S
from llmstream.store.store import Store
from llmstream.types import EventId, Finished, Restart
from tests.conftest import assert_every_key_expires
from tests.logs import begin, drain, finished, new_job, open_writer, say, stored, text_of
from tests.valkey import Valkey, stores, valkey
from tests.waiting import wait_until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with valkey(tmp_path) as server:
        yield server


@pytest.fixture
async def store(server: Valkey) -> AsyncIterator[Store]:
    async with stores(server.url) as (store,):
        yield store
        await assert_every_key_expires(store)


async def test_a_lost_tail_is_written_again(server: Valkey) -> None:
    """What the server lost of a log stands in it again under the same ids, before anything new, and readers on other
    replicas notice nothing."""
    async with stores(server.url, 2) as (store, other):
        job = await new_job(store)
        writer = await open_writer(store, job)
        elsewhere = asyncio.create_task(drain(other.log.follow(job.id)))
        say(writer, "kept ")
        await writer.flush()
        await server.snapshot()
        for word in ("lost ", "twice ", "over "):
            say(writer, word)
            await writer.flush()
        await server.set_back()
        say(writer, "new")
        await server.start()
        await writer.flush()
        await writer.finish(finished())
        writer.close()
        log = await stored(store, job.id)
        assert text_of(log) == "kept lost twice over new"
        assert [event.id for event in log] == [EventId(1, seq) for seq in range(7)]
        assert await elsewhere == log
        await assert_every_key_expires(store)


async def test_a_silent_writer_restores_its_log_too(server: Valkey, store: Store) -> None:
    """A job whose model says nothing at the moment gets its log back without waiting for the next word."""
    job = await new_job(store)
    writer = await open_writer(store, job)
    await server.snapshot()
    say(writer, "lost")
    await writer.flush()
    await server.set_back()
    await server.start()
    await wait_until(lambda: _life(store))
    await wait_until(lambda: _says(store, job.id, "lost"))
    writer.close()


async def _life(store: Store) -> bool:
    """Whether the store has noticed that another server answers; asking makes it look."""
    try:
        await store.ping()
    except StoreUnavailable:
        return False
    return store.presence.life > 0


async def _says(store: Store, job_id: str, text: str) -> bool:
    try:
        return text_of(await stored(store, job_id)) == text
    except StoreUnavailable:
        return False


async def test_a_lost_record_is_written_again(server: Valkey, store: Store) -> None:
    """A job that was created, begun and half said within the lost moment is complete again: record, log, attempt."""
    await server.snapshot()
    job = await new_job(store)
    writer = await open_writer(store, job)
    say(writer, "said ")
    await writer.flush()
    before = await store.jobs.get(job.id)
    await server.set_back()
    await server.start()
    say(writer, "more")
    await writer.flush()
    assert await store.jobs.get(job.id) == before
    await writer.finish(finished())
    writer.close()
    assert text_of(await stored(store, job.id)) == "said more"
    assert (await store.jobs.get(job.id)).status == "completed"


async def test_a_lost_end_is_written_again(server: Valkey, store: Store) -> None:
    """A job that finished, and one that was cancelled, within the lost moment are over again."""
    done, cancelled = await new_job(store), await new_job(store)
    writer = await open_writer(store, done)
    say(writer, "first ")
    await writer.flush()
    await server.snapshot()
    say(writer, "last")
    await writer.finish(finished())
    writer.close()
    log = await stored(store, done.id)
    await store.jobs.end(cancelled.id, finished("cancelled"))
    await server.set_back()
    await server.start()
    await wait_until(lambda: _life(store))
    await wait_until(lambda: _is(store, done.id, "completed"))
    await wait_until(lambda: _is(store, cancelled.id, "cancelled"))
    assert await stored(store, done.id) == log
    assert len([event for event in log if isinstance(event.data, Finished)]) == 1


async def _is(store: Store, job_id: str, status: str) -> bool:
    try:
        return (await store.jobs.get(job_id)).status == status
    except StoreUnavailable:
        return False


async def test_a_lost_attempt_stands_behind_the_one_before(server: Valkey, store: Store) -> None:
    """The end of one attempt and the beginning of the next are both lost and both come back, in order."""
    job = await new_job(store)
    first = await open_writer(store, job)
    await server.snapshot()
    say(first, "one ")
    await first.flush()
    first.close()
    second = await open_writer(store, job)
    say(second, "two")
    await second.flush()
    await server.set_back()
    await server.start()
    await second.finish(finished())
    second.close()
    log = await stored(store, job.id)
    assert text_of(log) == "one two"
    assert [event.id for event in log] == [EventId(1, 0), EventId(1, 1), EventId(2, 0), EventId(2, 1), EventId(2, 2)]


async def test_a_hole_that_nobody_can_fill_is_said(server: Valkey, store: Store) -> None:
    """When more was lost than is kept the log says restart behind the last event that anybody saw, and the attempt
    gives up."""
    job = await new_job(store)
    await server.snapshot()
    writer = await open_writer(store, job)
    say(writer, "gone")
    await writer.flush()
    writer._trail.entries.pop(0)
    told: list[Exception] = []
    writer.on_lost = told.append
    await server.set_back()
    await server.start()
    say(writer, "never")
    with pytest.raises(StoreUnavailable):
        await writer.flush()
    assert [type(error) for error in told] == [StoreUnavailable]
    writer.close()
    (event,) = await stored(store, job.id)
    assert event.id == EventId(1, 2)
    assert isinstance(event.data, Restart)


async def test_restoring_does_not_bring_back_an_attempt_that_was_superseded(server: Valkey) -> None:
    """A writer whose job another replica has taken over since the server came back is fenced and writes nothing."""
    async with stores(server.url, 2) as (store, other):
        job = await new_job(store)
        await server.snapshot()
        writer = await open_writer(store, job)
        say(writer, "old")
        await writer.flush()
        await store.presence.close()  # it notices nothing before it has something to write
        await server.set_back()
        await server.start()
        await wait_until(lambda: _life(other))
        begun = await begin(other, job)
        assert begun.attempt == 1
        with pytest.raises(Fenced):
            await writer.finish(finished())
        writer.close()
        assert text_of(await stored(other, job.id)) == ""


async def test_nothing_is_believed_missing_before_everybody_was_there(server: Valkey, store: Store) -> None:
    """Right after another server has answered an unknown job is "not now"; a moment later it is "not found"."""
    await server.set_back_to_nothing()
    await server.start()
    await wait_until(lambda: _life(store))
    start = asyncio.get_running_loop().time()
    with pytest.raises(StoreUnavailable):
        await store.jobs.get("unknown")
    await store.presence.recovered()
    assert asyncio.get_running_loop().time() - start < RECOVERY_S + 1
    with pytest.raises(NotFound):
        await store.jobs.get("unknown")


async def test_a_plain_restart_loses_nothing_and_doubles_nothing(server: Valkey, store: Store) -> None:
    """A server that is killed and comes back with everything gets nothing twice."""
    job = await new_job(store)
    writer = await open_writer(store, job)
    for number in range(3):
        say(writer, f"{number} ")
        await writer.flush()
        await server.kill()
        say(writer, "held ")
        await server.start()
    await writer.finish(finished())
    writer.close()
    log = await stored(store, job.id)
    assert text_of(log) == "0 held 1 held 2 held "
    assert [event.id for event in log] == [EventId(1, seq) for seq in range(8)]
