"""RabbitMQ for tests: the machine's server, with queues that are gone afterwards, or a node that a test may restart."""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
import signal
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aio_pika
import aiormq
import pytest
from aio_pika.abc import AbstractIncomingMessage

from llmstream.config_broker import BrokerSettings
from tests.waiting import wait_until

URL = os.environ.get("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/")
REQUIRED = "TEST_RABBITMQ_REQUIRED"
"""Set where a missing RabbitMQ is a failure and no reason to skip."""


class Queues:
    """The queues of one test, and a client that is not ours."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = f"llmstream-test-{uuid.uuid4().hex}"
        self.connection: aio_pika.abc.AbstractConnection

    def settings(self, **more: Any) -> BrokerSettings:
        """What makes a server use them."""
        given = {"kind": "rabbitmq", "url": self.url, "queue": self.name, "result_prefix": "results", **more}
        return BrokerSettings.model_validate(given)

    async def connect(self) -> None:
        self.connection = await aio_pika.connect(self.url)

    async def post(self, body: bytes, queue: str | None = None, **properties: Any) -> None:
        """Posts a message as anyone may."""
        async with self.connection.channel() as channel:
            message = aio_pika.Message(body, **properties)
            await channel.default_exchange.publish(message, routing_key=queue or self.name)

    async def declare(self, **options: Any) -> None:
        """Makes the main queue, as another system would."""
        async with self.connection.channel() as channel:
            await channel.declare_queue(self.name, **options)

    async def count(self, suffix: str = "") -> int:
        """Messages of one queue that nobody has taken out."""
        async with self.connection.channel() as channel:
            queue = await channel.declare_queue(f"{self.name}{suffix}", passive=True)
            return queue.declaration_result.message_count or 0

    async def get(self, suffix: str = "") -> AbstractIncomingMessage | None:
        """Takes one message out."""
        async with self.connection.channel() as channel:
            queue = await channel.get_queue(f"{self.name}{suffix}", ensure=False)
            return await queue.get(no_ack=True, fail=False)

    async def delete(self) -> None:
        async with self.connection:
            for suffix in ("", ".high", ".low", ".dead"):
                async with self.connection.channel() as channel:
                    with suppress(aiormq.exceptions.AMQPError):
                        await channel.queue_delete(f"{self.name}{suffix}")
                    if suffix == ".dead":
                        await channel.exchange_delete(f"{self.name}.dead")


@asynccontextmanager
async def queues(url: str) -> AsyncIterator[Queues]:
    own = Queues(url)
    await own.connect()
    try:
        yield own
    finally:
        with suppress(aiormq.exceptions.AMQPError, RuntimeError):
            await own.connection.close()
        await own.connect()  # the test may have restarted the server
        await own.delete()


class Node:
    """A RabbitMQ server of its own name, ports and files, that may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port, self._dist_port = free_port(), free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self._process: asyncio.subprocess.Process | None = None
        self._name = f"test-{uuid.uuid4().hex[:12]}@localhost"

    async def start(self) -> None:
        """Returns when it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        nothing = str(self._folder / "none")
        environment = {
            **os.environ,
            "HOME": str(self._folder),
            "RABBITMQ_NODENAME": self._name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_CONFIG_FILE": nothing,
            "RABBITMQ_ADVANCED_CONFIG_FILE": nothing,
            "RABBITMQ_CONF_ENV_FILE": nothing,
            "RABBITMQ_ENABLED_PLUGINS_FILE": nothing,
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        with (self._folder / "out.txt").open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                str(server_program()), env=environment, stdout=out, stderr=out, start_new_session=True
            )
        await wait_until(self._answers, timeout=90)

    async def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, (self._folder / "out.txt").read_text()
        with suppress(aiormq.exceptions.AMQPError, OSError, TimeoutError):
            async with asyncio.timeout(5), await aio_pika.connect(self.url):
                return True
        return False

    async def kill(self) -> None:
        """Ends it at once; what it had confirmed is on its disk."""
        if self._process is not None and self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def restart(self) -> None:
        await self.kill()
        await self.start()


def server_program() -> Path | None:
    """RabbitMQ's own start script; the wrapper in the path insists on a user of its own."""
    found = sorted(glob.glob("/usr/lib/rabbitmq/lib/*/sbin/rabbitmq-server"))
    found += [path for path in [shutil.which("rabbitmq-server")] if path]
    return Path(found[0]) if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


async def reachable(url: str) -> bool:
    with suppress(aiormq.exceptions.AMQPError, OSError, TimeoutError):
        async with asyncio.timeout(5), await aio_pika.connect(url):
            return True
    return False


def missing(what: str) -> None:
    """Skips, or fails where RabbitMQ has to be there."""
    if os.environ.get(REQUIRED):
        pytest.fail(what)
    pytest.skip(what)
