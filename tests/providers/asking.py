"""Short forms for asking a provider."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmstream.providers.base import Provider
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, GenerateRequest


def chat(text: str = "hello world", **fields: Any) -> GenerateRequest:
    """A greedy chat request of one user message."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    return GenerateRequest("chat", "tiny", body)


def completion(prompt: Any, **fields: Any) -> GenerateRequest:
    """A greedy text completion."""
    return GenerateRequest("completion", "tiny", {"prompt": prompt, "temperature": 0, **fields})


def logged(deltas: Iterable[Delta]) -> Transcript:
    """What a log with these deltas amounts to."""
    return Transcript(Event(EventId(1, seq), delta) for seq, delta in enumerate(deltas, start=1))


async def collect(provider: Provider, request: GenerateRequest, so_far: Transcript | None = None) -> list[Delta]:
    """All deltas of one answer."""
    return [delta async for batch in provider.generate(request, so_far) for delta in batch]


def text_of(deltas: Iterable[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)
