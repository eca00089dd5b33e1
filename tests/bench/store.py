"""A Valkey of the benchmark's own, with the options of the embedded one, away from the server's core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from llmstream.config import StoreSettings
from llmstream.store.embedded import MALLOC, find_server
from llmstream.store.store import Store, open_store
from tests.bench.processes import running, until_ready


class BenchStore:
    """A running store; its CPU is counted apart from the server's."""

    def __init__(self, socket: Path, pid: int) -> None:
        self.socket = socket
        self.pid = pid

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[Store]:
        """The store, used directly."""
        async with open_store(StoreSettings.model_validate({"url": self.url}), self.socket.parent) as store:
            yield store

    async def memory_mb(self) -> float:
        async with self.inside() as store:
            info: bytes = await store.writes.call("INFO", "memory")
        (used,) = (int(line.split(b":")[1]) for line in info.splitlines() if line.startswith(b"used_memory:"))
        return used / 2**20


@asynccontextmanager
async def open_bench_store(folder: Path, core: str) -> AsyncIterator[BenchStore]:
    """An empty store in ``folder``, which holds none yet."""
    socket, log = folder / "store.sock", folder / "store.log"
    options = {
        "port": "0",
        "unixsocket": socket,
        "dir": folder,
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]

    async def answers() -> bool:
        with suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(socket)
            writer.write(b"PING\r\n")
            line = await reader.readline()
            writer.close()
            return line.startswith(b"+PONG")
        return False

    async with running([find_server(), *words], core=core, log=log, env=MALLOC) as process:
        await until_ready(process, log, answers)
        yield BenchStore(socket, process.pid)
