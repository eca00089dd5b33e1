"""A store server that tests start, kill and set back in time."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from llmstream.config import StoreSettings
from llmstream.store.embedded import find_server
from llmstream.store.presence import parse_info
from llmstream.store.store import Store, open_store
from tests.waiting import wait_until


class Valkey:
    """A server in a directory of its own, on a Unix socket."""

    def __init__(self, folder: Path, *options: str, binary: Path | None = None) -> None:
        self.data = folder / "data"
        self.socket = folder / "s"
        self.url = f"unix://{self.socket}"
        self._options = options
        self._binary = binary or find_server()
        self._process: asyncio.subprocess.Process | None = None
        self._snapshot = folder / "snapshot"

    async def start(self, *options: str) -> None:
        """Starts the server and waits until it has read its files."""
        self.data.mkdir(parents=True, exist_ok=True)
        command = [str(self._binary), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.data)]
        command += ["--appendonly", "yes", "--save", "", *self._options, *options]
        self._process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.DEVNULL, start_new_session=True
        )
        await wait_until(self._answers)

    async def _answers(self) -> bool:
        return await self.ask("PING") != b""

    async def ask(self, *words: str, lines: int = 1) -> bytes:
        """The first line of an answer, after so many were read; empty without one."""
        with suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(self.socket)
            writer.write(" ".join(words).encode() + b"\r\n")
            try:
                answer, *_ = [await reader.readline() for _ in range(lines)]
                return b"" if answer.startswith(b"-LOADING") else answer
            finally:
                writer.close()
        return b""

    async def info(self, name: str) -> str:
        """One value of ``INFO replication``; empty without an answer."""
        with suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(self.socket)
            writer.write(b"INFO replication\r\n")
            try:
                head = await reader.readline()
                found = parse_info(await reader.readexactly(int(head[1:])))
                return found.get(name, "")
            finally:
                writer.close()
        return ""

    async def kill(self) -> None:
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def snapshot(self) -> None:
        """Remembers what would be on the disk if the power went now, everything acknowledged included."""
        # The server holds writes to its log back while the disk is busy; a moment's wait for the disk ends that.
        await self.ask("SET", "snapshot", "1", "PX", "60000\r\nWAITAOF", "1", "0", "2000", lines=2)
        shutil.copytree(self.data, self._snapshot)

    async def set_back_to_nothing(self) -> None:
        """Kills the server; everything is lost."""
        await self.kill()
        shutil.rmtree(self.data)

    async def set_back(self) -> None:
        """Kills the server; what it wrote after the snapshot is lost."""
        await self.kill()
        shutil.rmtree(self.data)
        self._snapshot.rename(self.data)


@asynccontextmanager
async def valkey(folder: Path, *options: str, binary: Path | None = None) -> AsyncIterator[Valkey]:
    server = Valkey(folder, *options, binary=binary)
    await server.start()
    try:
        yield server
    finally:
        await server.kill()


@asynccontextmanager
async def stores(url: str, count: int = 1, **settings: object) -> AsyncIterator[Sequence[Store]]:
    """So many replicas' views of one server."""
    given = StoreSettings.model_validate({"url": url, "timeout_s": 5.0, "outage_s": 10.0, **settings})
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_store(given, Path("unused"))) for _ in range(count)]
