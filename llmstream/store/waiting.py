"""Those in this process who wait for the same thing, in order. Only the first of them asks for it. No I/O."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from types import TracebackType
from typing import Self


class WaitingLine:
    """Places by rank: the least goes first, of equals the one who came first."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def first(self) -> Place:
        return self._places[0]

    def join(self, urgency: float) -> Place:
        """A place to wait in, taken with ``with``."""
        return Place(self, (urgency, next(self._numbers)))

    def wake(self) -> None:
        """Says that asking makes sense."""
        if self._places:
            self.first.look()

    def enter(self, place: Place) -> None:
        heapq.heappush(self._places, place)

    def leave(self, place: Place) -> None:
        self._places.remove(place)
        heapq.heapify(self._places)
        self.wake()


class Place:
    """One who waits."""

    __slots__ = ("_line", "_news", "_not_before", "rank")

    def __init__(self, line: WaitingLine, rank: tuple[float, int]) -> None:
        self.rank = rank
        self._line = line
        self._news = asyncio.Event()
        self._not_before = 0.0

    def __lt__(self, other: Place) -> bool:
        return self.rank < other.rank

    def __enter__(self) -> Self:
        self._line.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.leave(self)

    def look(self) -> None:
        """Says that asking makes sense."""
        self._news.set()

    def rest(self, seconds: float) -> None:
        """Asking makes no sense for so long, unless there is news, also such as came since the last turn began."""
        self._not_before = asyncio.get_running_loop().time() + seconds

    async def turn(self) -> None:
        """Waits until this is the first in line and it is time to ask."""
        waited = False
        while not (waited and self._line.first is self):
            # Who is not the first needs no alarm: whoever leaves the line wakes the next.
            alarm = self._not_before if self._line.first is self else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(alarm):
                    await self._news.wait()
            self._news.clear()
            waited = True
