"""Deltas held back until all that belong together are there."""

from __future__ import annotations

from collections.abc import Sequence

from llmstream.types import Delta, Usage


class Gathered:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.usage: Usage | None = None

    def put(self, deltas: Sequence[Delta]) -> bool:
        for delta in deltas:
            if delta.fields is not None:
                self.deltas.append(delta)
            if delta.usage is not None:
                self.usage = delta.usage
        return True

    async def drained(self) -> None:
        """There is always room."""
