"""Token buckets of callers, on a real Valkey and on a clock that can be set."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.exceptions import ResponseError

from llmstream.errors import StoreError
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Command, Lazy, Sender, Settle
from llmstream.store.rate_limits import Charge, Rate, RateLimits, Verdict
from llmstream.store.store import Store
from tests.proxy import distant
from tests.simulation.lua import Scripts
from tests.simulation.memory import Memory
from tests.valkey import stores

HOURLY = Rate("requests", limit=3600, window_s=3600, burst=5)
TOKENS = Rate("tokens", limit=1000, window_s=3600, burst=100)


class VirtualStore(Sender):
    """Runs scripts at once, at a time that the test sets."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.memory.now_ms = 1_700_000_000_000.0
        self._scripts = Scripts(self.memory)

    def defer(self, command: Command | Lazy, settle: Settle) -> None:
        assert not isinstance(command, Lazy)
        name, *args = (str(part).encode() if not isinstance(part, bytes) else part for part in command)
        try:
            reply = (self._scripts.evalsha if name == b"EVALSHA" else self._scripts.eval)(*args)
        except ResponseError as error:
            settle(None, StoreError(str(error)))
        else:
            settle(reply, None)


async def take(limits: RateLimits, *charges: Charge) -> list[Verdict]:
    return (await limits.take("key", *charges)).verdicts


async def test_a_burst_then_the_rate(store: Store) -> None:
    """A burst goes through at once; then it is refused, and the headers' values say where it stands."""
    found = [(await take(store.rate_limits, Charge(HOURLY)))[0] for _ in range(7)]
    assert [one.allowed for one in found] == [True] * 5 + [False] * 2
    assert [one.remaining for one in found] == [4, 3, 2, 1, 0, 0, 0]
    assert {one.size for one in found} == {5}
    assert 4 < found[4].reset_s <= 5
    assert found[4].retry_after_s == 0
    assert 0 < found[6].retry_after_s <= 1
    assert (await store.rate_limits.take("another key", Charge(HOURLY))).verdicts[0].remaining == 4


async def test_all_or_nothing(store: Store) -> None:
    """Where one of several buckets has not enough, none is charged, and each says how it stands."""
    limits = store.rate_limits
    requests, tokens = await take(limits, Charge(HOURLY), Charge(TOKENS, 101))
    assert requests == Verdict("requests", True, 5, 5, 0.0, 0.0)
    assert tokens == Verdict("tokens", False, 100, 100, 0.0, math.inf)
    tokens, requests = await take(limits, Charge(TOKENS, 101), Charge(HOURLY))
    assert (requests.allowed, requests.remaining, tokens.allowed) == (True, 5, False)
    requests, tokens = await take(limits, Charge(HOURLY), Charge(TOKENS, 60))
    assert (requests.remaining, tokens.remaining) == (4, 40)
    requests, tokens = await take(limits, Charge(HOURLY), Charge(TOKENS, 60))
    assert (requests.allowed, requests.remaining, tokens.allowed) == (True, 4, False)
    assert 60 < tokens.retry_after_s <= 72


async def test_what_was_really_used(store: Store) -> None:
    """What a job took is set right once when it is known how much it used, also beyond what the bucket has."""
    limits = store.rate_limits
    await limits.take("key", Charge(TOKENS, 100), job_id="j1")
    for _ in range(3):
        await limits.settle("key", "tokens", "j1", 70)
    assert (await take(limits, Charge(TOKENS, 0)))[0].remaining == 30
    await limits.take("key", Charge(TOKENS, 30), job_id="j2")
    await limits.settle("key", "tokens", "j2", 160)
    await limits.settle("key", "tokens", "j2", 0)
    await limits.settle("key", "tokens", "of nobody", 1_000)
    (found,) = await take(limits, Charge(TOKENS, 1))
    assert (found.allowed, found.remaining) == (False, 0)
    assert 465 < found.retry_after_s <= 472


async def test_a_job_is_charged_once(store: Store) -> None:
    """Equal requests are one job: its tokens are taken once, while it runs and when it has just ended."""
    limits = store.rate_limits
    first = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 60), job_id="j")
    second = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 60), job_id="j")
    assert [charge.cost for taken in (first, second) for charge in taken.charges] == [1, 60, 1, 0]
    await limits.settle("key", "tokens", "j", 60)
    third = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 60), job_id="j")
    assert [verdict.remaining for verdict in third.verdicts] == [2, 40]


async def test_what_nothing_came_of_is_given_back(store: Store) -> None:
    """A refused request costs nothing, however often that is said; of a job that has ended, what it used stays."""
    limits = store.rate_limits
    await take(limits, Charge(HOURLY, 2), Charge(TOKENS, 20))
    taken = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 10), job_id="j")
    for _ in range(2):
        await limits.give_back(taken)
    await limits.settle("key", "tokens", "j", 60)
    assert [verdict.remaining for verdict in await take(limits, Charge(HOURLY, 0), Charge(TOKENS, 0))] == [3, 80]
    taken = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 60), job_id="cancelled")
    await limits.settle("key", "tokens", "cancelled", 10)
    await limits.give_back(taken)
    assert [verdict.remaining for verdict in await take(limits, Charge(HOURLY, 0), Charge(TOKENS, 0))] == [3, 70]


async def test_a_lost_answer_counts_once(store: Store) -> None:
    """Where the answer gets lost, it is asked again and nothing is taken twice; given back is what was taken."""
    async with distant(store) as (far, proxy):
        await far.rate_limits.take("key", Charge(HOURLY, 0))
        trap = proxy.trap(b":noted:j")
        taken = await far.rate_limits.take("key", Charge(HOURLY), Charge(TOKENS, 60), job_id="j")
        assert trap.sprung.is_set()
        assert [verdict.remaining for verdict in taken.verdicts] == [4, 40]
        await far.rate_limits.give_back(taken)
    assert [verdict.remaining for verdict in await take(store.rate_limits, Charge(HOURLY, 0), Charge(TOKENS, 0))] == [
        5,
        100,
    ]


async def test_three_replicas_share_a_bucket(store: Store) -> None:
    """Of hundreds of requests at once on three replicas exactly the burst goes through."""
    rate = Rate("requests", limit=10, window_s=36_000, burst=50)
    async with stores(store.url, 3) as views:
        asked = [view.rate_limits.take("key", Charge(rate)) for _ in range(100) for view in views]
        found = await asyncio.gather(*asked)
    assert sum(taken.allowed for taken in found) == 50


async def test_one_round_trip(store: Store) -> None:
    """Several buckets are one request to the store."""
    async with distant(store) as (far, proxy):
        await far.rate_limits.take("key", Charge(HOURLY), Charge(TOKENS))
        before = proxy.requests
        await far.rate_limits.take("key", Charge(HOURLY), Charge(TOKENS))
        assert proxy.requests == before + 1


rates = st.builds(
    Rate,
    name=st.just("requests"),
    limit=st.integers(1, 10_000_000),
    window_s=st.sampled_from([1.0, 60.0, 3600.0, 86400.0]),
    burst=st.integers(1, 1_000_000),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(rate=rates, pauses_ms=st.lists(st.integers(0, 100_000), max_size=40), seed=st.integers(0, 1000))
async def test_it_is_a_token_bucket_exactly(rate: Rate, pauses_ms: Sequence[int], seed: int) -> None:
    """For any rate and any pauses, the bucket allows what the textbook's does, computed with fractions."""
    store, rng = VirtualStore(), random.Random(seed)
    limits = RateLimits(store, Keys("p"), note_s=3600)
    level = Fraction(rate.burst)
    for pause_ms in pauses_ms:
        store.memory.now_ms += pause_ms
        level = min(Fraction(rate.burst), level + Fraction(pause_ms * 1000 * rate.limit, rate.window_us))
        cost = rng.choice((1, rng.randint(0, rate.burst), math.floor(level), math.floor(level) + 1))
        (found,) = await take(limits, Charge(rate, cost))
        assert found.allowed == (cost <= level)
        if found.allowed:
            level -= cost
        assert found.remaining == max(0, math.floor(level))
        if not found.allowed and cost <= rate.burst:
            assert found.retry_after_s == pytest.approx(float((cost - level) * rate.window_us / rate.limit / 1_000_000))


async def test_a_clock_that_steps_back_costs_nobody() -> None:
    """Nobody is refused for longer because the server's clock was set back, and nothing is refilled twice."""
    virtual = VirtualStore()
    limits = RateLimits(virtual, Keys("p"), note_s=3600)
    for _ in range(5):
        assert (await take(limits, Charge(HOURLY)))[0].allowed
    virtual.memory.now_ms -= 3_000_000
    (found,) = await take(limits, Charge(HOURLY))
    assert (found.allowed, found.retry_after_s) == (False, 1.0)
    virtual.memory.now_ms += 2000
    assert (await take(limits, Charge(HOURLY, 2)))[0].allowed
