"""A RabbitMQ for each test: the machine's, or one that a test may restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.rabbit import URL, Node, Queues, missing, queues, reachable, server_program


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A server that belongs to the test."""
    if server_program() is None:
        missing("rabbitmq-server is not installed; install it to run the tests that restart one")
    node = Node(tmp_path / "rabbitmq")
    try:
        await node.start()
        yield node
    finally:
        await node.kill()


@pytest.fixture
async def rabbit(tmp_path: Path) -> AsyncIterator[Queues]:
    """Queues that are gone after the test: on the machine's server or, where there is none, on one of its own."""
    if await reachable(URL):
        async with queues(URL) as own:
            yield own
        return
    if server_program() is None:
        missing(f"no RabbitMQ answers at {URL} and rabbitmq-server is not installed; start or install one")
    node = Node(tmp_path / "rabbitmq")
    try:
        await node.start()
        async with queues(node.url) as own:
            yield own
    finally:
        await node.kill()
