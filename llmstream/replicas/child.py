"""One replica as a process of its own. Started as ``python -m llmstream.replicas.child PARENT_PID``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import BinaryIO

import msgspec

from llmstream.errors import ConfigError, LLMStreamError
from llmstream.processes import collect_less, follow_parent, loop_factory
from llmstream.replicas.counts import counts_line
from llmstream.replicas.wire import Alive, Failed, Ready, Report, Start, read_start
from llmstream.server import Server
from llmstream.telemetry import setup_logging

BEATS = 8
"""Signs of life in the time after which their absence counts as a hang."""
MAX_BEAT_S = 1.0

logger = logging.getLogger(__name__)


def main() -> int:
    follow_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and hang-ups are for the supervisor
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    commands, reports = _take_pipes()
    try:
        start = read_start(commands)
    except EOFError:
        return 0
    threading.Thread(target=_end_with, args=(commands,), name="supervisor", daemon=True).start()
    setup_logging(start.settings.logging, pid=os.getpid())
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(start, reports))


async def _serve(start: Start, reports: int) -> int:
    task = asyncio.current_task()
    assert task is not None
    stopping = asyncio.Event()

    def stop() -> None:
        if not stopping.is_set():
            stopping.set()
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    sockets = [socket.socket(fileno=number) for number in start.descriptors]
    beat_s = min(start.settings.server.worker_timeout_s / BEATS, MAX_BEAT_S)
    beating = asyncio.create_task(_show_life(reports, beat_s), name="signs-of-life")
    try:
        async with counts_line(start.counts) as line, Server(start.settings, sockets=sockets) as server:
            gateway = server.gateway
            line.connect(gateway.observer)
            models = [model.name for model in gateway.models]
            _report(reports, Ready(gateway.replica, gateway.pools, models))
            collect_less()
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
    except Exception as error:
        known = isinstance(error, LLMStreamError)
        if not known:
            logger.exception("the replica failed")
        _report(reports, Failed(str(error) if known else repr(error), isinstance(error, ConfigError)))
        return 1
    finally:
        beating.cancel()
    return 0


async def _show_life(reports: int, every_s: float) -> None:
    while True:
        # A supervisor that is stopped reads nothing, which must not stop us.
        with suppress(BlockingIOError):
            _report(reports, Alive())
        await asyncio.sleep(every_s)


def _take_pipes() -> tuple[BinaryIO, int]:
    """Keeps the pipes to the supervisor for ourselves: what libraries print must not look like a report."""
    commands, reports = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    os.set_blocking(reports, False)
    return os.fdopen(commands, "rb"), reports


def _end_with(commands: BinaryIO) -> None:
    """Ends this process with the supervisor, however stuck the event loop is."""
    commands.read(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _report(pipe: int, report: Report) -> None:
    os.write(pipe, msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
