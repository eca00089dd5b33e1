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


async def test_a_burst_then_the_rate(store: Store) -> None:
    """A burst goes through at once; then it is refused, and the headers' values say where it stands."""
    found = [(await store.rate_limits.take("key", Charge(HOURLY)))[0] for _ in range(7)]
    assert [one.allowed for one in found] == [True] * 5 + [False] * 2
    assert [one.remaining for one in found] == [4, 3, 2, 1, 0, 0, 0]
    assert {one.limit for one in found} == {3600}
    assert 4 < found[4].reset_s <= 5
    assert found[4].retry_after_s == 0
    assert 0 < found[6].retry_after_s <= 1
    assert (await store.rate_limits.take("another key", Charge(HOURLY)))[0].remaining == 4


async def test_all_or_nothing(store: Store) -> None:
    """Where one of several buckets has not enough, none is charged, and each says how it stands."""
    limits = store.rate_limits
    requests, tokens = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 101))
    assert requests == Verdict(True, 3600, 5, 0.0, 0.0)
    assert tokens == Verdict(False, 1000, 100, 0.0, math.inf)
    tokens, requests = await limits.take("key", Charge(TOKENS, 101), Charge(HOURLY))
    assert (requests.allowed, requests.remaining, tokens.allowed) == (True, 5, False)
    requests, tokens = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 60))
    assert (requests.remaining, tokens.remaining) == (4, 40)
    requests, tokens = await limits.take("key", Charge(HOURLY), Charge(TOKENS, 60))
    assert (requests.allowed, requests.remaining, tokens.allowed) == (True, 4, False)
    assert 60 < tokens.retry_after_s <= 72


async def test_what_was_really_used(store: Store) -> None:
    """Tokens are corrected when it is known how many there were, also beyond what the bucket had."""
    limits = store.rate_limits
    await limits.take("key", Charge(TOKENS, 100))
    limits.correct("key", TOKENS, -30)
    (found,) = await limits.take("key", Charge(TOKENS, 0))
    if found.remaining == 0:  # a script that the server did not know goes a second time
        (found,) = await limits.take("key", Charge(TOKENS, 0))
    assert found.remaining == 30
    limits.correct("key", TOKENS, 130)
    (found,) = await limits.take("key", Charge(TOKENS, 1))
    assert (found.allowed, found.remaining) == (False, 0)
    assert 355 < found.retry_after_s <= 364
    limits.correct("key", TOKENS, -10_000)
    assert (await limits.take("key", Charge(TOKENS, 100)))[0].allowed


async def test_three_replicas_share_a_bucket(store: Store) -> None:
    """Of hundreds of requests at once on three replicas exactly the burst goes through."""
    rate = Rate("requests", limit=10, window_s=36_000, burst=50)
    async with stores(store.url, 3) as views:
        asked = [view.rate_limits.take("key", Charge(rate)) for _ in range(100) for view in views]
        found = await asyncio.gather(*asked)
    assert sum(verdict.allowed for (verdict,) in found) == 50


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
    limits = RateLimits(store, Keys("p"))
    level = Fraction(rate.burst)
    for pause_ms in pauses_ms:
        store.memory.now_ms += pause_ms
        level = min(Fraction(rate.burst), level + Fraction(pause_ms * 1000 * rate.limit, rate.window_us))
        cost = rng.choice((1, rng.randint(0, rate.burst), math.floor(level), math.floor(level) + 1))
        (found,) = await limits.take("key", Charge(rate, cost))
        assert found.allowed == (cost <= level)
        if found.allowed:
            level -= cost
        assert found.remaining == max(0, math.floor(level))
        if not found.allowed and cost <= rate.burst:
            assert found.retry_after_s == pytest.approx(float((cost - level) * rate.window_us / rate.limit / 1_000_000))


async def test_a_clock_that_steps_back_costs_nobody() -> None:
    """Nobody is refused for longer because the server's clock was set back, and nothing is refilled twice."""
    virtual = VirtualStore()
    limits = RateLimits(virtual, Keys("p"))
    for _ in range(5):
        assert (await limits.take("key", Charge(HOURLY)))[0].allowed
    virtual.memory.now_ms -= 3_000_000
    (found,) = await limits.take("key", Charge(HOURLY))
    assert (found.allowed, found.retry_after_s) == (False, 1.0)
    virtual.memory.now_ms += 2000
    assert (await limits.take("key", Charge(HOURLY, 2)))[0].allowed
