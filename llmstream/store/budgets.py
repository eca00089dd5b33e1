"""Limits of a target, shared by all replicas: requests at once, requests and tokens a minute.

What a request may use at most is reserved before it is sent and settled when it is over. The counts are exact: no
window of 60 seconds, wherever it begins, holds more than the limit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from typing import Any, Literal, NamedTuple

from llmstream.errors import BadRequest, StoreUnavailable
from llmstream.store.budget_scripts import RECONCILE, RENEW, RESERVE, SETTLE, SPENT, STEP_BACK
from llmstream.store.connection import Arg
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender
from llmstream.store.presence import Presence
from llmstream.store.waiting import WaitingLine
from llmstream.types import Clock

WINDOW_S = 60.0
SLICES = 60
POLL_S = 1.0
"""So often the first in line asks again without being told to; who has not asked for three times as long has gone."""
RECONCILE_RENEWALS = 20
"""So often reservations are compared without a reason to doubt them: a command may arrive after it was given up."""
KEEP_S = 60.0
"""How long counts outlive the last moment they matter."""

logger = logging.getLogger(__name__)


class TooManyTokens(BadRequest):
    """A request that may use more tokens than its target ever allows in a window; waiting does not help."""

    code = "too_many_tokens"


class Limits(NamedTuple):
    """What a target takes, over all replicas; None: as much as comes."""

    slots: int | None = None
    """Requests at once."""
    requests: int | None = None
    """Requests a minute."""
    tokens: int | None = None
    """Tokens a minute."""


class Reservation(NamedTuple):
    """A slot, a request and tokens that nobody else can have until they are settled."""

    target: str
    name: str
    number: int
    """Greater than that of any earlier one of this replica."""
    tokens: int
    life: int
    """The store's life that has it."""


class Wait(NamedTuple):
    """There is no room at the moment."""

    after_s: float
    """Asking again makes sense after so many seconds; where nobody can know, a guess."""
    reason: Literal["slots", "requests", "tokens", "line"]
    """What is used up; ``line``: somebody else is first."""


class Spent(NamedTuple):
    """What a target has at the moment, from all replicas."""

    slots: int
    requests: int
    """In the last window."""
    tokens: int


class Budgets:
    """This replica's reservations. The one who reserves says how much a target takes; all replicas should agree."""

    def __init__(
        self,
        pipeline: Sender,
        keys: Keys,
        presence: Presence,
        replica: str,
        *,
        lease_s: float,
        window_s: float = WINDOW_S,
        clock: Clock = time.time,
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._presence = presence
        self._replica = replica.replace("|", "%7C")
        self._clock = clock
        window_ms = math.ceil(window_s * 1000)
        ttl_ms = 2 * window_ms + int((lease_s + KEEP_S) * 1000)
        self._settings = (int(lease_s * 1000), ttl_ms, window_ms, math.ceil(window_ms / SLICES), keys.room)
        self._numbers = itertools.count(1)
        self._held: dict[str, dict[int, Reservation]] = {}
        """By target and number."""
        self._moving: set[int] = set()
        """Numbers of those whose beginning or end is on its way."""
        self._ends: list[tuple[Reservation, int | None]] = []
        """What is over but could not be settled, and the tokens it used."""
        self._lines: dict[str, WaitingLine] = {}
        self._unsure: set[str] = set()
        """Targets for which the store may know other reservations than we do."""
        self._renewals = 0

    async def acquire(
        self, target: str, limits: Limits, tokens: int, name: str, urgency: float | None = None
    ) -> Reservation:
        """Reserves like :meth:`reserve`, and waits in line for as long as the caller does.

        Of all who wait on any replica the one with the least ``urgency`` goes first, by default the one who came first;
        one who wants much is not overtaken by those who want little.
        """
        urgency = self._clock() if urgency is None else urgency
        rest_s = 0.0
        if target not in self._lines:
            found = await self.reserve(target, limits, tokens, name, urgency)
            if isinstance(found, Reservation):
                return found
            rest_s = min(found.after_s, POLL_S)
        line = self._lines.setdefault(target, WaitingLine())
        with line.join(urgency) as place:
            place.rest(rest_s)
            try:
                while True:
                    await place.turn()
                    found = await self.reserve(target, limits, tokens, name, urgency)
                    if isinstance(found, Reservation):
                        return found
                    place.rest(min(found.after_s, POLL_S))
            except BaseException:
                if len(line) == 1:
                    self._step_back(target)
                raise
            finally:
                if len(line) == 1:
                    del self._lines[target]

    async def reserve(
        self, target: str, limits: Limits, tokens: int, name: str, urgency: float | None = None
    ) -> Reservation | Wait:
        """Takes a slot, a request and ``tokens``, all or nothing.

        ``name`` is unique to the try; used again after StoreUnavailable, it finds what a lost answer has taken.
        Whoever is told to wait has a place in line for three seconds. Raises TooManyTokens, StoreUnavailable.
        """
        if limits.tokens is not None and tokens > limits.tokens:
            raise TooManyTokens(
                f"The request may use {tokens} tokens (prompt and longest answer), but {target} takes no more than "
                f"{limits.tokens} a minute; send less or lower max_tokens.",
                param="max_tokens",
            )
        urgency_ms = int((self._clock() if urgency is None else urgency) * 1000)
        reservation = Reservation(target, name, next(self._numbers), tokens, self._presence.life)
        held = self._held.setdefault(target, {})
        held[reservation.number] = reservation
        self._moving.add(reservation.number)
        most = ("" if limit is None else limit for limit in limits)
        asked = (self._field(name), reservation.number, tokens, *most, urgency_ms, int(3000 * POLL_S))
        try:
            granted, after_ms, forgotten, *reason = await self._run(RESERVE, target, *asked)
        except asyncio.CancelledError:
            self._unsure.add(target)
            self._end(reservation, None)
            self._step_back(target)
            raise
        except StoreUnavailable:  # whether it happened shows when reservations are compared
            self._unsure.add(target)
            self._drop(reservation)
            raise
        if forgotten and len(held) > 1:
            self._unsure.add(target)
        if granted:
            self._moving.discard(reservation.number)
            return reservation
        self._drop(reservation)
        return Wait(after_ms / 1000 or POLL_S, reason[0].decode())

    def settle(self, reservation: Reservation, used_tokens: int) -> None:
        """Gives the slot back, and the tokens that were not used; what was used beyond is counted too.

        Repeating it changes nothing. While the store is away it is kept for :meth:`renew`.
        """
        self._end(reservation, used_tokens)

    def cancel(self, reservation: Reservation) -> None:
        """Gives everything back: nothing was sent to the target."""
        self._end(reservation, None)

    async def renew(self) -> None:
        """Keeps this replica's slots, which lapse without it, and settles what could not be. Part of each heartbeat;
        costs nothing while nothing is held. Raises StoreUnavailable."""
        ends, self._ends = self._ends, []
        for reservation, used in ends:
            self._end(reservation, used)
        self._renewals += 1
        if self._renewals % RECONCILE_RENEWALS == 0:
            self._unsure.update(self._held)
        targets = self._held.keys() | self._unsure
        outcomes = await asyncio.gather(*map(self._renew, targets), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def spent(self, target: str) -> Spent:
        """What is held and counted at the moment. Raises StoreUnavailable."""
        return Spent(*await self._run(SPENT, target))

    def wake(self, target: str) -> None:
        """Says that a target may have room."""
        if line := self._lines.get(target):
            line.wake()

    async def _renew(self, target: str) -> None:
        held = self._held.get(target, {})
        reborn = any(one.life != self._presence.life for one in held.values())
        if target not in self._unsure and not reborn and not await self._run(RENEW, target):
            return
        self._unsure.discard(target)
        try:
            await self._reconcile(target)
        except StoreUnavailable:
            self._unsure.add(target)
            raise

    async def _reconcile(self, target: str) -> None:
        held, life, known = self._held.get(target, {}), self._presence.life, list[Arg]()
        for number, one in held.items():
            tokens = "" if number in self._moving else one.tokens
            known += self._field(one.name), number, tokens, int(one.life != life)
        told = set(held)
        await self._run(RECONCILE, target, next(self._numbers), *known)
        for number in told & held.keys():
            held[number] = held[number]._replace(life=life)

    def _end(self, reservation: Reservation, used: int | None) -> None:
        target, number = reservation.target, reservation.number
        self._moving.add(number)

        def ended(_reply: Any, error: Exception | None) -> None:
            if error is None:
                self._drop(reservation)
            else:
                logger.warning("the end of a request will be told to the store once more: %s", error)
                self._ends.append((reservation, used))

        args = self._args(target, self._field(reservation.name), number, "" if used is None else used)
        self._pipeline.defer_script(SETTLE, self._keys.budget(target), args, ended)

    def _step_back(self, target: str) -> None:
        def told(_reply: Any, error: Exception | None) -> None:
            if error is not None:
                logger.debug("a place in line lapses by itself: %s", error)

        self._pipeline.defer_script(STEP_BACK, self._keys.budget(target), self._args(target), told)

    def _drop(self, reservation: Reservation) -> None:
        self._moving.discard(reservation.number)
        held = self._held.get(reservation.target, {})
        held.pop(reservation.number, None)
        if not held:
            self._held.pop(reservation.target, None)

    def _run(self, script: Script, target: str, *args: Arg) -> asyncio.Future[Any]:
        return self._pipeline.run(script, self._keys.budget(target), *self._args(target, *args))

    def _args(self, target: str, *args: Arg) -> tuple[Arg, ...]:
        return (self._replica, *self._settings, target, *args)

    def _field(self, name: str) -> str:
        return f"{self._replica}|{name}"
