"""Real processes, real signals: what was accepted is answered, once and exactly."""

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
from llmstream.types import Event, EventId, Finished, Restart, Started
from tests.conftest import assert_every_key_expires
from tests.logs import stored, text_of
from tests.replica import tokens
from tests.waiting import wait_until

LENGTH = 60


class Service:
    """``llmstream serve`` as a process of its own, with one slot and a slow echo."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    async def start(self) -> None:
        words = {
            "models.echo.engine": "echo",
            "models.echo.slots": 1,
            "models.echo.delay_ms": 15,
            "scheduler.lease_s": 0.5,
            "store.sync": "always",  # with everysec a slow fsync may hold back what was acknowledged
            "server.shutdown_grace_s": 10,
        }
        flags = [word for key, value in words.items() for word in ("--set", f"{key}={value}")]
        command = ["-m", "llmstream", "serve", "--port", "0", "--data-dir", str(self.data_dir), *flags]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=(self.data_dir / "stderr.txt").open("ab"),
            start_new_session=True,
        )
        await wait_until(self._listens, timeout=30)

    def _listens(self) -> bool:
        assert self.process.returncode is None, (self.data_dir / "stderr.txt").read_text()
        try:
            found = json.loads((self.data_dir / "server.json").read_bytes())
        except (OSError, ValueError):
            return False
        self.url = found["url"]
        return bool(found["pid"] == self.process.pid)

    async def end(self, number: signal.Signals) -> int:
        """Sends a signal and waits for the process."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(20):
            return await self.process.wait()

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        """The service's own store, looked at from outside."""
        settings = StoreSettings.model_validate({"url": f"unix://{self.data_dir}/store/valkey.sock"})
        async with open_store(settings, self.data_dir) as store:
            yield store

    async def submit(self, length: int = LENGTH) -> tuple[str, str]:
        """Asks for ``length`` tokens; the id of the job and the path of its stream."""
        body = {"message": f"to {length}", "model": "echo", "echo": {"tokens": length}}
        async with aiohttp.ClientSession(self.url) as http, http.post("/chat/async", json=body) as answer:
            assert answer.status == 202, await answer.text()
            told = await answer.json()
            return told["task_id"], told["stream_url"]


class Client:
    """Reads a job's stream as a browser would: keeps the last event id and asks for the rest."""

    def __init__(self) -> None:
        self.text = ""
        self.last_id = ""
        self.ended = False

    async def read(self, url: str, path: str) -> None:
        """Reads until the end of the answer or of the connection."""
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        async with aiohttp.ClientSession(url) as http:
            try:
                async with http.get(path, headers=headers) as answer:
                    event_id = ""
                    async for raw in answer.content:
                        name, _, value = raw.decode().rstrip("\r\n").partition(": ")
                        if name == "id":
                            event_id = value
                        elif name == "data":
                            self._take(json.loads(value))
                        elif not name and event_id:
                            self.last_id = event_id
            except aiohttp.ClientError:
                return

    def _take(self, data: dict[str, Any]) -> None:
        assert data["type"] not in {"restart", "error"}, data
        self.text += data.get("content") or ""
        self.ended = self.ended or data["type"] == "complete"


def attempts_in(log: list[Event]) -> int:
    return sum(isinstance(event.data, Started) for event in log)


def assert_exact(log: list[Event], length: int = LENGTH) -> None:
    """The whole answer, no token lost or said twice, one end."""
    assert text_of(log) == tokens(length)
    assert [event.data.status for event in log if isinstance(event.data, Finished)] == ["completed"]
    assert not any(isinstance(event.data, Restart) for event in log)


@asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[Service]:
    service = Service(data_dir)
    await service.start()
    try:
        yield service
    finally:
        await service.end(signal.SIGKILL)


async def until_said(client: Client, count: int) -> None:
    await wait_until(lambda: len(client.text) >= len(tokens(count)))


async def test_a_killed_server_goes_on_where_it_was(tmp_path: Path) -> None:
    """After ``kill -9`` and a new start the running job goes on from its last logged token, waiting jobs run, finished
    logs read as before, and every key expires."""
    async with running(tmp_path) as service:
        done, done_path = await service.submit(5)
        before = Client()
        await before.read(service.url, done_path)
        assert before.text == tokens(5)
        job, path = await service.submit()
        waiting = [await service.submit(7) for _ in range(3)]
        client = Client()
        reading = asyncio.create_task(client.read(service.url, path))
        await until_said(client, 10)
        async with service.store() as store:
            finished_log = await stored(store, done)
        await service.end(signal.SIGKILL)
        await reading
        seen = client.text

        await service.start()
        await client.read(service.url, path)
        assert client.ended
        assert client.text == tokens(LENGTH)
        assert client.text.startswith(seen)
        for _, other in waiting:
            late = Client()
            await late.read(service.url, other)
            assert late.text == tokens(7)
        again = Client()
        await again.read(service.url, done_path)
        assert (again.text, again.last_id) == (before.text, before.last_id)
        async with service.store() as store:
            assert await stored(store, done) == finished_log
            log = await stored(store, job)
            assert_exact(log)
            assert attempts_in(log) == 2
            for other, _ in waiting:
                assert_exact(await stored(store, other), 7)
            await assert_every_key_expires(store)


async def test_a_killed_store_interrupts_nothing(tmp_path: Path) -> None:
    """``kill -9`` of the Valkey process in the middle of an answer costs neither the attempt nor the stream."""
    async with running(tmp_path) as service:
        job, path = await service.submit()
        client = Client()
        reading = asyncio.create_task(client.read(service.url, path))
        await until_said(client, 10)
        async with service.store() as store:
            info: bytes = await store.writes.call("INFO", "server")
        (pid,) = (int(line.split(b":")[1]) for line in info.splitlines() if line.startswith(b"process_id:"))
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            await reading
        assert client.ended
        assert client.text == tokens(LENGTH)
        async with service.store() as store:
            log = await stored(store, job)
            assert_exact(log)
            assert attempts_in(log) == 1
            assert log[-1].id == EventId.parse(client.last_id)
            await assert_every_key_expires(store)


async def test_a_stopped_server_hands_over(tmp_path: Path) -> None:
    """SIGTERM ends the process well before the grace time with exit status 0; started again it goes on at the next
    token, and the hand-over has cost no attempt."""
    async with running(tmp_path) as service:
        job, path = await service.submit()
        _, other = await service.submit(7)
        client = Client()
        reading = asyncio.create_task(client.read(service.url, path))
        await until_said(client, 10)
        start = asyncio.get_running_loop().time()
        assert await service.end(signal.SIGTERM) == 0
        assert asyncio.get_running_loop().time() - start < 8
        await reading
        await service.start()
        await client.read(service.url, path)
        assert client.ended
        assert client.text == tokens(LENGTH)
        late = Client()
        await late.read(service.url, other)
        assert late.text == tokens(7)
        async with service.store() as store:
            log = await stored(store, job)
            assert_exact(log)
            assert attempts_in(log) == 2
            assert await store.writes.call("HGET", store.keys.job(job), "handed_over") == b"1"
            await assert_every_key_expires(store)
