"""Runs a command's coroutine: on uvloop where there is one, until it ends or a signal asks it to."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from llmstream.processes import loop_factory

DOUBLED_S = 0.3
"""A terminal's Ctrl-C may come twice: from the terminal and from a program between it and us."""

Main = Callable[[], Coroutine[Any, Any, int]]


def run(main: Main, *, on_stop: Callable[[], None] = lambda: None) -> int:
    """Returns the exit status of ``main``.

    The first SIGINT, SIGTERM or SIGHUP calls ``on_stop`` and cancels ``main``, which ends in order; when it passes
    the cancellation on, the status is 130, 143 or 129. From then on a SIGINT ends the process at once. Under nohup
    a SIGHUP is nothing.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        stop = _Stop(on_stop)
        try:
            return runner.run(stop.guard(main))
        except asyncio.CancelledError:
            if stop.signal is None:
                raise
            return 128 + stop.signal


class _Stop:
    def __init__(self, on_stop: Callable[[], None]) -> None:
        self.signal: int | None = None
        self._on_stop = on_stop

    async def guard(self, main: Main) -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            if self.signal is not None:
                return
            self.signal = number
            loop.call_later(DOUBLED_S, _end_at_once_on_sigint, loop)
            self._on_stop()
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, stop, number)
        return await main()


def _end_at_once_on_sigint(loop: asyncio.AbstractEventLoop) -> None:
    # The system's own reaction works even when this program is stuck.
    loop.remove_signal_handler(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
