"""What this replica sees of its targets: how many answers each one gives now, and how fast they begin. Pure.

Each replica measures for itself. What others run at the same time shows in the latencies, and a count that is exact
over all replicas is what a limit on ``concurrency`` keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

STALE_S = 60.0
"""An older latency is forgotten, so that a target that was slow once is tried again."""
_SHARE = 0.3
"""How much the latest latency counts."""


class _Measured(NamedTuple):
    seconds: float
    at: float


class Load:
    """Counts and latencies by target."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._running: dict[str, int] = {}
        self._measured: dict[str, _Measured] = {}

    def began(self, name: str) -> None:
        """A target is being asked, until :meth:`ended`."""
        self._running[name] = self._running.get(name, 0) + 1

    def ended(self, name: str) -> None:
        self._running[name] -= 1

    def measured(self, name: str, seconds: float) -> None:
        """Takes note of the time that a target took to its first token."""
        known = self.first_token_s(name)
        mean = seconds if known is None else known + (seconds - known) * _SHARE
        self._measured[name] = _Measured(mean, self._clock())

    def running(self, name: str) -> int:
        return self._running.get(name, 0)

    def first_token_s(self, name: str) -> float | None:
        """Seconds to the first token, lately; None while nothing is known."""
        found = self._measured.get(name)
        return found.seconds if found is not None and self._clock() - found.at < STALE_S else None
