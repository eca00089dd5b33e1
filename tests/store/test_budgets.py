"""Limits of a target, on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from llmstream.errors import StoreUnavailable
from llmstream.store import budgets as module
from llmstream.store.budgets import Budgets, Limits, Reservation, Spent, TooManyTokens, Wait
from llmstream.store.store import Store
from tests.proxy import distant
from tests.valkey import stores, valkey
from tests.waiting import wait_until

TARGET = "openai/gpt-4o|mini {eu}"


def budgets_of(store: Store, replica: str = "r", *, lease_s: float = 60.0, window_s: float = 60.0) -> Budgets:
    """One replica's; the wake-ups go to the last one made for a store."""
    budgets = Budgets(store.writes, store.keys, store.presence, replica, lease_s=lease_s, window_s=window_s)
    store.signals.on_room = budgets.wake
    return budgets


async def reserved(budgets: Budgets, limits: Limits, tokens: int, name: str) -> Reservation:
    found = await budgets.reserve(TARGET, limits, tokens, name)
    assert isinstance(found, Reservation)
    return found


async def refused(budgets: Budgets, limits: Limits, tokens: int, name: str, urgency: float | None = None) -> Wait:
    found = await budgets.reserve(TARGET, limits, tokens, name, urgency)
    assert isinstance(found, Wait)
    return found


async def comes_to(budgets: Budgets, expected: Spent) -> None:
    """What is settled may be told to the server once more, where it does not know the script yet."""

    async def so_it_is() -> bool:
        return await budgets.spent(TARGET) == expected

    await wait_until(so_it_is)


async def teach(store: Store) -> None:
    """Lets the server know the scripts, so that each is one request from then on."""
    budgets = budgets_of(store, "teacher")
    found = await budgets.reserve("another target", Limits(), 0, "a")
    assert isinstance(found, Reservation)
    budgets.settle(found, 0)
    await budgets.spent("another target")


@pytest.fixture
def _no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits depends on what he is told."""
    monkeypatch.setattr(module, "POLL_S", 1000.0)


async def test_each_limit_holds_over_replicas(store: Store) -> None:
    """What one replica has taken, another cannot; it is told what is used up, and when asking again makes sense."""
    one, other = budgets_of(store, "r1"), budgets_of(store, "r2")
    slots, requests, tokens = Limits(slots=2), Limits(requests=2), Limits(tokens=100)
    await reserved(one, slots, 40, "a")
    await reserved(other, slots, 60, "b")
    assert await refused(one, slots, 0, "c") == (module.POLL_S, "slots")
    for limits, wanted, reason in ((requests, 0, "requests"), (tokens, 1, "tokens")):
        wait = await refused(other, limits, wanted, "c")
        assert wait.reason == reason
        assert 55 < wait.after_s <= 61
    assert isinstance(await one.reserve(TARGET, tokens, 0, "c", 0.0), Reservation)
    await comes_to(one, Spent(3, 3, 100))


async def test_other_targets_have_limits_of_their_own(store: Store) -> None:
    """Names of targets that look alike do not share a budget."""
    budgets = budgets_of(store)
    for target in ("a/b", "a", "a/b ", "{a/b}"):
        assert isinstance(await budgets.reserve(target, Limits(slots=1), 1, "same name"), Reservation)


async def test_what_can_never_fit_is_an_error(store: Store) -> None:
    """A request that may use more tokens than a minute has is told so and counts nothing."""
    budgets = budgets_of(store)
    with pytest.raises(TooManyTokens, match=r"1001 tokens .* 1000 a minute; send less or lower max_tokens") as refusal:
        await budgets.acquire(TARGET, Limits(tokens=1000), 1001, "a")
    assert refusal.value.http_status == 400
    await comes_to(budgets, Spent(0, 0, 0))
    await reserved(budgets, Limits(tokens=1000), 1000, "b")


@pytest.mark.parametrize(("used", "counted"), [(0, 0), (30, 30), (100, 100), (170, 170)])
async def test_settling_counts_what_was_used(store: Store, used: int, counted: int) -> None:
    """The slot comes back, and the tokens that were not used; what was used beyond is counted. Once."""
    budgets = budgets_of(store)
    reservation = await reserved(budgets, Limits(), 100, "a")
    for _ in range(2):
        budgets.settle(reservation, used)
        await comes_to(budgets, Spent(0, 1, counted))
    await budgets.renew()
    await comes_to(budgets, Spent(0, 1, counted))


async def test_what_was_not_sent_does_not_count(store: Store) -> None:
    """Cancelling gives the request back too."""
    budgets = budgets_of(store)
    budgets.cancel(await reserved(budgets, Limits(requests=1), 100, "a"))
    await comes_to(budgets, Spent(0, 0, 0))
    await reserved(budgets, Limits(requests=1), 70, "b")
    await comes_to(budgets, Spent(1, 1, 70))


async def test_room_comes_when_it_was_said(store: Store) -> None:
    """Who waits for requests or tokens gets in as the window moves on, not before and not much later."""
    budgets = budgets_of(store, window_s=0.6)
    limits = Limits(requests=2, tokens=100)
    start = time.monotonic()
    for number, tokens in enumerate((60, 40, 50, 30, 20)):
        reservation = await budgets.acquire(TARGET, limits, tokens, f"job{number}")
        if number == 1:
            assert time.monotonic() - start < 0.5
        budgets.settle(reservation, tokens)
    assert 1.2 <= time.monotonic() - start < 10
    start = time.monotonic()
    await wait_until(lambda: time.monotonic() - start > 0.65)
    await comes_to(budgets, Spent(0, 0, 0))


async def test_a_lost_answer_counts_once(store: Store) -> None:
    """Whoever asks again after an answer was lost, finds what was reserved."""
    await teach(store)
    async with distant(store) as (far, proxy):
        budgets = budgets_of(far)
        trap = proxy.trap(b"the-job")
        with pytest.raises(StoreUnavailable):
            await budgets.reserve(TARGET, Limits(slots=1), 10, "the-job")
        assert trap.sprung.is_set()
        reservation = await reserved(budgets, Limits(slots=1), 10, "the-job")
        await comes_to(budgets, Spent(1, 1, 10))
        trap = proxy.trap(b"the-job")
        budgets.settle(reservation, 4)
        await trap.sprung.wait()
        await wait_until(lambda: far.presence.trouble is None)
        await budgets.renew()
        await comes_to(budgets, Spent(0, 1, 4))


async def test_an_end_that_could_not_be_told(store: Store) -> None:
    """A request that ended while the store was away is settled as soon as it is back."""
    await teach(store)
    async with distant(store, timeout_s=0.2) as (far, proxy):
        budgets = budgets_of(far)
        reservation = await reserved(budgets, Limits(), 10, "a")
        proxy.refuse()
        proxy.cut()
        budgets.settle(reservation, 4)
        await wait_until(lambda: bool(budgets._ends))
        proxy.refuse(False)
        await wait_until(lambda: far.presence.trouble is None)
        await budgets.renew()
        await comes_to(budgets, Spent(0, 1, 4))


async def test_an_answer_nobody_waits_for_is_given_back(store: Store) -> None:
    """A reservation that was made although its answer got lost does not stay when nobody asks for it again."""
    await teach(store)
    async with distant(store) as (far, proxy):
        budgets = budgets_of(far)
        proxy.trap(b"the-job")
        with pytest.raises(StoreUnavailable):
            await budgets.reserve(TARGET, Limits(), 10, "the-job")
        assert (await budgets_of(store, "other").spent(TARGET)).slots == 1
        await budgets.renew()
        await comes_to(budgets, Spent(0, 0, 0))


@pytest.mark.usefixtures("_no_polls")
async def test_a_wait_that_is_cancelled_leaves_nothing(store: Store) -> None:
    """Neither a slot nor a place in line stays with somebody who stopped waiting."""
    one, other = budgets_of(store, "r1"), budgets_of(store, "r2")
    limits = Limits(slots=1)
    first = await reserved(one, limits, 0, "first")
    for urgency in (1.0, 2.0):
        waiting = asyncio.create_task(one.acquire(TARGET, limits, 0, f"waits {urgency}", urgency))
        await wait_until(lambda: len(one._lines.get(TARGET, ())) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert not one._lines
    one.settle(first, 0)
    await comes_to(one, Spent(0, 1, 0))
    second = await other.reserve(TARGET, limits, 0, "other", 3.0)
    assert isinstance(second, Reservation)
    other.settle(second, 0)
    in_flight = asyncio.create_task(one.acquire(TARGET, Limits(), 0, "in flight"))
    await asyncio.sleep(0)
    in_flight.cancel()
    await comes_to(one, Spent(0, 2, 0))


@pytest.mark.usefixtures("_no_polls")
async def test_a_free_slot_is_told(store: Store) -> None:
    """Who waits on another replica hears of a free slot, without asking again and again."""
    async with stores(store.url, 2) as (near, far):
        one, other = budgets_of(near, "r1"), budgets_of(far, "r2")
        limits = Limits(slots=1)
        for number in range(3):
            reservation = await one.acquire(TARGET, limits, 0, f"one{number}")
            waiting = asyncio.create_task(other.acquire(TARGET, limits, 0, f"other{number}"))
            await wait_until(lambda: len(other._lines.get(TARGET, ())) == 1)
            one.settle(reservation, 0)
            async with asyncio.timeout(10):
                other.settle(await waiting, 0)


async def test_who_hears_nothing_asks_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any wake-up a free slot is found by asking."""
    monkeypatch.setattr(module, "POLL_S", 0.02)
    budgets, limits = budgets_of(store), Limits(slots=1)
    store.signals.on_room = None
    reservation = await budgets.acquire(TARGET, limits, 0, "a")
    waiting = asyncio.create_task(budgets.acquire(TARGET, limits, 0, "b"))
    await wait_until(lambda: len(budgets._lines.get(TARGET, ())) == 1)
    await asyncio.sleep(0.1)  # it has asked several times
    budgets.settle(reservation, 0)
    async with asyncio.timeout(10):
        await waiting


async def test_the_most_urgent_goes_first(store: Store) -> None:
    """Over all replicas, whoever asked first."""
    async with stores(store.url, 3) as views:
        replicas = [budgets_of(view, f"r{number}") for number, view in enumerate(views)]
        limits, order = Limits(slots=1), list[int]()
        first = await replicas[0].acquire(TARGET, limits, 0, "first")

        async def wait_and_go(rank: int) -> None:
            budgets = replicas[rank % 3]
            reservation = await budgets.acquire(TARGET, limits, 0, f"rank{rank}", float(rank))
            order.append(rank)
            budgets.settle(reservation, 0)

        waiting = [asyncio.create_task(wait_and_go(rank)) for rank in (5, 4, 3, 8, 1, 6, 7, 2, 0)]
        await wait_until(lambda: sum(len(one._lines.get(TARGET, ())) for one in replicas) == 9)
        await asyncio.gather(*(one.spent(TARGET) for one in replicas))
        replicas[0].settle(first, 0)
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)
        assert order == sorted(order)


async def test_small_requests_do_not_starve_a_large_one(store: Store) -> None:
    """Who came first gets his tokens first, however few the others want."""
    large, small = budgets_of(store, "r1"), budgets_of(store, "r2")
    limits = Limits(tokens=100)
    await reserved(small, limits, 50, "before")
    assert (await refused(large, limits, 60, "large", 1.0)).reason == "tokens"
    assert (await refused(small, limits, 10, "small", 2.0)).reason == "line"
    assert isinstance(await small.reserve(TARGET, limits, 10, "more urgent", 0.5), Reservation)


async def test_slots_of_a_dead_replica_lapse(store: Store) -> None:
    """Slots of a replica that fell silent come back, its requests stay counted, and who renews keeps his own."""
    dead, alive = budgets_of(store, "dead", lease_s=0.3), budgets_of(store, "alive", lease_s=0.3)
    limits = Limits(slots=2, requests=3)
    await reserved(dead, limits, 10, "a")
    await reserved(alive, limits, 10, "b")

    async def in_turn() -> bool:
        await alive.renew()
        return isinstance(await alive.reserve(TARGET, limits, 10, "c"), Reservation)

    await wait_until(in_turn)
    await comes_to(alive, Spent(2, 3, 30))
    assert (await refused(alive, limits._replace(slots=3), 0, "d")).reason == "requests"


async def test_a_replica_that_was_away_takes_its_slots_back(store: Store) -> None:
    """Requests that are still under way count again as soon as their replica is back, even beyond the limit; what they
    used of the window was counted all the time."""
    away, other = budgets_of(store, "away", lease_s=0.3), budgets_of(store, "other", lease_s=60)
    limits = Limits(slots=1)
    reservation = await reserved(away, limits, 10, "a")

    async def lapsed() -> bool:
        return isinstance(await other.reserve(TARGET, limits, 10, "b"), Reservation)

    await wait_until(lapsed)
    await away.renew()
    await comes_to(other, Spent(2, 2, 20))
    away.settle(reservation, 15)
    await comes_to(away, Spent(1, 2, 25))


@pytest.mark.parametrize("everything", [True, False])
async def test_a_store_that_forgot_is_told_again(
    tmp_path: Path, everything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way counts again in a store that came back empty, or without its last moments."""
    monkeypatch.setattr(module, "RECONCILE_RENEWALS", 1_000_000)
    async with valkey(tmp_path) as server, stores(server.url) as (store,):
        budgets = budgets_of(store)
        reservations = [await reserved(budgets, Limits(), 10, "a")]
        await server.snapshot()
        reservations.append(await reserved(budgets, Limits(), 20, "b"))
        await (server.set_back_to_nothing() if everything else server.set_back())
        await server.start()

        async def told_again() -> bool:
            try:
                await budgets.renew()
                return await budgets.spent(TARGET) == Spent(2, 2, 30)
            except StoreUnavailable:
                return False

        await wait_until(told_again)
        for _ in range(2):
            await budgets.renew()
        await comes_to(budgets, Spent(2, 2, 30))
        for reservation in reservations:
            budgets.settle(reservation, 4)
        await comes_to(budgets, Spent(0, 2, 8))


async def test_nothing_held_costs_nothing(store: Store) -> None:
    """A heartbeat of a replica that holds nothing asks the store nothing."""
    async with distant(store) as (far, proxy):
        budgets = budgets_of(far)
        budgets.settle(await reserved(budgets, Limits(), 0, "a"), 0)
        await budgets.spent(TARGET)
        before = proxy.requests
        for _ in range(module.RECONCILE_RENEWALS):
            await budgets.renew()
        await far.reads.call("PING")
        assert proxy.requests - before <= 2  # greeting and PING of the other connection
