"""Where a model's name leads: targets in a route. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import msgspec

from llmstream.config import Strategy
from llmstream.errors import LLMStreamError
from llmstream.providers.base import Provider
from llmstream.routing.tokens import most_tokens
from llmstream.store.budgets import Limits, TooManyTokens
from llmstream.types import GenerateRequest

REMOTE = "remote"
NO_LIMITS = Limits()


@dataclass(frozen=True)
class Target:
    """A provider and a model on it."""

    provider: Provider
    model: str | None = None
    """What the provider calls the model; None: as the client does."""
    weight: float = 1.0
    price: float | None = None
    limits: Limits = NO_LIMITS

    @cached_property
    def name(self) -> str:
        """What this target is known by on all replicas."""
        return f"{self.provider.name}/{self.model or '*'}"

    @cached_property
    def limited(self) -> bool:
        return self.limits != NO_LIMITS

    def fits(self, tokens: int) -> bool:
        """Whether a request of so many tokens can ever run here."""
        return self.limits.tokens is None or tokens <= self.limits.tokens

    def asked(self, request: GenerateRequest) -> GenerateRequest:
        """The request as this target gets it."""
        if self.model is None or self.model == request.model:
            return request
        return msgspec.structs.replace(request, model=self.model)


@dataclass(frozen=True)
class Route:
    """Who can answer the requests for one name, or for all that match a pattern."""

    name: str
    targets: tuple[Target, ...]
    strategy: Strategy = "ordered"
    hedge_s: float | None = None

    @cached_property
    def pool(self) -> str:
        """Whose jobs these are: those of a local model where only that one answers, else of any replica. Where a target
        has limits the jobs wait in lanes of their own."""
        if self.limited:
            return f"{REMOTE}:{self.name}"
        pools = {target.provider.pool for target in self.targets}
        return pools.pop() if len(pools) == 1 else REMOTE

    @cached_property
    def limited(self) -> bool:
        return any(target.limited for target in self.targets)

    def tokens(self, request: GenerateRequest) -> int:
        """What a request may use at most, where that counts; else 0."""
        counts = any(target.limits.tokens is not None for target in self.targets)
        return most_tokens(request) if counts else 0

    def with_room_for(self, tokens: int) -> Route:
        """The route without targets that can never take so many tokens; as it is where none can."""
        fitting = tuple(target for target in self.targets if target.fits(tokens))
        return self if len(fitting) in (0, len(self.targets)) else replace(self, targets=fitting)

    async def check(self, request: GenerateRequest) -> None:
        """Refuses what none of the targets can ever run. Raises what the first of them has against it."""
        refusals: list[LLMStreamError] = []
        tokens = self.tokens(request)
        for target in self.targets:
            try:
                _fit(target, tokens, "input" if request.kind == "embedding" else "max_tokens")
                return await target.provider.check(target.asked(request))
            except LLMStreamError as error:
                refusals.append(error)
        raise refusals[0]


def _fit(target: Target, tokens: int, param: str) -> None:
    if not target.fits(tokens):
        raise TooManyTokens(
            f"The request may use {tokens} tokens (its prompt and the longest answer), but {target.name} takes no more "
            f"than {target.limits.tokens} a minute; send less or lower max_tokens.",
            param=param,
        )
