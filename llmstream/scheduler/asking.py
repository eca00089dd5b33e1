"""The way of one job through the targets of its route, on this replica."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from msgspec.structs import replace

from llmstream.errors import ContextLengthExceeded, LLMStreamError, ProviderError, UpstreamBroken
from llmstream.providers.base import CannotContinue, Sink
from llmstream.routing.gates import Ask, Crossing, Gates, NobodyLeft, NoRoom, Resting
from llmstream.routing.router import Router
from llmstream.routing.targets import Target
from llmstream.scheduler.intake import Intake
from llmstream.scheduler.race import Race, Runner
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, Job, Usage

_BARELY_BEGUN = Transcript([Event(EventId(1, 1), Delta())])
"""Stands for whatever text an attempt may have produced when it is asked to hand over."""

REST_S = 0.05
"""Shortest wait for a target that is left alone."""

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """A target to ask, and what it is to go on from; None: it answers from the start."""

    target: Target
    so_far: Transcript | None


class Asking:
    """Asks one target after the other until one begins to answer; remembers which have failed."""

    def __init__(self, job: Job, router: Router, gates: Gates, granted: Crossing | None, urgency: float) -> None:
        """Raises ModelNotFound, BadRequest where the name leads nowhere any more."""
        self.fault: LLMStreamError | None = None
        """What went wrong last."""
        self.continuable = True
        """Whether another replica could go on with what is being said now, as long as it is text."""
        self._request = job.asked
        self._patience_s = job.patience_s
        self._router = router
        self._gates = gates
        self._granted = granted
        self._route = router.route(job.request)
        self._wish: Ask | None = None
        """What it takes of targets with limits."""
        if self._route.limited:
            self._wish = Ask(job.id, self._route.tokens(job.request), urgency)
            self._route = self._route.with_room_for(self._wish.tokens)
        self.asked = self._route.targets[0]
        """Who was asked last, or answered."""
        self._failed: set[str] = set()
        self._stuck: set[str] = set()
        """Targets that turned out to be unable to go on from what was said."""
        self._crossings: list[Crossing] = []
        """Leave for those that are being asked now."""
        self._lost: Target | None = None
        """Who was asked beside the one that answered."""
        self._intake: Intake | None = None

    def can_continue(self, transcript: Transcript) -> bool:
        """Whether some target can go on from here."""
        return any(self._goes_on(target, transcript) for target in self._route.targets)

    @property
    def untried(self) -> bool:
        """Whether there is a target that has not failed and may be asked."""
        targets = self._route.targets
        return any(target.name not in self._failed and self._gates.admits(target) for target in targets)

    def plan(self, transcript: Transcript | None, *, may_restart: bool) -> list[Step]:
        """Whom to ask in turn. Those that can go on from what was said come first; others start over, if they may."""
        targets = self._router.order(self._route, self._avoided())
        if transcript is None or transcript.empty:
            return [Step(target, None) for target in targets]
        able = [target for target in targets if self._goes_on(target, transcript)]
        steps = [Step(target, transcript) for target in able]
        return steps + [Step(target, None) for target in targets if may_restart and target not in able]

    async def answer(self, steps: Sequence[Step], intake: Intake, restart: Callable[[], None] | None) -> None:
        """Puts the whole answer into ``intake``; calls ``restart`` before a target starts over. Raises what the last
        target had to say, or the first that began to answer."""
        self._intake = intake
        while True:
            left, refusals = deque(steps), list[tuple[Step, LLMStreamError]]()
            while left:
                step = left.popleft()
                if step.so_far is None and restart is not None:
                    restart()
                    restart = None
                    steps = [Step(each.target, None) for each in steps]  # what was said is void
                try:
                    return await self._ask_or_race(step, left, intake)
                except (ProviderError, ContextLengthExceeded) as error:
                    if intake.got_token or not error.elsewhere:
                        raise
                    refusals.append((step, error))
                    if isinstance(error, CannotContinue) and restart is not None:
                        left.append(Step(step.target, None))
            if not refusals:
                raise self.fault or UpstreamBroken("Nobody can go on from here.")
            if full := [step for step, each in refusals if isinstance(each, NoRoom)]:
                return await self._wait_and_ask(full[0], intake)
            best = min((each for _, each in refusals), key=_hope)
            if not all(isinstance(each, Resting) for _, each in refusals):
                raise best
            await self._rest(best.retry_after or 0.0, intake)

    def blame(self, error: LLMStreamError) -> None:
        """Holds whoever is being asked responsible for an error."""
        for crossing in list(self._crossings):
            self._blame(crossing, error)

    def close(self) -> None:
        """Gives back what the job has; safe to call twice."""
        for crossing in list(self._crossings):
            self._leave(crossing, LLMStreamError("The job was stopped."), None)
        if self._granted is not None:
            self._gates.give_back(self._granted)
            self._granted = None

    def hedged(self, usage: Usage) -> Usage:
        """What the answer took; a target that was asked beside the one that answered is named in it."""
        if self._lost is None:
            return usage
        # It was sent the same prompt; how much it had thought of by then, nobody tells.
        hedged = {"target": self._lost.name, "prompt_tokens": usage.prompt_tokens}
        return replace(usage, details={**(usage.details or {}), "hedged": hedged})

    async def _ask_or_race(self, step: Step, left: deque[Step], intake: Intake) -> None:
        """Asks a target, and beside it the next one, where the route says so and both can begin at the same place."""
        after_s = self._route.hedge_s
        if after_s is None or not left or (left[0].so_far is None) != (step.so_far is None):
            return await self._ask(step, intake, intake)
        pair = (step, left[0])
        race = Race(partial(self._ask, pair[0], intake), partial(self._ask, pair[1], intake), after_s, intake)
        try:
            await race.run()
        finally:
            if race.second_asked:
                left.popleft()
            if race.lost is not None:
                self._lost = pair[race.lost].target

    async def _ask(self, step: Step, intake: Intake, sink: Sink) -> None:
        granted = self._granted
        if granted is not None and granted.target.name == step.target.name:
            self._granted = None
        else:
            granted = None
        await self._generate(step, intake, sink, await self._gates.enter(step.target, self._wish, granted))

    async def _rest(self, seconds: float, intake: Intake) -> None:
        """Others have failed here, this job has not: it waits, and keeps its attempts, as long as it has patience.

        Raises NobodyLeft.
        """
        wait_s = max(seconds, REST_S)
        if self._patience_s is not None:
            if wait_s > self._patience_s:
                raise NobodyLeft.for_s(seconds)
            self._patience_s -= wait_s
        intake.silent_since = None
        await asyncio.sleep(wait_s)

    async def _wait_and_ask(self, step: Step, intake: Intake) -> None:
        """Whoever is not used up has failed: waits for the first that is."""
        assert self._wish is not None
        intake.silent_since = None
        await self._generate(step, intake, intake, await self._gates.wait(step.target, self._wish))

    async def _generate(self, step: Step, intake: Intake, sink: Sink, crossing: Crossing) -> None:
        target, alone = step.target, not self._crossings
        self.asked = target
        self._crossings.append(crossing)
        self.continuable = self._goes_on(target, step.so_far or _BARELY_BEGUN) and (alone or self.continuable)
        asked_at = intake.expect()
        load = self._router.load
        load.began(target.name)
        try:
            await target.provider.generate(target.asked(self._request), step.so_far, sink)
            earlier = step.so_far.ended if step.so_far is not None else 0
            if earlier + len(intake.reasons) < self._request.choices:
                raise UpstreamBroken("The model's stream ended before the answer did.")
        except (ProviderError, ContextLengthExceeded) as error:
            self._blame(crossing, error)
            raise
        except asyncio.CancelledError:
            if isinstance(sink, Runner) and sink.lost:
                self._leave(crossing, LLMStreamError("Another target was faster."), None)
            raise
        finally:
            lost = isinstance(sink, Runner) and sink.lost
            load.ended(target.name)
            if intake.first_at is not None and len(self._route.targets) > 1 and not lost:
                load.measured(target.name, intake.first_at - asked_at)
        self.asked = target
        self._leave(crossing, None, intake.usage)

    def _blame(self, crossing: Crossing, error: LLMStreamError) -> None:
        self._leave(crossing, error, self._intake.usage if self._intake is not None else None)
        name = crossing.target.name
        if isinstance(error, CannotContinue):
            self._stuck.add(name)
            return
        self.fault = error
        self._failed.add(name)
        if len(self._route.targets) > 1:
            logger.warning("target %s failed: %s", name, error.message)

    def _leave(self, crossing: Crossing, error: LLMStreamError | None, usage: Usage | None) -> None:
        if crossing in self._crossings:
            self._crossings.remove(crossing)
            self._gates.leave(crossing, error, usage.total_tokens if usage is not None else None)

    def _avoided(self) -> set[str]:
        """Those to ask last: they failed this job, or their breakers are open."""
        resting = {target.name for target in self._route.targets if not self._gates.admits(target)}
        return self._failed | resting

    def _goes_on(self, target: Target, transcript: Transcript) -> bool:
        stitches = transcript.continuable or self._request.kind == "embedding"
        able = stitches and target.name not in self._stuck
        return able and target.provider.can_continue(target.asked(self._request), transcript)


def _hope(error: LLMStreamError) -> tuple[bool, float]:
    """Sorts errors by how soon trying again may help."""
    return not error.retryable, error.retry_after or 0.0
