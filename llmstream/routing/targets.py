"""Where a model's name leads: targets in a route. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from msgspec.structs import replace

from llmstream.config import Strategy
from llmstream.errors import LLMStreamError
from llmstream.providers.base import Provider
from llmstream.types import GenerateRequest

REMOTE = "remote"


@dataclass(frozen=True)
class Target:
    """A provider and a model on it."""

    provider: Provider
    model: str | None = None
    """What the provider calls the model; None: as the client does."""
    weight: float = 1.0
    price: float | None = None

    @cached_property
    def name(self) -> str:
        """What this target is known by on all replicas."""
        return f"{self.provider.name}/{self.model or '*'}"

    def asked(self, request: GenerateRequest) -> GenerateRequest:
        """The request as this target gets it."""
        if self.model is None or self.model == request.model:
            return request
        return replace(request, model=self.model)


@dataclass(frozen=True)
class Route:
    """Who can answer the requests for one name, or for all that match a pattern."""

    name: str
    targets: tuple[Target, ...]
    strategy: Strategy = "ordered"

    @cached_property
    def pool(self) -> str:
        """Whose jobs these are: those of a local model where only that one answers, else of any replica."""
        pools = {target.provider.pool for target in self.targets}
        return pools.pop() if len(pools) == 1 else REMOTE

    async def check(self, request: GenerateRequest) -> None:
        """Refuses what none of the targets can ever run. Raises what the first of them has against it."""
        refusals: list[LLMStreamError] = []
        for target in self.targets:
            try:
                return await target.provider.check(target.asked(request))
            except LLMStreamError as error:
                refusals.append(error)
        raise refusals[0]
