"""A network that fails on demand: a TCP proxy in front of the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from llmstream.config import StoreSettings
from llmstream.store.store import Store, open_store


class Trap:
    """Catches the first answer to a request that contains ``needle``: the command is delivered, its answer is not."""

    def __init__(self, needle: bytes, *, hold: bool) -> None:
        self.needle = needle
        self.hold = hold
        self.sprung = asyncio.Event()
        """Set when the answer has arrived here and is kept back."""
        self.released = asyncio.Event()

    def release(self) -> None:
        """Lets an answer that is held go on."""
        self.released.set()


class Link:
    """One client connection and its counterpart."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.trap: Trap | None = None

    def cut(self) -> None:
        for writer in (self.client, self.server):
            writer.transport.abort()


class Proxy:
    """Listens on a free port and forwards to a Unix socket, as long as it is told to."""

    def __init__(self, target: Path) -> None:
        self.requests = 0
        """Batches of commands forwarded so far; a batch is what one write of the client carried."""
        self._target = target
        self._links: set[Link] = set()
        self._traps: list[Trap] = []
        self._flow = asyncio.Event()
        self._flow.set()
        self._refusing = False
        self._swallowing = False
        self.swallowed = 0
        """Connections made since :meth:`swallow`; they never say anything."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def trap(self, needle: bytes, *, hold: bool = False) -> Trap:
        """Loses the answer to the next request with ``needle`` and cuts that connection, or holds the answer back."""
        trap = Trap(needle, hold=hold)
        self._traps.append(trap)
        return trap

    def pause(self) -> None:
        """Delivers nothing more in either direction; connections stay open and new ones are accepted."""
        self._flow.clear()

    def swallow(self) -> None:
        """Like :meth:`pause`, but connections made until :meth:`resume` are dead for ever: accepted, never answered."""
        self.pause()
        self._swallowing = True

    def resume(self) -> None:
        self._swallowing = False
        self._flow.set()

    def refuse(self, refusing: bool = True) -> None:
        """Closes new connections at once."""
        self._refusing = refusing

    def redirect(self, target: Path) -> None:
        """Forwards new connections elsewhere; old ones stay as they are."""
        self._target = target

    def cut(self) -> None:
        """Breaks every connection."""
        for link in list(self._links):
            link.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._swallowing:
                self.swallowed += 1
                await asyncio.Event().wait()
            elif not self._refusing:
                await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, server = await self._reach()
        link = Link(writer, server)
        self._links.add(link)
        pumps = [asyncio.create_task(pump) for pump in (self._ask(link, reader), self._answer(link, upstream))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            link.cut()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._target)

    async def _ask(self, link: Link, client: asyncio.StreamReader) -> None:
        while data := await client.read(1 << 18):
            await self._flow.wait()
            self.requests += 1
            for trap in self._traps:
                if trap.needle in data:
                    link.trap = trap
                    self._traps.remove(trap)
                    break
            link.server.write(data)

    async def _answer(self, link: Link, server: asyncio.StreamReader) -> None:
        while data := await server.read(1 << 18):
            await self._flow.wait()
            if (trap := link.trap) is not None:
                link.trap = None
                trap.sprung.set()
                if not trap.hold:
                    return
                await trap.released.wait()
            link.client.write(data)


class TcpProxy(Proxy):
    """The same network in front of a port."""

    def __init__(self, port: int) -> None:
        super().__init__(Path())
        self._port = port

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)


def socket_of(store: Store) -> Path:
    """The socket of a store's embedded server."""
    assert store.embedded is not None
    return Path(store.embedded.url.removeprefix("unix://"))


@asynccontextmanager
async def distant(store: Store, **settings: float) -> AsyncIterator[tuple[Store, Proxy]]:
    """A second replica's view of ``store``, over a network that can fail."""
    async with Proxy(socket_of(store)) as proxy:
        given = StoreSettings.model_validate({"url": proxy.url, "timeout_s": 5.0, "outage_s": 10.0, **settings})
        async with open_store(given, Path("unused")) as far:
            yield far, proxy
            proxy.resume()
            proxy.refuse(False)
