"""Writes that count once they are on the server's disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from llmstream.errors import StoreUnavailable
from llmstream.store.pipeline import Command, Lazy, Pipeline, Sender, Settle, tell

_Outcome = tuple[Settle, Any, Exception | None]


class Synced(Sender):
    """Sends what has gathered, then waits for the disk once for all of it; meanwhile the next gathers.

    Has a pipeline of its own: while the server waits for its disk it answers nothing else on that connection.
    """

    def __init__(self, pipeline: Pipeline, timeout_s: float, touch: Callable[[], Command]) -> None:
        self._pipeline = pipeline
        self._wait: Command = ("WAITAOF", 1, 0, int(timeout_s * 800))
        # The server waits for the last write of the connection. Without one on it, as when an append that is already
        # there was only read back, it would wait for nothing.
        self._touch = touch
        self.waits = True
        """False where the server answers a write only after its disk has it."""
        self._gathered: list[tuple[Command | Lazy, Settle]] = []
        self._flying = False

    def defer(self, command: Command | Lazy, settle: Settle) -> None:
        if not self.waits:
            self._pipeline.defer(command, settle)
            return
        self._gathered.append((command, settle))
        if not self._flying:
            self._flying = True
            asyncio.get_running_loop().call_soon(self._fly)

    def _fly(self) -> None:
        batch, self._gathered = self._gathered, []
        outcomes: list[_Outcome] = []
        for command, settle in batch:
            self._pipeline.defer(command, _collector(outcomes, settle))
        touched: list[int] = []

        def touch(reply: Any, error: Exception | None) -> None:
            if error is None:
                touched.append(self._pipeline.connections)

        self._pipeline.defer(self._touch(), touch)

        def landed(reply: Any, error: Exception | None) -> None:
            if error is None and (reply[0] < 1 or touched != [self._pipeline.connections]):
                error = StoreUnavailable("The store has not confirmed that it is on its disk.", retry_after=1)
            self._landed(outcomes, error)

        self._pipeline.defer(self._wait, landed)

    def _landed(self, outcomes: list[_Outcome], failure: Exception | None) -> None:
        self._flying = bool(self._gathered)
        if self._flying:
            self._fly()
        for settle, reply, error in outcomes:
            tell(settle, reply, error or failure)


def _collector(outcomes: list[_Outcome], settle: Settle) -> Settle:
    return lambda reply, error: outcomes.append((settle, reply, error))
