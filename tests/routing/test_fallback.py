"""What becomes of a job when the first target of its route cannot answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import DeadlineSettings, RetrySettings, SchedulerSettings
from llmstream.server import Server
from llmstream.types import JobState, Restart
from tests.api.reading import Json, finished, log_of, status
from tests.conftest import echo_settings
from tests.logs import text_of
from tests.upstream import Fault, Reply, Upstream
from tests.waiting import wait_until

PIECES = ("Hello", " there", " you")
WHOLE = "".join(PIECES)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        upstream.models["b"] = Reply(PIECES, prefill=True, counts=True)
        yield upstream


@asynccontextmanager
async def serving(
    tmp_path: Path, upstream: Upstream, a_url: str | None = None, **sections: Any
) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    """A server whose model ``r`` leads to ``a`` at one provider, then to ``b`` at another."""
    given: Json = {
        "providers": {
            "one": {"base_url": a_url or upstream.url, "models": [], "continue_by": "assistant_prefill"},
            "two": {"base_url": upstream.url, "models": ["only-two"], "continue_by": "assistant_prefill"},
        },
        "routes": {"r": {"targets": [{"provider": "one", "model": "a"}, {"provider": "two", "model": "b"}]}},
        "scheduler": SchedulerSettings(lease_s=0.4),
        "deadlines": DeadlineSettings(first_token_s=0.4, stall_s=0.4),
        "retry": RetrySettings(base_s=0.01),
        **sections,
    }
    async with Server(echo_settings(tmp_path, **given)) as server, aiohttp.ClientSession(server.url) as http:
        yield server, http


async def submit(http: aiohttp.ClientSession, **body: Any) -> str:
    async with http.post("/chat/async", json={"message": "hi", "model": "r", **body}) as response:
        answer = await response.json()
        assert response.status == 202, answer
        return str(answer["task_id"])


async def run(server: Server, http: aiohttp.ClientSession, **body: Any) -> tuple[JobState, str]:
    """A job's end, and its text, of which nothing was said twice."""
    job = await submit(http, **body)
    state, log = await finished(server, job), await log_of(server, job)
    assert not any(isinstance(event.data, Restart) for event in log)
    return state, text_of(log)


def asked(upstream: Upstream) -> list[str]:
    return [seen.body["model"] for seen in upstream.requests]


def wrong(code: str) -> Json:
    return {"error": {"message": "no", "code": code}}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=401, body={}),
        Reply(status=402, body={}),
        Reply(status=404, body={}),
        Reply(status=429, headers={"Retry-After": "1000"}, body={}),
        Reply(status=500, body={}),
        Reply(status=504, body={}),
        Reply(status=400, body=wrong("context_length_exceeded")),
        Reply(body=wrong("rate_limit_exceeded")),
        Reply(body="<html>"),
        Reply(fault="cut"),
        Reply(fault="done"),
    ],
)
async def test_the_next_target_is_asked_at_once(tmp_path: Path, upstream: Upstream, reply: Reply) -> None:
    """Whatever keeps the first from answering, the next one does in the same attempt, without a wait."""
    upstream.models["a"] = reply
    async with serving(tmp_path, upstream, retry=RetrySettings(base_s=1000, cap_s=1000)) as (server, http):
        state, text = await run(server, http)
    assert (state.status, state.attempt, text) == ("completed", 1, WHOLE)
    assert asked(upstream) == ["a", "b"]


@pytest.mark.parametrize("code", ["content_filter", "invalid_value"])
async def test_what_is_wrong_with_the_request_is_wrong_everywhere(
    tmp_path: Path, upstream: Upstream, code: str
) -> None:
    """A bad request, or one whose content is not allowed, is answered so and asked nowhere else."""
    upstream.models["a"] = Reply(status=400, body=wrong(code))
    async with serving(tmp_path, upstream) as (server, http):
        state, _ = await run(server, http)
    assert state.failure is not None
    assert (state.status, state.failure.code, asked(upstream)) == ("failed", code, ["a"])


async def test_a_target_that_cannot_be_reached(tmp_path: Path, upstream: Upstream, unused_tcp_port: int) -> None:
    """Nobody listens at the first: the next one answers."""
    async with serving(tmp_path, upstream, f"http://127.0.0.1:{unused_tcp_port}/v1") as (server, http):
        state, text = await run(server, http)
    assert (state.attempt, text, asked(upstream)) == (1, WHOLE, ["b"])


async def test_keys_that_nobody_takes(tmp_path: Path, upstream: Upstream) -> None:
    """All targets refuse the key: that is the end, without another attempt."""
    upstream.models["a"] = upstream.models["b"] = Reply(status=401, body={})
    async with serving(tmp_path, upstream) as (server, http):
        state, _ = await run(server, http)
    assert state.failure is not None
    assert (state.failure.code, state.attempt, asked(upstream)) == ("upstream_denied", 1, ["a", "b"])


async def test_attempts_are_counted_in_rounds(tmp_path: Path, upstream: Upstream) -> None:
    """All targets are down for good: each of three attempts asks all of them."""
    upstream.models["a"] = upstream.models["b"] = Reply(status=500, body={})
    async with serving(tmp_path, upstream) as (server, http):
        state, _ = await run(server, http)
    assert (state.status, state.attempt, asked(upstream)) == ("failed", 3, ["a", "b"] * 3)


@pytest.mark.parametrize("fault", ["cut", "stall", "malformed", "error", "no_finish"])
async def test_going_on_at_the_next_target(tmp_path: Path, upstream: Upstream, fault: Fault) -> None:
    """The first breaks off in the middle: the next goes on from its last token, and is asked for its own model."""
    upstream.models["a"] = Reply(PIECES, fault=fault, at=1)
    said = WHOLE if fault == "no_finish" else PIECES[0]
    async with serving(tmp_path, upstream, retry=RetrySettings(base_s=1000, cap_s=1000)) as (server, http):
        state, text = await run(server, http)
        assert (await status(http, state.job.id))["model"] == "r"
    assert (state.status, state.attempt, text, asked(upstream)) == ("completed", 2, WHOLE, ["a", "b"])
    assert upstream.requests[1].body["messages"][-1] == {"role": "assistant", "content": said}
    assert state.usage is not None
    assert (state.usage.prompt_tokens, state.usage.completion_tokens) == (7, 3)


async def test_going_on_where_that_is_possible(tmp_path: Path, upstream: Upstream) -> None:
    """The next target cannot continue, the one that broke off can: it is asked once more before anybody starts over."""
    upstream.replies += [Reply(PIECES, fault="cut", at=1), Reply(PIECES, prefill=True)]
    providers = {
        "one": {"base_url": upstream.url, "models": [], "continue_by": "assistant_prefill"},
        "two": {"base_url": upstream.url, "models": []},
    }
    async with serving(tmp_path, upstream, providers=providers) as (server, http):
        state, text = await run(server, http)
    assert (state.status, text, asked(upstream)) == ("completed", WHOLE, ["a", "a"])


async def test_a_silent_target(tmp_path: Path, upstream: Upstream) -> None:
    """No first token in time: the next attempt begins at the next target."""
    upstream.models["a"] = Reply(gates={0: asyncio.Event()})
    async with serving(tmp_path, upstream, retry=RetrySettings(base_s=1000, cap_s=1000)) as (server, http):
        state, text = await run(server, http)
    assert (state.attempt, text, asked(upstream)) == (2, WHOLE, ["a", "b"])


async def test_an_open_breaker_is_passed_by(tmp_path: Path, upstream: Upstream) -> None:
    """After enough failures the first target is not asked any more; when it is well again it is."""
    upstream.models["a"] = Reply(status=500, body={})
    breaker = {"failures": 2, "open_s": 0.5}
    async with serving(tmp_path, upstream, breaker=breaker) as (server, http):
        for _ in range(2):
            await run(server, http)
        await wait_until(lambda: dict(server.gateway.breakers) == {"one/a": "open"})
        asked_before = asked(upstream)
        assert asked_before == ["a", "b"] * 2
        await run(server, http)
        assert asked(upstream) == [*asked_before, "b"]
        upstream.models["a"] = Reply(["back"])
        await wait_until(lambda: server.gateway.breakers["one/a"] == "half_open")
        assert (await run(server, http))[1] == "back"
        await wait_until(lambda: not server.gateway.breakers)


async def test_only_one_asks_a_target_that_may_be_well_again(tmp_path: Path, upstream: Upstream) -> None:
    """While one request tries a half open target the others go on to the next."""
    upstream.models["a"] = Reply(status=500, body={})
    async with serving(tmp_path, upstream, breaker={"failures": 1, "open_s": 0.3}) as (server, http):
        await run(server, http)
        await wait_until(lambda: server.gateway.breakers.get("one/a") == "half_open")
        gate = asyncio.Event()
        upstream.models["a"] = Reply(["back"], gates={0: gate})
        before = len(upstream.requests)
        jobs = [await submit(http) for _ in range(4)]
        await wait_until(lambda: len(upstream.requests) == before + 4)
        assert sorted(asked(upstream)[before:]) == ["a", "b", "b", "b"]
        gate.set()
        for job in jobs:
            assert (await finished(server, job)).status == "completed"


async def test_starting_over_where_all_targets_rest(tmp_path: Path, upstream: Upstream) -> None:
    """An answer breaks off, and no target may be asked for a while: what is said after the restart is one answer, not
    the rest of the one that is void."""
    upstream.models["a"] = Reply(PIECES, fault="cut", at=1)
    upstream.models["b"] = Reply(status=500, body={})
    providers = {
        "one": {"base_url": upstream.url, "models": [], "continue_by": "assistant_prefill"},
        "two": {"base_url": upstream.url, "models": [], "continue_by": "none"},
    }
    breaker = {"failures": 1, "open_s": 0.4}
    async with serving(tmp_path, upstream, providers=providers, breaker=breaker) as (server, http):
        await run(server, http, provider="two")  # which opens the breaker of b
        job = await submit(http)
        await wait_until(lambda: set(server.gateway.breakers) == {"one/a", "two/b"})
        upstream.models["a"] = upstream.models["b"] = Reply(PIECES, prefill=True)
        assert (await finished(server, job)).status == "completed"
        assert (await server.gateway.transcript(job)).text == WHOLE


async def test_no_retry_after_a_cancellation(tmp_path: Path, upstream: Upstream) -> None:
    """A job cancelled in the pause behind a failed attempt is never asked for again."""
    upstream.models["a"] = upstream.models["b"] = Reply(status=500, body={})
    async with serving(tmp_path, upstream, retry=RetrySettings(base_s=1000, cap_s=1000)) as (server, http):
        job = await submit(http)
        await wait_until(lambda: len(upstream.requests) == 2 and upstream.requests[1].answered)
        assert (await server.gateway.cancel(job)).status == "cancelled"
        await wait_until(lambda: server.gateway._scheduler.running == 0)
    assert asked(upstream) == ["a", "b"]


async def test_a_pattern_passes_the_name_on(tmp_path: Path, upstream: Upstream) -> None:
    """Through a route with wildcards the upstream is asked for the very name."""
    routes = {"my-*": {"targets": [{"provider": "one"}]}}
    async with serving(tmp_path, upstream, routes=routes) as (server, http):
        state, _ = await run(server, http, model="my-model")
    assert (state.status, asked(upstream)) == ("completed", ["my-model"])


async def test_choosing_the_provider(tmp_path: Path, upstream: Upstream) -> None:
    """With ``provider`` only its target is asked, whatever comes of it."""
    upstream.models["b"] = Reply(status=401, body={})
    async with serving(tmp_path, upstream) as (server, http):
        state, _ = await run(server, http, provider="two")
    assert (state.status, asked(upstream)) == ("failed", ["b"])
