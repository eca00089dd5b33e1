"""Schedules, pauses and drains with several replicas on one store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from llmstream.config import SchedulerSettings
from llmstream.errors import BadRequest
from llmstream.scheduler.control import MAX_RULES, QueueControl
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.store import Store
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, Job, ModelInfo, QueueRule, QueueRules, Started, new_id
from tests.logs import drain, stored
from tests.replica import FAST, MODEL, Scripted, lanes_of, replica
from tests.scheduler.test_scheduler import die, status_of
from tests.waiting import wait_until


class TwoModels(Scripted):
    """A pool with two models."""

    models = ModelInfo(name="one", provider=MODEL), ModelInfo(name="two", provider=MODEL)

    def __init__(self, gate: asyncio.Event) -> None:
        async def script(request: GenerateRequest, so_far: Transcript | None) -> AsyncGenerator[Sequence[Delta], None]:
            await gate.wait()
            yield [Delta(text="x", finish_reason="stop")]

        super().__init__(script, slots=2)


async def submit(store: Store, model: str = "one", *, priority: int = 0, delay_s: float | None = None) -> Job:
    now = time.time()
    job = Job(
        id=new_id(),
        request=GenerateRequest.of(kind="chat", model=model, body={"nonce": new_id()}),
        pool=MODEL,
        created_at=now,
        priority=priority,
        not_before=None if delay_s is None else now + delay_s,
    )
    assert await store.jobs.create(job)
    assert await lanes_of(store).push(job)
    return job


@asynccontextmanager
async def replicas(store: Store, gate: asyncio.Event, count: int = 3) -> AsyncIterator[list[Scheduler]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(replica(store, TwoModels(gate), name=f"r{n}")) for n in range(count)]


def free() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


def outsider(store: Store) -> QueueControl:
    """Somebody who changes the rules, and then is gone."""
    return QueueControl(store, lambda pool: store.lanes(pool, FAST))


async def begun_at(store: Store, job: Job) -> float:
    first = (await stored(store, job.id))[0].data
    assert isinstance(first, Started)
    return first.at


async def test_jobs_begin_at_their_time_on_any_replica(store: Store) -> None:
    """Of forty jobs of forty times none begins before its own on any of three replicas, and all are answered, although
    nobody told the replicas of them."""
    async with replicas(store, free()):
        jobs = [await submit(store, delay_s=0.3 + number * 0.01) for number in range(40)]
        await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs))
    assert min([await begun_at(store, job) - (job.not_before or 0) for job in jobs]) >= 0


async def test_an_alarm_is_more_exact_than_heartbeats(store: Store) -> None:
    """A replica that beats twice a second begins jobs within some milliseconds of their times."""
    calm = SchedulerSettings(lease_s=10)
    async with replica(store, TwoModels(free()), settings=calm) as scheduler:
        beats = scheduler.pools[MODEL].beats
        jobs = [await submit(store, delay_s=0.7 + number * 0.03) for number in range(20)]
        await wait_until(lambda: scheduler.pools[MODEL].beats > beats)
        await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs))
    late = sorted([await begun_at(store, job) - (job.not_before or 0) for job in jobs])
    assert late[5] < 0.05  # by heartbeats it would be 0.125; the rest is left to a busy machine


async def test_jobs_whose_time_came_while_nobody_was_there_begin_with_the_first_replica(store: Store) -> None:
    """The schedule is the store's: replicas that were there before and are gone leave it as it is."""
    async with replicas(store, free(), 1) as (first,):
        job = await submit(store, delay_s=0.3)
        await die(first)
        start = time.monotonic()
        await wait_until(lambda: time.monotonic() - start > 0.4)
        assert await status_of(store, job) == "queued"
        async with replica(store, TwoModels(free()), name="late"):
            await drain(store.log.follow(job.id))
    assert await begun_at(store, job) >= (job.not_before or 0)


async def test_nothing_of_a_paused_model_is_claimed_by_any_of_three_replicas(store: Store) -> None:
    """With two models in one pool under load: once the pause is acknowledged no job of that model is claimed any more,
    those of the other one go on, those that ran end; once it is resumed all jobs end."""
    gate = asyncio.Event()
    async with replicas(store, gate):
        jobs = [await submit(store, model) for _ in range(40) for model in ("one", "two")]
        await wait_until(lambda: _running(store, 6))
        rules = await outsider(store).hold("paused", None, "on?", "admin")
        assert [rule.by for rule in rules.rules] == ["admin"]
        running = await _claimed(store)
        gate.set()
        one = {job.id for job in jobs if job.request.model == "one"}
        await asyncio.gather(
            *(drain(store.log.follow(job.id)) for job in jobs if job.id not in one or job.id in running)
        )
        jobs += [await submit(store, "one") for _ in range(5)]
        started = {job.id for job in jobs if await status_of(store, job) != "queued"}
        assert started & one == running & one
        assert (await lanes_of(store).census()).paused == 45 - len(running & one)
        await outsider(store).resume(None, "on?")
        await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs))
    assert {await status_of(store, job) for job in jobs} == {"completed"}


async def _claimed(store: Store) -> set[str]:
    return {job.id async for page in lanes_of(store).alive() for job in page if job.running}


async def _running(store: Store, count: int) -> bool:
    return sum((await lanes_of(store).census()).running.values()) == count


async def test_a_replica_that_comes_during_a_pause_keeps_to_it(store: Store) -> None:
    """A pause outlives all replicas, and holds in the queue of a pool that there was none of before."""
    await outsider(store).hold("paused", "default", None, "admin")
    job = await submit(store)
    async with replicas(store, free(), 1) as (scheduler,):
        beats = scheduler.pools[MODEL].beats
        await wait_until(lambda: scheduler.pools[MODEL].beats > beats + 2)
        assert await status_of(store, job) == "queued"
        assert (await lanes_of(store).standing(job.id)).paused
        await scheduler.control.resume("default", None)
        await drain(store.log.follow(job.id))


async def test_heartbeats_finish_what_a_change_left_undone(store: Store) -> None:
    """Whoever pauses or resumes may die after any step: replicas go on from the record, and nothing is stranded."""
    async with replicas(store, free(), 2):
        await outsider(store).hold("paused", None, "one", "admin")
        jobs = [await submit(store) for _ in range(5)]

        def nothing(rules: tuple[QueueRule, ...]) -> tuple[QueueRule, ...]:
            return ()

        await store.control.change(nothing)  # on record, and spread by nobody
        await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs))
        await outsider(store).hold("paused", None, "one", "admin")
        jobs = [await submit(store) for _ in range(5)]
        await lanes_of(store).control(await store.control.change(nothing))  # in the queue, and swept by nobody
        await asyncio.gather(*(drain(store.log.follow(job.id)) for job in jobs))


async def test_a_store_that_forgot_the_rules_gets_them_back(store: Store) -> None:
    """The record is gone, as after a power loss: the replicas know it, and write it again."""
    async with replicas(store, free(), 1) as (scheduler,):
        rules = await scheduler.control.hold("paused", "low", "two", "admin")
        await store.writes.call("DEL", store.keys.queues, lanes_of(store)._key("control"))
        control = store.control

        async def back() -> bool:
            pulse = await lanes_of(store).heartbeat("looking", 0, 1.0, 0)
            return await control.read() == rules and pulse.swept == rules.version

        await wait_until(back)


async def test_rules_are_the_queues_after_all_who_knew_them_are_gone(store: Store) -> None:
    """The record is older than a queue's copy, which nobody can have made: the record holds, everywhere."""
    await lanes_of(store).control(QueueRules(int(time.time() * 1000), (QueueRule(mode="paused"),)))
    job = await submit(store)
    async with replicas(store, free(), 1):
        await drain(store.log.follow(job.id))


async def test_many_change_the_rules_at_once(store: Store) -> None:
    """No change gets lost between others; one that is made twice is there once; there is a bound."""
    await asyncio.gather(*(outsider(store).hold("draining", None, f"m{number % 5}", "admin") for number in range(10)))
    rules = (await store.control.read()).rules
    assert sorted(rule.model or "" for rule in rules) == [f"m{number}" for number in range(5)]
    await outsider(store).resume(None, "m3")
    assert len((await store.control.read()).rules) == 4
    await store.control.change(lambda _: tuple(QueueRule(mode="paused", model=f"n{n}") for n in range(MAX_RULES)))
    with pytest.raises(BadRequest):
        await outsider(store).hold("paused", None, "one more", "admin")
    assert (await outsider(store).resume_all()).rules == ()
