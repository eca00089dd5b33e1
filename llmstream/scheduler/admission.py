"""Lets waiting jobs begin when a target of theirs has room."""

from __future__ import annotations

from llmstream.errors import LLMStreamError
from llmstream.routing.gates import Ask, Crossing, Gates
from llmstream.routing.router import Router
from llmstream.store.budgets import TooManyTokens, Wait
from llmstream.types import Job


class Admission:
    """Reserves what a job may use before it begins; a job for which there is no room stays in its lane."""

    def __init__(self, router: Router, gates: Gates, ageing_s: float) -> None:
        self._router = router
        self._gates = gates
        self._ageing_s = ageing_s

    def urgency(self, job: Job) -> float:
        """Who goes first where jobs of several replicas wait for one target: as in the lanes."""
        return job.created_at + job.delay_s - job.priority * self._ageing_s

    async def admit(self, job: Job) -> Crossing | Wait | None:
        """Room at the first target that has some, or when to ask again; None for a job that has to find out itself
        that nobody can run it. Raises StoreUnavailable."""
        try:
            route = self._router.route(job.request)
        except LLMStreamError:
            return None
        ask = Ask(job.id, route.tokens(job.request), self.urgency(job))
        route = route.with_room_for(ask.tokens)
        soonest: Wait | None = None
        targets = self._router.order(route, {each.name for each in route.targets if not self._gates.admits(each)})
        for target in targets:
            if not target.limited:
                return None
            try:
                found = await self._gates.reserve(target, ask)
            except TooManyTokens:  # the settings have changed since it was accepted
                return None
            if isinstance(found, Crossing):
                return found
            if soonest is None or found.after_s < soonest.after_s:
                soonest = found
        return soonest
