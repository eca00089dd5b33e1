"""Events that are to be delivered: how they get into the outbox, who may take them, and what becomes of them."""

from __future__ import annotations

import time

import pytest
from msgspec.structs import replace

from llmstream.store.lanes import ANNOUNCED, Lanes
from llmstream.store.outbox import UNDELIVERED, Outbox, Tries
from llmstream.store.store import Store
from llmstream.types import Job
from tests.store.test_lanes import lanes_of, make_job, push

LEASE_S = 30.0


class Clock:
    """Time that the test owns."""

    def __init__(self) -> None:
        self.now = time.time() + 1  # what the queue puts in by the store's clock is due

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def hooked(*receivers: str) -> Job:
    return replace(make_job(), receivers=receivers or ("request",))


async def announced(store: Store, clock: Clock, *receivers: str, count: int = 1) -> tuple[Outbox, list[str]]:
    """An outbox with the events of some jobs that have ended."""
    lanes = lanes_of(store)
    ids = await push(lanes, *(hooked(*receivers) for _ in range(count)))
    claimed = await lanes.claim("r", count)
    for job_id in ids:
        assert await lanes.settle(job_id, "r", claimed.number) == ANNOUNCED
    return store.outbox(lanes.pool, clock), ids


async def names(outbox: Outbox) -> list[str]:
    return [delivery.name for delivery in (await outbox.take(100, 0.0))[0]]


async def test_the_end_of_a_claim_is_announced(store: Store, clock: Clock) -> None:
    """The step that takes a job off the queue puts its events into the outbox, once for each receiver."""
    outbox, (job_id,) = await announced(store, clock, "audit", "request")
    assert await names(outbox) == [f"{job_id}|audit", f"{job_id}|request"]


async def test_a_job_without_receivers_leaves_nothing(store: Store) -> None:
    """Neither an event nor a key."""
    lanes = lanes_of(store)
    (job_id,) = await push(lanes, make_job())
    claimed = await lanes.claim("r", 1)
    assert await lanes.settle(job_id, "r", claimed.number) == 1
    for part in ("hooked", "outbox"):
        assert await store.writes.call("EXISTS", lanes._key(part)) == 0


async def waiting(lanes: Lanes) -> str:
    (job_id,) = await push(lanes, hooked())
    return job_id


async def test_a_cancelled_waiting_job_is_announced(store: Store, clock: Clock) -> None:
    """Taking it out of the line is the end of it; repeating that announces nothing more."""
    lanes = lanes_of(store)
    job_id = await waiting(lanes)
    outbox = store.outbox(lanes.pool, clock)
    assert await lanes.remove(job_id)
    (taken,), _ = await outbox.take(9, LEASE_S)
    await outbox.done(taken)
    assert not await lanes.remove(job_id)
    assert await outbox.waiting() == 0


async def test_a_cancelled_running_job_is_announced_by_its_owner(store: Store, clock: Clock) -> None:
    """Not before its claim is settled, also by a replica that took it over."""
    lanes = lanes_of(store)
    job_id = await waiting(lanes)
    await lanes.claim("r", 1)
    assert not await lanes.remove(job_id, ("request",))
    outbox = store.outbox(lanes.pool, clock)
    assert await outbox.waiting() == 0
    await lanes.leave("r")
    claimed = await lanes.claim("s", 1)
    assert await lanes.settle(job_id, "r", claimed.number) == 0
    assert await outbox.waiting() == 0
    assert await lanes.settle(job_id, "s", claimed.number) == ANNOUNCED
    assert await names(outbox) == [f"{job_id}|request"]


async def test_a_claim_written_again_is_announced(store: Store, clock: Clock) -> None:
    """A store that lost a running job's place in line hears from its replica who is to be told."""
    lanes, job = lanes_of(store), hooked("audit")
    await lanes.reclaim("r", [(job, 7)])
    assert await lanes.settle(job.id, "r", 7) == ANNOUNCED
    assert await names(store.outbox(lanes.pool, clock)) == [f"{job.id}|audit"]


async def test_a_delivery_has_one_owner(store: Store, clock: Clock) -> None:
    """What is taken is nobody else's until the lease ends; who comes too late changes nothing."""
    outbox, _ = await announced(store, clock)
    (first,), _ = await outbox.take(9, LEASE_S)
    nothing, next_s = await outbox.take(9, LEASE_S)
    assert (nothing, next_s) == ([], LEASE_S)
    clock.now += LEASE_S
    (second,), _ = await outbox.take(9, LEASE_S)
    assert not await outbox.done(first)
    assert not await outbox.again(first, 0.0)
    assert not await outbox.give_up(first, Tries(1))
    assert await outbox.waiting() == 1
    assert await outbox.done(second)
    assert await outbox.waiting() == 0


async def test_a_failed_one_comes_back_with_its_tries(store: Store, clock: Clock) -> None:
    """After the wait it was given, not before."""
    outbox, _ = await announced(store, clock)
    (taken,), _ = await outbox.take(1, LEASE_S)
    assert await outbox.again(taken, 3600.0, Tries(1, 5.0, 500, "the receiver answered 500"))
    clock.now += 3599
    assert await outbox.take(1, LEASE_S) == ([], 1.0)
    clock.now += 1
    (again,), _ = await outbox.take(1, LEASE_S)
    assert again.tries == Tries(1, 5.0, 500, "the receiver answered 500")


async def test_what_was_given_up_is_kept_and_can_be_sent_again(store: Store, clock: Clock) -> None:
    """It stands in a list until then, and begins anew."""
    outbox, (job_id,) = await announced(store, clock)
    (taken,), _ = await outbox.take(1, LEASE_S)
    await outbox.give_up(taken, Tries(9, 5.0, None, "no connection"))
    (dead,) = await outbox.latest("dead", 10)
    assert (dead.job_id, dead.tries.count) == (job_id, 9)
    assert [each.name for each in await outbox.find("dead", [taken.name, "other|request"])] == [taken.name]
    await outbox.send_again(job_id, ["request"])
    assert await outbox.latest("dead", 10) == []
    (again,), _ = await outbox.take(1, LEASE_S)
    assert again.tries == Tries()


async def test_sending_again_takes_nothing_from_its_owner(store: Store, clock: Clock) -> None:
    """What is being delivered, or waits, stays where it is."""
    outbox, (job_id,) = await announced(store, clock)
    (taken,), _ = await outbox.take(1, LEASE_S)
    await outbox.send_again(job_id, ["request"])
    assert (await outbox.take(1, LEASE_S))[0] == []
    assert await outbox.done(taken)


async def test_the_list_of_those_given_up_is_bounded(store: Store, clock: Clock) -> None:
    """The latest are kept, and nothing of the others is left."""
    outbox, ids = await announced(store, clock, count=5)
    taken, _ = await outbox.take(9, LEASE_S)
    filler = {f"old{number}|request": number for number in range(UNDELIVERED - 2)}
    flat = [word for name, score in filler.items() for word in (score, name)]
    await store.writes.call("ZADD", outbox._keys[2], *flat)
    await store.writes.call("HSET", outbox._keys[1], *[word for name in filler for word in (name, "{}")])
    for delivery in taken:
        clock.now += 1
        await outbox.give_up(delivery, Tries(1))
    kept = await outbox.latest("dead", 2 * UNDELIVERED)
    assert len(kept) == UNDELIVERED
    assert {each.job_id for each in kept[:5]} == set(ids)
    assert await store.writes.call("HLEN", outbox._keys[1]) == UNDELIVERED
