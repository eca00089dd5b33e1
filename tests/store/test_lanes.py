"""The queue's order, claims and leases, on a real Valkey."""

from __future__ import annotations

import time
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstream.config import SchedulerSettings
from llmstream.store.lanes import Lanes
from llmstream.store.store import Store
from llmstream.types import GenerateRequest, Job, new_id
from tests.waiting import wait_until

SETTINGS = SchedulerSettings()
REQUEST = GenerateRequest.of(kind="chat", model="echo", body={})


def make_job(priority: int = 0, principal: str = "a", expires_at: float | None = None) -> Job:
    return Job(
        id=new_id(),
        request=REQUEST,
        pool="p",
        created_at=time.time(),
        priority=priority,
        principal=principal,
        expires_at=expires_at,
    )


async def push(lanes: Lanes, *jobs: Job) -> list[str]:
    for job in jobs:
        assert await lanes.push(job)
    return [job.id for job in jobs]


def lanes_of(store: Store, **changes: object) -> Lanes:
    return store.lanes(f"p{new_id()}", SETTINGS.model_copy(update=changes))


async def test_higher_priority_goes_first(store: Store) -> None:
    """Every one of the 21 priorities goes before the ones below it."""
    lanes = lanes_of(store)
    by_priority = {priority: (await push(lanes, make_job(priority)))[0] for priority in (0, -10, 10, 3, -4, 4, -3)}
    claimed = (await lanes.claim("r", 10)).ids
    assert claimed == [by_priority[priority] for priority in sorted(by_priority, reverse=True)]


async def test_waiting_makes_urgent(store: Store) -> None:
    """A job that has waited for longer than its lower priority costs goes before a fresh one of higher priority."""
    lanes = lanes_of(store, ageing_s=0.001)  # 20 steps of priority are worth 20 ms
    (old,) = await push(lanes, make_job(-10))
    start = time.monotonic()
    await wait_until(lambda: time.monotonic() - start > 0.05)
    (young,) = await push(lanes, make_job(10))
    assert (await lanes.claim("r", 2)).ids == [old, young]


async def test_principals_take_turns(store: Store) -> None:
    """A principal with one job does not wait behind another's hundred, and a hundred do not starve."""
    lanes = lanes_of(store)
    greedy = await push(lanes, *(make_job(principal="greedy") for _ in range(100)))
    assert (await lanes.claim("r", 10)).ids == greedy[:10]
    modest = await push(lanes, *(make_job(principal="modest") for _ in range(3)))
    claimed = (await lanes.claim("r", 8)).ids
    assert sorted(claimed.index(job_id) for job_id in modest) in ([0, 2, 4], [1, 3, 5])
    assert [job_id for job_id in claimed if job_id in greedy] == greedy[10:15]


async def test_claims_only_what_is_asked_for(store: Store) -> None:
    """A claim never takes more jobs than there are free slots, nor one job twice."""
    lanes = lanes_of(store)
    ids = await push(lanes, *(make_job() for _ in range(10)))
    first, second = (await lanes.claim("r1", 4)).ids, (await lanes.claim("r2", 100)).ids
    assert first + second == ids


async def test_pushing_twice_is_once(store: Store) -> None:
    """Repeating a push whose answer was lost changes nothing."""
    lanes = lanes_of(store)
    job = make_job()
    await push(lanes, job, job)
    assert (await lanes.claim("r", 10)).ids == [job.id]


async def test_a_full_queue_refuses(store: Store) -> None:
    """The bound on waiting jobs is exact."""
    lanes = lanes_of(store, max_waiting=2)
    await push(lanes, make_job(), make_job())
    assert not await lanes.push(make_job(10))
    await lanes.claim("r", 1)
    assert await lanes.push(make_job())


async def test_a_lapsed_lease_frees_its_jobs(store: Store) -> None:
    """Jobs of a replica that fell silent wait again, at the front of their level."""
    lanes = lanes_of(store)
    await lanes.heartbeat("dead", 4, 0.02, 0)
    ids = await push(lanes, *(make_job() for _ in range(4)))
    assert (await lanes.claim("dead", 2)).ids == ids[:2]

    async def taken_back() -> bool:
        return (await lanes.heartbeat("alive", 4, 60, 0)).taken_back == 2

    await wait_until(taken_back)
    assert (await lanes.claim("alive", 4)).ids == ids


async def test_a_living_lease_keeps_its_jobs(store: Store) -> None:
    """A replica's heartbeat renews all of its claims at once."""
    lanes = lanes_of(store)
    await lanes.heartbeat("alive", 4, 60, 0)
    await push(lanes, make_job(), make_job())
    await lanes.claim("alive", 2)
    assert (await lanes.heartbeat("other", 4, 60, 0)).taken_back == 0
    assert (await lanes.claim("other", 2)).ids == []


async def test_settle_and_release_only_touch_ones_own(store: Store) -> None:
    """A replica cannot give back or finish what another one has claimed, nor finish what it has claimed anew itself."""
    lanes = lanes_of(store)
    (job_id,) = await push(lanes, make_job())
    first = await lanes.claim("owner", 1)
    await lanes.settle(job_id, "stranger", first.number)
    await lanes.release(job_id, "stranger")
    assert await lanes.claimed_by("owner") == {job_id}
    await lanes.release(job_id, "owner")
    second = await lanes.claim("owner", 1)
    assert second.ids == [job_id]
    await lanes.settle(job_id, "owner", first.number)
    assert await lanes.claimed_by("owner") == {job_id}
    await lanes.settle(job_id, "owner", second.number)
    census = await lanes.census()
    assert (census.running, census.served) == ({}, 1)


async def test_leaving_hands_everything_over(store: Store) -> None:
    """A replica that goes orderly leaves its jobs to the others at once."""
    lanes = lanes_of(store)
    await lanes.heartbeat("going", 4, 60, 0)
    ids = await push(lanes, make_job(), make_job())
    await lanes.claim("going", 2)
    await lanes.leave("going")
    assert (await lanes.claim("staying", 2)).ids == ids
    assert "going" not in (await lanes.census()).slots


async def test_removing_a_waiting_job(store: Store) -> None:
    """A cancelled job leaves the line at once and its owner learns of it at the next heartbeat."""
    lanes = lanes_of(store)
    first, second = await push(lanes, make_job(), make_job())
    assert await lanes.remove(first)
    assert (await lanes.heartbeat("r", 1, 60, 0)).cancelled == [first]
    assert (await lanes.claim("r", 2)).ids == [second]


async def test_overdue_jobs_are_reported(store: Store) -> None:
    """A waiting job whose own deadline has passed is reported until it is taken out."""
    lanes = lanes_of(store)
    (late,) = await push(lanes, make_job(expires_at=time.time() - 1))
    await push(lanes, make_job(expires_at=time.time() + 100))
    assert (await lanes.heartbeat("r", 1, 60, 0)).overdue == [late]
    await lanes.remove(late)
    assert (await lanes.heartbeat("r", 1, 60, 0)).overdue == []


async def test_the_rate_is_measured(store: Store) -> None:
    """The estimated wait follows from the measured service time and the slots of all living replicas."""
    lanes = lanes_of(store)
    await lanes.heartbeat("r1", 3, 60, 0)
    await lanes.heartbeat("r2", 5, 60, 0)
    (served,) = await push(lanes, make_job())
    claimed = await lanes.claim("r1", 1)
    await lanes.settle(served, "r1", claimed.number)
    ids = await push(lanes, *(make_job() for _ in range(16)))
    standing = await lanes.standing(ids[15])
    assert (standing.ahead, standing.slots) == (15, 8)
    assert standing.service_s is not None
    assert standing.eta_s == round(16 * standing.service_s / 8, 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.lists(st.tuples(st.integers(-10, 10), st.sampled_from("abc")), min_size=1, max_size=30))
async def test_positions_are_the_order_of_service(store: Store, jobs: list[tuple[int, str]]) -> None:
    """The reported position is the real one, whatever priorities and principals wait."""
    lanes = lanes_of(store, ageing_s=1000.0)
    ids = await push(lanes, *(make_job(priority, principal) for priority, principal in jobs))
    said = {job_id: (await lanes.standing(job_id)).ahead for job_id in ids}
    positions = [said[job_id] for job_id in (await lanes.claim("r", len(ids))).ids]
    assert positions[0] == 0
    assert all(a is not None and b is not None and a <= b for a, b in pairwise(positions))


async def test_a_share_keeps_replicas_level(store: Store) -> None:
    """A replica gets its part of all jobs by slots, running ones included, and all of them when it is alone."""
    lanes = lanes_of(store)
    await lanes.heartbeat("small", 4, 60, 0)
    ids = await push(lanes, *[make_job() for _ in range(17)])
    alone = await lanes.claim_share("small", 1, 0)
    assert alone[:2] == (ids[:1], 16)
    await lanes.heartbeat("large", 12, 60, 0)
    assert (await lanes.claim_share("small", 64, 1))[:2] == (ids[1:5], 12)
    assert (await lanes.claim_share("small", 64, 5))[:2] == ([], 12)
    assert (await lanes.claim_share("large", 64, 0))[:2] == (ids[5:], 0)


async def test_jobs_left_to_others_wake_them(store: Store) -> None:
    """Whoever leaves jobs that others have slots for tells them; a quiet push tells nobody."""
    woken: list[str] = []
    store.signals.on_work = woken.append
    lanes, other = lanes_of(store), lanes_of(store)
    for name in ("a", "b"):
        await lanes.heartbeat(name, 4, 60, 0)

    async def heard() -> bool:
        await other.push(make_job())
        return other.pool in woken

    await wait_until(heard)
    for job in (make_job(), make_job()):
        await lanes.push(job, wake=False)
    assert (await lanes.claim_share("a", 4, 0)).left == 1
    await wait_until(lambda: lanes.pool in woken)
    assert woken.count(lanes.pool) == 1
