"""An HTTP server that says exactly the bytes a test wants, and notes what it hears."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

Script = Callable[["Heard"], Awaitable[None]]


class Heard:
    """One request and its connection."""

    def __init__(
        self, connection: int, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connection = connection
        self.head = head
        self.body = body
        self.reader = reader
        self.writer = writer

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n", 1)[0].decode()

    @property
    def hung_up(self) -> bool:
        """Whether the client has closed the connection."""
        return self.reader.at_eof() or self.writer.is_closing()

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


def answer(body: bytes, *headers: bytes) -> bytes:
    """A whole answer of known length."""
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (
        b"".join(h + b"\r\n" for h in headers),
        len(body),
        body,
    )


class RawServer:
    """Runs ``script`` for every request, one after the other on a connection; closes where the script ends it."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Heard] = []
        self.connections = 0
        self.open = 0
        """Connections whose end was not noticed yet."""
        self._script = script
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RawServer:
        """Listens on a free port of this machine."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"https://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self._exchanges(self.connections, reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client or the test is done
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def _exchanges(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            heard = Heard(number, head, await reader.readexactly(int(length or 0)), reader, writer)
            self.requests.append(heard)
            await self._script(heard)
