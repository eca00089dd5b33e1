"""How long a job waits between two attempts."""

from __future__ import annotations

import pytest

from llmstream.config import RetrySettings
from llmstream.routing.retry import Backoff


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_waits_double_up_to_the_cap(chance: float) -> None:
    """A wait is a random part of 1, 2, 4 and then 8 seconds."""
    backoff = Backoff(RetrySettings(), lambda: chance)
    assert [backoff.delay(tries, None) for tries in range(1, 6)] == [chance * longest for longest in (1, 2, 4, 8, 8)]


def test_what_the_upstream_asks_for_is_kept() -> None:
    """Nobody comes back before ``Retry-After``, and not all at once behind it."""
    backoff = Backoff(RetrySettings(), lambda: 0.25)
    assert backoff.delay(2, 30.0) == 30.5
    assert backoff.delay(100, None) == 2.0
