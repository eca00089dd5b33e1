"""What a follower sees: logged before seen, exactly once, in order, no gap."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstream.errors import NotFound, StoreUnavailable
from llmstream.store.channel import RING_BYTES
from llmstream.store.follower import PAGE
from llmstream.store.store import Store
from llmstream.types import BEGINNING, Delta, EventId
from tests.logs import drain, events_of, finished, new_job, open_writer, say, stored, text_of
from tests.proxy import distant
from tests.waiting import wait_until


async def test_nothing_is_seen_before_it_is_logged(store: Store) -> None:
    """No follower gets an event while the store's acknowledgement of it is still on its way."""
    async with distant(store) as (far, proxy):
        job = await new_job(far)
        writer = await open_writer(far, job)
        with far.log.follow(job.id) as follower:
            await anext(follower)  # the start of the attempt
            trap = proxy.trap(b"NOMKSTREAM", hold=True)
            say(writer, "secret")
            seen = asyncio.create_task(anext(follower))
            await trap.sprung.wait()
            assert text_of(await stored(store, job.id)) == "secret"
            assert not seen.done()
            trap.release()
            assert text_of(events_of(await seen)) == "secret"
        await writer.finish(finished())
        writer.close()


async def test_what_was_seen_is_in_the_log_after_the_writer_is_gone(store: Store) -> None:
    """A writer that dies with words unsent has shown nobody those words."""
    async with distant(store) as (far, proxy):
        job = await new_job(far)
        writer = await open_writer(far, job)
        with far.log.follow(job.id) as follower:
            seen = events_of(await anext(follower))
            say(writer, "a")
            await writer.flush()
            proxy.pause()
            say(writer, "b")
            writer.close()
            while await follower.ready(0.05):
                seen += events_of(await anext(follower))
        proxy.cut()
        proxy.resume()
        log = await stored(store, job.id)
        assert seen == log[: len(seen)]
        assert text_of(seen) == "a"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    merged=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    attempts=st.integers(1, 3),
    cut=st.floats(0, 1),
    from_memory=st.booleans(),
)
async def test_every_position_yields_the_rest_exactly_once(
    store: Store, merged: list[int], attempts: int, cut: float, from_memory: bool
) -> None:
    """From any event id, also inside a merged entry, a follower gets every later event once and in order, whether they
    come from memory or from the store."""
    job = await new_job(store)
    keeper = store.log.follow(job.id, newborn=True) if from_memory else None
    for attempt in range(attempts):
        writer = await open_writer(store, job)
        for count in merged:
            say(writer, *map(str, range(count)))
            await writer.flush()
        if attempt == attempts - 1:
            await writer.finish(finished())
        writer.close()
    whole = await stored(store, job.id)
    assert len(whole) == attempts * (1 + sum(merged)) + 1
    at = round(cut * (len(whole) - 1))
    after = whole[at - 1].id if at else BEGINNING
    assert await drain(store.log.follow(job.id, after)) == whole[at:]
    if keeper is not None:
        assert await drain(keeper) == whole
    assert not store.tail.channels


async def test_a_reader_that_resumes_at_every_event_misses_nothing(store: Store) -> None:
    """A stream cut after each single event and resumed from there, while it is written, equals the log."""
    job = await new_job(store)
    writer = await open_writer(store, job)
    seen = events_of(await store.log.read(job.id))
    for number in range(40):
        say(writer, f"{number} ", "x ")
        with store.log.follow(job.id, seen[-1].id) as follower:
            seen.append(events_of(await anext(follower))[0])
    await writer.finish(finished())
    writer.close()
    seen += await drain(store.log.follow(job.id, seen[-1].id))
    assert seen == await stored(store, job.id)


async def test_subscribers_of_one_job_share_its_entries(store: Store) -> None:
    """Two simultaneous followers and a late one get the same events; in memory there is one copy of an entry."""
    job = await new_job(store)
    first, second = (store.log.follow(job.id, newborn=True) for _ in range(2))
    writer = await open_writer(store, job)
    say(writer, "a", "b")
    await writer.flush()
    assert (await anext(first))[0] is (await anext(second))[0]
    await writer.finish(finished())
    writer.close()
    late = store.log.follow(job.id)
    streams = [await drain(follower) for follower in (first, second, late)]
    assert streams[0] == streams[1]
    assert streams[2][-len(streams[0]) :] == streams[0]


async def test_a_slow_reader_costs_bounded_memory(store: Store) -> None:
    """A follower that stops reading makes nobody keep more than the ring, and gets everything later."""
    job = await new_job(store)
    slow = store.log.follow(job.id, newborn=True)
    writer = await open_writer(store, job)
    for number in range(3 * PAGE):
        say(writer, f"{number:0200d}")
        if number % 7 == 0:
            await writer.flush()
    await writer.finish(finished())
    writer.close()
    channel = store.tail.channels[job.id]
    assert sum(entry.size for entry in channel.behind(channel.base)) <= RING_BYTES
    assert await drain(slow) == await stored(store, job.id)


async def test_a_position_nobody_has_reached_harms_nobody(store: Store) -> None:
    """A client that claims to have seen events of the future waits for them and takes nothing from the others."""
    job = await new_job(store)
    liar = store.log.follow(job.id, EventId(9, 9))
    assert not await liar.ready(0.05)
    honest = store.log.follow(job.id)
    writer = await open_writer(store, job)
    say(writer, "word")
    await writer.flush()
    assert text_of(events_of(await anext(honest))) == "word"
    assert not await honest.ready(0.05)
    rest = asyncio.create_task(drain(honest))
    say(writer, "s")
    await writer.finish(finished())
    writer.close()
    assert text_of(await rest) == "s"
    with pytest.raises(NotFound, match="nothing behind 9-9"):
        await drain(liar)


async def test_there_is_nothing_behind_the_end(store: Store) -> None:
    """Following a finished log from its last event says at once that there is nothing more, in memory or not."""
    job = await new_job(store)
    keeper = store.log.follow(job.id, newborn=True)
    writer = await open_writer(store, job)
    await writer.finish(finished())
    writer.close()
    end = (await stored(store, job.id))[-1].id
    for _ in range(2):
        with pytest.raises(NotFound, match="nothing behind"):
            async with asyncio.timeout(2):
                await drain(store.log.follow(job.id, end))
        keeper.close()


async def test_finished_logs_expire(store: Store) -> None:
    """After the retention time neither the record nor the log of a finished job is there, and readers are told."""
    async with distant(store, retention_s=0.3, unfinished_retention_s=60) as (far, _):
        job = await new_job(far)
        late = far.log.follow(job.id)
        writer = await open_writer(far, job)
        say(writer, "word")
        await writer.finish(finished())
        writer.close()
        assert text_of(await stored(store, job.id)) == "word"
        await wait_until(lambda: _is_gone(store, job.id))
        assert await store.writes.call("EXISTS", store.keys.log(job.id)) == 0
        with pytest.raises(NotFound, match="expired"):
            await drain(store.log.follow(job.id))
        assert text_of(await drain(late)) == "word"


async def _is_gone(store: Store, job_id: str) -> bool:
    return await store.jobs.find(job_id) is None


async def test_an_expired_log_does_not_come_back(store: Store) -> None:
    """An append to a log that is gone leaves no key without an end; the writer loses the job instead."""
    job = await new_job(store)
    writer = await open_writer(store, job)
    await store.writes.call("DEL", store.keys.log(job.id))
    say(writer, "word")
    with pytest.raises(StoreUnavailable, match="gone"):
        await writer.flush()
    assert await store.writes.call("EXISTS", store.keys.log(job.id)) == 0
    writer.close()


async def test_closed_followers_leave_nothing_behind(store: Store) -> None:
    """When every follower and writer is closed, no channel is kept, and no task beside the store's own."""
    before = len(asyncio.all_tasks())
    jobs = [await new_job(store) for _ in range(20)]
    followers = [store.log.follow(job.id) for job in jobs for _ in range(3)]
    waiting = [asyncio.create_task(follower.ready(30)) for follower in followers]
    writers = [await open_writer(store, job) for job in jobs]
    assert all(await asyncio.gather(*waiting))
    for follower in followers:
        follower.close()
    for writer in writers:
        writer.close()
    assert store.tail.channels == {}
    assert len(asyncio.all_tasks()) == before


async def test_a_read_through_a_merged_entry_is_cut_to_the_position(store: Store) -> None:
    """Reading behind an event in the middle of an entry returns only the entry's later events."""
    job = await new_job(store)
    writer = await open_writer(store, job)
    say(writer, "a", "b", "c")
    await writer.flush()
    writer.close()
    entries = await store.log.read(job.id, EventId(1, 2))
    assert events_of(entries) == [(EventId(1, 3), Delta(text="c"))]
    assert entries[0].first == EventId(1, 3)
