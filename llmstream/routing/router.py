"""A model's name leads to the provider that runs it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from llmstream.errors import BadRequest, ModelNotFound
from llmstream.providers.base import Lasting, Provider
from llmstream.types import GenerateRequest, ModelInfo

ANY = "*"
REMOTE = "remote"


class Target(NamedTuple):
    """A provider and the model to ask it for."""

    provider: Provider
    model: str


class Router:
    """All providers of this replica, by the names of their models."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        self.providers = tuple(providers)

    @property
    def models(self) -> list[ModelInfo]:
        """Everything that can be asked for by name, without wildcards."""
        return [model for provider in self.providers for model in provider.models if model.name != ANY]

    @property
    def pools(self) -> dict[str, list[Provider]]:
        """Providers by the pool whose jobs they run."""
        pools: dict[str, list[Provider]] = {}
        for provider in self.providers:
            pools.setdefault(provider.pool, []).append(provider)
        return pools

    def target(self, request: GenerateRequest) -> Target:
        """Finds who runs a request; an exact name goes before a wildcard. Raises ModelNotFound, BadRequest."""
        candidates = self._candidates(request)
        for wanted in (request.model, ANY):
            for provider in candidates:
                if any(model.name == wanted for model in provider.models):
                    return Target(provider, request.model)
        names = [model.name for provider in candidates for model in provider.models if model.name != ANY]
        close = difflib.get_close_matches(request.model, names, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ModelNotFound(
            f"The model {request.model!r} does not exist here. {hint}Available: {', '.join(sorted(names)) or 'none'}.",
            param="model",
        )

    async def stop(self, job_id: str) -> None:
        """Ends what providers still run for a job that is over."""
        for provider in self.providers:
            if isinstance(provider, Lasting):
                await provider.stop(job_id)

    def _candidates(self, request: GenerateRequest) -> Sequence[Provider]:
        if request.provider is None:
            return self.providers
        found = [provider for provider in self.providers if provider.name == request.provider]
        if not found:
            names = ", ".join(sorted(provider.name for provider in self.providers))
            raise BadRequest(f"There is no provider {request.provider!r}. Available: {names}.", param="provider")
        return found
