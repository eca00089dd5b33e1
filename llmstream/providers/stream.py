"""The answer of one local generation on its way from the engine to whoever asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llmstream.errors import ProviderError
from llmstream.providers.base import Sink
from llmstream.types import Delta


class Stream:
    """One generation: where its deltas go, and how it ends."""

    def __init__(self, id: int, sink: Sink) -> None:  # noqa: A002 (the wire's name)
        self.id = id
        self.done = asyncio.Event()
        self.finished: set[int] = set()
        """Choices that came to their end."""
        self._sink: Sink | None = sink
        self._error: ProviderError | None = None

    def add(self, deltas: Sequence[Delta]) -> None:
        if self._sink is not None and deltas:
            self._sink.put(deltas)
            self.finished.update(delta.index for delta in deltas if delta.finish_reason)

    def mute(self) -> None:
        """Nobody wants more; the generation goes on until it is stopped."""
        self._sink = None

    def end(self, error: ProviderError | None = None) -> None:
        if not self.done.is_set():
            self._error = error
            self.done.set()

    async def ended(self) -> None:
        """Returns at the end of the answer. Raises what broke it."""
        await self.done.wait()
        if self._error is not None:
            raise self._error
