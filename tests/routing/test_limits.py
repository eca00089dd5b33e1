"""Limits of a target: who does not fit in waits in the lane, in order, and no longer than it has to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import RetrySettings, SchedulerSettings
from llmstream.scheduler import scheduler as scheduler_module
from llmstream.server import Server
from llmstream.store import budgets as budgets_module
from tests.api.reading import Json, finished, status
from tests.conftest import echo_settings
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until


def limited(tmp_path: Path, upstream: Upstream, routes: Json | None = None, **provider: Any) -> Server:
    settings = echo_settings(
        tmp_path,
        providers={
            "far": {"base_url": upstream.url, "models": ["m"], **provider},
            "near": {"base_url": upstream.url, "models": ["n"]},
        },
        routes=routes or {},
        scheduler=SchedulerSettings(lease_s=0.4),
        retry=RetrySettings(base_s=0.01),
    )
    return Server(settings)


async def submit(http: aiohttp.ClientSession, message: str = "hi", **body: Any) -> str:
    async with http.post("/chat/async", json={"message": message, "model": "m", **body}) as response:
        answer = await response.json()
        assert response.status == 202, answer
        return str(answer["task_id"])


def said(upstream: Upstream) -> list[str]:
    """What was asked, in the order of its arrival."""
    return [seen.body["messages"][-1]["content"] for seen in upstream.requests]


async def test_who_does_not_fit_waits_in_line(tmp_path: Path, upstream: Upstream) -> None:
    """With one request at once the others are queued, with a position, and go by priority; other models go on."""
    gate = asyncio.Event()
    upstream.models["m"] = Reply(gates={0: gate})
    async with limited(tmp_path, upstream, concurrency=1) as server, aiohttp.ClientSession(server.url) as http:
        first = await submit(http, "first")
        await wait_until(lambda: said(upstream) == ["first"])
        low, high = await submit(http, "low", priority=-5), await submit(http, "high", priority=5)
        other = await submit(http, "other", model="n")
        assert (await finished(server, other)).status == "completed"

        async def in_line() -> bool:
            states = [await status(http, job) for job in (high, low)]
            return [(state["status"], state.get("position")) for state in states] == [("queued", 0), ("queued", 1)]

        await wait_until(in_line)
        assert said(upstream) == ["first", "other"]
        gate.set()
        for job in (first, high, low):
            state = await finished(server, job)
            assert (state.status, state.attempt) == ("completed", 1)
        assert said(upstream) == ["first", "other", "high", "low"]


async def test_room_is_told_of(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that waits begins when a slot is given back, without asking again and again."""
    monkeypatch.setattr(scheduler_module, "POLL_S", 1000)
    monkeypatch.setattr(budgets_module, "POLL_S", 1000)
    gate = asyncio.Event()
    upstream.models["m"] = Reply(gates={0: gate})
    routes = {"other": {"targets": [{"provider": "far", "model": "m"}]}}
    async with limited(tmp_path, upstream, routes, concurrency=1) as server, aiohttp.ClientSession(server.url) as http:
        jobs = [await submit(http, "first")]
        await wait_until(lambda: len(upstream.requests) == 1)
        jobs.append(await submit(http, "same target, another lane", model="other"))
        await wait_until(lambda: server.gateway._scheduler.pools["remote:other"].full_until > 0)
        gate.set()
        for job in jobs:
            assert (await finished(server, job)).status == "completed"


async def test_a_deadline_passes_in_line(tmp_path: Path, upstream: Upstream) -> None:
    """A job that waits for room fails at its own deadline, and was never sent."""
    gate = asyncio.Event()
    upstream.models["m"] = Reply(gates={0: gate})
    async with limited(tmp_path, upstream, concurrency=1) as server, aiohttp.ClientSession(server.url) as http:
        await submit(http, "first")
        await wait_until(lambda: len(upstream.requests) == 1)
        state = await finished(server, await submit(http, "late", deadline_s=0.3))
        assert state.failure is not None
        assert (state.status, state.failure.code, state.attempt) == ("failed", "deadline_exceeded", 0)
        gate.set()
    assert said(upstream) == ["first"]


async def test_a_cancelled_job_gives_its_room_back(tmp_path: Path, upstream: Upstream) -> None:
    """One that runs and one that waits are cancelled: the next gets the slot."""
    upstream.models["m"] = Reply(gates={1: asyncio.Event()})
    async with limited(tmp_path, upstream, concurrency=1) as server, aiohttp.ClientSession(server.url) as http:
        first = await submit(http, "first")
        await wait_until(lambda: len(upstream.requests) == 1)
        waiting = await submit(http, "waiting")
        upstream.models["m"] = Reply()
        for job in (waiting, first):
            async with http.delete(f"/chat/{job}") as response:
                assert response.status == 200
        assert (await finished(server, await submit(http, "next"))).status == "completed"
        assert said(upstream) == ["first", "next"]


@pytest.mark.parametrize(("limit", "sent"), [({"rpm": 3}, 1), ({"tpm": 3000}, 2)])
async def test_rates(tmp_path: Path, upstream: Upstream, limit: Json, sent: int) -> None:
    """No more begin than the minute, or a burst of it, has room for; the rest waits."""
    async with limited(tmp_path, upstream, **limit) as server, aiohttp.ClientSession(server.url) as http:
        jobs = [await submit(http, str(number), max_tokens=1000) for number in range(5)]
        # What is settled makes room again for tokens: 10 of about 1,010 are used.
        done = 5 if "tpm" in limit else sent
        await wait_until(lambda: len(upstream.requests) == done)
        states = [await status(http, job) for job in jobs]
        assert sum(state["status"] == "queued" for state in states) == 5 - done
        spent = await server.gateway.spent("far/m")
        assert spent.requests == done
        assert spent.tokens <= 3000


async def test_what_can_never_fit_is_refused(tmp_path: Path, upstream: Upstream) -> None:
    """More tokens than a minute has: 400 at once, unless another target of the route takes them."""
    routes = {"r": {"targets": [{"provider": "far", "model": "m"}, {"provider": "near", "model": "n"}]}}
    async with limited(tmp_path, upstream, routes, tpm=500) as server, aiohttp.ClientSession(server.url) as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 501}
        async with http.post("/v1/chat/completions", json=body) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (400, "too_many_tokens", "max_tokens")
        assert "far/m takes no more than 500 a minute" in error["message"]
        async with http.post("/v1/chat/completions", json={**body, "model": "r"}) as response:
            assert response.status == 200
        assert [seen.body["model"] for seen in upstream.requests] == ["n"]


async def test_a_full_target_is_passed_over(tmp_path: Path, upstream: Upstream) -> None:
    """Where the first target of a route is full the next one is asked at once; both full, the job waits."""
    gate = asyncio.Event()
    upstream.models["m"] = upstream.models["n"] = Reply(gates={0: gate})
    routes = {
        "r": {"targets": [{"provider": "far", "model": "m"}, {"provider": "near", "model": "n", "concurrency": 1}]}
    }
    async with limited(tmp_path, upstream, routes, concurrency=1) as server, aiohttp.ClientSession(server.url) as http:
        jobs = [await submit(http, str(number), model="r") for number in range(3)]
        await wait_until(lambda: len(upstream.requests) == 2)
        assert [seen.body["model"] for seen in upstream.requests] == ["m", "n"]
        assert (await status(http, jobs[2]))["status"] == "queued"
        gate.set()
        for job in jobs:
            assert (await finished(server, job)).status == "completed"


async def test_memory_jobs_wait_too(tmp_path: Path, upstream: Upstream) -> None:
    """A job that is kept nowhere needs the same room."""
    gate = asyncio.Event()
    upstream.models["m"] = Reply(gates={0: gate})
    async with limited(tmp_path, upstream, concurrency=1) as server, aiohttp.ClientSession(server.url) as http:
        jobs = [await submit(http, str(number), durability="memory") for number in range(3)]
        await wait_until(lambda: len(upstream.requests) == 1)
        assert [(await status(http, job))["status"] for job in jobs[1:]] == ["queued"] * 2
        gate.set()
        for job in jobs:
            assert (await finished(server, job)).status == "completed"
        assert said(upstream) == ["0", "1", "2"]


async def test_a_retry_needs_room_as_well(tmp_path: Path, upstream: Upstream) -> None:
    """An attempt that follows another waits for its turn and costs no attempt while it does."""
    upstream.models["m"] = Reply()
    gate = asyncio.Event()
    upstream.replies += [Reply(status=503, body={}, gates={-1: gate})]
    async with limited(tmp_path, upstream, concurrency=1) as server, aiohttp.ClientSession(server.url) as http:
        jobs = [await submit(http, str(number)) for number in range(4)]
        await wait_until(lambda: len(upstream.requests) == 1)
        gate.set()
        states = [await finished(server, job) for job in jobs]
        assert [(state.status, state.attempt) for state in states] == [("completed", 2), *[("completed", 1)] * 3]
        spent = await server.gateway.spent("far/m")
        assert (spent.slots, spent.requests) == (0, 5)
