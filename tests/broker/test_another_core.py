"""The API in front of somebody else's core, and somebody else's API in front of our core."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import pytest
from aio_pika.abc import AbstractIncomingMessage

from llmstream.broker.messages import Order, OrderMeta
from llmstream.errors import Conflict, DeadlineExceeded
from llmstream.server import Server
from llmstream.store.store import Store
from tests.api.reading import finished, submit
from tests.conftest import echo_settings
from tests.rabbit import Queues
from tests.valkey import stores, valkey
from tests.waiting import wait_until


@asynccontextmanager
async def foreign_core(rabbit: Queues, store: Store) -> AsyncIterator[list[Any]]:
    """A core as the page's own: reads ``kwargs.prompt``, answers in capitals, stores ``{"content"}``."""
    seen: list[Any] = []

    async def run(message: AbstractIncomingMessage) -> None:
        prompt = json.loads(message.body)["kwargs"]["prompt"]
        seen.append(json.loads(message.body))
        said = prompt["content"] if "content" in prompt else prompt["messages"][-1]["content"]
        value = json.dumps({"content": said.upper()})
        await store.writes.call("SET", f"results:{prompt['job_id']}", value, "PX", 60_000)

    async with await aio_pika.connect(rabbit.url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(rabbit.name)
        await queue.consume(run, no_ack=True)
        yield seen


@asynccontextmanager
async def only_api(tmp_path: Path, rabbit: Queues) -> AsyncIterator[tuple[Server, Store]]:
    async with valkey(tmp_path) as redis, stores(redis.url) as (store,):
        settings = echo_settings(tmp_path, store={"url": redis.url}, broker=rabbit.settings(consume=False))
        async with Server(settings) as server:
            yield server, store


async def test_another_core_answers(tmp_path: Path, rabbit: Queues) -> None:
    """Orders go to the queue in the page's form, and the stored result comes back; a repeated one is not posted."""
    async with only_api(tmp_path, rabbit) as (server, store), foreign_core(rabbit, store) as seen:
        inbox = server.gateway.inbox
        assert inbox is not None
        single = Order("g1", OrderMeta(stop_words=["x"]), content="what is it")
        assert json.loads(await inbox.ask(single, 10)) == {"content": "WHAT IS IT"}
        assert json.loads(await inbox.ask(single, 10)) == {"content": "WHAT IS IT"}
        chat = Order("g2", messages=[{"role": "user", "content": "and this"}])  # type: ignore[list-item]
        assert json.loads(await inbox.ask(chat, 10)) == {"content": "AND THIS"}
        first, second = seen
        assert first["kwargs"]["prompt"]["meta"] == {
            "temperature": 0.2,
            "tokens_limit": 8096,
            "stop_words": ["x"],
            "model": None,
        }
        assert (first["id"], first["task"], first["kwargs"]["prompt_type"]) == ("g1", "generate", "single_generation")
        assert second["kwargs"]["prompt_type"] == "chat_completion"
        with pytest.raises(Conflict):
            await inbox.ask(Order("g1", content="something else"), 10)


async def test_no_core_answers(tmp_path: Path, rabbit: Queues) -> None:
    """Without a core the wait has an end, and the message says what to check."""
    async with only_api(tmp_path, rabbit) as (server, _):
        assert server.gateway.inbox is not None
        with pytest.raises(DeadlineExceeded, match="REDIS_PREFIX"):
            await server.gateway.inbox.ask(Order("n1", content="x"), 0.3)


async def test_other_jobs_do_without(tmp_path: Path, rabbit: Queues) -> None:
    """Where another core reads the queue, jobs it could not run stay here, and what is in the queue stays there."""
    await rabbit.declare(durable=True)
    await rabbit.post(b"for another core")
    async with only_api(tmp_path, rabbit) as (server, _), aiohttp.ClientSession(server.url) as http:
        job = await submit(http)
        assert (await finished(server, job["task_id"])).status == "completed"
        assert await rabbit.count() == 1


async def test_both_ends_are_ours(tmp_path: Path, rabbit: Queues) -> None:
    """An API of ours and a core of ours agree, through the queue and the results alone."""
    async with only_api(tmp_path, rabbit) as (api, store):
        url = store.url
        core = echo_settings(
            tmp_path / "core",
            store={"url": url, "prefix": "core"},
            broker=rabbit.settings(),
            models=api.settings.models,
        )
        async with Server(core):
            inbox = api.gateway.inbox
            assert inbox is not None
            orders = [Order(f"b{n}", content=f"number {n}") for n in range(20)]
            answers = await asyncio.gather(*(inbox.ask(order, 20) for order in orders))
            assert [json.loads(answer)["content"] for answer in answers] == [f"number {n}" for n in range(20)]
            await wait_until(lambda: nothing_left(rabbit))


async def nothing_left(rabbit: Queues) -> bool:
    return await rabbit.count() == 0
