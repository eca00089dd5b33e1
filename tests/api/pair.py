"""Two replicas on one store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from llmstream.config import ServerSettings, StoreSettings
from llmstream.server import Server
from tests.conftest import echo_settings


@asynccontextmanager
async def two_servers(tmp_path: Path, **sections: object) -> AsyncIterator[tuple[Server, Server]]:
    """Two servers that are one service; ``sections`` are settings of both."""
    given = {"server": ServerSettings(port=0, shutdown_grace_s=1), **sections}
    first = echo_settings(tmp_path / "a", slots=4).model_copy(update=given)
    async with Server(first) as one:
        store = StoreSettings.model_validate({"url": f"unix://{tmp_path}/a/store/valkey.sock"})
        second = echo_settings(tmp_path / "b", slots=4).model_copy(update={**given, "store": store})
        async with Server(second) as two:
            yield one, two


@asynccontextmanager
async def two_clients(tmp_path: Path, **sections: object) -> AsyncIterator[list[aiohttp.ClientSession]]:
    """A client of each of two servers that are one service."""
    async with (
        two_servers(tmp_path, **sections) as (one, two),
        aiohttp.ClientSession(one.url) as first,
        aiohttp.ClientSession(two.url) as second,
    ):
        yield [first, second]
