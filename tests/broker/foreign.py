"""A core that is not ours, written from its page alone: reads the queue, answers in capitals, stores the results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from llmstream.store.store import Store
from tests.rabbit import Queues


class ForeignCore:
    """What it was told, and what it does."""

    def __init__(self, store: Store) -> None:
        self.seen: list[Any] = []
        """The tasks it took out."""
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.stores: bytes | None = None
        """Instead of an answer."""
        self._store = store

    async def run(self, message: AbstractIncomingMessage) -> None:
        task = json.loads(message.body)
        self.seen.append(task)
        prompt = task["kwargs"]["prompt"]
        said = prompt["content"] if "content" in prompt else prompt["messages"][-1]["content"]
        await self.may_answer.wait()
        value = self.stores or json.dumps({"content": said.upper()}).encode()
        await self._store.writes.call("SET", f"results:{prompt['job_id']}", value, "PX", 60_000)


@asynccontextmanager
async def foreign_core(rabbit: Queues, store: Store) -> AsyncIterator[ForeignCore]:
    core = ForeignCore(store)
    async with await aio_pika.connect(rabbit.url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(rabbit.name)
        await queue.consume(core.run, no_ack=True)
        yield core
