"""Jobs of callers with limits in the queue of a pool: so many run, so many wait, and others pass them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstream.config import SchedulerSettings
from llmstream.store.lanes import OTHERS_MAY, Lanes, Pushed
from llmstream.store.store import Store
from llmstream.types import Counted, GenerateRequest, Job, new_id
from tests.waiting import wait_until

REQUEST = GenerateRequest.of(kind="chat", model="echo", body={})


def make_job(who: str | None = "a", *, concurrent: int | None = None, queued: int | None = None, **more: Any) -> Job:
    counted = Counted(who, concurrent=concurrent, queued=queued) if who is not None else None
    given = {"id": new_id(), "created_at": time.time(), "principal": who or "other", **more}
    return Job(request=REQUEST, pool="p", counted=counted, **given)


def lanes_of(store: Store, **changes: object) -> Lanes:
    return store.lanes(f"p{new_id()}", SchedulerSettings().model_copy(update=changes))


async def push(lanes: Lanes, *jobs: Job) -> list[str]:
    for job in jobs:
        assert await lanes.push(job)
    return [job.id for job in jobs]


async def claimed(lanes: Lanes, count: int = 100, replica: str = "r") -> list[str]:
    return (await lanes.claim(replica, count)).ids


async def waiting(lanes: Lanes) -> int:
    return sum((await lanes.census()).waiting.values())


async def test_so_many_run_and_the_rest_is_passed(store: Store) -> None:
    """No more than the limit are claimed, whoever claims; jobs of others behind them are, and nobody is told to come
    again for what has to wait."""
    lanes = lanes_of(store)
    own = await push(lanes, *(make_job(concurrent=2) for _ in range(6)))
    others = await push(lanes, make_job("b", concurrent=1), make_job(None), make_job(None))
    assert await claimed(lanes, 1) == [own[0]]
    assert set(await claimed(lanes, 100, "another")) == {own[1], *others}
    found = await lanes.claim("r", 10)
    assert (found.ids, found.left) == ([], 0)
    assert await waiting(lanes) == 4


async def test_each_end_lets_the_next_one_go(store: Store) -> None:
    """When one of the caller's ends, its next one stands in line, and the most urgent of those that are parked."""
    lanes = lanes_of(store)
    number = (await lanes.claim("r", 0)).number
    first = await push(lanes, make_job(concurrent=1))
    found = await lanes.claim("r", 9)
    low, high = await push(lanes, make_job(concurrent=1, priority=-10), make_job(concurrent=1, priority=10))
    assert found.ids == first
    assert found.number > number
    assert await claimed(lanes) == []
    assert await lanes.settle(first[0], "r", found.number) & OTHERS_MAY
    found = await lanes.claim("r", 9)
    assert found.ids == [high]
    assert await lanes.settle(high, "r", found.number) & OTHERS_MAY
    found = await lanes.claim("r", 9)
    assert found.ids == [low]
    assert await lanes.settle(low, "r", found.number) == 1
    assert await waiting(lanes) == 0


@pytest.mark.parametrize("parked_first", [True, False])
async def test_cancelled_ones_make_room(store: Store, *, parked_first: bool) -> None:
    """A job that is cancelled, parked or in line, takes nobody's place, and leaves nothing behind."""
    lanes = lanes_of(store)
    running, second, third, fourth = await push(lanes, *(make_job(concurrent=1) for _ in range(4)))
    number = (await lanes.claim("r", 9)).number
    if parked_first:
        assert await lanes.remove(second)
        await lanes.settle(running, "r", number)
        assert await lanes.remove(third)  # it stood in line
    else:
        await lanes.settle(running, "r", number)
        assert await lanes.remove(second)
        assert await lanes.remove(third)
    assert await claimed(lanes) == [fourth]


async def test_a_dead_replicas_jobs_count_until_they_are_taken_over(store: Store) -> None:
    """Jobs of a replica that fell silent are claimed again, no more of them than the limit, and nothing leaks."""
    lanes = lanes_of(store)
    await lanes.heartbeat("dead", 4, 0.02, 0)
    ids = await push(lanes, *(make_job(concurrent=2) for _ in range(5)))
    assert await claimed(lanes, 9, "dead") == ids[:2]
    assert await claimed(lanes, 9, "alive") == []

    async def taken_back() -> bool:
        return (await lanes.heartbeat("alive", 4, 60, 0)).taken_back == 2

    await wait_until(taken_back)
    for round_ in (ids[:2], ids[2:4], ids[4:]):
        found = await lanes.claim("alive", 9)
        assert found.ids == round_
        for job_id in round_:
            await lanes.settle(job_id, "alive", found.number)
    assert await waiting(lanes) == 0


async def test_released_and_left_ones_are_claimed_again(store: Store) -> None:
    """What a replica hands back, or leaves, has its place among the caller's."""
    lanes = lanes_of(store)
    ids = await push(lanes, *(make_job(concurrent=2) for _ in range(4)))
    assert await claimed(lanes, 9, "one") == ids[:2]
    await lanes.release(ids[0], "one")
    assert await claimed(lanes, 9, "two") == [ids[0]]
    await lanes.leave("one")
    assert await claimed(lanes, 9, "two") == [ids[1]]


async def test_claims_written_again_count(store: Store) -> None:
    """Where the store had lost that jobs run, they count once their replica has said so."""
    lanes = lanes_of(store)
    lost = make_job(concurrent=1)
    await lanes.reclaim("r", [(lost, 5)])
    (waits,) = await push(lanes, make_job(concurrent=1))
    assert await claimed(lanes) == []
    assert await lanes.settle(lost.id, "r", 5) & OTHERS_MAY
    assert await claimed(lanes) == [waits]


async def test_so_many_wait_and_more_are_refused(store: Store) -> None:
    """The bound on one caller's waiting jobs is exact, parked ones counted; others, and jobs put back, are not
    refused."""
    lanes = lanes_of(store)
    first = await push(lanes, *(make_job(concurrent=1, queued=2) for _ in range(2)))
    assert await lanes.push(make_job(concurrent=1, queued=2)) is Pushed.CALLER_FULL
    assert await lanes.push(make_job("b", queued=1))
    assert len(await claimed(lanes)) == 2
    await push(lanes, make_job(concurrent=1, queued=2))
    assert await lanes.push(make_job(concurrent=1, queued=2)) is Pushed.CALLER_FULL
    assert await lanes.push(make_job(queued=2), again=True)
    assert await waiting(lanes) == 3
    await lanes.remove(first[1])
    assert await waiting(lanes) == 2


async def test_parked_ones_count_for_all(store: Store) -> None:
    """The bound on all waiting jobs counts them, too."""
    lanes = lanes_of(store, max_waiting=2)
    await push(lanes, make_job(concurrent=1))
    await lanes.claim("r", 1)
    await push(lanes, make_job(concurrent=1), make_job(concurrent=1))
    assert await claimed(lanes) == []
    assert await lanes.push(make_job(concurrent=1)) is Pushed.FULL
    assert await lanes.push(make_job(None)) is Pushed.FULL


async def test_where_a_parked_job_stands(store: Store) -> None:
    """It is waiting, behind those of its caller that come first; its deadline is watched."""
    lanes = lanes_of(store)
    await push(lanes, make_job(concurrent=1))
    await lanes.claim("r", 1)
    ids = await push(lanes, *(make_job(concurrent=1, expires_at=time.time() - 1) for _ in range(3)))
    assert await claimed(lanes) == []
    await push(lanes, make_job(None, priority=10))
    assert [(await lanes.standing(job_id)).ahead for job_id in ids] == [1, 2, 3]
    assert set((await lanes.heartbeat("r", 1, 60, 0)).overdue) == set(ids)


async def test_its_turn_is_kept(store: Store) -> None:
    """A job that was parked has its old place: those who came later do not all go before it."""
    lanes = lanes_of(store)
    await push(lanes, *(make_job(None) for _ in range(30)))
    await lanes.claim("r", 29)
    first, second = await push(lanes, make_job(concurrent=1), make_job(concurrent=1))
    found = await lanes.claim("r", 9)
    assert first in found.ids
    await lanes.settle(first, "r", found.number)
    await push(lanes, *(make_job(None) for _ in range(10)))
    assert (await claimed(lanes)).index(second) <= 1


async def test_a_long_line_is_parked_bit_by_bit(store: Store) -> None:
    """A claim does not stop the store for long, however many of a caller's have to step aside."""
    lanes = lanes_of(store)
    await push(lanes, *(make_job(concurrent=1) for _ in range(300)))
    (behind,) = await push(lanes, make_job(None, priority=-10))
    assert len((await lanes.claim("r", 2)).ids) == 1
    claims = 0
    while not await claimed(lanes, 1):
        claims += 1
        assert claims < 5
    assert claims >= 1
    assert await lanes.remove(behind) is False


CAPS = {"a": 1, "b": 2, "c": None}


class Pool:
    """A pool whose callers have limits, and what is known of its jobs outside of the store."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.jobs: dict[str, Job] = {}
        self.running: dict[str, tuple[str, int]] = {}
        self.over: set[str] = set()

    async def push(self, number: int) -> None:
        who = "abc"[number % 3]
        job = make_job(who, concurrent=CAPS[who], priority=number % 21 - 10)
        self.jobs[job.id] = job
        await push(self.lanes, job)

    async def claim(self, number: int) -> None:
        replica = f"r{number % 2}"
        found = await self.lanes.claim(replica, number)
        self.running.update(dict.fromkeys(found.ids, (replica, found.number)))

    async def settle(self, number: int) -> None:
        if self.running:
            job_id = list(self.running)[number % len(self.running)]
            await self.lanes.settle(job_id, *self.running.pop(job_id))
            self.over.add(job_id)

    async def release(self, number: int) -> None:
        if self.running:
            job_id = list(self.running)[number % len(self.running)]
            await self.lanes.release(job_id, self.running.pop(job_id)[0])

    async def leave(self, number: int) -> None:
        replica = f"r{number % 2}"
        await self.lanes.leave(replica)
        self.running = {job_id: claim for job_id, claim in self.running.items() if claim[0] != replica}

    async def remove(self, number: int) -> None:
        live = [job_id for job_id in self.jobs if job_id not in self.over]
        if live and await self.lanes.remove(live[number % len(live)]):
            self.over.add(live[number % len(live)])

    def busy(self, who: str) -> int:
        return sum(self.jobs[job_id].principal == who for job_id in self.running)

    def waiting(self, who: str) -> int:
        gone = self.over | self.running.keys()
        return sum(job.principal == who and job_id not in gone for job_id, job in self.jobs.items())


STEPS = (Pool.push, Pool.claim, Pool.settle, Pool.release, Pool.leave, Pool.remove)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 30)), max_size=60))
async def test_whatever_happens(store: Store, steps: Sequence[tuple[Any, int]]) -> None:
    """In any order of events no caller has more running than allowed, nor waits while it has less; in the end all have
    run."""
    pool = Pool(lanes_of(store))
    for step, number in steps:
        await step(pool, number)
        assert all(cap is None or pool.busy(who) <= cap for who, cap in CAPS.items())
    for _ in range(len(pool.jobs) + 1):
        await pool.claim(100)
        assert all(pool.waiting(who) == 0 or pool.busy(who) == cap for who, cap in CAPS.items())
        await pool.settle(0)
    assert pool.over == pool.jobs.keys()
    keys = [pool.lanes._key(part) for part in ("callers", "parked", "meta", "order", "ages")]
    assert await pool.lanes._pipeline.call("EXISTS", *keys) == 0
