"""What one attempt generates, on its way into the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llmstream.errors import LLMStreamError
from llmstream.filters.answer import AnswerFilter
from llmstream.store.memory import AnyWriter
from llmstream.telemetry.observer import Attempt
from llmstream.types import Delta, Usage
from llmstream.vectors import EMBEDDING

EVENT_BYTES = 96
"""What an event weighs beside its text."""
GAP_EVERY = 8
"""One of so many gaps between tokens is measured."""

DUE = frozenset(".!?…\u3002\uff01\uff1f\n")
"""What a sentence may end with."""
DUE_CHARS = 200
"""So much text is looked at even without the end of a sentence."""

logger = logging.getLogger(__name__)


class Outlet(Protocol):
    """Where what was generated goes."""

    @property
    def lost(self) -> LLMStreamError | None: ...
    def extend(self, payloads: Sequence[Delta], size: int, /) -> bool: ...
    async def flush(self) -> None: ...


class FilteredWriter:
    """Stands before a writer: what is settled of an answer passes on, with its matches replaced."""

    def __init__(self, writer: AnyWriter, screen: AnswerFilter, broken: Callable[[LLMStreamError], None]) -> None:
        """``broken`` hears of a defect; from then on nothing comes through."""
        self._writer = writer
        self._screen = screen
        self._broken: Callable[[LLMStreamError], None] | None = broken
        self._waiting: list[Delta] = []
        """What a slow filter has not seen yet."""

    @property
    def lost(self) -> LLMStreamError | None:
        return self._writer.lost

    def extend(self, deltas: Sequence[Delta], size: int) -> bool:
        """See :meth:`Sink.put`."""
        if self._screen.slow:
            self._waiting += deltas
            return not self._due(deltas)
        return self._pass_on(self._look(deltas))

    async def flush(self) -> None:
        """Looks at what waits, and returns when what is settled is logged."""
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            self._pass_on(await asyncio.to_thread(self._look, waiting))
        await self._writer.flush()

    def _look(self, deltas: Sequence[Delta]) -> list[Delta] | None:
        """What is settled by now; None after a defect, when nothing may pass."""
        try:
            return self._screen.put(deltas)
        except Exception:
            logger.exception("a filter broke")
            return None

    def _pass_on(self, ready: list[Delta] | None) -> bool:
        if ready is None and self._broken is not None:
            self._broken(LLMStreamError("A filter broke, and what it did not see may not be shown."))
            self._broken = None
        if not ready or self._broken is None:
            return True
        return self._writer.extend(ready, EVENT_BYTES * len(ready) + sum(len(each.text) for each in ready))

    def _due(self, deltas: Sequence[Delta]) -> bool:
        """Whether a slow filter may find something to pass on."""
        ends = any(each.finish_reason is not None or not DUE.isdisjoint(each.text) for each in deltas)
        return ends or sum(len(each.text) for each in self._waiting) > DUE_CHARS


class Intake:
    """The sink of a provider; knows what came and since when nothing did."""

    def __init__(self, writer: Outlet, clock: Callable[[], float], seen: Attempt) -> None:
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
