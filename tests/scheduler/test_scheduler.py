"""Claims, leases, hand-overs and the order of service, with real replicas on one store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from pathlib import Path

import pytest

from llmstream.config import SchedulerSettings, Settings
from llmstream.errors import Overloaded
from llmstream.opening import open_gateway
from llmstream.scheduler import scheduler as scheduler_module
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store import lanes as lanes_module
from llmstream.store.store import Store
from llmstream.transcript import Transcript
from llmstream.types import Delta, Finished, GenerateRequest, Job, Restart, Started, new_id
from tests.conftest import assert_every_key_expires, echo_settings
from tests.logs import drain, finished, stored, text_of
from tests.proxy import distant
from tests.replica import FAST, MODEL, Scripted, echo, lanes_of, replica, submit, tokens
from tests.waiting import wait_until


async def status_of(store: Store, job: Job) -> str:
    return (await store.jobs.get(job.id)).status


async def idle(store: Store) -> bool:
    census = await lanes_of(store).census()
    return not census.running and not any(census.waiting.values())


async def said(store: Store, job: Job) -> str:
    return text_of(await stored(store, job.id))


async def die(scheduler: Scheduler) -> None:
    """Ends a replica as a crash does: nothing is handed over, nobody is told."""
    tasks = [*scheduler._loops, *scheduler._tasks]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_jobs_run_and_leave_nothing_behind(store: Store) -> None:
    """Jobs submitted before and after the replica came up are answered; then queue, claims and channels are empty."""
    early = await submit(store, tokens=5)
    async with replica(store) as scheduler:
        late = await submit(store, tokens=7)
        assert text_of(await drain(store.log.follow(early.id))) == tokens(5)
        assert text_of(await drain(store.log.follow(late.id))) == tokens(7)
        await wait_until(lambda: idle(store))
        assert scheduler.running == 0
        assert store.tail.channels == {}


async def test_priority_and_ageing_order_the_work(store: Store) -> None:
    """Three hundred jobs of mixed priority on four slots begin in the order of arrival plus ``ageing_s`` for each
    step of priority, as far as four slots can tell."""
    ageing = SchedulerSettings(lease_s=2.0, ageing_s=0.002)
    jobs = [await submit(store, settings=ageing, priority=(number * 7) % 21 - 10, tokens=3) for number in range(300)]
    arrived = await _arrivals(store)
    async with replica(store, settings=ageing):
        await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs))
    begun: dict[str, float] = {}
    for job in jobs:
        first = (await stored(store, job.id))[0].data
        assert isinstance(first, Started)
        begun[job.id] = first.at
    urgency = {job.id: arrived[job.id] + (10 - job.priority) * 2 for job in jobs}
    served = sorted(jobs, key=lambda job: begun[job.id])
    expected = sorted(jobs, key=lambda job: urgency[job.id])
    place = {job.id: number for number, job in enumerate(expected)}
    # Same-millisecond arrivals and four slots that begin at once may swap neighbours, no more.
    assert max(abs(place[job.id] - number) for number, job in enumerate(served)) <= 8
    assert [job.priority for job in served] != sorted((job.priority for job in jobs), reverse=True)


async def _arrivals(store: Store) -> dict[str, float]:
    meta = lanes_of(store)._keys[2]
    flat: list[bytes] = await store.writes.call("HGETALL", meta)
    return {job.decode(): float(raw.split(b"|")[1]) for job, raw in zip(flat[::2], flat[1::2], strict=True)}


async def test_strict_priority_when_nothing_ages(store: Store) -> None:
    """Without time for ageing three hundred waiting jobs begin in falling priority."""
    jobs = [await submit(store, priority=(number * 7) % 21 - 10, tokens=1) for number in range(300)]
    async with replica(store):
        logs = await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs))
    begun = sorted(
        (log[0].data.at, job.priority) for log, job in zip(logs, jobs, strict=True) if isinstance(log[0].data, Started)
    )
    priorities = [priority for _, priority in begun]
    # Four at once: only those that began together may be out of order.
    assert all(a + 1 >= b for a, b in zip(priorities, priorities[4:], strict=False))
    assert sorted(priorities, reverse=True)[:50] == sorted(priorities[:50], reverse=True)


@pytest.mark.parametrize("when", ["waiting", "running"])
async def test_cancelling(store: Store, when: str) -> None:
    """A cancelled job ends in one ``cancelled``, its slot is free for the next, and its model has stopped."""
    provider = echo(slots=1)
    running = await submit(store, fault="stall", at=3, tokens=9)
    async with replica(store, provider):
        await wait_until(lambda: _is(said(store, running), tokens(3)))
        waiting = await submit(store, tokens=2)
        chosen, other = (waiting, running) if when == "waiting" else (running, waiting)
        await store.jobs.end(chosen.id, finished("cancelled"))
        await lanes_of(store).remove(chosen.id)
        if when == "waiting":
            await store.jobs.end(other.id, finished("cancelled"))
            await lanes_of(store).remove(other.id)
        else:
            assert text_of(await drain(store.log.follow(other.id))) == tokens(2)
        await wait_until(lambda: idle(store))
        assert provider.running == 0
        log = await stored(store, chosen.id)
        assert [event.data.status for event in log if isinstance(event.data, Finished)] == ["cancelled"]
        assert text_of(log) == ("" if when == "waiting" else tokens(3))


async def _is(answer: Awaitable[str], expected: str) -> bool:
    return await answer == expected


async def test_a_cancellation_without_wake_up(store: Store) -> None:
    """When the wake-up is lost the owner learns of a cancellation at its next heartbeat."""
    provider = echo()
    job = await submit(store, fault="stall")
    async with replica(store, provider):
        await wait_until(lambda: provider.running == 1)
        store.signals.on_cancel = None
        await store.jobs.end(job.id, finished("cancelled"))
        await lanes_of(store).remove(job.id)
        await wait_until(lambda: provider.running == 0)
        await wait_until(lambda: idle(store))


async def test_a_graceful_close_hands_over(store: Store) -> None:
    """A replica that closes gives its jobs to another in the middle; the text is exact, no attempt is used up, and
    nothing waits for the grace time."""
    settings = FAST.model_copy(update={"max_attempts": 1})
    jobs = [await submit(store, settings=settings, tokens=60) for _ in range(6)]
    loop = asyncio.get_running_loop()
    async with distant(store) as (far, _), replica(store, echo(delay_ms=4), settings=settings, grace_s=30) as first:
        await wait_until(lambda: _is_longer(store, jobs[0], 3))
        async with replica(far, echo(delay_ms=4), name="r2", settings=settings):
            start = loop.time()
            await first.close(30)
            assert loop.time() - start < 5
            logs = await asyncio.gather(*(drain(far.log.follow(job.id)) for job in jobs))
    for log in logs:
        assert text_of(log) == tokens(60)
        assert not any(isinstance(event.data, Restart) for event in log)
    assert sum(isinstance(event.data, Started) for event in logs[0]) == 2
    assert store.tail.channels == {}


async def _is_longer(store: Store, job: Job, count: int) -> bool:
    return len(await said(store, job)) > len(tokens(count))


async def test_a_close_lets_end_what_nobody_could_continue(store: Store) -> None:
    """What another replica would have to start over gets the grace time to end here."""
    standing, go_on = asyncio.Event(), asyncio.Event()

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Delta(text="half ")]
        standing.set()
        await go_on.wait()
        yield [Delta(text="whole", finish_reason="stop")]

    job = await submit(store)
    async with replica(store, Scripted(generate)) as scheduler:
        await standing.wait()
        closing = asyncio.create_task(scheduler.close(30))
        await asyncio.sleep(0)
        go_on.set()
        await closing
    log = await stored(store, job.id)
    assert (await status_of(store, job), text_of(log)) == ("completed", "half whole")


async def test_a_dead_replicas_jobs_are_taken_over(store: Store) -> None:
    """When a replica falls silent another goes on from the last logged token after the lease; the text is exact."""
    async with distant(store) as (far, _):
        jobs = [await submit(store, tokens=80) for _ in range(4)]
        async with replica(store, echo(delay_ms=4)) as first:
            for job in jobs:
                await wait_until(lambda job=job: _is_longer(store, job, 5))  # type: ignore[misc]
            following = [asyncio.create_task(drain(far.log.follow(job.id))) for job in jobs]
            await die(first)
            async with replica(far, echo(delay_ms=1), name="r2"):
                for job, log in zip(jobs, await asyncio.gather(*following), strict=True):
                    assert text_of(log) == tokens(80)
                    assert log == await stored(store, job.id)
                    assert sum(isinstance(event.data, Started) for event in log) == 2
                await wait_until(lambda: idle(store))


async def test_a_replica_that_was_away_drops_what_moved_on(store: Store) -> None:
    """A replica cut off for longer than its lease stops the models of jobs that another one took, also when they say
    nothing, and works again afterwards."""
    provider = echo()
    async with distant(store, timeout_s=0.2) as (far, proxy):
        job = await submit(store, fault="stall", at=2, tokens=5, attempts=1)
        async with replica(far, provider, name="cut-off"):
            await wait_until(lambda: _is(said(store, job), tokens(2)))
            proxy.pause()
            async with replica(store, Scripted(_quick, continues=True), name="other"):
                log = await drain(store.log.follow(job.id))
            assert text_of(log) == tokens(2) + "quick"
            assert provider.running == 1
            proxy.cut()
            proxy.resume()
            await wait_until(lambda: provider.running == 0)
            again = await submit(store, tokens=3)
            assert text_of(await drain(store.log.follow(again.id))) == tokens(3)
        assert log == await stored(store, job.id)


async def _quick(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
    yield [Delta(text="quick", finish_reason="stop")]


@pytest.mark.parametrize("needle", [lanes_module._CLAIM.sha, lanes_module._SETTLE.sha])
async def test_a_lost_answer_strands_no_job(store: Store, needle: str) -> None:
    """A claim or a settlement whose answer was lost is found out and put right."""
    async with distant(store) as (far, proxy), replica(far):
        warm = await submit(store, tokens=1)
        await drain(store.log.follow(warm.id))
        await wait_until(lambda: idle(store))
        trap = proxy.trap(needle.encode())
        job = await submit(store, tokens=5)
        assert text_of(await drain(store.log.follow(job.id))) == tokens(5)
        await trap.sprung.wait()
        await wait_until(lambda: idle(store))


async def test_a_claim_that_arrives_late_strands_no_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that the store counts as ours without our knowing, for whatever reason, is put back by itself."""
    monkeypatch.setattr(scheduler_module, "RECONCILE_BEATS", 2)
    async with replica(store, echo(slots=1)):
        blocker = await submit(store, fault="stall")
        await wait_until(lambda: _is(status_of(store, blocker), "in_progress"))
        job = await submit(store, tokens=5)
        assert (await lanes_of(store).claim("r1", 1)).ids == [job.id]
        await store.jobs.end(blocker.id, finished("cancelled"))
        assert text_of(await drain(store.log.follow(job.id))) == tokens(5)


async def test_a_claim_is_never_without_a_lease(store: Store) -> None:
    """Jobs claimed by a replica that never sends a heartbeat are taken back all the same."""
    job = await submit(store, tokens=5)
    assert (await lanes_of(store).claim("ghost", 1)).ids == [job.id]
    async with replica(store):
        assert text_of(await drain(store.log.follow(job.id))) == tokens(5)


async def test_what_others_do_not_take_is_taken(store: Store) -> None:
    """Jobs that an idle replica leaves to a silent one are claimed a moment later, long before its lease lapses."""
    await lanes_of(store).heartbeat("silent", 8, 60, 0)
    async with replica(store, echo(slots=8)):
        jobs = [await submit(store, fault="stall") for _ in range(8)]

        async def all_taken() -> bool:
            return (await lanes_of(store).census()).running == {"r1": len(jobs)}

        await wait_until(all_taken)
        for job in jobs:
            await store.jobs.end(job.id, finished("cancelled"))


async def test_leaving_with_everything_keeps_times_to_live(store: Store) -> None:
    """A replica that leaves with the last waiting job in its hands puts it back under keys that expire."""
    lanes = lanes_of(store)
    await submit(store)
    await lanes.heartbeat("going", 1, 60, 0)
    await lanes.claim("going", 1)
    await lanes.leave("going")
    await assert_every_key_expires(store)


async def test_after_an_outage_nobody_loses_a_lease(store: Store) -> None:
    """When all leases lapsed because the store was away, the first one back leaves the others' jobs alone."""
    lanes = lanes_of(store)
    first, second = await submit(store), await submit(store)
    for name in ("a", "b"):
        await lanes.heartbeat(name, 1, 0.05, 0)
        await lanes.claim(name, 1)
    start = asyncio.get_running_loop().time()
    await wait_until(lambda: asyncio.get_running_loop().time() > start + 0.06)
    assert (await lanes.heartbeat("a", 1, 60, 0)).taken_back == 0
    assert (await lanes.heartbeat("b", 1, 60, 0)).taken_back == 0
    assert await lanes.claimed_by("a") | await lanes.claimed_by("b") == {first.id, second.id}


async def test_a_broken_provider_breaks_no_scheduler(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Jobs fail one by one on a provider that raises what nobody expected; the replica goes on claiming."""

    async def generate(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Delta(text="part")]
        raise ZeroDivisionError

    caplog.set_level(logging.CRITICAL)
    async with replica(store, Scripted(generate, slots=2)) as scheduler:
        jobs = [await submit(store) for _ in range(10)]
        for job in jobs:
            log = await drain(store.log.follow(job.id))
            assert text_of(log) == "part"
            assert await status_of(store, job) == "failed"
        await wait_until(lambda: scheduler.running == 0)
        await wait_until(lambda: idle(store))


async def test_a_waiting_job_fails_at_its_deadline(store: Store) -> None:
    """A job that is still waiting at the deadline of its request ends as ``deadline_exceeded``."""
    async with replica(store, echo(slots=1)):
        blocker = await submit(store, fault="stall")
        await wait_until(lambda: _is(status_of(store, blocker), "in_progress"))
        job = await submit(store, expires_at=1.0)
        await drain(store.log.follow(job.id))
        state = await store.jobs.get(job.id)
        assert state.failure is not None
        assert (state.status, state.attempt, state.failure.code) == ("failed", 0, "deadline_exceeded")
        await store.jobs.end(blocker.id, finished("cancelled"))


async def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    """Beyond ``max_waiting`` a job is refused with a time to retry that follows from the measured rate, and leaves no
    record behind."""
    settings: Settings = echo_settings(tmp_path, slots=1, scheduler=SchedulerSettings(max_waiting=2))
    async with open_gateway(settings) as gateway:

        def ask(**options: object) -> GenerateRequest:
            return GenerateRequest.of(kind="chat", model=MODEL, body={"messages": [], "echo": options})

        for _ in range(3):
            _, follower = await gateway.start(ask(tokens=20, delay_ms=10))
            await drain(follower)
        running = await gateway.submit(ask(fault="stall"))
        await wait_until(lambda: _started(gateway, running))
        waiting = [await gateway.submit(ask()) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 jobs wait") as caught:
            await gateway.submit(ask())
        assert caught.value.retry_after is not None
        assert 0.1 < caught.value.retry_after < 1.0  # about 0.2 s of service on one slot
        for job in (*waiting, running):
            await gateway.cancel(job.id)
            assert (await gateway.cancel(job.id)).status == "cancelled"


async def _started(gateway: object, job: Job) -> bool:
    return bool((await gateway.job(job.id)).attempt)  # type: ignore[attr-defined]


async def test_many_jobs_over_the_constant_connections(store: Store) -> None:
    """Five hundred jobs at once use as many connections as one."""

    async def connections() -> int:
        raw: bytes = await store.writes.call("CLIENT", "LIST")
        return len(raw.splitlines())

    async with replica(store, echo(slots=100)):
        await store.reads.call("PING")
        before = await connections()
        jobs = [await submit(store, tokens=20, delay_ms=1) for _ in range(500)]
        following = [asyncio.create_task(drain(store.log.follow(job.id))) for job in jobs]
        assert await connections() == before
        assert all(text_of(log) == tokens(20) for log in await asyncio.gather(*following))
        assert await connections() == before
    assert store.tail.channels == {}


async def test_a_job_nobody_knows_is_dropped(store: Store) -> None:
    """A queued id without a record is settled, not run."""
    job = Job(id=new_id(), request=GenerateRequest.of(kind="chat", model=MODEL, body={}), pool=MODEL, created_at=0.0)
    await lanes_of(store).push(job)
    async with replica(store):
        await wait_until(lambda: idle(store))
    assert await store.jobs.find(job.id) is None
