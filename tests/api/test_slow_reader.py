"""Truth 10 over HTTP: whoever stops reading costs little, and misses nothing."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing
from pathlib import Path

import aiohttp
import pytest

from tests.api.reading import submit, tokens
from tests.sse import Frame, Parser
from tests.waiting import wait_until

LENGTH = 200_000
READERS = 8
MIB = 1 << 20

SERVE = """
import asyncio, pathlib, sys
from llmstream.server import Server
from tests.conftest import echo_settings

async def main():
    async with Server(echo_settings(pathlib.Path(sys.argv[1]))) as server:
        print(server.url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


class Process:
    """A server in a process of its own, whose memory nobody else uses."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._status = Path(f"/proc/{pid}/status")

    @property
    def memory(self) -> int:
        """Bytes it has in RAM."""
        found = re.search(r"VmRSS:\s+(\d+) kB", self._status.read_text())
        assert found is not None
        return int(found[1]) * 1024


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Process]:
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVE, str(tmp_path), stdin=pipe, stdout=pipe)
    assert child.stdin is not None
    assert child.stdout is not None
    url = (await child.stdout.readline()).decode().strip()
    yield Process(url, child.pid)
    child.stdin.close()
    assert await child.wait() == 0


async def _stalled(url: str, path: str) -> socket.socket:
    """Asks for a stream and reads nothing of it. HTTP/1.0, so that the body comes as it is."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, (host, int(port)))
    await loop.sock_sendall(connection, f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    return connection


async def _read_on(connection: socket.socket) -> list[Frame]:
    """Reads what a stalled connection has missed, to its end."""
    loop, parser, head = asyncio.get_running_loop(), Parser(), b""
    while b"\r\n\r\n" not in head:
        head += await loop.sock_recv(connection, 4096)
    frames = parser.feed(head.partition(b"\r\n\r\n")[2])
    while chunk := await loop.sock_recv(connection, MIB):
        frames += parser.feed(chunk)
    return frames


async def test_stalled_readers_cost_bounded_memory(process: Process) -> None:
    """Readers that stop reading a long answer together cost less than one copy of it, and then get all of it."""
    async with aiohttp.ClientSession(process.url) as http:
        with ExitStack() as stack:
            answer = await submit(http, echo={"tokens": LENGTH})
            before = process.memory
            readers = [await _stalled(process.url, answer["stream_url"]) for _ in range(READERS)]
            for reader in readers:
                stack.enter_context(closing(reader))

            async def done() -> bool:
                async with http.get("/jobs") as response:
                    return bool((await response.json())["data"][0]["status"] == "completed")

            await wait_until(done, timeout=60)
            cost = process.memory - before
            answers = [await _read_on(reader) for reader in readers[:2]]
    seen = [frame for frame in answers[0] if frame.id]
    assert [frame.id for frame in seen] == [f"1-{seq}" for seq in [*range(LENGTH + 1), LENGTH + 2]]
    assert "".join(frame.json.get("content", "") for frame in seen) == tokens(LENGTH)
    assert [frame for frame in answers[1] if frame.id] == seen
    size = sum(len(frame.data) + len("id: 1-123456\ndata: \n\n") for frame in seen)
    assert cost < size
