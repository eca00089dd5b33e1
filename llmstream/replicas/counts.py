"""A replica process's side of the metrics: tells its counts when asked, and asks for those of all when scraped."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from llmstream.errors import LLMStreamError
from llmstream.replicas.wire import LAST_WORDS, LINE_BYTES, Everything, Tell, Told, Wanted
from llmstream.telemetry.observer import Observer
from llmstream.telemetry.snapshot import Snapshot

EVERYTHING_S = 6.0
"""What the supervisor gets to answer a scrape: more than it gives each process."""


class NoTotals(LLMStreamError):
    """Only a part of the counts can be had, which would look like a restart."""

    status, code, retryable = 503, "no_totals", True


@asynccontextmanager
async def counts_line(descriptor: int) -> AsyncIterator[CountsLine]:
    """The line to the supervisor; at the end it carries the counts for the last time."""
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor), limit=LINE_BYTES)
    line = CountsLine(reader, writer)
    listening = asyncio.create_task(line.listen(), name="counts")
    try:
        yield line
    finally:
        line.end()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


class CountsLine:
    """Made by :func:`counts_line`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._observer: Observer | None = None
        self._number = 0
        self._wanted: dict[int, asyncio.Future[list[Snapshot]]] = {}

    def connect(self, observer: Observer) -> None:
        """Lets ``observer`` show the counts of all processes, and all processes show its own."""
        self._observer = observer
        observer.gather = self.gather

    def end(self) -> None:
        """Says the last words."""
        if self._observer is not None:
            self._say(Told(LAST_WORDS, self._observer.counted()))

    async def listen(self) -> None:
        """Answers the supervisor until it is gone."""
        while raw := await self._reader.readline():
            message = msgspec.json.decode(raw, type=Tell | Everything)
            if isinstance(message, Tell):
                snapshot = [] if self._observer is None else await self._observer.snapshot()
                self._say(Told(message.number, snapshot))
            elif (wanted := self._wanted.get(message.number)) is not None and not wanted.done():
                wanted.set_result(message.snapshots)

    async def gather(self) -> list[Snapshot]:
        """The counts of all processes. Raises NoTotals when the supervisor does not answer."""
        self._number += 1
        number, wanted = self._number, asyncio.get_running_loop().create_future()
        self._wanted[number] = wanted
        self._say(Wanted(number))
        try:
            async with asyncio.timeout(EVERYTHING_S):
                found: list[Snapshot] = await wanted
                return found
        except TimeoutError:
            raise NoTotals("The supervisor did not bring the counts of the other processes; try again.") from None
        finally:
            del self._wanted[number]

    def _say(self, message: Wanted | Told) -> None:
        self._writer.write(msgspec.json.encode(message) + b"\n")
