"""The counts of all replica processes, kept by the supervisor.

Whichever of them is scraped answers for all. What a process counted stays counted after its end: a total that shrinks
would look like a restart, and whoever computes rates would count all of it again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from llmstream.replicas.wire import LAST_WORDS, LINE_BYTES, Everything, Tell, Told, Wanted
from llmstream.telemetry.metrics import Metrics
from llmstream.telemetry.snapshot import Snapshot, lasting, merged

TELL_S = 3.0
"""What a process gets to tell its counts; of one that hangs the last ones are taken."""

logger = logging.getLogger(__name__)


class Tally:
    """Made once for a supervisor; close it when all processes have ended."""

    def __init__(self) -> None:
        self._metrics = {metric.name: metric for metric in Metrics()}
        self._gone: Snapshot = []
        """What the processes counted that have ended."""
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def connect(self) -> socket.socket:
        """The end of a new line that a process gets. It is the caller's to close."""
        ours, theirs = socket.socketpair()
        self._run(self._listen(ours), "counts")
        return theirs

    async def close(self) -> None:
        """Hears what was still said, and ends."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=TELL_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def gather(self) -> list[Snapshot]:
        """The counts of all processes, those included that have ended."""
        await asyncio.gather(*(line.ask() for line in self._lines))
        return [self._gone, *(line.last for line in self._lines)]

    async def _listen(self, ours: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=LINE_BYTES)
        line = _Line(writer)
        self._lines.add(line)
        try:
            while raw := await reader.readline():
                message = msgspec.json.decode(raw, type=Told | Wanted)
                if isinstance(message, Told):
                    line.told(message)
                else:
                    self._run(self._answer(line, message.number), "scrape")
        except (OSError, ValueError) as error:
            logger.error("a replica process's counts are lost: %s", error)
        finally:
            self._lines.discard(line)
            self._gone = merged([self._gone, lasting(line.last, self._metrics)], self._metrics)
            line.close()

    async def _answer(self, line: _Line, number: int) -> None:
        line.say(Everything(number, await self.gather()))

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Line:
    """The line to one process."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.last: Snapshot = []
        """What it told last."""
        self._writer = writer
        self._number = LAST_WORDS
        self._asked: dict[int, asyncio.Future[None]] = {}

    async def ask(self) -> None:
        """Waits until :attr:`last` is what the process has counted by now, or it has not answered for too long."""
        self._number += 1
        number, told = self._number, asyncio.get_running_loop().create_future()
        self._asked[number] = told
        self.say(Tell(number))
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await told
        finally:
            self._asked.pop(number, None)

    def told(self, message: Told) -> None:
        """Takes an answer in."""
        self.last = message.snapshot
        asked = self._asked.get(message.number)
        if asked is not None and not asked.done():
            asked.set_result(None)

    def say(self, message: Tell | Everything) -> None:
        self._writer.write(msgspec.json.encode(message) + b"\n")

    def close(self) -> None:
        """Nobody answers any more."""
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(None)
        self._writer.close()
