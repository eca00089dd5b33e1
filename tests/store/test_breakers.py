"""Breakers that replicas share, on a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from llmstream.store.breakers import Breakers, Pass, Policy
from llmstream.store.store import Store
from tests.proxy import distant
from tests.valkey import stores
from tests.waiting import wait_until

TARGET = "openai/gpt-4o|mini {eu}"
POLICY = Policy(failures=3, window_s=30, ratio=0.5, open_s=0.2, max_open_s=60)
LONG = POLICY._replace(open_s=30)


@asynccontextmanager
async def replicas(
    store: Store, count: int = 3, policy: Policy = POLICY, lease_s: float = 60
) -> AsyncIterator[Sequence[Breakers]]:
    """So many replicas that hear each other."""
    async with stores(store.url, count) as views:
        yield [view.breakers(f"r{number}", policy, lease_s=lease_s) for number, view in enumerate(views)]


async def fail(*breakers: Breakers) -> None:
    """Each has one request fail."""
    for one in breakers:
        passed = await one.enter(TARGET)
        assert passed == Pass(TARGET)
        one.failed(passed)
        await one.refresh()


async def state_of(breakers: Breakers) -> str:
    await breakers.refresh()
    return breakers.states.get(TARGET, "closed")


async def comes_to(expected: str, *breakers: Breakers) -> None:
    for one in breakers:

        async def so_it_is(one: Breakers = one) -> bool:
            return await state_of(one) == expected

        await wait_until(so_it_is)


async def probe_of(breakers: Breakers) -> Pass:
    """Waits until the replica gets the probe."""
    found: list[Pass] = []

    async def got_it() -> bool:
        await breakers.refresh()
        passed = await breakers.enter(TARGET)
        found.extend([passed] if passed is not None else [])
        return bool(found)

    await wait_until(got_it)
    assert found[0].probe
    return found[0]


async def test_failures_of_all_replicas_count(store: Store) -> None:
    """So many failures open it, whoever had them, and then it is open for all; other targets are not concerned."""
    async with replicas(store, policy=LONG) as (one, other, third):
        await fail(one, other)
        assert await state_of(third) == "closed"
        await fail(third)
        await comes_to("open", one, other, third)
        for replica in (one, other, third):
            assert not replica.admits(TARGET)
            assert 25 < replica.admits_in(TARGET) <= 30
            assert await replica.enter(TARGET) is None
            assert replica.admits("another")
            assert await replica.enter("another") == Pass("another")


async def test_all_hear_of_it(store: Store) -> None:
    """A breaker that opens, and one that closes, is known to the others without their asking."""
    async with replicas(store) as (one, other, third):
        await fail(one, one, one)
        await wait_until(lambda: TARGET in other.states and TARGET in third.states)
        one.succeeded(await probe_of(one))
        await wait_until(lambda: not (one.states or other.states or third.states))


async def test_a_closed_breaker_costs_nothing(store: Store) -> None:
    """While all goes well the store is neither read nor written."""
    async with distant(store) as (far, proxy):
        breakers = far.breakers("r", POLICY, lease_s=60)
        await breakers.refresh()
        before = proxy.requests
        for _ in range(1000):
            passed = await breakers.enter(TARGET)
            assert passed is not None
            breakers.succeeded(passed)
        await far.writes.call("PING")
        assert proxy.requests == before + 1


async def test_few_failures_among_many_successes(store: Store) -> None:
    """Failures open it only where they are a large enough share of what all who failed had."""
    async with replicas(store, 1, LONG) as (one,):
        for _ in range(4):
            one.succeeded(Pass(TARGET))
        await fail(one, one, one)
        assert await state_of(one) == "closed"
        await fail(one)
        assert await state_of(one) == "open"


async def test_old_failures_do_not_count(store: Store) -> None:
    """Failures that lie further apart than the window do not add up."""
    async with replicas(store, 1, LONG._replace(window_s=0.4)) as (one,):
        for _ in range(5):
            await fail(one)
            await asyncio.sleep(0.25)  # what is tried is that time passes
        assert await state_of(one) == "closed"


async def test_one_probe_among_three(store: Store) -> None:
    """When its time is up exactly one request goes through, over all replicas, until it is known how that went."""
    async with replicas(store) as all_three:
        for _ in range(3):
            await fail(all_three[0]) if await state_of(all_three[0]) == "closed" else None
        await comes_to("half_open", *all_three)
        asked = await asyncio.gather(*(one.enter(TARGET) for one in all_three for _ in range(20)))
        (passed,) = [one for one in asked if one is not None]
        for one in all_three:
            await one.refresh()
            assert await one.enter(TARGET) is None
        (prober,) = [one for one in all_three if one._probes]
        prober.succeeded(passed)
        await comes_to("closed", *all_three)
        assert all([await one.enter(TARGET) == Pass(TARGET) for one in all_three])


async def test_it_stays_open_for_longer_each_time(store: Store) -> None:
    """A probe that fails doubles the time, up to the bound; after a probe that succeeded the next time is long too."""
    policy = POLICY._replace(open_s=0.1, max_open_s=0.35)
    async with replicas(store, 2, policy) as (one, other):
        await fail(one, one, one)
        for expected in (0.2, 0.35, 0.35):
            one.failed(await probe_of(one))
            await comes_to("open", other)
            assert expected / 2 < other.admits_in(TARGET) <= expected
        one.succeeded(await probe_of(one))
        await comes_to("closed", one)
        await fail(one, one, one)
        assert 0.2 < one.admits_in(TARGET) <= 0.35


async def test_what_was_under_way_does_not_decide(store: Store) -> None:
    """Requests from before it opened neither keep it open, nor close it, nor take the probe's place."""
    async with replicas(store, 2) as (one, other):
        await fail(one, one, one)
        passed = await probe_of(one)
        for _ in range(5):
            other.failed(Pass(TARGET))
            other.succeeded(Pass(TARGET))
            other.succeeded(Pass(TARGET, "r0|999"))
        assert await state_of(other) == "half_open"
        assert await other.enter(TARGET) is None
        one.succeeded(passed)
        await comes_to("closed", one, other)


async def test_the_probe_of_a_dead_replica_lapses(store: Store) -> None:
    """Another one probes when the prober has died; what the dead one may have said late does not count."""
    async with replicas(store, 3, lease_s=0.3) as (dead, other, third):
        await fail(dead, dead, dead)
        lost = await probe_of(dead)
        assert await state_of(third) == "half_open"
        assert await other.enter(TARGET) is None
        passed = await probe_of(other)
        dead.failed(lost)
        dead.succeeded(lost)
        for _ in range(2):  # a script that the server did not know goes a second time
            await dead.refresh()
        assert await state_of(third) == "half_open"
        other.succeeded(passed)
        await comes_to("closed", third)


async def test_who_missed_that_it_opened_again(store: Store) -> None:
    """A replica whose copy is out of date gets no probe before the time, and learns how it is."""
    async with replicas(store, 2, LONG) as (one, late):
        await fail(one, one, one)
        await comes_to("open", late)
        late._shut = {TARGET: late._shut[TARGET]._replace(opens_at=0.0)}
        assert late.admits(TARGET)
        assert await late.enter(TARGET) is None
        await wait_until(lambda: not late.admits(TARGET))


async def test_a_long_probe_is_kept(store: Store) -> None:
    """A probe that takes longer than the lease stays the only one while its replica lives."""
    async with replicas(store, 2, lease_s=0.3) as (one, other):
        await fail(one, one, one)
        await probe_of(one)
        deadline = asyncio.get_running_loop().time() + 0.8
        while asyncio.get_running_loop().time() < deadline:
            assert await state_of(one) == "half_open"
            await other.refresh()
            assert await other.enter(TARGET) is None
            await asyncio.sleep(0.05)


async def test_a_probe_that_says_nothing(store: Store) -> None:
    """Whoever gives the probe up, also before it was granted, leaves it to the next at once."""
    async with replicas(store, 2) as (one, other):
        await fail(one, one, one)
        one.abandoned(await probe_of(one))
        second = await probe_of(other)
        other.abandoned(second)
        await comes_to("half_open", one)
        await wait_until(lambda: one.admits(TARGET))
        cancelled = asyncio.create_task(one.enter(TARGET))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert (await probe_of(other)).probe


async def test_it_survives_its_replicas(store: Store) -> None:
    """A replica that starts later finds what others that are gone have learned."""
    async with replicas(store, 1, LONG) as (one,):
        await fail(one, one, one)
    async with replicas(store, 1, LONG) as (young,):
        assert young.admits(TARGET)  # it has not looked yet
        await young.refresh()
        assert not young.admits(TARGET)


async def test_closed_ones_are_forgotten(store: Store) -> None:
    """What stayed closed for long leaves nothing behind."""
    policy = POLICY._replace(open_s=0.05, max_open_s=0.1)
    async with replicas(store, 1, policy) as (one,):
        await fail(one, one, one)
        one.succeeded(await probe_of(one))

        async def empty() -> bool:
            await one.refresh()
            return not await store.writes.call("HLEN", store.keys.breakers()[0])

        await wait_until(empty)
