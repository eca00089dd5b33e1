"""Memory jobs that wait for a slot of this replica, in the order of service that :mod:`llmstream.store.lanes` keeps."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

from llmstream.types import MAX_PRIORITY, MIN_PRIORITY, Job


class _Place(NamedTuple):
    job: Job
    level: int
    turn: int
    at_ms: float


class _Level:
    """The jobs of one priority: by turn, and by the time they came."""

    def __init__(self) -> None:
        self.order: list[tuple[int, str]] = []
        self.ages: list[tuple[float, str]] = []
        self.turns: dict[str, int] = {}
        """The last turn of each principal."""
        self.served = 0


class Line:
    """The line of one pool."""

    def __init__(self, ageing_s: float) -> None:
        self._ageing_ms = ageing_s * 1000
        self._places: dict[str, _Place] = {}
        self.aside: set[str] = set()
        """Those that are paused: they keep their places, and are not served."""
        self._paused: Callable[[Job], bool] = lambda job: False
        self._levels = [_Level() for _ in range(MIN_PRIORITY, MAX_PRIORITY + 1)]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> list[str]:
        return list(self._places)

    @property
    def urgency(self) -> float:
        """That of the job whose turn is next: the smaller, the sooner; infinite when nobody waits. It can be compared
        with those in the store."""
        return min(
            (level.ages[0][0] + number * self._ageing_ms for number, level in enumerate(self._levels) if level.ages),
            default=math.inf,
        )

    def push(self, job: Job, at_ms: float) -> None:
        """Lets a job wait that came at ``at_ms``, milliseconds since the epoch by the store's clock."""
        number = MAX_PRIORITY - job.priority
        level = self._levels[number]
        turn = max(level.served, level.turns.get(job.principal, 0)) + 1
        level.turns[job.principal] = turn
        place = self._places[job.id] = _Place(job, number, turn, at_ms)
        if self._paused(job):
            self.aside.add(job.id)
        else:
            self._enlist(place)

    def hold(self, paused: Callable[[Job], bool]) -> None:
        """From here on those jobs are not served that are ``paused``."""
        self._paused = paused
        for place in self._places.values():
            held = paused(place.job)
            if held and place.job.id not in self.aside:
                self._delist(place)
                self.aside.add(place.job.id)
            elif not held and place.job.id in self.aside:
                self.aside.discard(place.job.id)
                self._enlist(place)

    def _enlist(self, place: _Place) -> None:
        level = self._levels[place.level]
        insort(level.order, (place.turn, place.job.id))
        insort(level.ages, (place.at_ms, place.job.id))

    def _delist(self, place: _Place) -> None:
        level = self._levels[place.level]
        del level.order[bisect_left(level.order, (place.turn, place.job.id))]
        del level.ages[bisect_left(level.ages, (place.at_ms, place.job.id))]

    @property
    def first(self) -> str:
        """The job whose turn is next. Raises IndexError when nobody waits."""
        return self._next().order[0][1]

    def pop(self) -> str:
        """Takes out the job whose turn is next."""
        job_id = self.first
        self.take(job_id)
        return job_id

    def take(self, job_id: str) -> None:
        """Takes a job out because it is served; one that does not wait any more is none."""
        if (place := self._places.get(job_id)) is not None:
            self._levels[place.level].served = place.turn
            self.remove(job_id)
            if not self._places:
                for level in self._levels:
                    level.turns, level.served = {}, 0

    def _next(self) -> _Level:
        urgency = self.urgency
        for number, level in enumerate(self._levels):
            if level.ages and level.ages[0][0] + number * self._ageing_ms == urgency:
                return level
        raise IndexError("nobody waits")

    def remove(self, job_id: str) -> None:
        """Takes a job out; one that does not wait is none."""
        place = self._places.pop(job_id, None)
        if place is None:
            return
        if job_id in self.aside:
            self.aside.discard(job_id)
        else:
            self._delist(place)

    def standing(self, job_id: str) -> tuple[int, float] | None:
        """How many wait here in front of a job, and how urgent it is; None when it does not wait in line."""
        place = self._places.get(job_id)
        if place is None or job_id in self.aside:
            return None
        urgency = place.at_ms + place.level * self._ageing_ms
        ahead = bisect_left(self._levels[place.level].order, (place.turn, ""))
        for number, level in enumerate(self._levels):
            if number != place.level:
                ahead += bisect_left(level.ages, (urgency - number * self._ageing_ms, ""))
        return ahead, urgency

    def overdue(self, now: float) -> list[str]:
        """The jobs whose own deadline has passed."""
        places = self._places.values()
        return [each.job.id for each in places if each.job.expires_at is not None and each.job.expires_at < now]
