"""Group commit under good and bad weather."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmstream.errors import StoreError, StoreUnavailable
from llmstream.store.pipeline import MAX_BATCH, Lazy, Script
from llmstream.store.store import Store
from tests.proxy import distant
from tests.waiting import wait_until


async def test_a_thousand_callers_share_a_few_round_trips(store: Store) -> None:
    """Commands that gather while one is on its way travel together, and each caller gets its own answer."""
    async with distant(store) as (far, proxy):
        trap = proxy.trap(b"first", hold=True)
        first = far.writes.call("ECHO", "first")
        await trap.sprung.wait()
        before = proxy.requests
        calls = [far.writes.call("ECHO", str(number)) for number in range(1000)]
        trap.release()
        assert await first == b"first"
        assert await asyncio.gather(*calls) == [str(number).encode() for number in range(1000)]
        assert proxy.requests - before <= 4


async def test_one_wrong_command_harms_no_other(store: Store) -> None:
    """An error answer goes to the caller of that command only."""
    outcomes = await asyncio.gather(
        store.writes.call("ECHO", "a"),
        store.writes.call("NONSENSE"),
        store.writes.call("ECHO", "\ud800"),
        store.writes.call("ECHO", "b"),
        return_exceptions=True,
    )
    assert [outcomes[0], outcomes[3]] == [b"a", b"b"]
    assert isinstance(outcomes[1], StoreError)
    assert isinstance(outcomes[2], StoreError)


async def test_a_caller_that_breaks_on_its_answer_harms_no_other(store: Store) -> None:
    """A defect in taking in one answer does not end the connection's task."""

    def broken(reply: Any, error: Exception | None) -> None:
        raise KeyError(reply)

    store.writes.defer(("ECHO", "a"), broken)
    assert await store.writes.call("ECHO", "b") == b"b"


async def test_a_connection_that_died_while_idle_costs_nothing(store: Store) -> None:
    """The first command after the server closed an idle connection succeeds."""
    async with distant(store) as (far, proxy):
        await far.reads.call("PING")
        proxy.cut()
        await wait_until(lambda: _sees_the_end(far.reads))
        assert await far.reads.call("PING") == b"PONG"


def _sees_the_end(pipeline: Any) -> bool:
    return bool(pipeline._connection.closed_by_server)


async def test_a_cut_fails_what_was_under_way_and_nothing_else(store: Store) -> None:
    """Callers whose answer was lost get StoreUnavailable; the next ones go over a new connection."""
    async with distant(store) as (far, proxy):
        trap = proxy.trap(b"lost")
        with pytest.raises(StoreUnavailable, match="does not answer"):
            await far.writes.call("ECHO", "lost")
        assert trap.sprung.is_set()
        assert await far.writes.call("ECHO", "next") == b"next"


async def test_a_hanging_server_costs_one_deadline(store: Store) -> None:
    """With a server that accepts and never answers, every waiting caller fails within the deadline of one command, also
    those behind the first batch."""
    async with distant(store, timeout_s=1.0) as (far, proxy):
        await far.writes.call("PING")
        proxy.pause()
        loop = asyncio.get_running_loop()
        start = loop.time()
        first = far.writes.call("PING")
        await asyncio.sleep(0)
        calls = [first, *(far.writes.call("PING") for _ in range(5000))]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, StoreUnavailable) and outcome.retry_after for outcome in outcomes)
        assert loop.time() - start < 3  # six batches, each with a deadline of its own, would take six seconds


async def test_closing_leaves_nobody_waiting(store: Store) -> None:
    """Closing while the server is too slow answers every caller, sent or not; later ones are refused at once."""
    async with distant(store, timeout_s=1.0) as (far, proxy):
        (node,) = far.nodes
        await far.writes.call("PING")
        first, second = (proxy.trap(needle, hold=True) for needle in (b"first", b"second"))
        calls = [far.writes.call("ECHO", "first")]
        await first.sprung.wait()
        calls += [far.writes.call("ECHO", "second") for _ in range(3 * MAX_BATCH)]
        closing = asyncio.create_task(node.writes.close())
        await asyncio.sleep(0)
        start = asyncio.get_running_loop().time()
        await wait_until(lambda: asyncio.get_running_loop().time() > start + 0.2)
        first.release()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            await closing
        assert second.sprung.is_set()
        assert outcomes[0] == b"first"
        assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes[1:])
        with pytest.raises(StoreUnavailable, match="closed"):
            await far.writes.call("PING")


async def test_scripts_survive_a_server_that_forgot_them(store: Store) -> None:
    """A script runs before and after the server's script cache was emptied."""
    script = Script("answer", "return ARGV[1]")
    assert await store.writes.run(script, [], "1") == b"1"
    await store.writes.call("SCRIPT", "FLUSH")
    assert await store.writes.run(script, [], "2") == b"2"


async def test_a_server_that_refuses_writes_for_now(store: Store) -> None:
    """Out of memory, read-only and the like are StoreUnavailable with a time to retry, never StoreError."""
    script = Script("set", "return redis.call('SET', KEYS[1], 'x', 'PX', 60000)")
    await store.writes.run(script, ["k"])
    await store.writes.call("CONFIG", "SET", "maxmemory", 1)
    try:
        for call in (store.writes.run(script, ["k"]), store.writes.call("SET", "k", "x", "PX", 60000)):
            with pytest.raises(StoreUnavailable, match="refuses writes") as caught:
                await call
            assert not isinstance(caught.value, StoreError)
            assert caught.value.retry_after
    finally:
        await store.writes.call("CONFIG", "SET", "maxmemory", 0)
    await store.writes.call("REPLICAOF", "127.0.0.1", 1)
    with pytest.raises(StoreUnavailable) as caught:
        await store.writes.call("SET", "k", "x", "PX", 60000)
    assert not isinstance(caught.value, StoreError)
    await store.writes.call("REPLICAOF", "NO", "ONE")


async def test_a_connection_that_ends_as_a_command_comes(store: Store) -> None:
    """A command that meets the end of the connection is answered over one new connection, and so are those behind."""
    (node,) = store.nodes
    pipeline = node.writes
    await pipeline.call("PING")
    made = pipeline.connections
    for number in range(20):
        assert pipeline._connection is not None
        assert pipeline._connection._transport is not None
        first = pipeline.call("ECHO", f"first {number}")
        pipeline._connection._transport.close()
        await asyncio.sleep(0)
        rest = [pipeline.call("ECHO", f"{each} {number}") for each in range(3)]
        async with asyncio.timeout(5):
            found = await asyncio.gather(first, *rest)
        assert found == [f"{each} {number}".encode() for each in ("first", 0, 1, 2)]
    assert pipeline.connections == made + 20


async def test_a_command_that_cannot_be_made_is_refused_alone(store: Store) -> None:
    """A defect of one caller costs nobody else an answer."""

    def broken() -> tuple[str, ...]:
        raise RuntimeError("a defect")

    outcomes: list[object] = []
    store.writes.defer(Lazy("k", broken), lambda reply, error: outcomes.append(error))
    assert await store.writes.call("ECHO", "fine") == b"fine"
    assert isinstance(outcomes[0], StoreError)
