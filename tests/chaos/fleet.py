"""Replicas as real processes on one outside Valkey, and clients that never give up."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from llmstream.config import StoreSettings
from llmstream.store.embedded import find_server
from llmstream.store.store import Store, open_store
from tests.proxy import Proxy
from tests.waiting import wait_until

DELAY_MS = 20
SLOTS = 24
"""Any one replica could run everything: a take-over never waits for a slot."""


class OutsideStore:
    """A Valkey process that belongs to no replica."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / "outside.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def start(self) -> None:
        words = {"port": "0", "unixsocket": self.socket, "dir": self._folder, "appendonly": "yes", "save": ""}
        flags = [str(word) for key, value in words.items() for word in (f"--{key}", value)]
        self._process = await asyncio.create_subprocess_exec(
            find_server(), *flags, stdout=asyncio.subprocess.DEVNULL, start_new_session=True
        )

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


class Replica:
    """One ``llmstream serve``."""

    def __init__(self, folder: Path, store_url: str, settings: dict[str, object]) -> None:
        self._folder = folder
        self._words = {
            "store.url": store_url,
            "models.echo.engine": "echo",
            "models.echo.slots": SLOTS,
            "models.echo.delay_ms": DELAY_MS,
            "scheduler.max_attempts": 50,
            "server.shutdown_grace_s": 10,
            **settings,
        }
        self.url = ""
        self.up = False

    async def start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        flags = [word for key, value in self._words.items() for word in ("--set", f"{key}={value}")]
        command = ["-m", "llmstream", "serve", "--port", "0", "--data-dir", str(self._folder), *flags]
        with (self._folder / "stderr.txt").open("ab") as errors:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *command, stdout=asyncio.subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        await wait_until(self._listens, timeout=60)
        self.up = True

    def _listens(self) -> bool:
        assert self.process.returncode is None, (self._folder / "stderr.txt").read_text()
        try:
            found = json.loads((self._folder / "server.json").read_bytes())
        except (OSError, ValueError):
            return False
        self.url = found["url"]
        return bool(found["pid"] == self.process.pid)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; clients avoid the replica until it is up again."""
        self.up = number == signal.SIGCONT
        self.process.send_signal(number)

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        if self.process.returncode is None:
            self.send(number)
        async with asyncio.timeout(30):
            return await self.process.wait()


class Fleet:
    """Several replicas, the last one behind a network that can be cut."""

    def __init__(self, store: OutsideStore, proxy: Proxy, replicas: list[Replica], rng: random.Random) -> None:
        self.store = store
        self.proxy = proxy
        self.replicas = replicas
        self.rng = rng

    def any_url(self, avoid: Replica | None = None) -> str | None:
        """Where a client may connect now."""
        up = [replica for replica in self.replicas if replica.up and replica is not avoid]
        return self.rng.choice(up).url if up else None

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[Store]:
        """The store, looked at directly."""
        settings = StoreSettings.model_validate({"url": self.store.url})
        async with open_store(settings, Path("unused")) as store:
            yield store


@asynccontextmanager
async def open_fleet(folder: Path, seed: int, count: int = 3, **settings: object) -> AsyncIterator[Fleet]:
    """A store, a proxy and ``count`` replicas; all of them end with the context."""
    outside = OutsideStore(folder)
    async with AsyncExitStack() as stack:
        await outside.start()
        stack.push_async_callback(outside.kill)
        await wait_until(outside.socket.exists)
        proxy = await stack.enter_async_context(Proxy(outside.socket))
        urls = [outside.url] * (count - 1) + [proxy.url]
        replicas = [Replica(folder / f"r{number}", url, settings) for number, url in enumerate(urls)]
        for replica in replicas:
            stack.push_async_callback(_end, replica)
        await asyncio.gather(*(replica.start() for replica in replicas))
        yield Fleet(outside, proxy, replicas, random.Random(seed))


async def _end(replica: Replica) -> None:
    if hasattr(replica, "process") and replica.process.returncode is None:
        replica.process.kill()
        await replica.process.wait()


class Answer:
    """One job and the client that reads it to its end, wherever it can be read."""

    def __init__(self, fleet: Fleet, length: int) -> None:
        self.length = length
        self.job_id = ""
        self.text = ""
        self.status = ""
        self.faults: list[str] = []
        self.arrivals: list[float] = []
        """When each piece of the answer came, in seconds of the monotonic clock."""
        self._fleet = fleet
        self._last_id = ""

    async def ask_and_read(self, avoid: Replica | None = None) -> None:
        path = ""
        while not path:
            path = await self._ask()
        while not self.status:
            url = self._fleet.any_url(avoid)
            if url is not None:
                await self._read(url, path)
            if not self.status:
                await asyncio.sleep(0.05)

    async def _ask(self) -> str:
        body = {"message": "count", "model": "echo", "echo": {"tokens": self.length}}
        url = self._fleet.any_url()
        try:
            async with (
                aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=5)) as http,
                http.post("/chat/async", json=body) as answer,
            ):
                told = await answer.json()
                self.job_id = told["task_id"]
                return str(told["stream_url"])
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError):
            await asyncio.sleep(0.05)
            return ""

    async def _read(self, url: str, path: str) -> None:
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        quiet = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=20)
        try:
            async with aiohttp.ClientSession(url, timeout=quiet) as http, http.get(path, headers=headers) as answer:
                event_id = ""
                async for raw in answer.content:
                    name, _, value = raw.decode().rstrip("\r\n").partition(": ")
                    if name == "id":
                        event_id = value
                    elif name == "data":
                        self._take(json.loads(value))
                    elif not name and event_id:
                        self._last_id = event_id
        except (aiohttp.ClientError, TimeoutError):
            return

    def _take(self, data: dict[str, Any]) -> None:
        if data["type"] in ("restart", "error"):
            self.faults.append(data["type"])
        if content := data.get("content"):
            self.text += content
            self.arrivals.append(time.monotonic())
        if data["type"] in ("complete", "error"):
            self.status = data["type"]
