"""The way of one job through the targets of its route, on this replica."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmstream.errors import ContextLengthExceeded, LLMStreamError, ProviderError, UpstreamBroken
from llmstream.routing.router import Router
from llmstream.routing.targets import Target
from llmstream.scheduler.intake import Intake
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, GenerateRequest

_BARELY_BEGUN = Transcript([Event(EventId(1, 1), Delta())])
"""Stands for whatever text an attempt may have produced when it is asked to hand over."""

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """A target to ask, and what it is to go on from; None: it answers from the start."""

    target: Target
    so_far: Transcript | None


class Asking:
    """Asks one target after the other until one begins to answer; remembers which have failed."""

    def __init__(self, router: Router, request: GenerateRequest) -> None:
        """Raises ModelNotFound, BadRequest where the name leads nowhere any more."""
        self.fault: LLMStreamError | None = None
        """What went wrong last."""
        self.continuable = True
        """Whether another replica could go on with what is being said now, as long as it is text."""
        self._router = router
        self._request = request
        self._route = router.route(request)
        self._failed: set[str] = set()
        self._target: Target | None = None

    def can_continue(self, transcript: Transcript) -> bool:
        """Whether some target can go on from here."""
        return transcript.continuable and any(self._goes_on(target, transcript) for target in self._route.targets)

    @property
    def untried(self) -> bool:
        """Whether there is a target that has not failed."""
        return any(target.name not in self._failed for target in self._route.targets)

    def plan(self, transcript: Transcript | None, *, may_restart: bool) -> list[Step]:
        """Whom to ask in turn. Those that can go on from what was said come first; others start over, if they may."""
        targets = self._router.order(self._route, self._failed)
        if transcript is None or transcript.empty:
            return [Step(target, None) for target in targets]
        able = [target for target in targets if transcript.continuable and self._goes_on(target, transcript)]
        steps = [Step(target, transcript) for target in able]
        return steps + [Step(target, None) for target in targets if may_restart and target not in able]

    async def answer(self, steps: Sequence[Step], intake: Intake, restart: Callable[[], None] | None) -> None:
        """Puts the whole answer into ``intake``; calls ``restart`` before a target starts over. Raises what the last
        target had to say, or the first that began to answer."""
        refusals: list[LLMStreamError] = []
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
        raise min(refusals, key=_hope) if refusals else self.fault or UpstreamBroken("Nobody can go on from here.")

    def blame(self, error: LLMStreamError) -> None:
        """Holds the target that is being asked responsible for an error."""
        target, self._target = self._target, None
        if target is not None:
            self.fault = error
            self._failed.add(target.name)
            if len(self._route.targets) > 1:
                logger.warning("target %s failed: %s", target.name, error.message)

    async def _ask(self, step: Step, intake: Intake) -> None:
        target, self._target = step.target, step.target
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

    def _goes_on(self, target: Target, transcript: Transcript) -> bool:
        return target.provider.can_continue(target.asked(self._request), transcript)


def _hope(error: LLMStreamError) -> tuple[bool, float]:
    """Sorts errors by how soon trying again may help."""
    return not error.retryable, error.retry_after or 0.0
