"""The way of one job through the targets of its route, on this replica."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmstream.errors import ContextLengthExceeded, LLMStreamError, ProviderError, UpstreamBroken
from llmstream.providers.base import CannotContinue
from llmstream.routing.gates import Ask, Crossing, Gates, NoRoom
from llmstream.routing.router import Router
from llmstream.routing.targets import Target
from llmstream.scheduler.intake import Intake
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, Job

_BARELY_BEGUN = Transcript([Event(EventId(1, 1), Delta())])
"""Stands for whatever text an attempt may have produced when it is asked to hand over."""

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
        self._request = job.request
        self._router = router
        self._gates = gates
        self._granted = granted
        self._route = router.route(job.request)
        self._wish: Ask | None = None
        """What it takes of targets with limits."""
        if self._route.limited:
            self._wish = Ask(job.id, self._route.tokens(job.request), urgency)
            self._route = self._route.with_room_for(self._wish.tokens)
        self._failed: set[str] = set()
        self._stuck: set[str] = set()
        """Targets that turned out to be unable to go on from what was said."""
        self._crossing: Crossing | None = None
        """Leave for what is being asked now."""
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
        refusals: list[LLMStreamError] = []
        full: Step | None = None
        for step in steps:
            if step.so_far is None and restart is not None:
                restart()
                restart = None
            try:
                return await self._ask(step, intake)
            except (ProviderError, ContextLengthExceeded) as error:
                self.blame(error)
                if intake.got_token or not error.elsewhere:
                    raise
                refusals.append(error)
                if isinstance(error, NoRoom):
                    full = full or step
        if full is not None:
            return await self._wait_and_ask(full, intake)
        raise min(refusals, key=_hope) if refusals else self.fault or UpstreamBroken("Nobody can go on from here.")

    def blame(self, error: LLMStreamError) -> None:
        """Holds the target that is being asked responsible for an error."""
        crossing = self._crossing
        self._leave(error)
        if crossing is None:
            return
        name = crossing.target.name
        if isinstance(error, CannotContinue):
            self._stuck.add(name)
            return
        self.fault = error
        self._failed.add(name)
        if len(self._route.targets) > 1:
            logger.warning("target %s failed: %s", name, error.message)

    def close(self) -> None:
        """Gives back what the job has; safe to call twice."""
        self._leave(LLMStreamError("The job was stopped."))
        if self._granted is not None:
            self._gates.give_back(self._granted)
            self._granted = None

    async def _ask(self, step: Step, intake: Intake) -> None:
        granted = self._granted
        if granted is not None and granted.target.name == step.target.name:
            self._granted = None
        else:
            granted = None
        await self._generate(step, intake, await self._gates.enter(step.target, self._wish, granted))

    async def _wait_and_ask(self, step: Step, intake: Intake) -> None:
        """Whoever is not used up has failed: waits for the first that is."""
        assert self._wish is not None
        intake.silent_since = None
        crossing = await self._gates.wait(step.target, self._wish)
        try:
            await self._generate(step, intake, crossing)
        except (ProviderError, ContextLengthExceeded) as error:
            self.blame(error)
            raise

    async def _generate(self, step: Step, intake: Intake, crossing: Crossing) -> None:
        self._crossing, target = crossing, step.target
        self.continuable = self._goes_on(target, step.so_far or _BARELY_BEGUN)
        asked_at = intake.expect()
        with self._router.load.answering(target.name):
            try:
                await target.provider.generate(target.asked(self._request), step.so_far, intake)
            finally:
                if intake.first_at is not None and len(self._route.targets) > 1:
                    self._router.load.measured(target.name, intake.first_at - asked_at)
        if len(intake.reasons) < self._request.choices:
            raise UpstreamBroken("The model's stream ended before the answer did.")
        self._leave(None)

    def _leave(self, error: LLMStreamError | None) -> None:
        crossing, self._crossing = self._crossing, None
        if crossing is not None:
            usage = self._intake.usage if self._intake is not None else None
            self._gates.leave(crossing, error, usage.total_tokens if usage is not None else None)

    def _avoided(self) -> set[str]:
        """Those to ask last: they failed this job, or their breakers are open."""
        resting = {target.name for target in self._route.targets if not self._gates.admits(target)}
        return self._failed | resting

    def _goes_on(self, target: Target, transcript: Transcript) -> bool:
        able = transcript.continuable and target.name not in self._stuck
        return able and target.provider.can_continue(target.asked(self._request), transcript)


def _hope(error: LLMStreamError) -> tuple[bool, float]:
    """Sorts errors by how soon trying again may help."""
    return not error.retryable, error.retry_after or 0.0
