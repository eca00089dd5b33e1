"""How fast an answer came, as its reader saw it."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_S = 0.01


class Timings:
    """Starts when it is made; :meth:`note` marks each piece of text."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens: int | None = None
        """Tokens of the whole answer, where the server tells."""
        self._clock = clock
        self._start = clock()
        self._first: float | None = None
        self._last = self._start

    def note(self) -> None:
        self._last = self._clock()
        if self._first is None:
            self._first = self._last

    def __str__(self) -> str:
        if self._first is None:
            return "No token came."
        said = f"First token after {self._first - self._start:.3f} s"
        seconds = self._last - self._first
        if not self.tokens:
            return f"{said}."
        # An answer that came in one piece says nothing about the pace.
        rate = f", {(self.tokens - 1) / seconds:.1f} tokens/s" if seconds > LEAST_S else ""
        return f"{said}; {self.tokens} tokens in {self._last - self._start:.3f} s{rate}."
