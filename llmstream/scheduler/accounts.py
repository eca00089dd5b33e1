"""What a job used and what that costs: settled once, when its answer has come to its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from llmstream.config import PriceSettings
from llmstream.providers.tokens import Tokenizer, answered, asked
from llmstream.transcript import Transcript
from llmstream.types import GenerateRequest, Usage

PER = 1_000_000


class Accounts:
    """Counts tokens that nobody told, and prices all by the table of the settings."""

    def __init__(self, prices: Mapping[str, PriceSettings], tokenizer: Tokenizer) -> None:
        self._prices = prices
        self._tokenizer = tokenizer

    async def counted(self, request: GenerateRequest, transcript: Transcript) -> Usage:
        """The tokens of a prompt and its whole answer, marked as estimated."""
        texts, between = asked(request)
        prompt = await self._tokenizer.count(texts) + between
        completion = 0 if request.kind == "embedding" else await self._tokenizer.count(answered(transcript))
        return Usage(prompt_tokens=prompt, completion_tokens=completion, details={"estimated": True})

    def priced(self, usage: Usage, provider: str, model: str) -> Usage:
        """With the cost, where the table has a price; else an upstream's own ``cost`` stays what it said."""
        price = self._price(provider, model) if self._prices else None
        if price is None:
            return usage
        cached = min(_cached(usage.details or {}), usage.prompt_tokens)
        cached_price = price.input if price.cached is None else price.cached
        cost = (
            (usage.prompt_tokens - cached) * price.input
            + cached * cached_price
            + usage.completion_tokens * price.output
        ) / PER
        return replace(usage, cost=round(cost, 12))

    def _price(self, provider: str, model: str) -> PriceSettings | None:
        """The most exact entry goes first."""
        names = (f"{provider}/{model}", model, f"{provider}/*")
        return next((self._prices[name] for name in names if name in self._prices), None)


def _cached(details: Mapping[str, Any]) -> int:
    """Tokens of a prompt that the upstream had in its cache."""
    inner = details.get("prompt_tokens_details")
    found = inner.get("cached_tokens") if isinstance(inner, dict) else details.get("prompt_cache_hit_tokens")
    return found if isinstance(found, int) and found > 0 else 0
