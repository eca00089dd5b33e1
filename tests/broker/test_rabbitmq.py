"""Jobs through a real RabbitMQ: every route as without it, and what others post to the queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import SchedulerSettings
from llmstream.server import Server
from llmstream.store.connection import pack
from llmstream.store.store import Store
from tests.api.reading import Json, conversation, finished, read_all, status, submit, tokens
from tests.conftest import assert_every_key_expires, echo_settings
from tests.rabbit import Queues
from tests.waiting import wait_until
from tests.webhooks.receiver import SECRET, Receiver

STALL = {"fault": "stall", "tokens": 2, "at": 1}


@pytest.fixture
async def server(tmp_path: Path, rabbit: Queues) -> AsyncIterator[Server]:
    """A server whose jobs go through RabbitMQ."""
    async with Server(echo_settings(tmp_path, broker=rabbit.settings())) as server:
        yield server
        await assert_every_key_expires(store_of(server))


def store_of(server: Server) -> Store:
    return server.gateway._store


def order(job_id: str, content: str = "what is it", **meta: Any) -> Json:
    return {
        "job_id": job_id,
        "meta": {"temperature": 0.2, "tokens_limit": 8096, "stop_words": [], **meta},
        "content": content,
    }


async def result_of(server: Server, job_id: str) -> Json:
    """Waits for the result that the one who posted an order would find."""
    results = store_of(server).results("results")

    async def there() -> bool:
        return await results.get(job_id) is not None

    await wait_until(there)
    found = await results.get(job_id)
    assert found is not None
    body: Json = json.loads(found)
    return body


async def unacknowledged(server: Server) -> int:
    held: int = (await server.gateway.health())["broker"]["held"]
    return held


async def settled(server: Server, rabbit: Queues) -> None:
    """Waits until RabbitMQ has nothing left."""

    async def nothing() -> bool:
        return (
            await unacknowledged(server) == 0 and sum([await rabbit.count(lane) for lane in ("", ".high", ".low")]) == 0
        )

    await wait_until(nothing)


async def test_answers_are_the_same_as_without(http: aiohttp.ClientSession, server: Server, rabbit: Queues) -> None:
    """Streams, whole answers and jobs with priorities come through, and leave nothing in RabbitMQ."""
    async with http.post("/v1/chat/completions", json=conversation("hello there")) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "hello there"
    accepted = [await submit(http, message=f"m{n}", priority=n, session_id=f"s{n}") for n in (-10, 0, 10)]
    for job in accepted:
        _, frames = await read_all(http, job["stream_url"])
        assert frames[-1].json == {"type": "complete"}
    await settled(server, rabbit)
    assert [(await status(http, job["task_id"]))["attempt"] for job in accepted] == [1, 1, 1]


async def test_waiting_jobs_wait_in_rabbitmq(tmp_path: Path, rabbit: Queues) -> None:
    """What a replica has not taken out stays in RabbitMQ, by lane, and the lane ``high`` overtakes what waits there."""
    broker = rabbit.settings(prefetch=1)
    async with (
        Server(echo_settings(tmp_path, slots=1, broker=broker)) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        running = await submit(http, echo=STALL)
        waiting = [await submit(http, message=f"m{n}") for n in range(5)]

        async def out() -> bool:
            return await rabbit.count() == 5

        await wait_until(out)
        urgent = await submit(http, message="first", priority=10)
        await http.delete(f"/chat/{running['task_id']}")
        states = [await finished(server, job["task_id"]) for job in (urgent, *waiting)]
        starts = [state.started_at or 0.0 for state in states]
        assert starts == sorted(starts)
        assert await rabbit.count(".high") == 0


async def test_a_full_queue_refuses(tmp_path: Path, rabbit: Queues) -> None:
    """Beyond ``max_waiting`` jobs in RabbitMQ the next is refused with 429, and leaves no record."""
    settings = echo_settings(
        tmp_path, slots=1, broker=rabbit.settings(prefetch=1), scheduler=SchedulerSettings(max_waiting=3)
    )
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        for _ in range(2):
            await submit(http, echo=STALL)

        async def refused() -> bool:
            body = {"message": "more", "echo": STALL, "job_id": "refused"}
            async with http.post("/chat/async", json=body) as response:
                if response.status == 202:
                    await http.delete("/chat/refused")
                    return False
                assert response.status == 429
                assert "Retry-After" in response.headers
                return True

        for n in range(8):
            async with http.post("/chat/async", json={"message": f"m{n}", "echo": STALL}) as response:
                if response.status == 429:
                    break
        else:
            pytest.fail("nothing was refused")
        assert await refused()
        async with http.get("/chat/refused") as response:
            assert response.status == 404
        async with http.get("/jobs") as response:
            jobs = (await response.json())["data"]
        for job in jobs:
            await http.delete(f"/chat/{job['task_id']}")


async def test_cancelled_while_it_waits_in_rabbitmq(tmp_path: Path, rabbit: Queues) -> None:
    """A job that is cancelled before any replica takes its message out never runs, and the message goes."""
    broker = rabbit.settings(prefetch=1)
    async with (
        Server(echo_settings(tmp_path, slots=1, broker=broker)) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        running = await submit(http, echo=STALL)
        taken, waiting = await submit(http, echo=STALL), await submit(http)
        await http.delete(f"/chat/{waiting['task_id']}")
        for job in (running, taken):
            await http.delete(f"/chat/{job['task_id']}")
        await settled(server, rabbit)
        assert (await status(http, waiting["task_id"]))["attempt"] == 0


async def test_orders_of_others_are_run(server: Server, rabbit: Queues) -> None:
    """A prompt and a conversation, bare and inside a task, become jobs under their own ids; results appear in Redis."""
    prompt = order("a1", "hello core")
    chat = {"job_id": "a2", "meta": {}, "messages": [{"role": "user", "content": "hello again"}]}
    task = {"type": "task", "task": "generate", "args": [], "id": "a3", "retries": 0, "eta": None}
    task["kwargs"] = {"prompt": order("a3", "in a task"), "prompt_type": "single_generation"}
    for body in (prompt, chat, task):
        await rabbit.post(json.dumps(body).encode())
    assert await result_of(server, "a1") == {"content": "hello core"}
    assert await result_of(server, "a2") == {"content": "hello again"}
    assert await result_of(server, "a3") == {"content": "in a task"}
    await settled(server, rabbit)
    assert await store_of(server).writes.call("PTTL", "results:a1") > 0


async def test_meta_decides(server: Server, rabbit: Queues) -> None:
    """Limit, stop words and model of an order are kept."""
    await rabbit.post(json.dumps(order("m1", "one two three four", tokens_limit=2)).encode())
    assert (await result_of(server, "m1"))["content"] == "one two"
    await rabbit.post(json.dumps(order("m2", "one", model="nobody")).encode())
    assert (await result_of(server, "m2"))["error"]["code"] == "model_not_found"
    job = (await server.gateway.job("m1")).job
    assert job.request.body["temperature"] == 0.2
    assert job.request.body["max_tokens"] == 2


async def test_results_are_told(server: Server, rabbit: Queues) -> None:
    """Who listens on the channel of the result's name hears 'set' once it is there."""
    store = store_of(server)
    connection = store._servers.connect()
    await connection.connect()
    connection.write([pack(("SUBSCRIBE", "results:t1"))])
    await connection.receive(1)
    await rabbit.post(json.dumps(order("t1")).encode())
    async with asyncio.timeout(10):
        (message,) = await connection.receive(1)
    assert message[2] == b"set"
    assert await store.results("results").get("t1") is not None
    await connection.close()


async def test_webhooks_of_orders_and_jobs(tmp_path: Path, rabbit: Queues) -> None:
    """The end of an order that names a webhook is told there, and so is that of a job cancelled while it waits in
    RabbitMQ; an order with a wrong one is refused."""
    hooks, broker = {"secret": SECRET, "allow": ["127.0.0.1"]}, rabbit.settings(prefetch=1)
    models = {"echo": {"engine": "echo", "slots": 1}}
    async with (
        Receiver() as receiver,
        Server(echo_settings(tmp_path, broker=broker, webhooks=hooks, models=models)) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        await rabbit.post(json.dumps({**order("plain"), "webhook": receiver.url}).encode())
        await rabbit.post(
            json.dumps({**order("brief"), "webhook": {"url": receiver.url, "include_text": False}}).encode()
        )
        await rabbit.post(json.dumps({**order("wrong"), "webhook": "http://10.0.0.1/"}).encode())
        assert "webhook.url" in str(await result_of(server, "wrong"))
        await wait_until(lambda: len(receiver.events) == 2)
        assert receiver.of("plain")[0]["data"]["text"] == "what is it"
        assert "text" not in receiver.of("brief")[0]["data"]
        running = [await submit(http, echo=STALL) for _ in range(2)]
        waiting = await submit(http, webhook=receiver.url)
        await http.delete(f"/chat/{waiting['task_id']}")
        await wait_until(lambda: bool(receiver.of(waiting["task_id"])))
        assert receiver.of(waiting["task_id"])[0]["type"] == "response.cancelled"
        for job in running:
            await http.delete(f"/chat/{job['task_id']}")
        await settled(server, rabbit)
        assert len(receiver.of(waiting["task_id"])) == 1


async def test_the_same_order_twice_is_one_job(server: Server, rabbit: Queues) -> None:
    """An order that comes again, while it runs and after, is not run again; another under its id is a dead letter."""
    body = order("d1", "one two")
    slow = {**body, "meta": {**body["meta"]}}
    for _ in range(5):
        await rabbit.post(json.dumps(slow).encode())
    assert await result_of(server, "d1") == {"content": "one two"}
    await settled(server, rabbit)
    await rabbit.post(json.dumps(slow).encode())
    await settled(server, rabbit)
    assert (await server.gateway.job("d1")).attempt == 1
    assert len(await server.gateway.recent()) == 1
    await rabbit.post(json.dumps(order("d1", "different")).encode())
    await wait_until(lambda: dead(rabbit, 1))
    letter = await rabbit.get(".dead")
    assert letter is not None
    assert "taken by a different request" in str(letter.headers["x-reason"])
    assert await result_of(server, "d1") == {"content": "one two"}


async def dead(rabbit: Queues, count: int) -> bool:
    return await rabbit.count(".dead") == count


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"{}", "give either"),
        (b'{"job_id": "p", "meta": {}}', "give either"),
        (b'{"job_id": "p", "content": "x", "meta": {"tokens_limit": 0}}', "tokens_limit"),
        (b'{"job_id": "p", "content": "x", "meta": {"model": "nobody"}}', "nobody"),
        (b'{"job_id": "p q", "content": "x"}', "job_id"),
        (b'{"job_id": "p", "content": "x", "priority": 11}', "priority"),
        (b"[" * 5000 + b"]" * 5000, "message"),
    ],
)
async def test_poison_is_put_aside(server: Server, rabbit: Queues, body: bytes, said: str) -> None:
    """A message that can never be run is a dead letter with a reason, unchanged, and the next one is run."""
    await rabbit.post(body, message_id=None)
    await wait_until(lambda: dead(rabbit, 1))
    letter = await rabbit.get(".dead")
    assert letter is not None
    assert letter.body == body
    assert said in str(letter.headers["x-reason"])
    if b'"p"' in body:
        assert (await result_of(server, "p"))["content"] == ""
    await rabbit.post(json.dumps(order("after", "fine")).encode())
    assert await result_of(server, "after") == {"content": "fine"}


async def test_a_job_that_is_no_job(server: Server, rabbit: Queues) -> None:
    """A broken message of our own kind is a dead letter, too."""
    await rabbit.post(b'{"id": "x"}', type="llmstream.job")
    await wait_until(lambda: dead(rabbit, 1))


async def test_a_failed_order_says_so(http: aiohttp.ClientSession, server: Server, rabbit: Queues) -> None:
    """An order that is cancelled while it waits has a result without content that says why."""
    running = [await submit(http, echo=STALL) for _ in range(4)]
    await rabbit.post(json.dumps(order("f1")).encode())

    async def known() -> bool:
        async with http.get("/chat/f1") as response:
            return response.status == 200

    await wait_until(known)
    await http.delete("/chat/f1")
    body = await result_of(server, "f1")
    assert (body["content"], body["error"]["code"]) == ("", "cancelled")
    for job in running:
        await http.delete(f"/chat/{job['task_id']}")
    await settled(server, rabbit)


async def test_a_queue_of_somebody_else_is_used_as_it_is(tmp_path: Path, rabbit: Queues) -> None:
    """A classic queue that exists already, with priorities or without, is no obstacle."""
    await rabbit.declare(durable=False, arguments={"x-max-priority": 5})
    async with Server(echo_settings(tmp_path, broker=rabbit.settings())) as server:
        await rabbit.post(json.dumps(order("c1", "classic")).encode(), priority=3)
        assert await result_of(server, "c1") == {"content": "classic"}
        await settled(server, rabbit)


async def test_a_lost_record_begins_again(http: aiohttp.ClientSession, server: Server, rabbit: Queues) -> None:
    """A store that forgets a job, record, log and place in line, gets it back from the message RabbitMQ still has."""
    body = {"message": "hold on", "job_id": "lost", "echo": STALL}
    async with http.post("/chat/async", json=body) as response:
        assert response.status == 202

    async def runs() -> bool:
        return bool((await status(http, "lost"))["status"] == "in_progress")

    await wait_until(runs)
    store = store_of(server)
    await store.writes.call("FLUSHALL")

    async def back() -> bool:
        return await store.jobs.find("lost") is not None

    await wait_until(back, timeout=20)
    await http.delete("/chat/lost")
    await settled(server, rabbit)


async def test_health_tells(http: aiohttp.ClientSession, rabbit: Queues) -> None:
    """``/health/full`` shows the queue and what is held of it, and no password."""
    async with http.get("/health/full") as response:
        body = await response.text()
        broker = json.loads(body)["broker"]
    assert (broker["status"], broker["queue"], broker["held"]) == ("ok", rabbit.name, 0)
    assert "guest" not in body


async def test_tokens_stream_through(http: aiohttp.ClientSession, server: Server) -> None:
    """A burst of jobs comes out whole, every one once."""
    accepted = await asyncio.gather(*(submit(http, echo={"tokens": 5}) for _ in range(100)))
    answers = await asyncio.gather(*(read_all(http, job["stream_url"]) for job in accepted))
    for _, frames in answers:
        assert "".join(frame.json.get("content", "") for frame in frames if frame.json["type"] == "chunk") == tokens(5)
