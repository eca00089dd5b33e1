"""A replica process that sends as many requests to one target as its limits allow, and says what it did when.

``python -m tests.store.hammer URL NAME``; each line it writes is a :class:`Done` in JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from llmstream.config import StoreSettings
from llmstream.store.budgets import Budgets, Limits, Reservation, Wait
from llmstream.store.store import Store, open_store

TARGET = "openai/gpt"
LIMITS = Limits(slots=8, requests=60, tokens=3000)
WINDOW_S = 1.5
LEASE_S = 0.6
WORKERS = 20


class Done(NamedTuple):
    """A request began, or ended and used so many tokens. Times are of this machine's clock."""

    name: str
    asked_at: float
    at: float
    tokens: int
    over: bool


class TimedBudgets(Budgets):
    """Remembers when the store was asked last."""

    asked_at = 0.0

    async def reserve(self, *args: Any, **kwargs: Any) -> Reservation | Wait:
        asked_at = time.time()
        found = await super().reserve(*args, **kwargs)
        self.asked_at = asked_at
        return found


def budgets_of(store: Store, replica: str) -> TimedBudgets:
    budgets = TimedBudgets(store.writes, store.keys, store.presence, replica, lease_s=LEASE_S, window_s=WINDOW_S)
    store.signals.on_room = budgets.wake
    return budgets


def _say(done: Done) -> None:
    os.write(1, json.dumps(done).encode() + b"\n")


async def _work(budgets: TimedBudgets, worker: str) -> None:
    rng = random.Random(worker)
    for number in range(1_000_000):
        name, tokens = f"{worker}-{number}", rng.randint(1, 150)
        reservation = await budgets.acquire(TARGET, LIMITS, tokens, name)
        _say(Done(name, budgets.asked_at, time.time(), tokens, False))
        await asyncio.sleep(rng.choice((0, 0.01, 0.1)))
        used = rng.randint(0, tokens)
        _say(Done(name, 0, time.time(), used, True))
        budgets.settle(reservation, used)


async def main(url: str, replica: str) -> None:
    async with open_store(StoreSettings.model_validate({"url": url}), Path("unused")) as store:
        budgets = budgets_of(store, replica)
        workers = [asyncio.create_task(_work(budgets, f"{replica}-{number}")) for number in range(WORKERS)]
        while not any(worker.done() for worker in workers):
            await asyncio.sleep(LEASE_S / 4)
            await budgets.renew()
        await asyncio.gather(*workers)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
