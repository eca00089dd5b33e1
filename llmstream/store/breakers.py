"""Breakers of targets, shared by all replicas: who fails too often is left alone for a while, then tried once.

    closed ── too many failures ──▶ open ── its time is up ──▶ half open: one probe on one replica
       ▲                             ▲                              │
       └──────── the probe succeeded ┼──────────────────────────────┤
                                     └── it failed: open for longer ┘

The states lie in the store; each replica has a copy of those that are not closed, so that a closed breaker costs
nothing while all goes well. A probe is held under a lease: should its replica die, another one probes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any, Literal, NamedTuple

from llmstream.store.breaker_scripts import DECIDE, FAIL, LOOK, PROBE
from llmstream.store.connection import Arg
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender

logger = logging.getLogger(__name__)


class Policy(NamedTuple):
    """When a breaker opens, and for how long."""

    failures: int = 5
    """So many within the window open it,"""
    window_s: float = 30.0
    ratio: float = 0.5
    """if they are at least this share of all outcomes."""
    open_s: float = 5.0
    """For how long at first; each time it opens again, for twice as long,"""
    max_open_s: float = 120.0
    """up to this. One that stayed closed for as long begins anew."""


class Pass(NamedTuple):
    """Leave to try a target once. Whoever has it says how that went."""

    target: str
    probe: str = ""
    """The name of the probe, if it is one."""


class _Shut(NamedTuple):
    """A breaker that is not closed, in the event loop's time."""

    opens_at: float
    probe_until: float


class _Successes:
    """Outcomes that no other replica needs to know of before something fails."""

    __slots__ = ("count", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.count = 0


class Breakers:
    """All breakers, as this replica knows them."""

    def __init__(self, pipeline: Sender, keys: Keys, replica: str, policy: Policy, *, lease_s: float) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._replica = replica
        self._policy = policy
        max_open_ms, lease_ms = int(policy.max_open_s * 1000), int(lease_s * 1000)
        ttl_ms = 2 * max_open_ms + lease_ms + int(policy.window_s * 1000)
        self._limits = (max_open_ms, lease_ms, ttl_ms)
        self._numbers = itertools.count(1)
        self._shut: dict[str, _Shut] = {}
        self._probes: dict[str, str] = {}
        """Probes of this replica that are under way, by target."""
        self._successes: dict[str, _Successes] = {}

    @property
    def states(self) -> dict[str, Literal["open", "half_open"]]:
        """All that are not closed."""
        now = asyncio.get_running_loop().time()
        return {target: "open" if now < shut.opens_at else "half_open" for target, shut in self._shut.items()}

    @property
    def any_shut(self) -> bool:
        return bool(self._shut)

    def admits(self, target: str) -> bool:
        """Whether :meth:`enter` may give a pass at the moment."""
        return self.admits_in(target) == 0

    def admits_in(self, target: str) -> float:
        """Seconds until the target may be tried; 0: now."""
        shut = self._shut.get(target)
        return 0.0 if shut is None else max(0.0, max(shut) - asyncio.get_running_loop().time())

    async def enter(self, target: str) -> Pass | None:
        """A pass, or None while the target is left alone. Asks the store only where a probe is due; raises
        StoreUnavailable then."""
        if target not in self._shut:
            return Pass(target)
        if target in self._probes or not self.admits(target):
            return None
        probe = f"{self._replica}|{next(self._numbers)}"
        self._probes[target] = probe
        outcome = 0
        try:
            outcome = await self._pipeline.run(PROBE, self._keys.breakers(), *self._args(target, probe))
        except asyncio.CancelledError:
            self.abandoned(Pass(target, probe))
            raise
        finally:
            if outcome != 1:
                self._probes.pop(target, None)
        if outcome == 1:
            return Pass(target, probe)
        self.look()
        return Pass(target) if outcome == 2 else None

    def succeeded(self, passed: Pass) -> None:
        """The target answered."""
        if passed.probe:
            self._decide(passed, 1)
            return
        now, counted = asyncio.get_running_loop().time(), self._successes.get(passed.target)
        if counted is None or now - counted.since > self._policy.window_s:
            counted = self._successes[passed.target] = _Successes(now)
        counted.count += 1

    def failed(self, passed: Pass) -> None:
        """The target did not answer as it should, through its own fault."""
        policy = self._policy
        oldest = asyncio.get_running_loop().time() - policy.window_s
        counted = self._successes.pop(passed.target, None)
        successes = counted.count if counted is not None and counted.since >= oldest else 0
        limits = (policy.failures, repr(policy.ratio), int(policy.window_s * 1000), int(policy.open_s * 1000))
        args = self._args(passed.target, passed.probe, successes, *limits)
        self._tell(FAIL, passed, self._keys.breakers(passed.target), args)

    def abandoned(self, passed: Pass) -> None:
        """It came to nothing that says anything about the target: cancelled, refused for what was asked …"""
        if passed.probe:
            self._decide(passed, 0)

    async def refresh(self) -> None:
        """Keeps this replica's probes and learns the states. Part of each heartbeat: who missed a signal finds out.
        Raises StoreUnavailable."""
        oldest = asyncio.get_running_loop().time() - self._policy.window_s
        self._successes = {target: found for target, found in self._successes.items() if found.since >= oldest}
        self._learn(await self._pipeline.run(LOOK, self._keys.breakers(), *self._own_probes()))

    def look(self, _target: str = "") -> None:
        """Says that a breaker has changed."""

        def found(reply: Any, error: Exception | None) -> None:
            if error is None:
                self._learn(reply)
            else:
                logger.debug("the heartbeat finds out how the breakers are: %s", error)

        self._pipeline.defer_script(LOOK, self._keys.breakers(), self._own_probes(), found)

    def _learn(self, reply: list[Any]) -> None:
        now = asyncio.get_running_loop().time()
        self._shut = {
            target.decode(): _Shut(now + opens_ms / 1000, now + probe_ms / 1000) for target, opens_ms, probe_ms in reply
        }

    def _decide(self, passed: Pass, well: int) -> None:
        self._tell(DECIDE, passed, self._keys.breakers(), self._args(passed.target, passed.probe, well))

    def _tell(self, script: Script, passed: Pass, keys: tuple[str, ...], args: tuple[Arg, ...]) -> None:
        if self._probes.get(passed.target) == passed.probe:
            del self._probes[passed.target]

        def told(changed: Any, error: Exception | None) -> None:
            if error is not None:
                logger.warning("the breaker of %s was not told how a request went: %s", passed.target, error)
            elif changed:
                self.look()

        self._pipeline.defer_script(script, keys, args, told)

    def _args(self, target: str, *args: Arg) -> tuple[Arg, ...]:
        return (target, self._keys.breaker, *self._limits, *args)

    def _own_probes(self) -> list[Arg]:
        return [*self._limits, *itertools.chain.from_iterable(self._probes.items())]
