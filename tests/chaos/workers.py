"""``llmstream serve --workers N`` as real processes, and clients that know which of them they talk to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from llmstream.store.store import Store
from tests.chaos.service import Service


class Workers(Service):
    """The supervisor process and what it says about itself."""

    def __init__(self, data_dir: Path, count: int, settings: dict[str, Any]) -> None:
        super().__init__(
            data_dir, {"server.workers": count, "models.echo.engine": "echo", "server.shutdown_grace_s": 5, **settings}
        )
        self.count = count

    async def replicas(self) -> list[str]:
        """Names of the replicas that the service counts."""
        async with aiohttp.ClientSession(self.url) as http, http.get("/stats") as answer:
            names: list[str] = (await answer.json())["replicas"]
            return names

    async def store_pid(self) -> int:
        async with self.store() as store:
            info: bytes = await store.writes.call("INFO", "server")
        (pid,) = (int(line.split(b":")[1]) for line in info.splitlines() if line.startswith(b"process_id:"))
        return pid

    @asynccontextmanager
    async def connection(self, replica: str | None = None) -> AsyncIterator[Connection]:
        """One connection that stays open, to the given replica or any."""
        while True:
            async with aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(limit=1)) as http:
                async with http.get("/health/full") as answer:
                    name = (await answer.json())["replica"]
                if replica in (None, name):
                    yield Connection(http, name)
                    return


class Connection:
    """A client that sends everything over one connection."""

    def __init__(self, http: aiohttp.ClientSession, replica: str) -> None:
        self.http = http
        self.replica = replica

    async def ask(self, priority: int = 0, **echo: Any) -> tuple[str, str]:
        """Asks the echo model; the id of the accepted job and the path of its stream."""
        body = {"message": "go", "model": "echo", "priority": priority, "echo": echo}
        async with self.http.post("/chat/async", json=body) as answer:
            assert answer.status == 202, await answer.text()
            told = await answer.json()
            return told["task_id"], told["stream_url"]

    async def submit(self, priority: int = 0, **echo: Any) -> str:
        """Asks the echo model; the id of the accepted job."""
        job, _ = await self.ask(priority, **echo)
        return job


@asynccontextmanager
async def workers(data_dir: Path, count: int, **settings: Any) -> AsyncIterator[Workers]:
    """A running service; ``models__echo__slots=4`` stands for ``models.echo.slots``."""
    service = Workers(data_dir, count, {key.replace("__", "."): value for key, value in settings.items()})
    try:
        await service.start()
        yield service
    finally:
        await service.close()


async def replaced(service: Workers, gone: set[str]) -> bool:
    """Whether the service has all its workers, and none of these."""
    try:
        names = set(await service.replicas())
    except aiohttp.ClientError:
        return False
    return len(names) == service.count and not names & gone


def pid_of(replica: str) -> int:
    """A replica's process, which its name tells."""
    return int(replica.rsplit("-", 2)[1])


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be noted by its parent does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


async def all_done(store: Store, jobs: list[str]) -> bool:
    states = await store.jobs.find_all(jobs)
    return len(states) == len(jobs) and all(state.done for state in states)
