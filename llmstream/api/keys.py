"""What handlers find in the application, typed."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from llmstream.api.pings import Pings
from llmstream.gateway import Gateway


class Streams:
    """Handlers that hold a stream open."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def add(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)

    def __len__(self) -> int:
        return len(self._tasks)

    def discard(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)

    async def close(self) -> None:
        """Ends every open stream, so that its client reconnects elsewhere."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


GATEWAY = web.AppKey("gateway", Gateway)
STREAMS = web.AppKey("streams", Streams)
PINGS = web.AppKey("pings", Pings)
BODY_TIMEOUT_S = web.AppKey("body_timeout_s", float)
