"""Wakes the scheduled jobs of a pool at their time, at no cost while they sleep."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from llmstream.errors import StoreUnavailable
from llmstream.store.lanes import Lanes

LEAST_S = 0.001
"""Between two looks: clocks differ, and one look too early must not become a thousand."""
RETRY_S = 0.1

logger = logging.getLogger(__name__)


class Sleepers:
    """One alarm, set to the time of the job that may begin first. The store's clock decides when that is."""

    def __init__(self, lanes: Lanes, woke: Callable[[], None]) -> None:
        self._lanes = lanes
        self._woke = woke
        self._at: float | None = None
        """In the event loop's time."""
        self._news = asyncio.Event()

    def expect(self, seconds: float) -> None:
        """A job may begin in so many seconds."""
        at = asyncio.get_running_loop().time() + seconds
        if self._at is None or at < self._at - LEAST_S:
            self._at = at
            self._news.set()

    async def run(self) -> None:
        """Lets jobs wait in line as their times come, until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._at):
                    await self._news.wait()
            if self._news.is_set():
                self._news.clear()
                continue
            self._at = None
            try:
                now_ms, next_ms = await self._lanes.ripen()
            except StoreUnavailable as error:
                logger.debug("scheduled jobs have to wait for the store: %s", error.message)
                self.expect(RETRY_S)
            except Exception:  # the next heartbeat wakes them, and this has to go on
                logger.exception("scheduled jobs could not be woken")
                self.expect(RETRY_S)
            else:
                self._woke()
                if next_ms is not None:
                    self.expect(max(LEAST_S, (next_ms - now_ms) / 1000))
