"""The terminal: the answer on standard output, everything else on standard error."""

from __future__ import annotations

import asyncio
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ATOMIC_BYTES = 512
"""A pipe that can be written takes at least so much without blocking (POSIX's least PIPE_BUF)."""
POLL_S = 0.02
UNBOUND_WIDTH = 200
"""Columns of a table that no terminal shows."""


def say(text: str) -> None:
    """Tells the user something beside the answer, unless the terminal is gone."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def forget_stdout() -> None:
    """Nobody reads our output any more; nor shall Python try to write what is left when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def has_terminal() -> bool:
    """Whether this process belongs to a terminal that has not been closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def stdout_console() -> Console:
    """For tables; wide enough to lose nothing where the output is piped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else UNBOUND_WIDTH, highlight=False)


def stderr_console() -> Console:
    """For bars."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class Output:
    """Standard output, written piece by piece without ever holding up the event loop.

    A pager that is full would otherwise stop the server inside this process too. Raises BrokenPipeError when nobody
    reads any more.
    """

    def __init__(self) -> None:
        self._fd = sys.stdout.fileno()
        self._encoding = sys.stdout.encoding or "utf-8"
        self._at_line_start = True
        self.terminal = sys.stdout.isatty()

    async def write(self, text: str) -> None:
        """Writes text; returns once the system has all of it."""
        data = memoryview(text.encode(self._encoding, "replace"))
        while data:
            # The loop cannot watch regular files, and watching would change the mode of a terminal others share.
            while not select.select([], [self._fd], [], 0)[1]:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
            data = data[os.write(self._fd, data[:ATOMIC_BYTES]) :]
        if text:
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """On a terminal, begins a new line unless one has begun; adds nothing to a pipe or file."""
        if self.terminal and not self._at_line_start:
            os.write(self._fd, b"\n")
            self._at_line_start = True
