"""What is paused and draining: this replica's view of it, and how a change reaches every queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from llmstream.errors import BadRequest, Draining
from llmstream.store.lanes import Lanes, Pulse
from llmstream.store.store import Store
from llmstream.types import Clock, Job, Lane, Mode, QueueRule, QueueRules

MAX_RULES = 100
"""Each claim and each new job is compared with all of them."""
RETRY_AFTER_S = 30.0
"""When somebody whom a draining queue refused may ask again: nobody knows how long it lasts."""
_RULE_BYTES = 200


class QueueControl:
    """The rules as this replica knows them.

    A change is on record first, then copied into the queue of every pool; from that moment no claim goes against it.
    Whatever is missed on the way, a heartbeat of any replica makes up for.
    """

    def __init__(self, store: Store, lanes_of: Callable[[str], Lanes], clock: Clock = time.time) -> None:
        self.rules = QueueRules()
        self.on_change: Callable[[], None] | None = None
        self._store = store
        self._lanes_of = lanes_of
        self._clock = clock

    def pauses(self, job: Job) -> bool:
        """Whether a job is paused, as far as this replica knows."""
        return self.rules.find("paused", job) is not None

    async def hold(self, mode: Mode, lane: Lane | None, model: str | None, by: str) -> QueueRules:
        """Pauses or drains a part of the queue; doing it twice is fine. Once this returns, nothing of it is claimed or
        accepted by any replica. Raises BadRequest when there are too many rules."""
        rule = QueueRule(mode=mode, lane=lane, model=model, since=self._clock(), by=by)

        def edit(rules: tuple[QueueRule, ...]) -> tuple[QueueRule, ...]:
            if any((each.mode, each.lane, each.model) == (mode, lane, model) for each in rules):
                return rules
            if len(rules) >= MAX_RULES:
                raise BadRequest(f"There are {MAX_RULES} rules already; resume something, or use a wider pattern.")
            return (*rules, rule)

        return await self._change(edit)

    async def resume(self, lane: Lane | None, model: str | None) -> QueueRules:
        """Ends pause and drain of exactly this part; other rules that cover it stay."""
        return await self._change(
            lambda rules: tuple(each for each in rules if (each.lane, each.model) != (lane, model))
        )

    async def resume_all(self) -> QueueRules:
        """Ends all pauses and drains."""
        return await self._change(lambda rules: ())

    async def look(self) -> QueueRules:
        """The rules as they are on record."""
        self._adopt(await self._store.control.read())
        return self.rules

    async def follow(self, lanes: Lanes, pulse: Pulse) -> None:
        """Keeps the record alive, and brings this replica and a queue up to date with it."""
        control = self._store.control
        version = await control.renew()
        if version < self.rules.version:
            await control.restore(self.rules)  # the store has forgotten it
        elif version > self.rules.version:
            self._adopt(await control.read())
        if pulse.version > max(version, self.rules.version):
            self._adopt(await control.write_anew(version))  # it forgot, and so has everybody else
        rules = self.rules
        if pulse.version < rules.version:
            await lanes.control(rules)
        if pulse.swept < rules.version:
            await lanes.sweep(rules.version)

    async def check(self, job: Job) -> None:
        """For a job that goes another way than through the store's queue. Raises Draining."""
        await self.look()
        self.refuse(job)

    def refuse(self, job: Job) -> None:
        """Raises Draining for a job that may not be added, as far as this replica knows."""
        if self.rules.find("draining", job) is not None:
            raise draining(job)

    async def _change(self, edit: Callable[[tuple[QueueRule, ...]], tuple[QueueRule, ...]]) -> QueueRules:
        await self._store.presence.recovered()
        rules = await self._store.control.change(edit)
        self._store.recent.remember(lambda: self._again(rules), _RULE_BYTES * len(rules.rules))
        await self._spread(rules)
        return rules

    async def _again(self, rules: QueueRules) -> None:
        """For a store that may have forgotten the change."""
        await self._store.control.restore(rules)
        await self._spread(rules)

    async def _spread(self, rules: QueueRules) -> None:
        """A pool that is new by the time this reads their names finds the record as it begins."""
        self._adopt(rules)
        queues = [self._lanes_of(name) for name in await self._store.pools()]
        await asyncio.gather(*(lanes.control(rules) for lanes in queues))
        await asyncio.gather(*(lanes.sweep(rules.version) for lanes in queues))

    def _adopt(self, rules: QueueRules) -> None:
        if rules.version <= self.rules.version:
            return
        self.rules = rules
        if self.on_change is not None:
            self.on_change()


def draining(job: Job) -> Draining:
    return Draining(
        f"Lane {job.lane!r} is draining for model {job.request.model!r}: no new jobs are taken, and what waits is "
        "finished. Try again later, or send the request elsewhere.",
        retry_after=RETRY_AFTER_S,
    )
