"""One generation inside llama.cpp: its choices and their common end."""

from __future__ import annotations

import threading

from llmstream.providers.engines.base import Emit, Generation
from llmstream.providers.engines.gate import Ticket
from llmstream.types import Delta, Failure, Usage


class Run:
    """One generation on its way, in one or more choices."""

    def __init__(self, generation: Generation, emit: Emit) -> None:
        self.generation, self._emit = generation, emit
        self.prompt_tokens = 0
        self.tickets = [Ticket() for _ in range(generation.request.choices)]
        self._open = len(self.tickets)
        self._completion_tokens = self._cached_tokens = 0
        self.failure: Failure | None = None
        self._lock = threading.Lock()

    def emit(self, delta: Delta) -> None:
        self._emit(self.generation.id, [delta], None, False)

    def finish(self, index: int, reason: str | None, tokens: int, cached: int = 0) -> bool:
        """Ends one choice, with no ``reason`` when it was cut; True when it was the last."""
        with self._lock:
            self._open -= 1
            self._completion_tokens += tokens
            self._cached_tokens += cached
            last = not self._open
            usage = Usage(
                prompt_tokens=self.prompt_tokens,
                completion_tokens=self._completion_tokens,
                details={"prompt_tokens_details": {"cached_tokens": self._cached_tokens}},
            )
            whole = reason is not None and self.failure is None
            deltas = [Delta(index=index, finish_reason=reason, usage=usage if last else None)] if whole else []
            self._emit(self.generation.id, deltas, self.failure if last else None, last)
        return last
