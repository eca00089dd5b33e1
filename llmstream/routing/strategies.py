"""In which order the targets of a route are asked. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from llmstream.config import Strategy
from llmstream.routing.load import Load
from llmstream.routing.targets import Target

Random = Callable[[], float]
"""A number from 0 up to 1; injected so that tests own the chance."""


def arrange(
    targets: Sequence[Target], strategy: Strategy, load: Load, chance: Random = random.random
) -> Sequence[Target]:
    """The targets, the first to ask first; where a strategy sees no difference, as they are configured."""
    if len(targets) == 1 or strategy == "ordered":
        return targets
    if strategy == "weighted":
        # Sorted by u^(1/w), each place falls to a target with the chance of its weight among those left.
        return sorted(targets, key=lambda target: chance() ** (1 / target.weight), reverse=True)
    if strategy == "least_busy":
        return sorted(targets, key=lambda target: load.running(target.name) / target.weight)
    if strategy == "fastest":
        return sorted(targets, key=lambda target: load.first_token_s(target.name) or 0.0)
    return sorted(targets, key=lambda target: math.inf if target.price is None else target.price)
