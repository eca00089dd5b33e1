"""The real scheduler, workers and scripts under thousands of seeded schedules of everything that can go wrong.

``SIMULATION_SEED`` chooses the first seed, ``SIMULATION_COUNT`` how many schedules follow it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from typing import Any

import pytest
from redis.exceptions import ResponseError

from llmstream.errors import StoreError
from llmstream.store.store import Store
from tests.simulation.memory import time_of
from tests.simulation.mutations import MUTATIONS
from tests.simulation.network import Command, Executed
from tests.simulation.schedules import run_chunk
from tests.simulation.world import FORGETTING, simulate

SEED = int(os.environ.get("SIMULATION_SEED", "0"))
_TOKEN = re.compile(r"(?<=b')([0-9a-f]{16})+(?=')|(?<=:took:)[0-9a-f]{16}")
"""What tells a repeated begin, or that something was taken before: random on purpose, and only ever compared."""
COUNT = int(os.environ.get("SIMULATION_COUNT", "10000"))
PARTS = 10
"""Tests that share the schedules, for several cores to take."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_breaks_a_truth(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is killed, frozen, cut off, lost, delayed or restarted, and in whatever order: every accepted job ends
    once, says exactly what it should, in at most so many tries, and leaves no claim behind; what was shown stays."""
    first, stop = (SEED + COUNT * edge // PARTS for edge in (part, part + 1))
    total = run_chunk(first, stop - first)
    with capsys.disabled():
        print(f"\nseed {first}: {total}")  # noqa: T201
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


@pytest.mark.parametrize("guard", [name for name, mutation in MUTATIONS.items() if not mutation.rare])
def test_the_simulation_sees_a_missing_guard(guard: str) -> None:
    """Without any one guard some schedule breaks a truth."""
    outcome = MUTATIONS[guard].first_fault()
    assert outcome is not None
    print(f"without {guard}: seed {outcome.seed}: {outcome.faults[0]}")  # noqa: T201


async def test_the_simulated_store_answers_like_the_real_one(store: Store) -> None:
    """Every command of a few hundred schedules gets the same reply from a real Valkey at the same time of day."""
    outcomes = await asyncio.to_thread(lambda: [simulate(seed, traced=True) for seed in range(SEED, SEED + 200)])
    for outcome in outcomes:
        if any(FORGETTING in step for step in outcome.plan):
            continue  # the real one loses nothing
        trace = [executed for executed in outcome.trace if _is_comparable(executed)]
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


def _is_comparable(executed: Executed) -> bool:
    """Which server it is and which scripts are in its cache, the two do not share."""
    error = str(executed.reply) if isinstance(executed.reply, ResponseError) else ""
    return executed.command[0] != b"INFO" and not error.startswith("NOSCRIPT")


def _at_its_time(executed: Executed, sources: dict[bytes, bytes]) -> Command:
    """The command for a real server, whose scripts are told what time it is."""
    name, *rest = executed.command
    if name not in (b"EVAL", b"EVALSHA"):
        return executed.command
    source = sources[rest[0]] if name == b"EVALSHA" and rest[0] in sources else rest[0]
    timed = source.replace(b"redis.call('TIME')", b"{'%s', '%s'}" % tuple(time_of(executed.now_ms)))
    return (b"EVAL", timed, *rest[1:])


def _comparable(reply: Any, command: Command) -> Any:
    if isinstance(reply, StoreError | ResponseError):
        return f"error: {reply}"
    if command[0] == b"HGETALL":  # a hash with long values has no order
        return dict(zip(reply[::2], reply[1::2], strict=True))
    return reply
