"""The place of one replica: there is always a process in it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from llmstream.errors import LLMStreamError
from llmstream.replicas.process import ReplicaProcess
from llmstream.replicas.sockets import close_all

STABLE_S = 10.0
"""A process that lived for so long did not die of its start."""
BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0

logger = logging.getLogger(__name__)

Bind = Callable[[], list[socket.socket]]


class Crew(Protocol):
    """What a slot needs of the supervisor."""

    async def launch(self, sockets: list[socket.socket]) -> ReplicaProcess:
        """Starts a process and waits until it is ready. Raises LLMStreamError or OSError."""

    async def retire(self, process: ReplicaProcess) -> None:
        """Asks a process to hand over and end, and gives the jobs it leaves to others."""

    async def bury(self, process: ReplicaProcess) -> None:
        """Gives the jobs of a dead process to others."""


class Slot:
    """Replaces its process when it dies or hangs, and on request without a moment between the old one and the new.

    The listening socket belongs to the slot: a successor takes it over together with the connections that wait in it.
    """

    def __init__(self, crew: Crew, bind: Bind, silence_s: float) -> None:
        self._crew = crew
        self._bind = bind
        self._silence_s = silence_s
        self._sockets: list[socket.socket] = []
        self._process: ReplicaProcess | None = None
        self._lock = asyncio.Lock()
        self._started_at = 0.0
        self._failures = 0

    async def fill(self) -> ReplicaProcess:
        """Puts the first process, or one for a dead one, in place. Raises LLMStreamError or OSError."""
        self._started_at = asyncio.get_running_loop().time()
        self._sockets = self._bind()
        try:
            self._process = await self._crew.launch(self._sockets)
        except BaseException:
            self.close()
            raise
        return self._process

    async def keep(self) -> None:
        """Replaces every process that dies or shows no life; runs until it is cancelled."""
        while True:
            process = self._process
            assert process is not None
            await process.watch(self._silence_s)
            if process is self._process:
                if not self._lock.locked():
                    # Nobody would accept what the kernel still put into this socket's queue.
                    self.close()
                logger.error("replica process %d %s and is replaced", process.pid, process.ended())
                await self._crew.bury(process)
            async with self._lock:
                if process is self._process:
                    self.close()
                    await self._fill_again()

    async def renew(self) -> None:
        """Puts a new process in place and then retires the old one.

        Raises LLMStreamError or OSError, with the old one still in place, when the new one does not start.
        """
        async with self._lock:
            old = self._process
            assert old is not None
            self._process = await self._crew.launch(self._sockets)
            self._started_at = asyncio.get_running_loop().time()
        await self._crew.retire(old)

    def close(self) -> None:
        """Lets go of the port."""
        close_all(self._sockets)
        self._sockets = []

    async def _fill_again(self) -> None:
        lived = asyncio.get_running_loop().time() - self._started_at
        self._failures = 0 if lived > STABLE_S else self._failures + 1
        while True:
            # The first death costs no time: it is rarely the replica's own fault.
            if self._failures > 1:
                await asyncio.sleep(min(BACKOFF_S * 2 ** (self._failures - 2), MAX_BACKOFF_S))
            try:
                await self.fill()
                return
            except (LLMStreamError, OSError) as error:
                self._failures += 1
                logger.error("a replica process could not be started: %s", error)
