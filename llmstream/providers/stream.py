"""The answer of one local generation on its way from the engine to whoever asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from llmstream.errors import ProviderError
from llmstream.types import Delta


class Stream:
    """What one generation has produced and nobody has taken yet."""

    def __init__(self, id: int) -> None:  # noqa: A002 (the wire's name)
        self.id = id
        self.done = asyncio.Event()
        self._deltas: list[Delta] = []
        self._error: ProviderError | None = None
        self._changed = asyncio.Event()

    def add(self, deltas: list[Delta]) -> None:
        self._deltas += deltas
        self._changed.set()

    def end(self, error: ProviderError | None = None) -> None:
        if not self.done.is_set():
            self._error = error
            self.done.set()
            self._changed.set()

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Everything that waits, each time there is something, to the end. Raises what ended the generation."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._deltas:
                batch, self._deltas = self._deltas, []
                yield batch
            if self.done.is_set() and not self._deltas:
                if self._error:
                    raise self._error
                return
