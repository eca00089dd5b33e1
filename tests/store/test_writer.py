"""The one who may append: group commit, fencing, lost replies, outages."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstream.config import StoreSettings
from llmstream.errors import Fenced, StoreUnavailable
from llmstream.store.store import Store, open_store
from llmstream.types import EventId, Finished, Started
from tests.conftest import assert_every_key_expires
from tests.logs import begin, drain, finished, new_job, open_writer, say, stored, text_of
from tests.proxy import distant
from tests.waiting import wait_until


async def test_appends_gather_while_one_is_on_its_way(store: Store) -> None:
    """A hundred words of each of fifty jobs said during one round trip cost one more round trip and one entry each."""
    async with distant(store) as (far, proxy):
        jobs = [await new_job(far) for _ in range(50)]
        writers = [await open_writer(far, job) for job in jobs]
        trap = proxy.trap(b"NOMKSTREAM", hold=True)
        for writer in writers:
            say(writer, "first ")
        await trap.sprung.wait()
        before = proxy.requests
        for number in range(100):
            for writer in writers:
                say(writer, f"{number} ")
        trap.release()
        await asyncio.gather(*(writer.flush() for writer in writers))
        assert proxy.requests - before <= 4  # one batch; a large write may arrive in a few pieces
        for job, writer in zip(jobs, writers, strict=True):
            entries = await far.log.read(job.id)
            assert [len(entry.events) for entry in entries] == [1, 1, 100]
            writer.close()


async def test_a_superseded_writer_can_write_nothing(store: Store) -> None:
    """A paused owner whose job another attempt has taken can neither append nor finish, and learns why."""
    job = await new_job(store)
    old = await open_writer(store, job)
    say(old, "old ")
    await old.flush()
    told: list[Exception] = []
    old.on_lost = told.append
    new = await open_writer(store, job)
    say(old, "never")
    with pytest.raises(Fenced):
        await old.flush()
    assert [type(error) for error in told] == [Fenced]
    with pytest.raises(Fenced):
        say(old, "again")
    with pytest.raises(Fenced):
        await old.finish(finished())
    say(new, "new")
    await new.finish(finished())
    assert text_of(await stored(store, job.id)) == "old new"


async def test_a_superseded_writer_cannot_finish(store: Store) -> None:
    """Finishing is refused to an owner who had nothing left to say when it was superseded."""
    job = await new_job(store)
    old = await open_writer(store, job)
    await begin(store, job)
    with pytest.raises(Fenced):
        await old.finish(finished())
    assert (await store.jobs.get(job.id)).status == "in_progress"


async def test_a_cancelled_job_takes_no_more_words(store: Store) -> None:
    """After a cancellation was recorded the owner's next append is refused, without any wake-up."""
    job = await new_job(store)
    writer = await open_writer(store, job)
    say(writer, "kept")
    await writer.flush()
    await store.jobs.end(job.id, finished("cancelled"))
    say(writer, " lost")
    with pytest.raises(Fenced):
        await writer.flush()
    with pytest.raises(Fenced):
        await writer.finish(finished())
    log = await stored(store, job.id)
    assert text_of(log) == "kept"
    assert [event.data.status for event in log if isinstance(event.data, Finished)] == ["cancelled"]


async def test_an_append_whose_answer_was_lost_is_done(store: Store) -> None:
    """The same entry sent again after a lost answer is recognised by reading it back, and logged once."""
    async with distant(store) as (far, proxy):
        job = await new_job(far)
        writer = await open_writer(far, job)
        trap = proxy.trap(b"NOMKSTREAM")
        say(writer, "a", "b")
        await trap.sprung.wait()
        say(writer, "c")
        await writer.flush()
        await writer.finish(finished())
        writer.close()
        log = await stored(store, job.id)
        assert text_of(log) == "abc"
        assert [event.id for event in log] == [EventId(1, seq) for seq in range(5)]


async def test_a_lost_answer_and_a_new_attempt(store: Store) -> None:
    """An append that never arrived, sent again after another attempt began, is refused."""
    async with distant(store) as (far, proxy):
        job = await new_job(far)
        writer = await open_writer(far, job)
        proxy.refuse()
        proxy.cut()
        say(writer, "late")
        await begin(store, job)
        proxy.refuse(False)
        with pytest.raises(Fenced):
            await writer.flush()
        assert text_of(await stored(store, job.id)) == ""
        writer.close()


async def test_a_finish_whose_answer_was_lost_is_done(store: Store) -> None:
    """Finishing again after a lost answer succeeds and logs one terminal event."""
    async with distant(store) as (far, proxy):
        job = await new_job(far)
        writer = await open_writer(far, job)
        trap = proxy.trap(b"completed")
        await writer.finish(finished())
        assert trap.sprung.is_set()
        assert [event.data.status for event in await stored(store, job.id) if isinstance(event.data, Finished)] == [
            "completed"
        ]
        writer.close()


@pytest.fixture
async def careful(tmp_path: Path) -> AsyncIterator[Store]:
    """A store that is on disk before it answers: with ``everysec`` a slow fsync may hold back what was acknowledged."""
    async with open_store(StoreSettings(sync="always"), tmp_path) as store:
        yield store
        await assert_every_key_expires(store)


async def test_a_killed_store_loses_and_doubles_nothing(careful: Store) -> None:
    """Appends held while the store is killed and started again go in under the same ids; followers see the log."""
    store = careful
    assert store.embedded is not None
    job = await new_job(store)
    follower = asyncio.create_task(drain(store.log.follow(job.id, newborn=True)))
    writer = await open_writer(store, job)
    for number in range(300):
        say(writer, f"{number} ")
        if number in (100, 200):
            await writer.flush()
            restarts = store.embedded.restarts
            assert store.embedded.pid is not None
            os.kill(store.embedded.pid, signal.SIGKILL)
            say(writer, "hole ")
            await wait_until(lambda before=restarts: store.embedded.restarts > before)  # type: ignore[misc]
        if number % 10 == 0:
            await asyncio.sleep(0)
    await writer.finish(finished())
    writer.close()
    log = await stored(store, job.id)
    said = "".join(f"{number} " + "hole " * (number in (100, 200)) for number in range(300))
    assert text_of(log) == said
    assert await follower == log
    assert [event.id for event in log] == [EventId(1, seq) for seq in range(len(log))]


async def test_a_store_that_stays_away(store: Store) -> None:
    """When the store is away for longer than ``outage_s`` the writer says StoreUnavailable; nothing hangs."""
    async with distant(store, timeout_s=0.1, outage_s=0.3) as (far, proxy):
        job = await new_job(far)
        writer, other = await open_writer(far, job), await open_writer(far, await new_job(far))
        told: list[Exception] = []
        writer.on_lost = told.append
        proxy.pause()
        say(writer, "word")
        async with asyncio.timeout(5):
            with pytest.raises(StoreUnavailable):
                await writer.flush()
            assert [type(error) for error in told] == [StoreUnavailable]
            with pytest.raises(StoreUnavailable):
                await other.finish(finished())
        for part in (writer, other):
            part.close()
        proxy.cut()
        proxy.resume()
        await wait_until(lambda: _answers(far))


async def _answers(store: Store) -> bool:
    try:
        await store.ping()
    except StoreUnavailable:
        return False
    return True


async def test_a_closed_writer_sends_nothing_again(store: Store) -> None:
    """What was not acknowledged when the writer was closed does not arrive when the store comes back."""
    async with distant(store, timeout_s=0.2) as (far, proxy):
        job = await new_job(far)
        writer = await open_writer(far, job)
        proxy.refuse()
        proxy.cut()
        say(writer, "late")
        await wait_until(lambda: writer._failing_since is not None)
        writer.close()
        proxy.refuse(False)
        await wait_until(lambda: _answers(far))
        start = asyncio.get_running_loop().time()
        await wait_until(lambda: asyncio.get_running_loop().time() > start + 0.2)
        assert text_of(await stored(store, job.id)) == ""


async def test_one_terminal_event_whatever_happens_at_once(store: Store) -> None:
    """Finish, cancel, failure from outside and new attempts at the same time leave exactly one terminal event, as the
    last one, and a record that says the same."""
    async with distant(store) as (far, _):

        async def race(number: int) -> None:
            job = await new_job(store)
            writer = await open_writer(store, job)
            say(writer, "word")

            async def finish() -> None:
                await writer.finish(finished())

            async def cancel() -> None:
                await far.jobs.end(job.id, finished("cancelled"))

            async def fail() -> None:
                await store.jobs.end(job.id, finished("failed"))

            async def take_over() -> None:
                begun = await far.jobs.begin(job.id, Started(replica="other", at=0.0), 100, 0)
                if not isinstance(begun, str):
                    second = far.log.writer(begun)
                    say(second, "more")
                    await second.finish(finished("incomplete"))

            steps = [finish, cancel, fail, take_over]
            order = steps[number % 4 :] + steps[: number % 4]
            chosen = order[: 2 + number % 3]
            for outcome in await asyncio.gather(*(step() for step in chosen), return_exceptions=True):
                assert outcome is None or isinstance(outcome, Fenced), outcome
            log = await stored(store, job.id)
            ends = [event.data.status for event in log if isinstance(event.data, Finished)]
            state = await store.jobs.get(job.id)
            assert ends == [state.status]
            assert isinstance(log[-1].data, Finished)
            ids = [event.id for event in log]
            assert ids == sorted(set(ids))

        await asyncio.gather(*(race(number) for number in range(600)))
