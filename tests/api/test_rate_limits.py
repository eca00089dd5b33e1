"""Rates, tokens and jobs of a caller: what is allowed, what is refused and how, and what it has cost in the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from llmstream.access.credentials import issue
from llmstream.api.rates import HEADERS, duration, origin_of
from llmstream.config import ModelSettings
from llmstream.config_security import RateLimitSettings
from llmstream.errors import StoreUnavailable
from llmstream.scheduler import charges
from llmstream.scheduler.scheduler import MAX_BEAT_S
from llmstream.server import Server
from llmstream.store import rate_limits
from llmstream.store.rate_limits import Charge, Rate
from llmstream.types import CallerLimits
from tests.api.keyed import client, keyed_settings, secret
from tests.api.reading import Json, conversation, finished, status, submit
from tests.conftest import echo_settings
from tests.scrape import scrape
from tests.waiting import wait_until

HI = {"role": "user", "content": "hi"}
ROUTES: Mapping[str, Json] = {
    "/v1/chat/completions": {"model": "echo", "messages": [HI]},
    "/v1/chat/stream": {"model": "echo", "messages": [HI]},
    "/chat": {"message": "hi"},
    "/chat/async": {"message": "hi"},
    "/question": {"text": "hi"},
    "/generate": {"content": "hi"},
    "/chat_completion": {"messages": [HI]},
    "/v1/generate": {"prompt": "hi"},
    "/v1/chat": {"messages": [HI], "stream": True, "session_id": "s"},
    "/v1/embeddings": {"model": "echo", "input": "hi"},
    "/embeddings": {"model": "echo", "texts": ["hi"]},
}
LONG = {"tokens": 1000, "delay_ms": 1000}


@pytest.fixture(autouse=True)
def slow_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute takes ten hours, so that what is left can be compared exactly."""
    monkeypatch.setattr(charges, "WINDOW_S", 36_000.0)


@asynccontextmanager
async def serving(tmp_path: Path, key: Json | None = None, **limits: Any) -> AsyncIterator[Server]:
    """A server with keys and these limits for each; ``key`` says more about alice's."""
    keys = {name: dict(value) for name, value in keyed_settings(tmp_path).keys.items()}
    keys["alice"] |= key or {}
    async with Server(keyed_settings(tmp_path, keys=keys, rate_limit=limits)) as server:
        yield server


async def post(http: aiohttp.ClientSession, path: str = "/v1/chat/completions", **more: Any) -> tuple[int, Any, Json]:
    body = {**ROUTES[path], **more.pop("body", {})}
    async with http.post(path, json=body, **more) as response:
        raw = await response.read()
        return response.status, response.headers, await response.json() if response.status >= 400 else {"raw": raw}


async def left(server: Server, name: str = "tokens", who: str = "alice", size: int = 1000) -> int:
    rate = Rate(name, size, charges.WINDOW_S, size)
    return (await server.gateway._store.rate_limits.take(who, Charge(rate, 0))).verdicts[0].remaining


async def test_requests_a_minute_on_every_route(tmp_path: Path) -> None:
    """Every route that generates counts, says what is left, streams included, and refuses what is too much; somebody
    else's requests are not concerned."""
    names = [f"caller{number}" for number in range(len(ROUTES))]
    keys = {name: {"value": secret(name)} for name in names}
    limits = {"requests_per_minute": 60, "burst_size": 2}
    async with Server(keyed_settings(tmp_path, keys=keys, rate_limit=limits)) as server:
        for name, path in zip(names, ROUTES, strict=True):
            async with client(server, secret(name)) as http:
                for remaining in (1, 0):
                    code, headers, _ = await post(http, path)
                    assert code in (200, 202)
                    assert (headers["X-RateLimit-Limit"], headers["X-RateLimit-Remaining"]) == ("2", str(remaining))
                before = len(await server.gateway.recent())
                code, headers, body = await post(http, path)
                error = body["error"]
                assert (code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
                assert "60 a minute" in error["message"]
                assert 590 < int(headers["Retry-After"]) <= 600
                assert headers["x-ratelimit-limit-requests"] == "2"
                assert headers["x-ratelimit-remaining-requests"] == "0"
                assert headers["x-ratelimit-reset-requests"].startswith(("19m", "20m"))
                assert 1190 < int(headers["X-RateLimit-Reset"]) <= 1200
                assert len(await server.gateway.recent()) == before


async def test_embeddings_cost_their_inputs(tmp_path: Path) -> None:
    """A batch is charged for its inputs only, and in the end for what the model counted."""
    async with serving(tmp_path, tokens_per_minute=1000) as server, client(server, secret("alice")) as http:
        body = {"input": ["one two three"] * 100}
        code, _, answer = await post(http, "/v1/embeddings", body=body)
        used: int = json.loads(answer["raw"])["usage"]["total_tokens"]
        assert (code, used) == (200, 300)

        async def settled() -> bool:
            return await left(server) == 1000 - used

        await wait_until(settled)


async def test_reading_is_free(tmp_path: Path) -> None:
    """Status, streams, lists, cancellation cost nothing and bear no such headers, nor does a request that is wrong."""
    async with (
        serving(tmp_path, requests_per_minute=60, burst_size=2) as server,
        client(server, secret("alice")) as http,
    ):
        job = await submit(http)
        for path in (f"/chat/{job['task_id']}", job["stream_url"], "/jobs", "/v1/models", "/stats", "/sessions"):
            async with http.get(path) as response:
                assert response.status == 200
                assert not set(HEADERS) & set(response.headers)
        async with http.delete(f"/chat/{job['task_id']}") as response:
            assert response.status == 200
        assert (await post(http, body={"model": "nobody"}))[0] == 404
        assert (await post(http, body={"n": 0}))[0] == 400
        assert await left(server, "requests", size=2) == 1


async def test_requeuing_counts(tmp_path: Path) -> None:
    """A job that runs once more is a request; doing it twice is a request more and the same job's tokens."""
    async with (
        serving(tmp_path, requests_per_minute=60, tokens_per_minute=1000) as server,
        client(server, secret("alice")) as http,
    ):
        job = await submit(http, max_tokens=5, echo={"tokens": 3, "fault": "reject"})
        await finished(server, job["task_id"])
        for _ in range(2):
            async with http.post(f"/jobs/{job['task_id']}/requeue") as response:
                assert response.status == 202
                assert response.headers["x-ratelimit-limit-requests"] == "60"
                again = (await response.json())["task_id"]
            await finished(server, again)
        assert await left(server, "requests", size=60) == 57
        await wait_until(lambda: settled(server, 1000))


async def settled(server: Server, tokens: int) -> bool:
    return await left(server) == tokens


async def test_tokens_are_what_was_used(tmp_path: Path) -> None:
    """A job is charged for its prompt and the longest answer, and in the end for what it used."""
    async with serving(tmp_path, tokens_per_minute=1000) as server, client(server, secret("alice")) as http:
        job = await submit(http, max_tokens=500, echo={"tokens": 20, "delay_ms": 20})
        assert 480 <= await left(server) < 500
        usage = (await finished(server, job["task_id"])).usage
        assert usage is not None
        assert usage.total_tokens > 20
        await wait_until(lambda: settled(server, 1000 - usage.total_tokens))


async def test_a_refused_prompt_charges_nothing(tmp_path: Path) -> None:
    """What does not fit now is refused with the time it takes; what never fits is a bad request. Neither costs
    anything."""
    async with (
        serving(tmp_path, requests_per_minute=60, tokens_per_minute=1000) as server,
        client(server, secret("alice")) as http,
    ):
        job = await submit(http, max_tokens=600, echo=LONG)
        code, headers, body = await post(http, body={"max_tokens": 600})
        assert (code, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "tokens" in body["error"]["message"]
        assert headers["X-RateLimit-Limit"] == headers["x-ratelimit-limit-tokens"] == "1000"
        assert int(headers["x-ratelimit-remaining-tokens"]) < 400
        assert int(headers["Retry-After"]) > 5000
        code, headers, body = await post(http, body={"max_tokens": 1001})
        assert (code, body["error"]["code"], body["error"]["param"]) == (400, "rate_limit_exceeded", "max_tokens")
        assert "never" in body["error"]["message"]
        assert len(await server.gateway.recent()) == 1
        assert await left(server, "requests", size=60) == 59
        async with http.delete(f"/chat/{job['task_id']}"):
            pass
        assert (await post(http))[0] == 200  # without max_tokens: as much as there is, and it will use less


async def used_a_little(server: Server) -> bool:
    return 4 < 1000 - await left(server) < 40


async def test_a_job_that_never_began_costs_nothing(tmp_path: Path) -> None:
    """One that is cancelled while it waits, or that its model refuses, gives back all that it took."""
    async with (
        serving(tmp_path, tokens_per_minute=1000, concurrent_jobs=1) as server,
        client(server, secret("alice")) as http,
    ):
        running = await submit(http, max_tokens=200, echo=LONG)
        before = await left(server)
        waiting = await submit(http, max_tokens=200, echo=LONG)
        assert await left(server) < before - 200
        async with http.delete(f"/chat/{waiting['task_id']}"):
            assert await left(server) == before
        async with http.delete(f"/chat/{running['task_id']}"):
            pass
        rejected = await submit(http, max_tokens=200, echo={"fault": "reject"})
        assert (await finished(server, rejected["task_id"])).status == "failed"
        await wait_until(lambda: settled(server, 1000))


async def test_a_job_whose_time_is_up_in_line_costs_nothing(tmp_path: Path) -> None:
    """A job that still waits at its deadline gives back all that it took."""
    async with (
        serving(tmp_path, tokens_per_minute=1000, concurrent_jobs=1) as server,
        client(server, secret("alice")) as http,
    ):
        await submit(http, max_tokens=200, echo=LONG)
        before = await left(server)
        late = await submit(http, max_tokens=200, deadline_s=0.1, echo=LONG)
        assert (await finished(server, late["task_id"])).status == "failed"
        await wait_until(lambda: settled(server, before))


@pytest.mark.parametrize("fault", ["stall", "crash"])
async def test_an_answer_that_was_cut_costs_what_it_said(tmp_path: Path, fault: str) -> None:
    """A job that was cancelled or failed has used its prompt and what there is of the answer."""
    async with serving(tmp_path, tokens_per_minute=1000) as server, client(server, secret("alice")) as http:
        job = await submit(http, max_tokens=200, echo={"tokens": 100, "fault": fault, "at": 4})

        async def said() -> bool:
            return "tok0003" in (await status(http, job["task_id"]))["text"]

        await wait_until(said)
        async with http.delete(f"/chat/{job['task_id']}"):
            state = await finished(server, job["task_id"])
        assert state.status == {"stall": "cancelled", "crash": "failed"}[fault]
        await wait_until(lambda: used_a_little(server))


async def test_nobody_reads_it_any_more(tmp_path: Path) -> None:
    """A job that ends for want of readers costs what it said."""
    async with serving(tmp_path, tokens_per_minute=1000) as server, client(server, secret("alice")) as http:
        echo = {"tokens": 9, "fault": "stall", "at": 4}
        body = conversation(stream=True, max_tokens=200, on_disconnect="cancel", echo=echo)
        async with http.post("/v1/chat/completions", json=body) as response:
            await response.content.readuntil(b"tok0003")
            assert await left(server) < 800
        await wait_until(lambda: used_a_little(server))


async def test_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    """A job that ends in line for want of readers gives back all that it took."""
    async with (
        serving(tmp_path, tokens_per_minute=1000, concurrent_jobs=1) as server,
        client(server, secret("alice")) as http,
    ):
        await submit(http, max_tokens=200, echo=LONG)
        before = await left(server)
        body = {"max_tokens": 200, "stream": True, "on_disconnect": "cancel", "echo": LONG}
        async with http.post("/v1/chat/completions", json={**ROUTES["/v1/chat/completions"], **body}):
            assert await left(server) < before - 200
        await wait_until(lambda: settled(server, before))


async def test_what_could_not_be_counted_is_counted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the store go away just before what a job used is counted, the job's place is kept until it is."""
    async with serving(tmp_path, tokens_per_minute=1000) as server, client(server, secret("alice")) as http:
        limits = server.gateway._store.rate_limits
        settle, tried = limits.settle, list[str]()

        async def fails_once(who: str, name: str, job_id: str, used: int) -> Any:
            tried.append(job_id)
            if len(tried) == 1:
                raise StoreUnavailable("gone")
            return await settle(who, name, job_id, used)

        monkeypatch.setattr(limits, "settle", fails_once)
        job = await submit(http, max_tokens=500, echo={"tokens": 20})
        usage = (await finished(server, job["task_id"])).usage
        assert usage is not None
        await wait_until(lambda: settled(server, 1000 - usage.total_tokens))
        assert tried == [job["task_id"]] * 2


async def test_a_defect_keeps_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should counting what a job used break, the job is over all the same."""
    async with serving(tmp_path, tokens_per_minute=1000) as server, client(server, secret("alice")) as http:

        def breaks(*_: object) -> None:
            raise RuntimeError("a defect")

        monkeypatch.setattr(server.gateway._store.rate_limits, "settle", breaks)
        job = await submit(http, model="echo", echo={"tokens": 1})
        assert (await finished(server, job["task_id"])).status == "completed"

        async def given_back() -> bool:
            return (await server.gateway.stats())["echo"].served == 1

        await wait_until(given_back)


async def test_the_same_job_is_charged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes again is a request and no tokens: at once, while it runs, when it is over, and where the
    tokens have run out."""
    monkeypatch.setattr(rate_limits, "SETTLED_MS", 1)
    async with (
        serving(tmp_path, requests_per_minute=60, tokens_per_minute=100) as server,
        client(server, secret("alice")) as http,
    ):
        body = {"max_tokens": 80, "echo": {"tokens": 20, "delay_ms": 20}, "stream": True}
        named = {"Idempotency-Key": "k"}
        both = await asyncio.gather(*(post(http, body=body, headers=named) for _ in range(3)))
        assert [code for code, *_ in both] == [200] * 3
        assert len({headers["x-job-id"] for _, headers, _ in both}) == 1
        usage = (await finished(server, both[0][1]["x-job-id"])).usage
        assert usage is not None
        await wait_until(lambda: exactly(server, 100 - usage.total_tokens))
        code, headers, _ = await post(http, body=body, headers=named)
        assert (code, headers["x-ratelimit-remaining-tokens"]) == (200, str(100 - usage.total_tokens))
        assert (await post(http, body={**body, "echo": LONG}))[0] == 429
        assert await left(server, "requests", size=60) == 56


async def exactly(server: Server, tokens: int) -> bool:
    return await left(server, size=100) == tokens


async def test_a_cached_answer_is_a_request_and_no_tokens(tmp_path: Path) -> None:
    """An answer that is there already counts as a request, and is refused like one."""
    async with (
        serving(tmp_path, requests_per_minute=60, burst_size=3, tokens_per_minute=1000) as server,
        client(server, secret("alice")) as http,
    ):
        found = [await post(http, "/v1/generate", body={"max_tokens": 50}) for _ in range(4)]
        assert [code for code, *_ in found] == [200, 200, 200, 429]
        assert [headers.get("X-Cache") for _, headers, _ in found] == [None, "hit", "hit", None]
        usage = (await finished(server, found[0][1]["x-job-id"])).usage
        assert usage is not None
        await wait_until(lambda: settled(server, 1000 - usage.total_tokens))


async def test_so_many_at_once(tmp_path: Path) -> None:
    """Jobs over the limit wait, others pass them, and one that ends lets the next one go."""
    async with (
        serving(tmp_path, concurrent_jobs=2) as server,
        client(server, secret("alice")) as http,
        client(server, secret("bob")) as other,
    ):
        jobs = [(await submit(http, model="echo", echo=LONG))["task_id"] for _ in range(4)]

        async def running() -> list[bool]:
            return [(await status(http, job_id))["status"] == "in_progress" for job_id in jobs]

        async def first_two() -> bool:
            return await running() == [True, True, False, False]

        await wait_until(first_two)
        passed = await submit(other, model="echo", echo={"tokens": 1})
        assert (await finished(server, passed["task_id"])).status == "completed"
        third = await status(http, jobs[2])
        assert (third["status"], third["position"]) == ("queued", 0)
        async with http.delete(f"/chat/{jobs[0]}"):
            pass

        async def next_one() -> bool:
            return await running() == [False, True, True, False]

        await wait_until(next_one)


async def test_the_next_one_begins_at_once(tmp_path: Path) -> None:
    """One after the other without a pause, however rarely a replica looks by itself."""
    async with serving(tmp_path, concurrent_jobs=1) as server, client(server, secret("alice")) as http:
        first = await submit(http, echo=LONG)
        jobs = [await submit(http, echo={"tokens": 1}) for _ in range(12)]
        begun = time.monotonic()
        async with http.delete(f"/chat/{first['task_id']}"):
            pass
        for job in jobs:
            assert (await finished(server, job["task_id"])).status == "completed"
        assert time.monotonic() - begun < 12 * MAX_BEAT_S / 2


async def test_so_many_wait(tmp_path: Path) -> None:
    """More waiting jobs than the limit are refused with 429, leave nothing behind, and cost nothing."""
    limits = {"concurrent_jobs": 1, "queued_jobs": 2, "requests_per_minute": 60, "tokens_per_minute": 1000}
    async with serving(tmp_path, None, **limits) as server, client(server, secret("alice")) as http:
        first = await submit(http, max_tokens=10, echo=LONG)

        async def begun() -> bool:
            return bool((await status(http, first["task_id"]))["status"] == "in_progress")

        await wait_until(begun)
        for _ in range(2):
            await submit(http, max_tokens=10, echo=LONG)
        tokens = await left(server)
        for path in ("/chat/async", "/v1/chat/completions"):
            code, headers, body = await post(http, path)
            assert (code, body["error"]["code"]) == (429, "rate_limit_exceeded")
            assert "queued_jobs" in body["error"]["message"]
            assert "Retry-After" in headers
        assert len(await server.gateway.recent()) == 3
        assert (await left(server, "requests", size=60), await left(server)) == (57, tokens)
        async with client(server, secret("bob")) as other:
            await submit(other)
        assert (await scrape(http)).value("llmstream_rate_limited_total", reason="queued_jobs") == 2


async def test_a_key_may_have_more_or_less(tmp_path: Path) -> None:
    """What a key says goes before what all have, 0 takes a limit off, and one switch takes them all off."""
    key = {"requests_per_minute": 7, "tokens_per_minute": 0}
    async with (
        serving(tmp_path, key, requests_per_minute=60, tokens_per_minute=1000) as server,
        client(server, secret("alice")) as http,
    ):
        _, headers, _ = await post(http, body={"max_tokens": 2000})
        assert headers["x-ratelimit-limit-requests"] == "7"
        assert "x-ratelimit-limit-tokens" not in headers
        now = time.time()
        limits = CallerLimits(requests_per_minute=0, tokens_per_minute=500, burst_size=9)
        made, record = issue("carol", scopes=["generate"], models=None, now=now, expires_at=now + 60, limits=limits)
        await server.gateway._store.api_keys.add(record, now)
        async with client(server, made) as http:
            for _ in range(2):
                _, headers, _ = await post(http)
                assert headers["x-ratelimit-limit-tokens"] == "500"
                assert "x-ratelimit-limit-requests" not in headers
    async with (
        serving(tmp_path, key, requests_per_minute=1, enabled=False) as server,
        client(server, secret("alice")) as http,
    ):
        for _ in range(3):
            code, headers, _ = await post(http)
            assert code == 200
            assert not set(HEADERS) & set(headers)


async def test_the_official_client_knows_it(tmp_path: Path) -> None:
    """The OpenAI client finds its headers, and raises its own error, which says when to come again."""
    async with (
        serving(tmp_path, requests_per_minute=60, burst_size=1) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key=secret("alice"), max_retries=0) as sdk,
    ):
        ask: Any = {"model": "echo", "messages": [HI]}
        raw = await sdk.chat.completions.with_raw_response.create(**ask)
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as caught:
            await sdk.chat.completions.create(**ask)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after-ms"]) > 1000


async def test_memory_jobs(tmp_path: Path) -> None:
    """They count like others; only where jobs at once are limited they cannot, and are refused."""
    async with (
        serving(tmp_path, requests_per_minute=60, tokens_per_minute=1000) as server,
        client(server, secret("alice")) as http,
    ):
        code, _, _ = await post(http, body={"durability": "memory", "max_tokens": 100, "echo": {"tokens": 9}})
        assert code == 200
        await wait_until(lambda: used_a_little(server))
        job = await submit(http, durability="memory", max_tokens=300, echo={"tokens": 9, "fault": "stall", "at": 5})
        assert await left(server) < 700
        async with http.delete(f"/chat/{job['task_id']}"):
            pass
        await wait_until(lambda: used_a_little(server))
        assert await left(server, "requests", size=60) == 58
    async with serving(tmp_path / "b", concurrent_jobs=1) as server, client(server, secret("alice")) as http:
        code, _, body = await post(http, body={"durability": "memory"})
        assert (code, body["error"]["param"]) == (400, "durability")


async def test_by_address_without_keys(tmp_path: Path) -> None:
    """Without keys each address has the limits of a caller; who it is says the connection, unless a trusted proxy
    does."""
    model = {"echo": ModelSettings(engine="echo", slots=4)}
    for proxies, codes in (([], [200, 429, 429]), (["127.0.0.0/8"], [200, 200, 429])):
        limits = {"requests_per_minute": 60, "burst_size": 1, "trusted_proxies": proxies}
        settings = echo_settings(tmp_path / str(len(proxies)), models=model, rate_limit=limits)
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
            asked = ("203.0.113.7", "203.0.113.8", "203.0.113.8")
            found = [await post(http, headers={"X-Forwarded-For": f"198.51.100.1, {who}"}) for who in asked]
            assert [code for code, *_ in found] == codes


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("192.0.2.1", ["203.0.113.9"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9, 10.0.0.2"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("::ffff:10.0.0.1", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ['"[2001:db8:1:2:3:4:5:6]:4711"'], "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", [], "2001:db8:1:2::/64"),
        ("fe80::1%eth0", [], "fe80::/64"),
        (None, ["203.0.113.9"], "unknown"),
    ],
)
def test_where_a_request_comes_from(peer: str | None, forwarded: list[str], expected: str) -> None:
    """What trusted proxies say counts, and nothing that somebody before them may have written; a site's IPv6
    addresses are one."""
    proxies = RateLimitSettings(trusted_proxies=["10.0.0.0/8"]).networks
    assert origin_of(peer, forwarded, proxies) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0121, "13ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9999, "60s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (3723, "1h2m3s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Times are written as OpenAI's headers have them."""
    assert duration(seconds) == text
