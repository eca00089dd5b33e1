"""A second target is asked when the first one keeps silent: whose token comes first answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from llmstream.config import RetrySettings, SchedulerSettings
from llmstream.server import Server
from llmstream.types import JobState, Restart, Started
from tests.api.reading import finished, log_of
from tests.conftest import echo_settings
from tests.logs import text_of
from tests.upstream import Reply, Seen, Upstream
from tests.waiting import wait_until

PREFILL = "assistant_prefill"
A, B = Reply(["A1", " A2"], counts=True), Reply(["B1", " B2"], counts=True)


@pytest.fixture
async def server(tmp_path: Path, upstream: Upstream) -> AsyncIterator[Server]:
    settings = echo_settings(
        tmp_path,
        providers={
            "far": {"base_url": upstream.url, "models": [], "concurrency": 2, "continue_by": "assistant_prefill"}
        },
        routes={"r": {"targets": [{"provider": "far", "model": name} for name in "abc"], "hedge_s": 0.05}},
        scheduler=SchedulerSettings(lease_s=0.4),
        retry=RetrySettings(base_s=0.01),
    )
    async with Server(settings) as server:
        yield server


async def submit(server: Server, **body: object) -> str:
    asked = {"message": "hi", "model": "r", **body}
    async with aiohttp.ClientSession(server.url) as http, http.post("/chat/async", json=asked) as response:
        answer = await response.json()
        assert response.status == 202, answer
        return str(answer["task_id"])


async def text(server: Server, job: str) -> str:
    log = await log_of(server, job)
    assert not any(isinstance(event.data, Restart) for event in log)
    return text_of(log)


def asked(upstream: Upstream, model: str) -> Seen:
    (seen,) = (seen for seen in upstream.requests if seen.body["model"] == model)
    return seen


def hedged(state: JobState) -> object:
    assert state.usage is not None
    return (state.usage.details or {}).get("hedged")


async def nothing_held(server: Server) -> None:
    async def free() -> bool:
        return [(await server.gateway.spent(f"far/{name}")).slots for name in "abc"] == [0, 0, 0]

    await wait_until(free)


async def test_the_second_is_faster(server: Server, upstream: Upstream) -> None:
    """The first keeps silent: the second one's answer is the answer, the first is hung up on and named in the usage."""
    upstream.models.update(a=Reply(gates={0: asyncio.Event()}), b=B)
    job = await submit(server)
    state = await finished(server, job)
    assert (state.status, state.attempt, await text(server, job)) == ("completed", 1, "B1 B2")
    await asyncio.wait_for(asked(upstream, "a").hung_up.wait(), 10)
    assert state.usage is not None
    assert (state.usage.prompt_tokens, state.usage.completion_tokens) == (7, 2)
    assert hedged(state) == {"target": "far/a", "prompt_tokens": 7}
    await nothing_held(server)


async def test_the_first_is_faster_after_all(server: Server, upstream: Upstream) -> None:
    """Both are asked, the first one's token comes first: the second is hung up on."""
    gate = asyncio.Event()
    upstream.models.update(a=Reply(A.pieces, gates={0: gate}), b=Reply(gates={0: asyncio.Event()}))
    job = await submit(server)
    await wait_until(lambda: len(upstream.requests) == 2)
    gate.set()
    state = await finished(server, job)
    assert (state.status, await text(server, job)) == ("completed", "A1 A2")
    await asyncio.wait_for(asked(upstream, "b").hung_up.wait(), 10)
    assert hedged(state) == {"target": "far/b", "prompt_tokens": 7}
    await nothing_held(server)


async def test_who_is_quick_enough_is_asked_alone(server: Server, upstream: Upstream) -> None:
    """A first token in time, and a slow rest: nobody else is asked."""
    gate = asyncio.Event()
    upstream.models.update(a=Reply(A.pieces, gates={1: gate}))
    job = await submit(server)

    async def begun() -> bool:
        return (await server.gateway.transcript(job)).text == "A1"

    await wait_until(begun)
    await asyncio.sleep(0.1)
    gate.set()
    state = await finished(server, job)
    assert (await text(server, job), len(upstream.requests), hedged(state)) == ("A1 A2", 1, None)


async def test_the_loser_gives_its_slot_back_at_once(server: Server, upstream: Upstream) -> None:
    """While the winner is still answering, the loser's slot is free."""
    gate = asyncio.Event()
    upstream.models.update(a=Reply(gates={0: asyncio.Event()}), b=Reply(B.pieces, gates={1: gate}))
    job = await submit(server)

    async def only_the_winner() -> bool:
        return [(await server.gateway.spent(f"far/{name}")).slots for name in "ab"] == [0, 1]

    await wait_until(only_the_winner)
    gate.set()
    assert (await finished(server, job)).status == "completed"


async def test_one_of_both_fails(server: Server, upstream: Upstream) -> None:
    """The first fails while the second is silent: the second answers, and no attempt is lost."""
    fails, answers = asyncio.Event(), asyncio.Event()
    upstream.models.update(a=Reply(status=500, body={}, gates={-1: fails}), b=Reply(B.pieces, gates={0: answers}))
    job = await submit(server)
    await wait_until(lambda: len(upstream.requests) == 2)
    fails.set()
    await wait_until(lambda: asked(upstream, "a").answered)
    answers.set()
    state = await finished(server, job)
    assert (state.status, state.attempt, await text(server, job)) == ("completed", 1, "B1 B2")
    assert len(upstream.requests) == 2


async def test_both_fail(server: Server, upstream: Upstream) -> None:
    """Both refuse: the third is asked in the same attempt."""
    gate = asyncio.Event()
    upstream.models.update(
        a=Reply(status=500, body={}, gates={-1: gate}), b=Reply(status=500, body={}, gates={-1: gate})
    )
    upstream.models["c"] = Reply(["C"])
    job = await submit(server)
    await wait_until(lambda: len(upstream.requests) == 2)
    gate.set()
    state = await finished(server, job)
    assert (state.status, state.attempt, await text(server, job)) == ("completed", 1, "C")
    await nothing_held(server)


async def test_the_winner_breaks_off(server: Server, upstream: Upstream) -> None:
    """The winner is cut in the middle: the next attempt goes on from there, at a target that has not failed."""
    upstream.models["a"] = Reply(B.pieces, gates={0: asyncio.Event()})
    upstream.models["b"] = Reply(B.pieces, fault="cut", at=1)
    upstream.models["c"] = Reply(B.pieces, prefill=True)
    job = await submit(server)
    state = await finished(server, job)
    log = await log_of(server, job)
    assert (state.status, await text(server, job)) == ("completed", "B1 B2")
    assert sum(isinstance(event.data, Started) for event in log) == 2
    await nothing_held(server)


async def test_cancelling_stops_both(server: Server, upstream: Upstream) -> None:
    """A job cancelled while both are silent stops both."""
    upstream.models.update(a=Reply(gates={0: asyncio.Event()}), b=Reply(gates={0: asyncio.Event()}))
    job = await submit(server)
    await wait_until(lambda: len(upstream.requests) == 2)
    await server.gateway.cancel(job)
    for name in "ab":
        await asyncio.wait_for(asked(upstream, name).hung_up.wait(), 10)
    assert (await finished(server, job)).status == "cancelled"
    await nothing_held(server)
