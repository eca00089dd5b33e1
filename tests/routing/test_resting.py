"""A provider that is dead and has no substitute: who waits for an answer is told so, jobs in the background wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import RetrySettings
from llmstream.server import Server
from tests.api.reading import Json, finished
from tests.conftest import echo_settings
from tests.sse import parse
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

TURNS = [{"role": "user", "content": "hi"}]
INTERACTIVE: list[tuple[str, Json]] = [
    ("/v1/chat/completions", {"model": "m", "messages": TURNS}),
    ("/v1/chat/completions", {"model": "m", "messages": TURNS, "stream": True}),
    ("/v1/chat/stream", {"model": "m", "messages": TURNS}),
    ("/v1/chat", {"messages": TURNS}),
    ("/v1/chat", {"messages": TURNS, "stream": True}),
    ("/v1/generate", {"prompt": "hi"}),
    ("/question", {"text": "hi"}),
    ("/generate", {"content": "hi", "job_id": "mine"}),
    ("/chat", {"message": "hi"}),
]
BACKGROUND = {"message": "hi", "model": "m"}
DEAD = Reply(status=500, body={})


@asynccontextmanager
async def serving(
    tmp_path: Path, upstream: Upstream, **breaker: Any
) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    """A server with one target, whose breaker opens with the first failure."""
    settings = echo_settings(
        tmp_path,
        models={},
        providers={"far": {"base_url": upstream.url, "models": ["m"]}},
        breaker={"failures": 1, **breaker},
        retry=RetrySettings(base_s=0.01, cap_s=0.01),
    )
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        yield server, http


async def background(http: aiohttp.ClientSession) -> str:
    async with http.post("/chat/async", json=BACKGROUND) as response:
        assert response.status == 202
        return str((await response.json())["task_id"])


async def open_breaker(server: Server, http: aiohttp.ClientSession, upstream: Upstream) -> str:
    """Lets a job fail, and returns it: it waits from then on."""
    upstream.models["m"] = DEAD
    job = await background(http)
    await wait_until(lambda: dict(server.gateway.breakers) == {"far/m": "open"})
    return job


async def test_a_dead_provider_is_no_slow_one(tmp_path: Path, upstream: Upstream) -> None:
    """While nobody can answer, requests that wait for an answer get 503 with ``Retry-After`` at once, and leave no job
    and no name behind; jobs in the background are accepted, and wait."""
    async with serving(tmp_path, upstream, open_s=60) as (server, http):
        waiting = [await open_breaker(server, http, upstream), await background(http)]
        before = len(upstream.requests)
        for route, body in INTERACTIVE:
            async with http.post(route, json=body) as response:
                refusal = await response.json()
                assert (response.status, refusal["error"]["code"]) == (503, "target_resting"), route
                assert 50 <= int(response.headers["Retry-After"]) <= 60
                assert "x-should-retry" not in response.headers
        assert len(upstream.requests) == before
        assert {state.job.id for state in await server.gateway.recent()} == set(waiting)
        assert not any([(await server.gateway.job(job)).done for job in waiting])
        for job in waiting:
            await server.gateway.cancel(job)


@pytest.mark.parametrize(("route", "body"), [INTERACTIVE[0], INTERACTIVE[1], INTERACTIVE[7]])
async def test_who_was_waiting_is_told(tmp_path: Path, upstream: Upstream, route: str, body: Json) -> None:
    """A request whose own failure opens the breaker does not wait for it: it ends with the same error, costs one
    question, and is no dead letter."""
    upstream.models["m"] = DEAD
    async with serving(tmp_path, upstream, open_s=60) as (server, http):
        async with http.post(route, json=body) as response:
            raw = await response.read()
            if body.get("stream"):
                assert response.status == 200
                (error,) = [frame.json["error"] for frame in parse(raw) if b"error" in frame.data.encode()]
            else:
                assert response.status == 503
                error = (await response.json())["error"]
                assert 50 <= int(response.headers["Retry-After"]) <= 60
                assert "x-should-retry" not in response.headers
            assert error["code"] == "target_resting"
            state = await server.gateway.job(response.headers["x-job-id"])
        assert (state.status, state.dead, len(upstream.requests)) == ("failed", False, 1)


async def test_a_short_rest_is_waited_for(tmp_path: Path, upstream: Upstream) -> None:
    """What is soon over costs nobody their answer."""
    async with serving(tmp_path, upstream, open_s=0.3, wait_s=20) as (server, http):
        job = await open_breaker(server, http, upstream)
        upstream.models["m"] = Reply(["back"])
        for route, body in INTERACTIVE[3], INTERACTIVE[6]:
            async with http.post(route, json=body) as response:
                assert (response.status, "back" in await response.text()) == (200, True)
        assert (await finished(server, job)).status == "completed"


async def test_patience_is_a_setting(tmp_path: Path, upstream: Upstream) -> None:
    """``breaker.wait_s: null`` lets everybody wait."""
    async with serving(tmp_path, upstream, open_s=60, wait_s=None) as (server, http):
        job = await open_breaker(server, http, upstream)
        asking = http.post("/question", json={"text": "hi", "deadline_s": 1})
        async with asking as response:
            assert (response.status, (await response.json())["error"]["code"]) == (504, "deadline_exceeded")
        await server.gateway.cancel(job)


async def test_an_answer_that_is_there_is_given(tmp_path: Path, upstream: Upstream) -> None:
    """A repeated request gets the answer it had, whoever rests now."""
    upstream.models["m"] = Reply(["well"])
    body, key = INTERACTIVE[0][1], {"Idempotency-Key": "k"}
    async with serving(tmp_path, upstream, open_s=60) as (server, http):
        for _ in range(2):
            async with http.post("/v1/chat/completions", json=body, headers=key) as response:
                assert (await response.json())["choices"][0]["message"]["content"] == "well"
            if not server.gateway.breakers:
                await server.gateway.cancel(await open_breaker(server, http, upstream))
        async with http.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "new"}) as response:
            assert response.status == 503
