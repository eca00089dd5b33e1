"""The API in front of somebody else's core, and somebody else's API in front of our core."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import load
from llmstream.server import Server
from llmstream.store.store import Store
from tests.api.keyed import client, keyed_settings, secret
from tests.api.reading import Json, finished, submit
from tests.broker.foreign import ForeignCore, foreign_core
from tests.conftest import assert_every_key_expires, echo_settings
from tests.proxy import Proxy, TcpProxy
from tests.rabbit import Queues
from tests.upstream import Upstream
from tests.valkey import stores, valkey
from tests.waiting import wait_until


@asynccontextmanager
async def only_api(
    tmp_path: Path, rabbit: Queues, settings: Any = echo_settings, **broker: Any
) -> AsyncIterator[tuple[Server, Store]]:
    """A server whose orders somebody else runs, and the store that both share."""
    async with valkey(tmp_path) as redis, stores(redis.url) as (store,):
        given = settings(tmp_path, store={"url": redis.url}, broker=rabbit.settings(consume=False, **broker))
        async with Server(given) as server:
            yield server, store
            await assert_every_key_expires(store)


async def post(http: aiohttp.ClientSession, route: str, headers: Json | None = None, **body: Any) -> tuple[int, Json]:
    async with http.post(route, json=body, headers=headers) as response:
        return response.status, await response.json()


async def test_the_pages_requests_reach_the_core(tmp_path: Path, rabbit: Queues) -> None:
    """The page's two requests go into the queue in the page's form, and what the core stores is the answer."""
    meta = {"temperature": 0.5, "tokens_limit": 1000, "stop_words": ["stop"], "model": "gpt-model"}
    turns = [{"role": "user", "content": "What is AI?"}, {"role": "assistant", "content": "Artificial..."}]
    async with (
        only_api(tmp_path, rabbit) as (server, store),
        foreign_core(rabbit, store) as core,
        aiohttp.ClientSession(server.url) as http,
    ):
        asked = await post(http, "/generate", job_id="12345", meta=meta, content="What is AI?")
        assert asked == (200, {"content": "WHAT IS AI?"})
        asked = await post(http, "/chat_completion", job_id="12346", meta=meta, messages=turns)
        assert asked == (200, {"content": "ARTIFICIAL..."})
        asked = await post(http, "/generate", content="no id", priority=7)
        assert asked == (200, {"content": "NO ID"})
        first, second, third = core.seen
        assert first["kwargs"] == {
            "prompt": {"job_id": "12345", "meta": meta, "content": "What is AI?"},
            "prompt_type": "single_generation",
        }
        assert (first["type"], first["task"], first["id"]) == ("task", "generate", "12345")
        assert second["kwargs"] == {
            "prompt": {"job_id": "12346", "meta": meta, "messages": turns},
            "prompt_type": "chat_completion",
        }
        defaults = {"temperature": 0.2, "tokens_limit": 8096, "stop_words": [], "model": None}
        assert (third["kwargs"]["prompt"]["meta"], third["kwargs"]["prompt"]["priority"]) == (defaults, 7)


async def test_filters_look_at_what_the_core_gets_and_says(tmp_path: Path, rabbit: Queues) -> None:
    """What is redacted reaches neither the queue nor the caller; what is restored only the caller."""
    filters: Json = {"email": {}, "phone": {"action": "restore"}}
    async with (
        only_api(tmp_path, rabbit, partial(echo_settings, filters=filters)) as (server, store),
        foreign_core(rabbit, store) as core,
        aiohttp.ClientSession(server.url) as http,
    ):
        text = "mail me@example.com or call +49 30 901820 now"
        for route, what in (("/generate", {"content": text}), ("/chat_completion", {"messages": [turn(text)]})):
            assert await post(http, route, **what) == (200, {"content": "MAIL [EMAIL] OR CALL +49 30 901820 NOW"})
        masked = "mail [EMAIL] or call <PHONE_1> now"
        single, conversation = [each["kwargs"]["prompt"] for each in core.seen]
        assert (single["content"], conversation["messages"]) == (masked, [turn(masked)])


async def test_orders_count_as_requests(tmp_path: Path, rabbit: Queues) -> None:
    """What another core runs is limited like what runs here."""
    limits: Json = {"requests_per_minute": 1, "burst_size": 1}
    async with (
        only_api(tmp_path, rabbit, partial(echo_settings, rate_limit=limits)) as (server, store),
        foreign_core(rabbit, store) as core,
        aiohttp.ClientSession(server.url) as http,
    ):
        assert (await post(http, "/generate", content="x"))[0] == 200
        assert (await post(http, "/generate", content="y"))[0] == 429
        assert len(core.seen) == 1


def turn(text: str) -> Json:
    return {"role": "user", "content": text}


async def seen(core: ForeignCore, count: int) -> bool:
    return len(core.seen) == count


async def test_an_order_is_posted_once(tmp_path: Path, rabbit: Queues) -> None:
    """All who ask for the same order at once, and those who come back, get the one result; another request under its
    id or key is refused."""
    async with (
        only_api(tmp_path, rabbit) as (server, store),
        foreign_core(rabbit, store) as core,
        aiohttp.ClientSession(server.url) as http,
    ):
        core.may_answer.clear()
        with pytest.raises(TimeoutError):
            await http.post("/generate", json={"job_id": "1", "content": "x"}, timeout=aiohttp.ClientTimeout(total=0.2))
        asking = [asyncio.create_task(post(http, "/generate", job_id="1", content="x")) for _ in range(6)]
        key = {"Idempotency-Key": "k"}
        asking += [asyncio.create_task(post(http, "/generate", key, content="x")) for _ in range(3)]
        await wait_until(partial(seen, core, 2))
        assert (await post(http, "/generate", job_id="1", content="y"))[0] == 409
        core.may_answer.set()
        assert await asyncio.gather(*asking) == [(200, {"content": "X"})] * 9
        assert await post(http, "/generate", job_id="1", content="x", deadline_s=9) == (200, {"content": "X"})
        for changed in ({"content": "y"}, {"content": "x", "meta": {"temperature": 1}}):
            code, refusal = await post(http, "/generate", job_id="1", **changed)
            assert (code, refusal["error"]["param"]) == (409, "job_id")
        assert (await post(http, "/generate", key, content="y"))[0] == 422
        assert len(core.seen) == 2


async def test_a_client_that_leaves_waits_no_longer(tmp_path: Path, rabbit: Queues) -> None:
    """Its request ends, so that nothing looks for the result any more."""
    async with only_api(tmp_path, rabbit) as (server, _), aiohttp.ClientSession(server.url) as http:
        with pytest.raises(TimeoutError):
            await http.post("/generate", json={"content": "x"}, timeout=aiohttp.ClientTimeout(total=0.1))
        requests = server.gateway.observer.metrics.http_requests

        async def ended() -> bool:
            return [series.labels for series in requests.read()] == [("POST", "/generate", "499")]

        await wait_until(ended)


@pytest.mark.parametrize(
    ("stored", "status", "said"),
    [
        (b'{"content": ""}', 200, None),
        (b'{"content": "", "error": {"message": "no such model", "status": 404}}', 404, "no such model"),
        (b'{"content": "", "error": {"message": "broken"}}', 502, "broken"),
        (b"not json", 502, "cannot be read"),
        (b'{"answer": 42}', 502, "without 'content'"),
    ],
)
async def test_what_a_core_may_store(
    tmp_path: Path, rabbit: Queues, stored: bytes, status: int, said: str | None
) -> None:
    """An error of the core is an error here, with its status where it says one; so is what makes no sense."""
    async with (
        only_api(tmp_path, rabbit) as (server, store),
        foreign_core(rabbit, store) as core,
        aiohttp.ClientSession(server.url) as http,
    ):
        core.stores = stored
        code, answer = await post(http, "/generate", content="x")
        assert code == status
        assert answer == {"content": ""} if said is None else said in answer["error"]["message"]


async def test_a_core_that_does_not_answer(tmp_path: Path, rabbit: Queues) -> None:
    """The wait has an end, and the message says what to check; an order without a result is posted again once it
    counts as lost."""
    async with (
        only_api(tmp_path, rabbit, result_timeout_s=0.5) as (server, store),
        aiohttp.ClientSession(server.url) as http,
    ):
        code, refusal = await post(http, "/generate", job_id="n1", content="x", deadline_s=0.1)
        assert (code, refusal["error"]["code"]) == (504, "deadline_exceeded")
        assert "REDIS_PREFIX" in refusal["error"]["message"]
        assert (await post(http, "/generate", job_id="n1", content="x", deadline_s=0.1))[0] == 504
        assert await rabbit.count() == 1
        assert await rabbit.get() is not None  # and nobody knows what became of it
        async with foreign_core(rabbit, store) as core:

            async def answered() -> bool:
                return await post(http, "/generate", job_id="n1", content="x") == (200, {"content": "X"})

            await wait_until(answered)
            assert len(core.seen) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"content": "x", "top_p": 0.5}, "top_p"),
        ({"content": "x", "provider": "openai"}, "provider"),
        ({"content": "x", "on_disconnect": "cancel"}, "on_disconnect"),
        ({"content": "x", "durability": "memory"}, "durability"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ],
)
async def test_what_cannot_be_passed_on_is_refused(http_api: aiohttp.ClientSession, body: Json, param: str) -> None:
    """What an order cannot say is not left out in silence."""
    code, refusal = await post(http_api, "/generate" if "content" in body else "/chat_completion", **body)
    assert (code, refusal["error"]["param"]) == (400, param)


@pytest.fixture
async def http_api(tmp_path: Path, rabbit: Queues) -> AsyncIterator[aiohttp.ClientSession]:
    async with only_api(tmp_path, rabbit) as (server, _), aiohttp.ClientSession(server.url) as http:
        yield http


async def test_everybody_has_ids_of_their_own(tmp_path: Path, rabbit: Queues) -> None:
    """With keys the same id of two principals is two orders; models and lengths that are not allowed are refused."""

    def settings(folder: Path, **sections: Any) -> Any:
        return keyed_settings(folder, security={"max_prompt_chars": 20}, **sections)

    async with (
        only_api(tmp_path, rabbit, settings) as (server, store),
        foreign_core(rabbit, store) as core,
        client(server, secret("alice")) as alice,
        client(server, secret("bob")) as bob,
        client(server, secret("reader")) as reader,
    ):
        echo = {"model": "echo"}
        assert (await post(alice, "/generate", job_id="1", meta=echo, content="a"))[1] == {"content": "A"}
        assert (await post(bob, "/generate", job_id="1", meta=echo, content="b"))[1] == {"content": "B"}
        assert [task["id"] for task in core.seen] == ["alice:1", "bob:1"]
        assert (await post(bob, "/generate", job_id="alice:1", meta=echo, content="b"))[1] == {"content": "B"}
        for meta in ({"model": "other"}, {}):
            code, refusal = await post(bob, "/generate", meta=meta, content="b")
            assert (code, refusal["error"]["param"]) == (404, "meta.model")
        assert (await post(reader, "/generate", meta=echo, content="b"))[0] == 403
        assert (await post(alice, "/generate", meta=echo, content="b" * 21))[0] == 400
        assert (await post(alice, "/generate", job_id="1" * 128, content="b"))[1]["error"]["param"] == "job_id"
        assert len(core.seen) == 3


async def test_rabbitmq_goes_and_comes_back(tmp_path: Path, rabbit: Queues) -> None:
    """While it is away an order is refused with 503 and may be sent again; what waits for a result goes on waiting."""
    port = int(rabbit.url.rsplit(":", 1)[1].strip("/"))
    async with TcpProxy(port) as proxy:
        url = proxy.url.replace("redis://", "amqp://guest:guest@")
        async with (
            only_api(tmp_path, rabbit, url=f"{url}/", timeout_s=0.3) as (server, store),
            foreign_core(rabbit, store) as core,
            aiohttp.ClientSession(server.url) as http,
        ):
            core.may_answer.clear()
            waiting = asyncio.create_task(post(http, "/generate", job_id="w", content="x"))
            await wait_until(partial(seen, core, 1))
            proxy.refuse()
            proxy.cut()
            code, refusal = await post(http, "/generate", job_id="r", content="y")
            assert (code, refusal["error"]["code"]) == (503, "broker_unavailable")
            assert await server.gateway._store.repeats.find("posted-r") == "refused"  # to be posted at once
            core.may_answer.set()
            assert await waiting == (200, {"content": "X"})
            proxy.refuse(False)

            async def answered() -> bool:
                return await post(http, "/generate", job_id="r", content="y") == (200, {"content": "Y"})

            await wait_until(answered)
            assert [task["id"] for task in core.seen] == ["w", "r"]


async def test_redis_goes_and_comes_back(tmp_path: Path, rabbit: Queues, caplog: pytest.LogCaptureFixture) -> None:
    """A result is waited for while Redis is away; who asks then gets 503, and nothing is posted."""
    caplog.set_level("DEBUG", "llmstream.broker")
    async with valkey(tmp_path) as redis, stores(redis.url) as (store,), Proxy(redis.socket) as proxy:
        settings = echo_settings(
            tmp_path, store={"url": proxy.url, "timeout_s": 0.3}, broker=rabbit.settings(consume=False)
        )
        async with (
            Server(settings) as server,
            foreign_core(rabbit, store) as core,
            aiohttp.ClientSession(server.url) as http,
        ):
            core.may_answer.clear()
            waiting = asyncio.create_task(post(http, "/generate", job_id="w", content="x"))
            await wait_until(partial(seen, core, 1))
            proxy.refuse()
            proxy.cut()
            assert (await post(http, "/generate", job_id="r", content="y"))[0] == 503
            await wait_until(lambda: "a result has to wait" in caplog.text)
            core.may_answer.set()
            proxy.refuse(False)
            assert await waiting == (200, {"content": "X"})
            assert [task["id"] for task in core.seen] == ["w"]


async def test_other_jobs_do_without(tmp_path: Path, rabbit: Queues) -> None:
    """Where another core reads the queue, jobs it could not run stay here, and what is in the queue stays there."""
    await rabbit.declare(durable=True)
    await rabbit.post(b"for another core")
    async with only_api(tmp_path, rabbit) as (server, _), aiohttp.ClientSession(server.url) as http:
        job = await submit(http)
        assert (await finished(server, job["task_id"])).status == "completed"
        assert await rabbit.count() == 1


async def test_both_ends_are_ours(tmp_path: Path, rabbit: Queues) -> None:
    """An API of ours and a core of ours agree, through the queue and the results alone, on answers and on errors."""
    async with only_api(tmp_path, rabbit) as (api, store):
        core = echo_settings(
            tmp_path / "core",
            store={"url": store.url, "prefix": "core"},
            broker=rabbit.settings(),
            models=api.settings.models,
        )
        async with Server(core) as behind, aiohttp.ClientSession(api.url) as http:
            asking = [post(http, "/generate", job_id=f"b{n}", content=f"number {n}") for n in range(20)]
            assert await asyncio.gather(*asking) == [(200, {"content": f"number {n}"}) for n in range(20)]
            code, refusal = await post(http, "/generate", content="x", meta={"model": "nobody"})
            assert (code, refusal["error"]["code"]) == (404, "model_not_found")
            assert (await behind.gateway.job("b7")).attempt == 1
            await wait_until(lambda: nothing_left(rabbit))


async def nothing_left(rabbit: Queues) -> bool:
    return await rabbit.count() == 0


async def test_an_order_is_the_same_job_over_both_ways(tmp_path: Path, rabbit: Queues) -> None:
    """A request over HTTP and an order in the queue with the same id and content are one job, whichever comes first;
    with another content they are not."""
    async with (
        Server(echo_settings(tmp_path, broker=rabbit.settings())) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        results = server.gateway._store.results("results")
        page: Json = {"job_id": "h", "meta": {"temperature": 0, "stop_words": []}, "content": "one two"}
        assert await post(http, "/generate", **page) == (200, {"content": "one two"})
        await rabbit.post(json.dumps(page).encode())

        async def stored(job_id: str) -> bool:
            return await results.get(job_id) is not None

        await wait_until(partial(stored, "h"))
        assert json.loads(await results.get("h") or b"") == {"content": "one two"}

        turns = [{"role": "user", "content": "three"}]
        await rabbit.post(json.dumps({"job_id": "q", "messages": turns}).encode())
        await wait_until(partial(stored, "q"))
        assert await post(http, "/chat_completion", job_id="q", messages=turns) == (200, {"content": "three"})
        assert (await post(http, "/generate", job_id="q", content="three"))[0] == 409
        assert (await post(http, "/chat_completion", job_id="q", messages=turns, echo={"tokens": 3}))[0] == 409
        states = [await server.gateway.job(job_id) for job_id in ("h", "q")]
        assert [state.attempt for state in states] == [1, 1]
        assert len(await server.gateway.recent()) == 2


async def test_in_front_of_a_core_over_http(tmp_path: Path) -> None:
    """``INNER_LLM_URL`` alone: the core there answers every route."""
    async with Upstream() as upstream:
        env = {"INNER_LLM_URL": upstream.url.removeprefix("http://").removesuffix("/v1"), "DATA_DIR": str(tmp_path)}
        settings = load(env={**env, "SERVER__PORT": "0"})
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
            asked = await post(http, "/generate", meta={"model": "gpt-model"}, content="What is AI?")
            assert asked == (200, {"content": "Hello there you"})
            assert upstream.requests[-1].body["model"] == "gpt-model"


async def test_the_pages_variables(tmp_path: Path, rabbit: Queues) -> None:
    """The page's own variables, and nothing else, make the API in front of the core that has the same ones."""
    async with valkey(tmp_path) as redis, stores(redis.url) as (store,), Proxy(redis.socket) as proxy:
        env = {
            "INNER_LLM_URL": "localhost:8670",
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": proxy.url.rpartition(":")[2],
            "REDIS_PREFIX": "results",
            "RABBIT_MQ_HOST": "127.0.0.1",
            "RABBIT_MQ_PORT": rabbit.url.rsplit(":", 1)[1].strip("/"),
            "RABBIT_MQ_LOGIN": "guest",
            "RABBIT_MQ_PASSWORD": "guest",
            "QUEUE_NAME": rabbit.name,
        }
        settings = load(env={**env, "SERVER__PORT": "0", "DATA_DIR": str(tmp_path)})
        async with (
            Server(settings) as server,
            foreign_core(rabbit, store),
            aiohttp.ClientSession(server.url) as http,
        ):
            assert await post(http, "/generate", content="hello") == (200, {"content": "HELLO"})
