"""Three replica processes at one target."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from tests.store.hammer import LEASE_S, LIMITS, TARGET, WINDOW_S, Done, budgets_of
from tests.valkey import stores, valkey
from tests.waiting import wait_until

ENOUGH = 3 * (LIMITS.requests or 0)
"""Requests that take at least so many windows."""


class Hammer:
    """A process that hammers the target until it is killed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.killed_at = 0.0
        self.said: list[Done] = []
        self._process = process
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.said.append(Done(*json.loads(line)))

    async def kill(self) -> None:
        """SIGKILL."""
        if not self.killed_at:
            self._process.kill()
            await self._process.wait()
            self.killed_at = time.time()
            await self._reading


async def hammer(stack: AsyncExitStack, url: str, name: str) -> Hammer:
    command = (sys.executable, "-m", "tests.store.hammer", url, name)
    hammer = Hammer(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
    stack.push_async_callback(hammer.kill)
    return hammer


def begun(*hammers: Hammer) -> list[Done]:
    return [done for hammer in hammers for done in hammer.said if not done.over]


def ends(*hammers: Hammer) -> dict[str, Done]:
    return {done.name: done for hammer in hammers for done in hammer.said if done.over}


def most_at_once(hammers: Sequence[Hammer]) -> int:
    """How many requests were under way at the same time, all of them for certain."""
    over, steps, under_way, most = ends(*hammers), [], 0, 0
    for hammer in hammers:
        for one in begun(hammer):
            steps += [(one.at, 1), (over[one.name].at if one.name in over else hammer.killed_at, -1)]
    for _, step in sorted(steps):
        under_way += step
        most = max(most, under_way)
    return most


def most_in_a_window(hammers: Sequence[Hammer]) -> tuple[int, int]:
    """The most requests, and the most tokens that these used, in any window, all of them for certain."""
    over, sent, requests, tokens = ends(*hammers), begun(*hammers), 0, 0
    for first in sent:
        inside = [one for one in sent if one.asked_at >= first.asked_at and one.at < first.asked_at + WINDOW_S]
        requests = max(requests, len(inside))
        tokens = max(tokens, sum(over.get(one.name, one).tokens for one in inside))
    return requests, tokens


async def test_three_replicas_hammer_one_target(tmp_path: Path) -> None:
    """Of three processes one is killed and replaced in the middle, and all are killed in the end: no window holds more
    than the limits, no slot is used twice, hardly anything is left unused, and no slot is lost."""
    async with valkey(tmp_path) as server, AsyncExitStack() as stack:
        first, *rest = hammers = [await hammer(stack, server.url, f"r{number}") for number in range(3)]
        await wait_until(lambda: len(begun(*hammers)) > ENOUGH / 2, timeout=60)
        await first.kill()
        hammers.append(await hammer(stack, server.url, "r3"))
        await wait_until(lambda: bool(hammers[-1].said) and len(begun(*hammers)) > ENOUGH, timeout=60)
        for one in hammers:
            await one.kill()
        assert LIMITS.requests is not None
        assert LIMITS.tokens is not None
        requests, tokens = most_in_a_window(hammers)
        assert 0.8 * LIMITS.requests < requests <= LIMITS.requests
        assert tokens <= LIMITS.tokens
        assert most_at_once(hammers) <= (LIMITS.slots or 0)
        assert all(begun(one) for one in rest)

        async with stores(server.url) as (store,):
            budgets = budgets_of(store, "auditor")
            async with asyncio.timeout(10 * (LEASE_S + WINDOW_S)):
                for number in range(LIMITS.slots or 0):
                    await budgets.acquire(TARGET, LIMITS, 1, f"audit{number}")
            assert (await budgets.spent(TARGET)).slots == LIMITS.slots
