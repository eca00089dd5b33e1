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
from llmstream.replicas.wire import Ready, Report, Start, packed

logger = logging.getLogger(__name__)


class NotStarted(LLMStreamError):
    """A replica process ended before it was ready."""

    code, retryable = "replica_not_started", True


class ReplicaProcess:
    """Made by :meth:`start`; :meth:`wait` must be awaited to its end."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.report: Ready | None = None
        """Who it is, once it is ready."""

    @classmethod
    async def start(cls, settings: Settings, sockets: Sequence[socket.socket]) -> ReplicaProcess:
        """Starts a process that is to listen on bound sockets. Raises OSError."""
        descriptors = [own.fileno() for own in sockets]
        # A session of its own: Ctrl-C in our terminal is for us, who then end the replicas in order.
        process = await asyncio.create_subprocess_exec(
            *module_command("llmstream.replicas.child"),
            str(os.getpid()),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=descriptors,
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(packed(Start(settings, descriptors)))
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> Ready:
        """Waits until it listens. Raises ConfigError or NotStarted with the process's own words."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            status = await self.wait()
            raise NotStarted(f"Replica process {self.pid} {_how(status)} before it was ready.")
        report = msgspec.json.decode(line, type=Report)
        if not isinstance(report, Ready):
            raise ConfigError(report.message) if report.misconfigured else NotStarted(report.message)
        self.report = report
        return report

    async def wait(self) -> int:
        """Waits for its end; the exit status, negative for a signal."""
        return await self._process.wait()

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

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
