"""The record of a job: create, begin, finish, end, hand over."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from llmstream.errors import NotFound, StoreUnavailable
from llmstream.store.entry import Entry, encode_payloads
from llmstream.store.store import Store
from llmstream.types import EventId, Failure, Finished, Started, Usage
from tests.logs import begin, finished, new_job, open_writer, stored
from tests.proxy import distant


def start(at: float = 1.0) -> Started:
    return Started(replica="r", at=at)


async def test_creating_twice_is_once(store: Store) -> None:
    """Repeating a creation changes nothing; the same id for a different job is refused."""
    job = await new_job(store)
    assert await store.jobs.create(job)
    assert not await store.jobs.create(replace(job, priority=5))


async def test_attempts_count_up(store: Store) -> None:
    """Each beginning is the next attempt; after the last allowed one the job is exhausted."""
    job = await new_job(store)
    for attempt in (1, 2, 3):
        begun = await begin(store, job, max_attempts=3)
        assert (begun.attempt, begun.tries, begun.previous) == (attempt, attempt, EventId(attempt - 1, 0))
    assert await store.jobs.begin(job.id, start(), 3, 0) == "exhausted"
    assert [event.id for event in await stored(store, job.id)] == [EventId(1, 0), EventId(2, 0), EventId(3, 0)]


async def test_hand_overs_cost_no_attempt(store: Store) -> None:
    """An attempt given up on purpose does not count against the limit, also when that is said twice."""
    job = await new_job(store)
    for attempt in range(1, 10):
        begun = await begin(store, job, max_attempts=1)
        assert (begun.attempt, begun.tries) == (attempt, 1)
        await store.jobs.hand_over(job.id, begun.attempt)
        await store.jobs.hand_over(job.id, begun.attempt)
    await begin(store, job, max_attempts=1)
    assert await store.jobs.begin(job.id, start(), 1, 0) == "exhausted"


async def test_a_superseded_attempt_cannot_hand_over(store: Store) -> None:
    """Handing over is ignored from an attempt that is not the current one."""
    job = await new_job(store)
    old = await begin(store, job)
    await begin(store, job)
    await store.jobs.hand_over(job.id, old.attempt)
    assert (await store.jobs.get(job.id)).status == "in_progress"


async def test_a_beginning_whose_answer_was_lost_costs_no_attempt(store: Store) -> None:
    """A begin that was carried out although its answer was lost is recognised when it is repeated."""
    async with distant(store) as (far, proxy):
        job = await new_job(far)
        trap = proxy.trap(b'"started"')
        begun = await begin(far, job, max_attempts=1)
        assert trap.sprung.is_set()
        assert (begun.attempt, begun.previous) == (1, EventId(0, 0))
        await store.jobs.hand_over(job.id, 1)
        trap = proxy.trap(b'"started"')
        begun = await begin(far, job, max_attempts=1)
        assert trap.sprung.is_set()
        assert (begun.attempt, begun.tries, begun.previous) == (2, 1, EventId(1, 0))
        assert [event.id for event in await stored(store, job.id)] == [EventId(1, 0), EventId(2, 0)]


async def test_a_beginning_repeated_too_late_takes_nothing_back(store: Store) -> None:
    """A replica that learns of its attempt only after another one began neither fences that one nor begins again."""
    async with distant(store) as (far, proxy):
        await begin(store, await new_job(store))  # from here on the server knows the script
        job = await new_job(store)
        trap = proxy.trap(b'"started"')
        asking = asyncio.create_task(far.jobs.begin(job.id, start(), 9, 0))
        await trap.sprung.wait()
        proxy.refuse()
        await begin(store, job)
        proxy.refuse(False)
        assert await asking == "superseded"
        assert [event.id for event in await stored(store, job.id)] == [EventId(1, 0), EventId(2, 0)]


async def test_a_beginning_under_an_older_claim_takes_nothing_back(store: Store) -> None:
    """A begin that arrives for the first time after the job was begun under a later claim begins nothing."""
    job = await new_job(store)
    await begin(store, job, claim=10)
    assert await store.jobs.begin(job.id, start(), 9, 9) == "superseded"
    assert (await begin(store, job, claim=10)).attempt == 2
    assert (await begin(store, job, claim=11)).attempt == 3


async def test_two_beginnings_are_two_attempts(store: Store) -> None:
    """Beginnings of the same replica at the same moment are told apart."""
    job = await new_job(store)
    for attempt in (1, 2):
        begun = await store.jobs.begin(job.id, start(), 9, 0)
        assert not isinstance(begun, str)
        assert begun.attempt == attempt


async def test_finishing_is_one_step(store: Store) -> None:
    """Terminal event, status and outcome are there together or not at all, and repeating the step is accepted."""
    job = await new_job(store)
    await begin(store, job)
    end = Finished(
        status="failed", at=5.0, usage=Usage(prompt_tokens=2), failure=Failure(message="m", code="c"), reason="r"
    )
    data = encode_payloads([end])
    entry = Entry(EventId(1, 1), [end], len(data))
    assert [await store.jobs.finish(store.writes, job.id, 1, entry, data, EventId(1, 0)) for _ in range(2)] == [
        "ok",
        "ok",
    ]
    state = await store.jobs.get(job.id)
    assert (state.status, state.failure, state.usage, state.reason, state.finished_at) == (
        "failed",
        end.failure,
        end.usage,
        "r",
        5.0,
    )
    assert [event.id for event in await stored(store, job.id)] == [EventId(1, 0), EventId(1, 1)]
    assert await store.jobs.begin(job.id, start(), 9, 0) == "done"


async def test_a_finish_that_cannot_be_logged_changes_nothing(store: Store) -> None:
    """When the terminal event is refused the record stays as it was."""
    job = await new_job(store)
    await begin(store, job)
    await store.writes.call("XADD", store.keys.log(job.id), "1-7", "e", encode_payloads([start()]))
    data = encode_payloads([finished()])
    entry = Entry(EventId(1, 1), [finished()], len(data))
    assert await store.jobs.finish(store.writes, job.id, 1, entry, data, EventId(1, 0)) == "behind"
    assert await store.jobs.finish(store.writes, job.id, 1, entry, data, EventId(1, 7)) == "fenced"
    assert (await store.jobs.get(job.id)).status == "in_progress"


async def test_ending_twice_is_once(store: Store) -> None:
    """The second end reports what the first one did and logs nothing."""
    job = await new_job(store)
    first = await store.jobs.end(job.id, finished("cancelled"))
    second = await store.jobs.end(job.id, finished("failed"))
    assert (first.status, second.status) == ("cancelled", "cancelled")
    assert first.entry is not None
    assert second.entry is None
    assert [event.id for event in await stored(store, job.id)] == [EventId(1, 0)]


async def test_unknown_jobs(store: Store) -> None:
    """Nothing can be begun, ended or read under an unknown id, and trying creates no key."""
    assert await store.jobs.begin("nobody", start(), 3, 0) == "done"
    assert await store.jobs.find("nobody") is None
    with pytest.raises(NotFound):
        await store.jobs.end("nobody", finished())
    with pytest.raises(NotFound):
        await store.jobs.get("nobody")
    await store.jobs.hand_over("nobody", 1)
    assert await store.writes.call("DBSIZE") == 0


async def test_a_session_keeps_its_latest_jobs(store: Store) -> None:
    """A session lists its jobs latest first, at most a hundred, under a key that expires."""
    jobs = [await new_job(store) for _ in range(110)]
    for number, job in enumerate(jobs):
        await store.jobs.join_session("s", replace(job, created_at=float(number)))
    assert await store.jobs.session_jobs("s") == [job.id for job in reversed(jobs)][:100]
    assert await store.writes.call("PTTL", store.keys.session("s")) > 0


async def test_many_records_at_once(store: Store) -> None:
    """Reading several records leaves out the unknown ones; when the store is away one error says so."""
    jobs = [await new_job(store) for _ in range(3)]
    states = await store.jobs.find_all([jobs[0].id, "nobody", jobs[2].id])
    assert [state.job.id for state in states] == [jobs[0].id, jobs[2].id]
    async with distant(store, timeout_s=0.1) as (far, proxy):
        proxy.pause()
        with pytest.raises(StoreUnavailable):
            await far.jobs.find_all([job.id for job in jobs])


async def test_attempts_never_overlap(store: Store) -> None:
    """Of many replicas that begin at once each gets an attempt of its own and only the last can finish."""
    job = await new_job(store)
    writers = await asyncio.gather(*(open_writer(store, job) for _ in range(30)))
    assert sorted(writer.attempt for writer in writers) == list(range(1, 31))
    outcomes = await asyncio.gather(*(writer.finish(finished()) for writer in writers), return_exceptions=True)
    assert [writer.attempt for writer, outcome in zip(writers, outcomes, strict=True) if outcome is None] == [30]
