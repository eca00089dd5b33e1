"""What one attempt generates, on its way into the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmstream.store.memory import AnyWriter
from llmstream.telemetry.observer import Attempt
from llmstream.types import Delta, Usage
from llmstream.vectors import EMBEDDING

EVENT_BYTES = 96
"""What an event weighs beside its text."""
GAP_EVERY = 8
"""One of so many gaps between tokens is measured."""


class Intake:
    """The sink of a provider; knows what came and since when nothing did."""

    def __init__(self, writer: AnyWriter, clock: Callable[[], float], seen: Attempt) -> None:
        self.reasons: dict[int, str] = {}
        """Finish reasons by choice."""
        self.usage: Usage | None = None
        self.text_only = True
        self.chunks = 0
        self.held_s = 0.0
        """How long the provider waited for the store."""
        self.first_at: float | None = None
        """When the first token came, in seconds of ``clock``."""
        self.silent_since: float | None = clock()
        """Since when the model owes a token, in seconds of ``clock``; None while it owes none."""
        self._writer = writer
        self._clock = clock
        self._seen = seen
        self._arrivals = 0

    @property
    def got_token(self) -> bool:
        return self.first_at is not None

    def expect(self) -> float:
        """A model is being asked: it owes a token from now on."""
        self.silent_since = now = self._clock()
        return now

    def put(self, deltas: Sequence[Delta]) -> bool:
        writer = self._writer
        if writer.lost is not None:  # the attempt is being stopped
            return True
        now, before, count = self._clock(), self.silent_since, len(deltas)
        self.silent_since = now
        self.chunks += count
        arrivals = self._arrivals = self._arrivals + 1
        if arrivals == 1:
            self.first_at = now
            self._seen.got_token()
        elif arrivals % GAP_EVERY == 2 and before is not None:
            self._seen.gap(now - before)
        size = EVENT_BYTES * count
        for delta in deltas:
            size += len(delta.text)
            if delta.usage is not None:
                self.usage = delta.usage
            if delta.fields:
                size += self._beside_text(delta.fields)
            if delta.finish_reason is not None:
                self.reasons[delta.index] = delta.finish_reason
        return writer.extend(deltas, size)

    def _beside_text(self, fields: dict[str, Any]) -> int:
        """Takes note of what is no text; gives its size where that is large."""
        vector = fields.get(EMBEDDING)
        if isinstance(vector, str):
            return len(vector)
        self.text_only = False
        return 0

    async def drained(self) -> None:
        """Waits for the store, which is no silence of the model."""
        self.silent_since, since = None, self._clock()
        try:
            await self._writer.flush()
        finally:
            self.silent_since = self._clock()
            self.held_s += self.silent_since - since
