"""Short forms for asking a provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from llmstream.providers.base import Provider
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, GenerateRequest


class Tray:
    """A sink that has room for one batch."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self.changed = asyncio.Event()
        self._empty = asyncio.Event()

    @property
    def full(self) -> bool:
        return bool(self._deltas)

    @property
    def characters(self) -> int:
        return sum(len(delta.text) for delta in self._deltas)

    def put(self, deltas: Sequence[Delta]) -> bool:
        self._deltas += deltas
        self._empty.clear()
        self.changed.set()
        return False

    async def drained(self) -> None:
        await self._empty.wait()

    def take(self) -> list[Delta]:
        taken, self._deltas = self._deltas, []
        self._empty.set()
        self.changed.clear()
        return taken


async def batches(
    provider: Provider, request: GenerateRequest, so_far: Transcript | None = None
) -> AsyncGenerator[list[Delta], None]:
    """What a provider generates, batch by batch as it comes; closing the iterator cancels the generation."""
    tray = Tray()
    task = asyncio.create_task(provider.generate(request, so_far, tray))
    task.add_done_callback(lambda _: tray.changed.set())
    try:
        while not task.done() or tray.full:
            await tray.changed.wait()
            if batch := tray.take():
                yield batch
        await task
    finally:
        if task.cancel():
            await asyncio.gather(task, return_exceptions=True)


def chat(text: str = "hello world", **fields: Any) -> GenerateRequest:
    """A greedy chat request of one user message."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    return GenerateRequest.of("chat", "tiny", body)


def completion(prompt: Any, **fields: Any) -> GenerateRequest:
    """A greedy text completion."""
    return GenerateRequest.of("completion", "tiny", {"prompt": prompt, "temperature": 0, **fields})


def logged(deltas: Iterable[Delta]) -> Transcript:
    """What a log with these deltas amounts to."""
    return Transcript(Event(EventId(1, seq), delta) for seq, delta in enumerate(deltas, start=1))


async def collect(provider: Provider, request: GenerateRequest, so_far: Transcript | None = None) -> list[Delta]:
    """All deltas of one answer."""
    return [delta async for batch in batches(provider, request, so_far) for delta in batch]


def text_of(deltas: Iterable[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)
