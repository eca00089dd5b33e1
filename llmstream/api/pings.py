"""Signs of life on silent streams: one timer for all of them."""

from __future__ import annotations

import asyncio
from typing import Protocol

STALL_S = 120.0
"""A client that takes nothing of what waits for it is given up after so long."""
_LOOKS = 4
"""Looks in one interval: a comment comes at most a quarter of it late."""


class Silent(Protocol):
    def look(self, now: float) -> None:
        """Sends a comment if nothing was sent for long; gives up a client that takes nothing. Must not raise."""


class Pings:
    """Looks at every open stream now and then."""

    def __init__(self, ping_s: float) -> None:
        self.ping_s = ping_s
        self._streams: set[Silent] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stream: Silent) -> None:
        self._streams.add(stream)
        if self._timer is None:
            self._later()

    def discard(self, stream: Silent) -> None:
        self._streams.discard(stream)

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.ping_s / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for stream in self._streams:
            stream.look(now)
        if self._streams:
            self._later()
