"""A model's name leads to a route: the targets that can answer, in the order to ask them."""

from __future__ import annotations

import difflib
import random
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import translate
from typing import Final

from llmstream.config import ProviderSettings, RouteSettings, TargetSettings
from llmstream.errors import BadRequest, ModelNotFound
from llmstream.providers.base import Lasting, Provider
from llmstream.routing.load import Load
from llmstream.routing.strategies import Random, arrange
from llmstream.routing.targets import NO_LIMITS, REMOTE, Route, Target
from llmstream.store.budgets import Limits
from llmstream.types import GenerateRequest, ModelInfo

ANY: Final = "*"
_WILD: Final = frozenset("*?")


class Router:
    """All providers of this replica, and the routes to them.

    A name is looked up among the configured routes, then among the models of the providers, then among the routes with
    wildcards, the longest pattern first, and last at a provider that serves any name.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        routes: Mapping[str, RouteSettings] | None = None,
        *,
        limits: Mapping[str, Limits] | None = None,
        chance: Random = random.random,
    ) -> None:
        """``limits`` are those of each target of a provider that says nothing else."""
        self.providers = tuple(providers)
        self.load = Load(time.monotonic)
        self._chance = chance
        self._limits = limits or {}
        self._listed = {each.name: frozenset(info.name for info in each.models) for each in providers}
        self._single: dict[tuple[str, str], Route] = {}
        """Routes of one target that no setting names."""
        self._routes = {name: self._configured(name, settings) for name, settings in (routes or {}).items()}
        patterns = sorted((name for name in self._routes if _WILD & set(name)), key=_literal, reverse=True)
        self._patterns = [(re.compile(translate(name)), self._routes.pop(name)) for name in patterns]

    @property
    def models(self) -> list[ModelInfo]:
        """Everything that can be asked for by name, without wildcards; each name once."""
        found = {name: _info(route) for name, route in self._routes.items()}
        for provider in self.providers:
            for model in provider.models:
                if model.name != ANY:
                    found.setdefault(model.name, model)
        return list(found.values())

    @property
    def pools(self) -> dict[str, int]:
        """What this replica runs jobs of, and how many at once; 0: as many remote ones as it may."""
        pools = {provider.pool: 0 if provider.pool == REMOTE else provider.slots for provider in self.providers}
        for route in self._all_routes():
            most = [target.limits.slots or 0 for target in route.targets]
            pools.setdefault(route.pool, sum(most) if all(most) else 0)
        return pools

    def targets(self, pool: str) -> list[Target]:
        """The targets with limits whose jobs wait in a pool."""
        limited = (route for route in self._all_routes() if route.limited and route.pool == pool)
        return [target for route in limited for target in route.targets]

    def route(self, request: GenerateRequest) -> Route:
        """Finds who can run a request; one with ``provider`` only there. Raises ModelNotFound, BadRequest."""
        candidates = self._candidates(request.provider)
        found = self._find(request.model, candidates)
        if found is None:
            raise self._unknown(request.model, candidates)
        if request.provider is None:
            return found
        chosen = tuple(target for target in found.targets if target.provider.name == request.provider)
        return replace(found, targets=chosen)

    def order(self, route: Route, failed: Collection[str] = ()) -> Sequence[Target]:
        """The targets of a route, the first to ask first; those that failed come last."""
        targets = arrange(route.targets, route.strategy, self.load, self._chance)
        return sorted(targets, key=lambda target: target.name in failed) if failed else targets

    def _find(self, model: str, candidates: Sequence[Provider]) -> Route | None:
        route = self._routes.get(model)
        if route is not None and _serves(route, candidates):
            return route
        if implicit := self._implicit(model, candidates):
            return implicit
        for pattern, wild in self._patterns:
            if pattern.fullmatch(model) and _serves(wild, candidates):
                return wild
        return self._implicit(ANY, candidates)

    def _implicit(self, model: str, candidates: Sequence[Provider]) -> Route | None:
        """The route to the first provider that lists a name."""
        for provider in candidates:
            if model in self._listed[provider.name]:
                key = (provider.name, model)
                if key not in self._single:
                    name = None if model == ANY else model
                    target = Target(provider, name, limits=self._limits.get(provider.name, NO_LIMITS))
                    self._single[key] = Route(target.name, (target,))
                return self._single[key]
        return None

    def _candidates(self, provider: str | None) -> Sequence[Provider]:
        if provider is None:
            return self.providers
        found = [each for each in self.providers if each.name == provider]
        if not found:
            names = ", ".join(sorted(each.name for each in self.providers))
            raise BadRequest(f"There is no provider {provider!r}. Available: {names}.", param="provider")
        return found

    def _unknown(self, model: str, candidates: Sequence[Provider]) -> ModelNotFound:
        names = {name for name, route in self._routes.items() if _serves(route, candidates)}
        names |= {info.name for provider in candidates for info in provider.models if info.name != ANY}
        close = difflib.get_close_matches(model, names, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return ModelNotFound(
            f"The model {model!r} does not exist here. {hint}Available: {', '.join(sorted(names)) or 'none'}.",
            param="model",
        )

    async def stop(self, job_id: str) -> None:
        """Ends what providers still run for a job that is over."""
        for provider in self.providers:
            if isinstance(provider, Lasting):
                await provider.stop(job_id)

    def _configured(self, name: str, settings: RouteSettings) -> Route:
        known = {provider.name: provider for provider in self.providers}

        def model(target: TargetSettings) -> str | None:
            if known[target.provider].pool != REMOTE:
                return target.provider
            return target.model or (None if _WILD & set(name) else name)

        def limits(target: TargetSettings) -> Limits:
            own, all_ = limits_of(target), self._limits.get(target.provider, NO_LIMITS)
            return Limits(*(mine if mine is not None else theirs for mine, theirs in zip(own, all_, strict=True)))

        targets = [
            Target(known[each.provider], model(each), each.weight, each.price, limits(each))
            for each in settings.targets
        ]
        return Route(name, tuple(targets), settings.strategy, settings.hedge_s)

    def _all_routes(self) -> Iterator[Route]:
        """Those that are configured, and those to models with limits."""
        yield from self._routes.values()
        yield from (route for _, route in self._patterns)
        for provider in self.providers:
            for model in provider.models if provider.name in self._limits else ():
                if (route := self._implicit(model.name, [provider])) is not None:
                    yield route


def limits_of(settings: TargetSettings | ProviderSettings) -> Limits:
    return Limits(settings.concurrency, settings.rpm, settings.tpm)


def _serves(route: Route, candidates: Sequence[Provider]) -> bool:
    return any(target.provider in candidates for target in route.targets)


def _info(route: Route) -> ModelInfo:
    first = route.targets[0]
    known = next((info for info in first.provider.models if info.name == first.model), None)
    return ModelInfo(name=route.name, provider=first.provider.name, context=known.context if known else None)


def _literal(pattern: str) -> int:
    return sum(character not in _WILD for character in pattern)
