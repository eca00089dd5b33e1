"""What RabbitMQ, the network and replicas do to jobs on their way: nothing is lost and nothing runs twice."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from llmstream.broker import rabbitmq
from llmstream.broker.rabbitmq import Delivery
from llmstream.config import ServerSettings
from llmstream.errors import BrokerUnavailable, ConfigError
from llmstream.server import Server
from tests.api.pair import two_servers
from tests.api.reading import Json, finished, read_all, status, submit, tokens
from tests.chaos.service import Service
from tests.conftest import echo_settings
from tests.proxy import TcpProxy
from tests.rabbit import Node, Queues, queues
from tests.valkey import stores, valkey
from tests.waiting import wait_until


def order(job_id: str, content: str) -> bytes:
    return json.dumps({"job_id": job_id, "meta": {}, "content": content}).encode()


def content(text: str) -> bytes:
    """The stored result of an order."""
    return msgspec.json.encode({"content": text})


async def empty(rabbit: Queues) -> bool:
    return sum([await rabbit.count(lane) for lane in ("", ".high", ".low", ".dead")]) == 0


async def no_more(server: Server) -> bool:
    assert server.gateway.inbox is not None
    return not server.gateway.inbox.health()["held"]


@asynccontextmanager
async def two_replicas(tmp_path: Path, rabbit: Queues, **more: Any) -> AsyncIterator[tuple[Server, Server]]:
    async with two_servers(tmp_path, broker=rabbit.settings(**more)) as (one, two):
        yield one, two


async def test_a_restart_under_load(tmp_path: Path, node: Node) -> None:
    """RabbitMQ is killed and started again in the middle: every job that was accepted, over HTTP or as an order, is
    answered once, whole and under its own id; what is refused meanwhile says so and leaves nothing that runs."""
    async with queues(node.url) as rabbit, two_replicas(tmp_path, rabbit, prefetch=8) as (one, two):
        async with aiohttp.ClientSession(one.url) as first, aiohttp.ClientSession(two.url) as second:
            for n in range(50):
                await rabbit.post(order(f"o{n}", f"words of {n}"), delivery_mode=2)
            accepted: list[str] = []

            async def hammer(http: aiohttp.ClientSession, name: str) -> None:
                for n in range(100):
                    body = {"message": "go", "job_id": f"{name}{n}", "echo": {"tokens": 5, "delay_ms": 2}}
                    async with http.post("/chat/async", json=body) as response:
                        if response.status == 202:
                            accepted.append(f"{name}{n}")
                        else:
                            assert response.status == 503, await response.text()
                            assert "Retry-After" in response.headers
                            await asyncio.sleep(0.2)

            loads = [asyncio.create_task(hammer(*each)) for each in ((first, "a"), (second, "b"))]
            await wait_until(lambda: len(accepted) >= 30)
            await node.kill()
            before = len(accepted)
            assert before < 190, "the load was over before the restart"
            await node.start()
            await asyncio.gather(*loads)
            assert len(accepted) > before
            for job_id in accepted:
                state = await status(first, job_id)
                if state["status"] != "completed":
                    await finished(one, job_id)
                    state = await status(first, job_id)
                assert (state["status"], state["text"], state["attempt"]) == ("completed", tokens(5), 1)
            results = one.gateway._store.results("results")
            for n in range(50):
                state_of_order = await finished(one, f"o{n}")
                assert state_of_order.attempt == 1

                async def there(job_id: str = f"o{n}") -> bool:
                    return (
                        await results.get(job_id)
                        == json.dumps({"content": f"words of {job_id[1:]}"}).replace('": "', '":"').encode()
                    )

                await wait_until(there)
            await wait_until(lambda: no_more(one), timeout=20)
            await wait_until(lambda: no_more(two), timeout=20)
        await rabbit.connect()
        await wait_until(lambda: empty(rabbit))


async def test_ready_says_when_rabbitmq_is_away(tmp_path: Path, node: Node) -> None:
    """While RabbitMQ is away new jobs get 503 at once and ``/ready`` says why; afterwards all is well by itself."""
    async with (
        queues(node.url) as rabbit,
        Server(echo_settings(tmp_path, broker=rabbit.settings())) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        await node.kill()

        async def ready(expected: int) -> bool:
            async with http.get("/ready") as response:
                return response.status == expected

        await wait_until(lambda: ready(503))
        async with http.post("/chat/async", json={"message": "go"}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "broker_unavailable")
        async with http.post("/chat", json={"message": "go", "durability": "memory"}) as response:
            assert response.status == 200
        await node.start()
        await wait_until(lambda: ready(200), timeout=20)
        job = await submit(http)
        await finished(server, job["task_id"])
        await rabbit.connect()


async def test_lost_acknowledgements(tmp_path: Path, rabbit: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages whose acknowledgement never arrives come again; their jobs do not run again, and their results stay."""

    async def lost(self: Delivery) -> None:
        acks.append(self.message_id)

    acks: list[str | None] = []
    monkeypatch.setattr(Delivery, "ack", lost)
    async with two_replicas(tmp_path, rabbit) as (one, two):
        await rabbit.post(order("l1", "hello"), message_id="l1")
        async with aiohttp.ClientSession(one.url) as http:
            jobs = [(await submit(http, echo={"tokens": 3}))["task_id"] for _ in range(10)]
        await wait_until(lambda: len(set(acks)) == 11)
        monkeypatch.undo()
        for server in (one, two):
            broker = server.gateway.inbox.broker if server.gateway.inbox else None
            assert broker is not None
            assert broker._session is not None
            await broker._session.close()
        await wait_until(lambda: empty(rabbit), timeout=20)
        await wait_until(lambda: no_more(one))
        await wait_until(lambda: no_more(two))
        for job_id in ("l1", *jobs):
            state = await one.gateway.job(job_id)
            assert (state.status, state.attempt) == ("completed", 1)
        assert await one.gateway._store.results("results").get("l1") == b'{"content":"hello"}'


async def test_redelivery_while_it_runs(tmp_path: Path, rabbit: Queues) -> None:
    """A connection that is cut in the middle of an answer interrupts nothing: the message comes again, the job goes
    on, and is acknowledged once it is over."""
    async with (
        Server(echo_settings(tmp_path, broker=rabbit.settings())) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        job = await submit(http, echo={"tokens": 100, "delay_ms": 10})

        async def runs() -> bool:
            return bool((await status(http, job["task_id"]))["status"] == "in_progress")

        await wait_until(runs)
        inbox = server.gateway.inbox
        assert inbox is not None
        first = inbox.broker._session
        assert first is not None
        await first.close()
        await wait_until(lambda: inbox.broker._session is not first)
        _, frames = await read_all(http, job["stream_url"])
        text = "".join(frame.json.get("content", "") for frame in frames if frame.json["type"] == "chunk")
        assert text == tokens(100)
        assert (await status(http, job["task_id"]))["attempt"] == 1
        await wait_until(lambda: no_more(server))
        await wait_until(lambda: empty(rabbit))


async def test_a_killed_replica(tmp_path: Path, rabbit: Queues) -> None:
    """``kill -9`` of the replica that holds messages and runs jobs: the other one gets both, and every order has its
    result once, from one uninterrupted log."""
    settings = {
        "models.echo.engine": "echo",
        "models.echo.delay_ms": 20,
        "scheduler.lease_s": 0.6,
        "broker.kind": "rabbitmq",
        "broker.url": rabbit.url,
        "broker.queue": rabbit.name,
        "broker.result_prefix": "results",
        "broker.prefetch": 16,
    }
    async with valkey(tmp_path) as server, stores(server.url) as (store,):
        doomed, survivor = (Service(tmp_path / name, {**settings, "store.url": server.url}) for name in "ab")
        try:
            await doomed.start()
            await survivor.start()
            words = " ".join(str(n) for n in range(30))
            for n in range(40):
                await rabbit.post(order(f"k{n}", words))
            results = store.results("results")

            async def under_way() -> bool:
                states = await store.jobs.find_all([f"k{n}" for n in range(40)])
                own = [state for state in states if state.status == "in_progress"]
                return len({state.replica for state in own}) == 2

            await wait_until(under_way, timeout=20)
            await doomed.end(signal.SIGKILL)

            async def all_there() -> bool:
                return None not in [await results.get(f"k{n}") for n in range(40)]

            await wait_until(all_there, timeout=60)
            assert {await results.get(f"k{n}") for n in range(40)} == {content(words)}
            states = await store.jobs.find_all([f"k{n}" for n in range(40)])
            assert {state.status for state in states} == {"completed"}
            assert max(state.attempt for state in states) == 2, "nothing was taken over"
            await wait_until(lambda: empty(rabbit), timeout=20)
        finally:
            await doomed.close()
            await survivor.close()


async def test_a_shutdown_gives_back(tmp_path: Path, rabbit: Queues) -> None:
    """A replica that ends leaves its messages to RabbitMQ; the next one finishes the jobs from where they stopped."""
    settings = echo_settings(
        tmp_path, slots=1, broker=rabbit.settings(), server=ServerSettings(port=0, shutdown_grace_s=0)
    )
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        jobs = [(await submit(http, echo={"tokens": 40, "delay_ms": 10}))["task_id"] for _ in range(3)]

        async def runs() -> bool:
            return bool((await status(http, jobs[0]))["status"] == "in_progress")

        await wait_until(runs)
    assert await rabbit.count() == 3
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        for job_id in jobs:
            await finished(server, job_id)
            assert (await status(http, job_id))["text"] == tokens(40)
        await wait_until(lambda: empty(rabbit))


async def test_unconfirmed_is_not_accepted(tmp_path: Path, rabbit: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose message is not confirmed is refused and does not run, even if the message is there; under its own
    id it may be sent again, and is one job."""
    publish = rabbitmq.RabbitMQ.publish

    async def unconfirmed(self: rabbitmq.RabbitMQ, *args: Any, **more: Any) -> None:
        await publish(self, *args, **more)
        raise BrokerUnavailable("no confirmation came", retry_after=1)

    async with (
        Server(echo_settings(tmp_path, broker=rabbit.settings())) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        monkeypatch.setattr(rabbitmq.RabbitMQ, "publish", unconfirmed)
        ids: list[str] = []
        for body in ({"message": "anonymous"}, {"message": "named", "job_id": "n1"}):
            async with http.post("/chat/async", json=body) as response:
                assert response.status == 503
        monkeypatch.undo()
        await submit(http, message="named", job_id="n1")
        await finished(server, "n1")
        await wait_until(lambda: no_more(server))
        async with http.get("/jobs") as response:
            found: list[Json] = (await response.json())["data"]
        ids = [job["task_id"] for job in found]
        assert ids.count("n1") == 1
        assert {job["status"] for job in found if job["task_id"] != "n1"} <= {"cancelled"}
        assert (await status(http, "n1"))["attempt"] == 1


async def test_a_silent_network(tmp_path: Path, node: Node) -> None:
    """While a network loses everything a job is refused within the deadline; when it is back, so is the service."""
    async with queues(node.url) as own, TcpProxy(node.port) as proxy:
        url = proxy.url.replace("redis://", "amqp://guest:guest@")
        settings = own.settings(url=f"{url}/", timeout_s=1)
        async with (
            Server(echo_settings(tmp_path, broker=settings)) as server,
            aiohttp.ClientSession(server.url) as http,
        ):
            proxy.pause()
            async with http.post("/chat/async", json={"message": "go"}) as response:
                assert response.status == 503
            proxy.cut()
            proxy.resume()

            async def accepted() -> bool:
                async with http.post("/chat/async", json={"message": "go", "job_id": "again"}) as response:
                    return response.status == 202

            await wait_until(accepted, timeout=20)
            await finished(server, "again")


async def test_a_queue_that_is_deleted(tmp_path: Path, rabbit: Queues) -> None:
    """Somebody deletes the queues under the service: it makes them again and goes on."""
    async with (
        Server(echo_settings(tmp_path, broker=rabbit.settings())) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        await rabbit.delete()
        await rabbit.connect()

        async def accepted() -> bool:
            async with http.post("/chat/async", json={"message": "go", "job_id": "after"}) as response:
                return response.status == 202

        await wait_until(accepted, timeout=20)
        assert (await finished(server, "after")).attempt == 1


@pytest.mark.parametrize("url", ["amqp://guest:hidden@127.0.0.1:1/", "amqp://nobody:hidden@127.0.0.1:5672/"])
async def test_a_rabbitmq_that_cannot_be_used(tmp_path: Path, rabbit: Queues, url: str) -> None:
    """A wrong address or password ends the start with a message that says what to check, without the password."""
    with pytest.raises(ConfigError, match="RABBITMQ_URL") as caught:
        async with Server(echo_settings(tmp_path, broker=rabbit.settings(url=url, timeout_s=5))):
            pass
    assert "hidden" not in str(caught.value)
