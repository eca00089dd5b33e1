"""Shared fixtures: a real store for each test, and a check that no key is left without a time to live."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import hypothesis
import pytest

from llmstream.config import ModelSettings, RetrySettings, ServerSettings, Settings, StoreSettings
from llmstream.server import Server
from llmstream.store.store import Store, open_store
from tests.upstream import Upstream

# A shared machine stalls now and then; what an example may cost is the test timeout's business.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


async def assert_every_key_expires(store: Store) -> None:
    """Fails for a key without a time to live."""
    immortal: list[str] = []
    for node in store.nodes:
        cursor = None
        while cursor != b"0":
            cursor, names = await node.writes.call("SCAN", cursor or b"0", "COUNT", 1000)
            lives = [await store.writes.call("PTTL", name) for name in names]
            immortal += [name.decode() for name, left in zip(names, lives, strict=True) if left == -1]
    assert not immortal, f"keys without a time to live: {immortal}"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(StoreSettings(), tmp_path) as store:
        yield store
        await assert_every_key_expires(store)


def echo_settings(data_dir: Path, *, slots: int = 4, port: int = 0, **sections: object) -> Settings:
    """Settings of a server with the ``echo`` model on a free port; ``sections`` replace whole sections."""
    given: dict[str, object] = {
        "data_dir": data_dir,
        "server": ServerSettings(port=port, shutdown_grace_s=2),
        "retry": RetrySettings(base_s=0.01),
        "models": {"echo": ModelSettings(engine="echo", slots=slots)},
        **sections,
    }
    return Settings.model_validate(given)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A real server with the echo model and a real store."""
    async with Server(echo_settings(tmp_path)) as server:
        yield server


@pytest.fixture
async def http(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of ``server``."""
    async with aiohttp.ClientSession(server.url) as session:
        yield session


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """An OpenAI-compatible API that misbehaves on request."""
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Leaves the logger as it was for the other tests."""
    logger = logging.getLogger("llmstream")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
