"""Two targets asked for one answer: whose first token comes first gives it, the other one is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from llmstream.providers.base import Sink
from llmstream.types import Delta

Generate = Callable[[Sink], Coroutine[Any, Any, None]]


class Race:
    """Asks ``first``, and ``second`` too when no token came for ``after_s`` seconds."""

    def __init__(self, first: Generate, second: Generate, after_s: float, sink: Sink) -> None:
        self.second_asked = False
        self.lost: int | None = None
        """Which of them, 0 or 1, was asked in vain: the other's first token came before its own."""
        self._generate = (first, second)
        self._after_s = after_s
        self._sink = sink
        self._winner: Runner | None = None
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Puts the winner's answer into the sink. Raises what the winner had to say, or without one the last."""
        runners = [self._start(0)]
        try:
            await self._wait_for_news(self._after_s)
            if self._winner is None and not runners[0].task.done():
                self.second_asked = True
                runners.append(self._start(1))
            while self._winner is None and not all(runner.task.done() for runner in runners):
                await self._wait_for_news(None)
            if self._winner is not None:
                await self._stop([runner for runner in runners if runner is not self._winner])
                return await self._winner.task
            for runner in runners[:-1]:
                runner.task.exception()
            await runners[-1].task
        finally:
            await self._stop(runners)

    @property
    def decided(self) -> bool:
        return self._winner is not None

    def claim(self, runner: Runner) -> bool:
        """Whether a runner that has a token is the winner."""
        if self._winner is None:
            self._winner = runner
            self.lost = 1 - runner.number if self.second_asked else None
            self._news.set()
        return self._winner is runner

    def _start(self, number: int) -> Runner:
        runner = Runner(self, number, self._sink)
        runner.task = asyncio.create_task(self._generate[number](runner), name=f"race-{number}")
        runner.task.add_done_callback(lambda _: self._news.set())
        return runner

    async def _wait_for_news(self, seconds: float | None) -> None:
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    @staticmethod
    async def _stop(runners: Sequence[Runner]) -> None:
        for runner in runners:
            runner.task.cancel()
        await asyncio.gather(*(runner.task for runner in runners), return_exceptions=True)


class Runner:
    """One of the two, and its sink: nothing of a loser comes through."""

    task: asyncio.Task[None]

    def __init__(self, race: Race, number: int, sink: Sink) -> None:
        self.number = number
        self._race = race
        self._sink = sink

    @property
    def lost(self) -> bool:
        """Whether the other one was faster."""
        return self._race.decided and not self._race.claim(self)

    def put(self, deltas: Sequence[Delta]) -> bool:
        return not deltas or not self._race.claim(self) or self._sink.put(deltas)

    async def drained(self) -> None:
        await self._sink.drained()
