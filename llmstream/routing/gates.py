"""What stands between a job and a remote target: its breaker and its limits, both shared by all replicas.

A target without limits and with a closed breaker is passed at once: no round trip to the store, no task.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aiolimiter import AsyncLimiter

from llmstream.errors import (
    UpstreamBroken,
    UpstreamDenied,
    UpstreamLimited,
    UpstreamRejected,
    UpstreamUnreachable,
)
from llmstream.providers.base import CannotContinue
from llmstream.routing.targets import REMOTE, Target
from llmstream.store.breakers import Breakers, Pass
from llmstream.store.budgets import Budgets, Reservation, Wait

SMOOTH_S = 10.0
"""Of what a target takes in a minute, no replica sends more than the part of so many seconds in a burst."""


class Resting(UpstreamBroken):
    """The breaker is open: the target failed too often lately."""

    status, type, code = 503, "service_unavailable", "target_resting"


class NobodyLeft(Resting):
    """All targets are resting, for longer than somebody waits."""

    retryable, elsewhere = False, False

    @classmethod
    def for_s(cls, seconds: float) -> NobodyLeft:
        """So long nobody may be asked."""
        again_s = max(seconds, 1.0)
        return cls(
            f"The model's provider failed too often lately and is left alone; try again in {again_s:.0f} s.",
            retry_after=again_s,
        )


class NoRoom(UpstreamLimited):
    """The target's limits are used up at the moment."""

    code = "target_limits"


class Ask(NamedTuple):
    """What a job wants of a target."""

    job_id: str
    tokens: int
    urgency: float
    """Who goes first where several wait: the least, in seconds since the epoch."""


@dataclass
class Crossing:
    """Leave to ask a target once; whoever has it says how that went."""

    target: Target
    passed: Pass | None = None
    reservation: Reservation | None = None


@dataclass
class Gates:
    """All targets, as this replica may ask them."""

    budgets: Budgets
    breakers: Breakers
    _limiters: dict[str, AsyncLimiter] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def admits(self, target: Target) -> bool:
        """Whether the breaker lets anybody pass at the moment."""
        return self.breakers.admits(target.name)

    def rest_s(self, targets: Sequence[Target]) -> float:
        """Seconds until the first of them may be asked."""
        if not self.breakers.any_shut:
            return 0.0
        return min(self.breakers.admits_in(target.name) for target in targets)

    async def reserve(self, target: Target, ask: Ask) -> Crossing | Wait:
        """Takes what the request may use of the target's limits, or says when to ask again; never waits.

        Raises StoreUnavailable, TooManyTokens.
        """
        if (wait := self._smooth(target)) is not None:
            return wait
        found = await self.budgets.reserve(target.name, target.limits, ask.tokens, self._name(ask), ask.urgency)
        if isinstance(found, Wait):
            return found
        await self._count(target)
        return Crossing(target, reservation=found)

    async def wait(self, target: Target, ask: Ask) -> Crossing:
        """Like :meth:`enter`, for a job that has begun: waits for its turn."""
        found = await self.budgets.acquire(target.name, target.limits, ask.tokens, self._name(ask), ask.urgency)
        granted = Crossing(target, reservation=found)
        try:
            await self._count(target)
        except BaseException:
            self.give_back(granted)
            raise
        return await self.enter(target, ask, granted)

    async def enter(self, target: Target, ask: Ask | None, granted: Crossing | None) -> Crossing:
        """Passes breaker and limits, or raises Resting or NoRoom with the time to wait."""
        crossing = granted or Crossing(target)
        if target.provider.pool != REMOTE:
            return crossing
        try:
            crossing.passed = await self.breakers.enter(target.name)
            if crossing.passed is None:
                after_s = self.breakers.admits_in(target.name)
                raise Resting(f"{target.name} failed too often lately and is left alone.", retry_after=after_s)
            if ask is not None and target.limited and crossing.reservation is None:
                found = await self.reserve(target, ask)
                if isinstance(found, Wait):
                    raise NoRoom(
                        f"The limits of {target.name} are used up ({found.reason}).", retry_after=found.after_s
                    )
                crossing.reservation = found.reservation
        except BaseException:
            self.give_back(crossing)
            raise
        return crossing

    def leave(self, crossing: Crossing, error: BaseException | None, used_tokens: int | None) -> None:
        """Says how it went. ``used_tokens`` is what the target counted; None: it did not say."""
        if crossing.passed is not None:
            if error is None:
                self.breakers.succeeded(crossing.passed)
            elif isinstance(error, UpstreamBroken) and not isinstance(error, CannotContinue):
                self.breakers.failed(crossing.passed)
            else:
                self.breakers.abandoned(crossing.passed)
        if crossing.reservation is None:
            return
        if used_tokens is not None:
            self.budgets.settle(crossing.reservation, used_tokens)
        elif isinstance(error, UpstreamUnreachable):
            self.budgets.cancel(crossing.reservation)
        elif isinstance(error, UpstreamLimited | UpstreamDenied | UpstreamRejected):
            self.budgets.settle(crossing.reservation, 0)
        else:  # nobody knows how far it came
            self.budgets.settle(crossing.reservation, crossing.reservation.tokens)

    def give_back(self, crossing: Crossing) -> None:
        """The target was not asked after all."""
        if crossing.passed is not None:
            self.breakers.abandoned(crossing.passed)
        if crossing.reservation is not None:
            self.budgets.cancel(crossing.reservation)

    async def refresh(self) -> None:
        """Part of each heartbeat. Raises StoreUnavailable."""
        await self.budgets.renew()
        await self.breakers.refresh()

    def _name(self, ask: Ask) -> str:
        return f"{ask.job_id}/{next(self._numbers)}"

    def _smooth(self, target: Target) -> Wait | None:
        limiter = self._limiter(target)
        if limiter is None or limiter.has_capacity():
            return None
        return Wait(SMOOTH_S / limiter.max_rate, "requests")

    async def _count(self, target: Target) -> None:
        if (limiter := self._limiter(target)) is not None:
            await limiter.acquire()

    def _limiter(self, target: Target) -> AsyncLimiter | None:
        if target.limits.requests is None:
            return None
        if target.name not in self._limiters:
            self._limiters[target.name] = AsyncLimiter(max(1.0, target.limits.requests * SMOOTH_S / 60), SMOOTH_S)
        return self._limiters[target.name]
