"""``llmstream serve --workers N`` as real processes, and clients that know which of them they talk to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from llmstream.config import StoreSettings
from llmstream.store.store import Store, open_store
from llmstream.types import EventId
from tests.waiting import wait_until


class Workers:
    """The supervisor process and what it says about itself."""

    def __init__(self, data_dir: Path, count: int, settings: dict[str, Any]) -> None:
        self.data_dir = data_dir
        self.count = count
        self._settings = {"models.echo.engine": "echo", "server.shutdown_grace_s": 5, **settings}
        self._stderr = data_dir / "stderr.txt"

    async def start(self) -> None:
        flags = [word for key, value in self._settings.items() for word in ("--set", f"{key}={value}")]
        words = ["--workers", str(self.count), "--port", "0", "--data-dir", str(self.data_dir), *flags]
        with self._stderr.open("ab") as stderr:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "llmstream", "serve", *words),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        await wait_until(self._listens, timeout=60)

    def _listens(self) -> bool:
        assert self.process.returncode is None, self.log
        try:
            found = json.loads((self.data_dir / "server.json").read_bytes())
        except (OSError, ValueError):
            return False
        self.url: str = found["url"]
        return bool(found["pid"] == self.process.pid)

    @property
    def log(self) -> str:
        return self._stderr.read_text()

    async def end(self, number: signal.Signals) -> int:
        """Sends a signal to the supervisor and waits for it."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(30):
            return await self.process.wait()

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
    async def store(self) -> AsyncIterator[Store]:
        """The service's own store, looked at from outside."""
        settings = StoreSettings.model_validate({"url": f"unix://{self.data_dir}/store/valkey.sock"})
        async with open_store(settings, self.data_dir) as store:
            yield store

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

    async def submit(self, priority: int = 0, **echo: Any) -> str:
        """Asks the echo model; the id of the accepted job."""
        body = {"message": "go", "model": "echo", "priority": priority, "echo": echo}
        async with self.http.post("/chat/async", json=body) as answer:
            assert answer.status == 202, await answer.text()
            return str((await answer.json())["task_id"])


class Reader:
    """Reads one job's stream and notes when each event came."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.text = ""
        self.last_id = ""
        self.ended = False
        self.first_of: dict[int, float] = {}
        """When the first text of each attempt came, in seconds of the event loop."""

    async def read(self, http: aiohttp.ClientSession) -> None:
        """Reads on to the end of the answer; raises aiohttp.ClientError when the connection ends before it."""
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        async with http.get(await self._path(http), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            event_id = ""
            async for raw in answer.content:
                name, _, value = raw.decode().rstrip("\r\n").partition(": ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    self._take(json.loads(value), event_id)
                elif not name and event_id:
                    self.last_id = event_id

    async def _path(self, http: aiohttp.ClientSession) -> str:
        async with http.get(f"/chat/{self.job_id}") as answer:
            session = (await answer.json())["session_id"]
        return f"/stream/{session}?task_id={self.job_id}"

    def _take(self, data: dict[str, Any], event_id: str) -> None:
        assert data["type"] not in {"restart", "error"}, data
        if data.get("content"):
            self.text += data["content"]
            attempt = EventId.parse(event_id).attempt
            self.first_of.setdefault(attempt, asyncio.get_running_loop().time())
        self.ended = self.ended or data["type"] == "complete"


@asynccontextmanager
async def workers(data_dir: Path, count: int, **settings: Any) -> AsyncIterator[Workers]:
    """A running service; ``models__echo__slots=4`` stands for ``models.echo.slots``."""
    service = Workers(data_dir, count, {key.replace("__", "."): value for key, value in settings.items()})
    try:
        await service.start()
        yield service
    finally:
        if hasattr(service, "process"):
            await service.end(signal.SIGKILL)


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
