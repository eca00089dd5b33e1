"""How long a job waits between two attempts. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable

from llmstream.config import RetrySettings


class Backoff:
    """Waits that grow, and differ, so that jobs which failed together do not come back together."""

    def __init__(self, settings: RetrySettings, chance: Callable[[], float] = random.random) -> None:
        self._settings = settings
        self._chance = chance

    def delay(self, tries: int, retry_after: float | None) -> float:
        """Seconds to wait after ``tries`` attempts: what the upstream asked for, or a random part of a time that
        doubles."""
        longest = min(self._settings.base_s * 2.0 ** (tries - 1), self._settings.cap_s)
        wait = self._chance() * longest
        return wait if retry_after is None else retry_after + wait
