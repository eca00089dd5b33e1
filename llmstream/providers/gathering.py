"""Deltas held back until all that belong together are there."""

from __future__ import annotations

from collections.abc import Sequence

from llmstream.types import Delta


class Gathered:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    def put(self, deltas: Sequence[Delta]) -> bool:
        self.deltas += deltas
        return True

    async def drained(self) -> None:
        """There is always room."""
