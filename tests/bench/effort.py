"""How long and how large a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    rounds: int
    factor: float
    """Multiplies the seconds of each load."""
    open_streams: tuple[int, ...]
    """Up to the first number that does not keep pace."""
    waiting: tuple[int, ...]
    stored: tuple[int, ...]
    subscribers: tuple[int, ...]
    events: tuple[int, ...]


FULL = Effort(
    rounds=5,
    factor=1.0,
    open_streams=(1_000, 2_000, 4_000, 8_000, 10_000),
    waiting=(100, 1_000, 10_000, 100_000),
    stored=(1_000, 10_000, 100_000),
    subscribers=(1, 10, 100, 1_000, 5_000),
    events=(100, 1_000, 10_000, 100_000),
)
QUICK = Effort(
    rounds=1,
    factor=0.25,
    open_streams=(500,),
    waiting=(100, 1_000, 5_000),
    stored=(500, 2_000),
    subscribers=(1, 10, 200),
    events=(100, 1_000, 5_000),
)
