"""The real scheduler, workers and scripts under thousands of seeded schedules of everything that can go wrong.

``SIMULATION_SEED`` chooses the first seed, ``SIMULATION_COUNT`` how many schedules follow it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from redis.exceptions import ResponseError

from llmstream.errors import StoreError
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.store import Store
from tests.simulation.memory import time_of
from tests.simulation.network import Command, Executed
from tests.simulation.schedules import run_schedules
from tests.simulation.world import Outcome, simulate, uncollected

SEED = int(os.environ.get("SIMULATION_SEED", "0"))
_TOKEN = re.compile(r"(?<=b')([0-9a-f]{16})+(?=')")
"""What tells a repeated begin: random on purpose, and only ever compared."""
COUNT = int(os.environ.get("SIMULATION_COUNT", "2000"))


@pytest.mark.timeout(600)
def test_no_schedule_breaks_a_truth(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is killed, frozen, cut off, lost, delayed or restarted, and in whatever order: every accepted job ends
    once, says exactly what it should, in at most so many tries, and leaves no claim behind."""
    total = run_schedules(SEED, COUNT)
    with capsys.disabled():
        print(f"\nseed {SEED}: {total}")  # noqa: T201
    assert not total.failed


def test_a_seed_is_a_schedule() -> None:
    """The same seed gives the same commands at the same times."""

    def fingerprint(seed: int) -> list[Any]:
        return [
            (executed.now_ms, _TOKEN.sub("token", repr((executed.command, executed.reply))))
            for executed in simulate(seed, traced=True).trace
        ]

    for seed in range(SEED, SEED + 20):
        assert fingerprint(seed) == fingerprint(seed)


def _first_fault(limit: int, *, start: int = 0, **changes: Any) -> Outcome | None:
    with uncollected():
        for seed in range(start, start + limit):
            outcome = simulate(seed, **changes)
            if outcome.faults:
                return outcome
    return None


def without(guard: str, instead: str = "") -> Callable[[str], str]:
    """A mutation of the scripts that have ``guard``."""
    return lambda source: source.replace(guard, instead)


SCRIPT_GUARDS = {
    "attempt": (
        without("local attempt = tonumber(job[2]) + 1", "local attempt = math.max(1, tonumber(job[2]))"),
        False,
    ),
    "order of ids": (without(""), False),
    "repeated begin": (without("local known = string.find(tokens, ARGV[6], 1, true)", "local known = nil"), True),
    "superseded begin": (without("string.find(tokens,", "string.find(string.sub(tokens, 1, 16),"), True),
    "end of a handed over job": (without("if job[1] ~= 'in_progress' or job[2] ~= ARGV[1] then return 0 end"), True),
    "lapse of a lease": (without("then taken = taken + requeue(all[i]) end", "then end"), True),
}
"""A guard taken out of a script, and whether streams still refuse old ids."""
START = {"superseded begin": 1400}
"""Where to begin to look for what seldom shows."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("guard", SCRIPT_GUARDS)
def test_the_simulation_sees_a_missing_guard(guard: str) -> None:
    """Without any one guard of the scripts some schedule breaks a truth."""
    mutate, ordered = SCRIPT_GUARDS[guard]
    outcome = _first_fault(2_000, start=START.get(guard, 0), mutate=mutate, ordered=ordered)
    assert outcome is not None
    print(f"without {guard}: seed {outcome.seed}: {outcome.faults[0]}")  # noqa: T201


async def _look_away(scheduler: Scheduler, pool: object) -> None: ...


def test_the_simulation_sees_a_careless_owner() -> None:
    """An owner that never compares its claims with the store's soon leaves a job without an end."""
    with patch.object(Scheduler, "_reconcile", _look_away):
        outcome = _first_fault(2_000)
    assert outcome is not None
    print(f"without comparing claims: seed {outcome.seed}: {outcome.faults[0]}")  # noqa: T201


async def test_the_simulated_store_answers_like_the_real_one(store: Store) -> None:
    """Every command of a few hundred schedules gets the same reply from a real Valkey at the same time of day."""
    traces = await asyncio.to_thread(lambda: [simulate(seed, traced=True).trace for seed in range(SEED, SEED + 200)])
    for trace in ([executed for executed in trace if not _is_unknown(executed.reply)] for trace in traces):
        await store.writes.call("FLUSHALL")
        sources = {
            hashlib.sha1(command[1]).hexdigest().encode(): command[1]
            for _, command, _ in trace
            if command[0] == b"EVAL"
        }
        futures = [store.writes.call(*_at_its_time(executed, sources)) for executed in trace]
        replies = await asyncio.gather(*futures, return_exceptions=True)
        for executed, reply in zip(trace, replies, strict=True):
            assert _comparable(reply, executed.command) == _comparable(executed.reply, executed.command), executed


def _is_unknown(reply: object) -> bool:
    """Whether the store did not know the script: a matter of its cache, which the two do not share."""
    return isinstance(reply, ResponseError) and str(reply).startswith("NOSCRIPT")


def _at_its_time(executed: Executed, sources: dict[bytes, bytes]) -> Command:
    """The command for a real server, whose scripts are told what time it is."""
    name, *rest = executed.command
    if name not in (b"EVAL", b"EVALSHA"):
        return executed.command
    source = sources[rest[0]] if name == b"EVALSHA" and rest[0] in sources else rest[0]
    timed = source.replace(b"redis.call('TIME')", b"{ARGV[#ARGV - 1], ARGV[#ARGV]}")
    return (b"EVAL", timed, *rest[1:], *time_of(executed.now_ms))


def _comparable(reply: Any, command: Command) -> Any:
    if isinstance(reply, StoreError | ResponseError):
        return f"error: {reply}"
    if command[0] == b"HGETALL":  # a hash with long values has no order
        return dict(zip(reply[::2], reply[1::2], strict=True))
    return reply
