"""Equal requests get the answer that is there already: counted, bounded, replayed as streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.cache import Cache, Found
from llmstream.config import StoreSettings
from llmstream.config_routes import CacheSettings
from llmstream.server import Server
from llmstream.store.store import Store
from llmstream.types import GenerateRequest, Job, Principal
from tests.api.keyed import client, keyed_settings, secret
from tests.api.pair import two_clients
from tests.api.reading import Json, conversation, tokens
from tests.conftest import echo_settings
from tests.logs import finished
from tests.sse import Frame, parse
from tests.waiting import wait_until

SLOW = {"tokens": 20, "delay_ms": 10}


@asynccontextmanager
async def serving(tmp_path: Path, **sections: Any) -> AsyncIterator[aiohttp.ClientSession]:
    settings = echo_settings(tmp_path, **sections)
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        yield http


async def post(http: aiohttp.ClientSession, body: Json, route: str = "/v1/generate", **headers: str) -> Json:
    """The answer, with the job it comes from and whether the headers call it cached."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(route, json=body, headers=named) as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
        return {**answer, "job": response.headers["x-job-id"], "hit": response.headers.get("X-Cache") == "hit"}


async def stream(http: aiohttp.ClientSession, route: str, body: Json) -> tuple[list[Frame], bool]:
    """The numbered events of a stream, and whether it is a cached one."""
    async with http.post(route, json={**body, "stream": True}) as response:
        assert response.status == 200
        frames = [frame for frame in parse(await response.read()) if frame.id]
        return frames, response.headers.get("X-Cache") == "hit"


async def statistics(http: aiohttp.ClientSession) -> Json:
    async with http.get("/status") as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
        cache: Json = answer["cache"]
        return cache


async def looked(http: aiohttp.ClientSession) -> bool:
    """Whether some job is on record."""
    async with http.get("/jobs") as response:
        return bool((await response.json())["data"])


async def test_an_equal_prompt_is_answered_once(http: aiohttp.ClientSession) -> None:
    """The second answer is the first one, says so, and is counted; any other field makes another request."""
    first = await post(http, {"prompt": "hello"})
    again = await post(http, {"prompt": "hello"})
    assert (first["cached"], first["hit"], again["cached"], again["hit"]) == (False, False, True, True)
    assert {**again, "cached": False, "hit": False} == first
    for other in ({"prompt": "hello", "temperature": 0.1}, {"prompt": "hello", "max_tokens": 9}, {"prompt": "Hello"}):
        assert not (await post(http, other))["cached"]
    found = await statistics(http)
    expected = {"hits": 1, "misses": 4, "shared": 0, "evictions": 0, "size": 4, "hit_rate": 0.2}
    assert {name: found[name] for name in expected} == expected
    assert (found["enabled"], found["max_size"], found["ttl_seconds"]) == (True, 100, 3600)


async def test_a_hit_costs_no_generation(tmp_path: Path) -> None:
    """A hit makes no job, on whichever replica."""
    async with two_clients(tmp_path) as clients:
        await post(clients[0], {"prompt": "hello"})
        assert (await post(clients[1], {"prompt": "hello"}))["cached"]
        async with clients[0].get("/jobs") as response:
            assert len((await response.json())["data"]) == 1


async def test_a_streamed_hit_is_a_stream(http: aiohttp.ClientSession) -> None:
    """A hit replays all events under the same ids, whether the first answer was streamed or not."""
    body = {"messages": [{"role": "user", "content": "x"}], "echo": {"tokens": 50}}
    assert not (await post(http, body, "/v1/chat"))["cached"]
    first, hit = await stream(http, "/v1/chat", body)
    assert hit
    assert "".join(frame.json.get("content", "") for frame in first) == tokens(50)
    assert first[-1].json == {"type": "complete"}
    assert await stream(http, "/v1/chat", body) == (first, True)
    whole = await post(http, body, "/v1/chat")
    assert (whole["cached"], whole["message"]["content"]) == (True, tokens(50))


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", conversation()),
        ("/v1/chat/completions", conversation(stream=True)),
        ("/v1/chat/stream", conversation()),
        ("/generate", {"content": "x"}),
        ("/chat_completion", {"messages": [{"role": "user", "content": "x"}]}),
        ("/question", {"text": "x"}),
    ],
)
@pytest.mark.parametrize("everywhere", [False, True])
async def test_other_routes_use_it_only_when_told(tmp_path: Path, route: str, body: Json, everywhere: bool) -> None:
    """Without cache.everywhere, only the routes whose page has a cache have one."""
    async with serving(tmp_path, cache=CacheSettings(everywhere=everywhere)) as http:
        hits, answers = [], []
        for _ in range(2):
            async with http.post(route, json=body) as response:
                assert response.status == 200
                answers.append(await response.read())
                hits.append(response.headers.get("X-Cache"))
        assert hits == [None, "hit" if everywhere else None]
        assert (answers[0] == answers[1]) or not everywhere


async def test_it_can_be_switched_off(tmp_path: Path) -> None:
    """CACHE__ENABLED=false: nothing is cached, and the statistics say so."""
    async with serving(tmp_path, cache=CacheSettings(enabled=False, everywhere=True)) as http:
        assert not [answer for _ in range(2) if (answer := await post(http, {"prompt": "x"}))["cached"]]
        assert (await statistics(http))["enabled"] is False


async def test_what_a_request_can_say(http: aiohttp.ClientSession) -> None:
    """no-cache makes a new answer that replaces the old one; no-store leaves no trace; an idempotency key and an id of
    the caller's own go their own way."""
    first = await post(http, {"prompt": "x"})
    fresh = await post(http, {"prompt": "x"}, Cache_Control="no-cache")
    assert not fresh["cached"]
    assert fresh["job"] != first["job"]
    assert (await post(http, {"prompt": "x"}))["job"] == fresh["job"]
    untold = await post(http, {"prompt": "x"}, Cache_Control="max-age=0, no-store")
    assert not untold["cached"]
    assert (await post(http, {"prompt": "x"}))["job"] == fresh["job"]
    keyed = [await post(http, {"prompt": "x"}, Idempotency_Key="k") for _ in range(2)]
    assert [answer["cached"] for answer in keyed] == [False, False]
    assert keyed[0]["job"] == keyed[1]["job"] != fresh["job"]
    assert (await post(http, {"prompt": "x", "job_id": "mine"}))["job"] == "mine"
    assert not (await post(http, {"prompt": "x", "durability": "memory"}))["cached"]


@pytest.mark.parametrize("share", [False, True])
async def test_a_retry_finds_its_job(tmp_path: Path, share: bool) -> None:
    """A request that an SDK sends again is recognised, like any other, while it is answered and after."""
    async with serving(tmp_path, cache=CacheSettings(share_in_flight=share)) as http:
        body = {"prompt": "x", "echo": SLOW}
        first = asyncio.create_task(post(http, body, x_stainless_retry_count="0"))
        await wait_until(lambda: looked(http))
        again = [await post(http, body, x_stainless_retry_count="1") for _ in range(2)]
        assert {answer["job"] for answer in again} == {(await first)["job"]}


@pytest.mark.parametrize(("fault", "attempts"), [("error", 1), ("cut", 3)])
async def test_failures_are_not_cached(http: aiohttp.ClientSession, fault: str, attempts: int) -> None:
    """A broken answer is asked for again."""
    body = {"prompt": "x", "echo": {"tokens": 3, "at": 1, "fault": fault, "attempts": attempts}}
    async with http.post("/v1/generate", json=body) as response:
        assert response.status >= 500
    answer = await post(http, body)
    assert (answer["cached"], answer["generated_text"]) == (False, tokens(3))
    assert (await post(http, body))["cached"]


async def test_an_answer_at_its_limit_is_cached(http: aiohttp.ClientSession) -> None:
    """An answer that max_tokens cut is as good as one can get."""
    body = {"prompt": "one two three", "max_tokens": 2}
    assert not (await post(http, body))["cached"]
    again = await post(http, body)
    assert (again["cached"], again["generated_text"]) == (True, "one two")


async def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    """A cache of two keeps the two that were used last."""
    async with serving(tmp_path, cache=CacheSettings(size=2)) as http:
        for prompt, cached in (("a", False), ("b", False), ("a", True), ("c", False), ("a", True), ("b", False)):
            assert (await post(http, {"prompt": prompt}))["cached"] is cached, prompt
        found = await statistics(http)
        assert (found["size"], found["max_size"], found["evictions"]) == (2, 2, 2)


async def test_in_flight_apart(tmp_path: Path) -> None:
    """Unless configured, equal requests at the same time are answered one by one."""
    async with serving(tmp_path) as http:
        answers = await asyncio.gather(*(post(http, {"prompt": "x", "echo": SLOW}) for _ in range(4)))
        assert len({answer["job"] for answer in answers}) == 4


@pytest.mark.parametrize("route", ["/v1/generate", "/v1/chat/stream"])
async def test_in_flight_together(tmp_path: Path, route: str) -> None:
    """With share_in_flight, a storm on two replicas is one generation, and everybody reads all of it, whatever
    priority they ask for."""
    cache = CacheSettings(share_in_flight=True, everywhere=True)
    async with two_clients(tmp_path, cache=cache) as clients:
        if route == "/v1/generate":
            body = {"prompt": "x", "echo": SLOW}
            answers = await asyncio.gather(*(post(clients[n % 2], {**body, "priority": n % 3}) for n in range(10)))
            assert {answer["generated_text"] for answer in answers} == {tokens(20)}
        else:
            body = conversation(echo=SLOW)
            streams = await asyncio.gather(*(stream(clients[n % 2], route, body) for n in range(10)))
            assert len({tuple(frames) for frames, _ in streams}) == 1
        async with clients[0].get("/jobs") as response:
            assert len((await response.json())["data"]) == 1
        found = await statistics(clients[1])
        assert (found["misses"], found["shared"] + found["hits"]) == (1, 9)


async def test_one_who_leaves_takes_nothing_from_the_others(tmp_path: Path) -> None:
    """A shared answer goes on while anybody reads it."""
    cache = CacheSettings(share_in_flight=True)
    async with serving(tmp_path, cache=cache) as http:
        body = {"prompt": "x", "echo": SLOW, "on_disconnect": "cancel"}
        leaves = asyncio.create_task(http.post("/v1/generate", json=body, timeout=aiohttp.ClientTimeout(total=0.08)))
        stays = await post(http, body)
        with pytest.raises(TimeoutError):
            await leaves
        assert stays["generated_text"] == tokens(20)


REQUEST = GenerateRequest.of("chat", "m", {"messages": [{"role": "user", "content": "x"}]})


async def answered(store: Store, found: Found) -> None:
    """Puts the job that was announced on record, and its end."""
    assert found.reserved is not None
    job = Job(id=found.reserved.job_id, request=REQUEST, pool="p", created_at=time.time())
    assert await store.jobs.create(job)
    await store.jobs.end(job.id, finished())


@pytest.mark.parametrize("shared", [False, True])
async def test_principals_share_only_when_configured(store: Store, shared: bool) -> None:
    """What one principal was told another one gets only with cache.shared."""
    cache = Cache(store, CacheSettings(shared=shared), retention_s=3600)
    await answered(store, await cache.look(REQUEST, Principal(id="alice")))
    assert (await cache.look(REQUEST, Principal(id="alice"))).hit is not None
    assert ((await cache.look(REQUEST, Principal(id="bob"))).hit is not None) is shared
    assert ((await cache.describe(Principal(id="bob")))["hits"] > 0) is shared


async def test_answers_grow_old(store: Store) -> None:
    """After its time an answer is not given again; it never has more than the retention time."""
    other = GenerateRequest.of("chat", "other", {})
    for settings, retention_s in ((CacheSettings(ttl_seconds=0.2), 3600.0), (CacheSettings(), 0.2)):
        cache, who = Cache(store, settings, retention_s), Principal(id=f"p{retention_s}")
        await answered(store, await cache.look(REQUEST, who))
        assert (await cache.look(REQUEST, who)).hit is not None
        await asyncio.sleep(0.12)
        await cache.look(other, who)
        await asyncio.sleep(0.1)
        assert (await cache.look(REQUEST, who)).reserved is not None


async def test_a_forgotten_answer_is_asked_for_again(tmp_path: Path) -> None:
    """An answer whose job is gone is no hit."""
    async with serving(tmp_path, store=StoreSettings(retention_s=0.2)) as http:
        await post(http, {"prompt": "x"})
        await asyncio.sleep(0.25)
        assert not (await post(http, {"prompt": "x"}))["cached"]


async def test_a_shared_answer_needs_the_same_rights(tmp_path: Path) -> None:
    """With cache.shared, a key gets the answers of others only from models that it may use."""
    async with Server(keyed_settings(tmp_path, cache=CacheSettings(shared=True))) as server:
        async with client(server, secret("alice")) as http:
            for model in ("echo", "other"):
                assert not (await post(http, {"prompt": "x", "model": model}))["cached"]
        async with client(server, secret("bob")) as http:
            assert (await post(http, {"prompt": "x", "model": "echo"}))["cached"]
            async with http.post("/v1/generate", json={"prompt": "x", "model": "other"}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")
