"""Logs that are written elsewhere: one connection watches them all."""

from __future__ import annotations

import asyncio

import pytest

from llmstream.errors import StoreError
from llmstream.store import tail
from llmstream.store.store import Store
from llmstream.types import Event, Job
from tests.logs import drain, events_of, finished, new_job, open_writer, say, stored, text_of
from tests.proxy import distant
from tests.waiting import wait_until


async def write(store: Store, job: Job, words: int = 20) -> None:
    writer = await open_writer(store, job)
    for number in range(words):
        say(writer, f"{number} ")
        if number % 3 == 0:
            await writer.flush()
    await writer.finish(finished())
    writer.close()


async def test_a_follower_elsewhere_gets_everything(store: Store) -> None:
    """Whether it attaches before the job begins, in the middle or after the end, a follower on another replica gets the
    whole log."""
    async with distant(store) as (far, _):
        job = await new_job(store)
        early = asyncio.create_task(drain(far.log.follow(job.id)))
        await wait_until(lambda: job.id in far.tail._watched)
        writer = await open_writer(store, job)
        say(writer, "a", "b")
        await writer.flush()
        middle = asyncio.create_task(drain(far.log.follow(job.id)))
        say(writer, "c")
        await writer.finish(finished())
        writer.close()
        log = await stored(store, job.id)
        assert await early == await middle == await drain(far.log.follow(job.id)) == log
        assert far.tail.channels == {}


async def test_many_logs_from_elsewhere(store: Store) -> None:
    """Two hundred logs written elsewhere at once reach two followers each, complete and in order."""
    async with distant(store) as (far, _):
        jobs = [await new_job(store) for _ in range(200)]
        following = [asyncio.create_task(drain(far.log.follow(job.id))) for job in jobs for _ in range(2)]
        await asyncio.gather(*(write(store, job) for job in jobs))
        seen = await asyncio.gather(*following)
        for number, job in enumerate(jobs):
            log = await stored(store, job.id)
            assert seen[2 * number] == seen[2 * number + 1] == log


async def test_a_cut_tail_goes_on_where_it_was(store: Store) -> None:
    """Cutting the tail's connection again and again loses and doubles nothing."""
    async with distant(store) as (far, proxy):
        job = await new_job(store)
        seen: list[Event] = []
        with far.log.follow(job.id) as follower:
            writer = await open_writer(store, job)
            for number in range(30):
                say(writer, f"{number} ")
                await writer.flush()
                if number % 5 == 0:
                    proxy.cut()
                elif number % 5 == 4:
                    written = (await stored(store, job.id))[-1].id
                    while follower.position < written:
                        assert await follower.ready(5)
                        seen += events_of(await anext(follower))
            await writer.finish(finished())
            writer.close()
            seen += [event async for entries in follower for event in events_of(entries)]
        assert seen == await stored(store, job.id)


async def test_a_silent_network_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail whose connection hangs, and whose next one is accepted and never answered, comes back by itself."""
    monkeypatch.setattr(tail, "BLOCK_MS", 100)
    monkeypatch.setattr(tail, "ANSWER_S", 0.2)
    monkeypatch.setattr(tail, "RECHECK_S", 1000)
    async with distant(store) as (far, proxy):
        job = await new_job(store)
        following = asyncio.create_task(drain(far.log.follow(job.id)))
        await wait_until(lambda: job.id in far.tail._watched)
        proxy.swallow()
        await write(store, job)
        await wait_until(lambda: proxy.swallowed > 0)
        proxy.resume()
        assert await following == await stored(store, job.id)


async def test_a_missed_wake_up_does_not_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that the tail forgets looks into the store by itself after a while."""
    monkeypatch.setattr(tail, "RECHECK_S", 0.2)
    monkeypatch.setattr(tail, "BLOCK_MS", 50)
    async with distant(store) as (far, _):
        monkeypatch.setattr(far.tail, "_is_wanted", lambda channel: False)
        job = await new_job(store)
        following = asyncio.create_task(drain(far.log.follow(job.id)))
        await wait_until(lambda: far.tail.channels[job.id].located)
        await write(store, job)
        assert await following == await stored(store, job.id)


async def test_entries_of_the_future_stop_one_log_only(store: Store) -> None:
    """An entry that this version cannot read is an error for its followers; other logs go on."""
    async with distant(store) as (far, _):
        odd, good = await new_job(store), await new_job(store)
        with far.log.follow(odd.id) as broken, far.log.follow(good.id) as fine:
            writers = [await open_writer(store, job) for job in (odd, good)]
            await anext(broken)
            await anext(fine)
            await wait_until(lambda: {odd.id, good.id} <= far.tail._watched)
            await store.writes.call("XADD", store.keys.log(odd.id), "1-1", "e", b'[{"type":"hologram"}]')
            with pytest.raises(StoreError, match="this version"):
                await anext(broken)
            say(writers[1], "word")
            assert text_of(events_of(await anext(fine))) == "word"
            for writer in writers:
                writer.close()


async def test_what_the_tail_skipped_is_read_from_the_store(store: Store) -> None:
    """An entry that arrives with a gap before it is never handed out before the gap is filled."""
    job = await new_job(store)
    writer = await open_writer(store, job)
    with store.log.follow(job.id, newborn=True) as follower:
        await anext(follower)
        channel = store.tail.channels[job.id]
        say(writer, "a")
        await writer.flush()
        say(writer, "b")
        await writer.flush()
        entries = await store.log.read(job.id)
        follower.position = entries[0].last
        # The channel loses what it held and hears only of the last entry.
        fresh = type(channel)(job.id)
        fresh.publish(entries[0], entries[0].last)
        fresh.publish(entries[2], entries[1].last)
        fresh.located = True
        follower._channel = fresh
        assert text_of(events_of(await anext(follower))) == "ab"
        follower._channel = channel
    writer.close()


async def connections(store: Store) -> int:
    raw: bytes = await store.writes.call("CLIENT", "LIST")
    return len(raw.splitlines())


async def test_the_number_of_connections_is_constant(store: Store) -> None:
    """One follower or five hundred, one job or five hundred: the store counts the same connections."""
    async with distant(store) as (far, _):
        job = await new_job(store)
        with far.log.follow(job.id) as follower:
            await follower.ready(0.01)
            await far.writes.call("PING")
            before = await connections(store)
            jobs = [await new_job(store) for _ in range(500)]
            many = [far.log.follow(other.id) for other in (*jobs, *([job] * 500))]
            waiting = [asyncio.create_task(drain(one)) for one in many]
            writers = [await open_writer(store, other) for other in jobs]
            for writer in writers:
                say(writer, "x")
            assert await connections(store) == before
            await asyncio.gather(*(writer.finish(finished()) for writer in writers))
            await store.jobs.end(job.id, finished("cancelled"))
            assert all(text_of(seen) == "x" for seen in (await asyncio.gather(*waiting))[:500])
            assert await connections(store) == before
            for writer in writers:
                writer.close()
        assert far.tail.channels == store.tail.channels == {}
