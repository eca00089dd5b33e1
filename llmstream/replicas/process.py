"""One replica process, seen from its supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from llmstream.config import Settings
from llmstream.errors import ConfigError, LLMStreamError
from llmstream.processes import module_command
from llmstream.replicas.wire import Failed, Ready, Report, Start, packed

START_SILENCE_S = 60.0
"""Without a sign of life while it starts: what it imports may come from a slow disk."""

logger = logging.getLogger(__name__)


class NotStarted(LLMStreamError):
    """A replica process ended before it was ready."""

    code, retryable = "replica_not_started", True


class Silent(NotStarted):
    """A replica process hangs."""


class ReplicaProcess:
    """Made by :meth:`start`; :meth:`wait` must be awaited to its end."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.report: Ready | None = None
        """Who it is, once it is ready."""

    @classmethod
    async def start(cls, settings: Settings, sockets: Sequence[socket.socket], counts: socket.socket) -> ReplicaProcess:
        """Starts a process that is to listen on bound sockets and tell its counts. Raises OSError."""
        descriptors = [own.fileno() for own in sockets]
        # A session of its own: Ctrl-C in our terminal is for us, who then end the replicas in order.
        process = await asyncio.create_subprocess_exec(
            *module_command("llmstream.replicas.child"),
            str(os.getpid()),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=[*descriptors, counts.fileno()],
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(packed(Start(settings, descriptors, counts.fileno())))
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> Ready:
        """Waits until it listens. Raises ConfigError or NotStarted with the process's own words."""
        while (report := await self._next_report(START_SILENCE_S)) is not None:
            if isinstance(report, Failed):
                raise ConfigError(report.message) if report.misconfigured else NotStarted(report.message)
            if isinstance(report, Ready):
                self.report = report
                return report
        status = await self.wait()
        raise NotStarted(f"Replica process {self.pid} {_how(status)} before it was ready.")

    async def wait(self) -> int:
        """Waits for its end; the exit status, negative for a signal."""
        return await self._process.wait()

    async def watch(self, silence_s: float) -> None:
        """Waits for its end; kills it when it shows no life for so long."""
        try:
            while await self._next_report(silence_s) is not None:
                pass
        except Silent as silent:
            logger.error("%s It is killed.", silent.message)
            self._signal(signal.SIGKILL)
        await self.wait()

    async def stop(self, deadline_s: float) -> None:
        """Asks it to hand over and end; kills it after the deadline."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(deadline_s):
                await self.wait()
        except TimeoutError:
            logger.error("replica process %d did not end within %g s and is killed", self.pid, deadline_s)
            await self.kill()

    async def kill(self) -> None:
        """Ends it now."""
        self._signal(signal.SIGKILL)
        await self.wait()

    def ended(self) -> str:
        """How it ended, for people."""
        return _how(self._process.returncode)

    async def _next_report(self, silence_s: float) -> Report | None:
        """Waits for the next report; None when there are no more. Raises Silent."""
        assert self._process.stdout is not None
        # In two halves: when it was this process that slept, the first one ends before what came meanwhile is read.
        for _ in range(2):
            with suppress(TimeoutError):
                async with asyncio.timeout(silence_s / 2):
                    line = await self._process.stdout.readline()
                    return msgspec.json.decode(line, type=Report) if line else None
        raise Silent(f"Replica process {self.pid} showed no life for {silence_s:g} s.")

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
