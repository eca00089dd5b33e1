"""Limits of a target under hundreds of seeded schedules, and with each guard taken out."""

from __future__ import annotations

import pytest

from llmstream.store.budget_scripts import RECONCILE, RESERVE, SETTLE
from llmstream.store.pipeline import Script
from tests.simulation.budgets import Outcome, simulate_budgets
from tests.simulation.world import uncollected

COUNT = 120
PARTS = 4
LIMIT = 1500
"""So many schedules without a fault mean that nobody noticed."""
RARE = {"what arrives late is not the latest": 1000, "only the lapsed": 250}
"""Guards that few schedules need: where to begin with the search, so that it takes seconds."""

MUTATIONS = {
    "a lost answer counts once": (RESERVE, "if held then", "if false then"),
    "what arrives late is not the latest": (RESERVE, "if known < tonumber(number) then", "if true then"),
    "the limit of slots": (RESERVE, ">= most_slots", "> most_slots"),
    "the limit of requests": (RESERVE, "counted + wanted <= limit then return end", "counted <= limit then return end"),
    "slices that have wholly left": (RESERVE, "(now - window_ms) / slice_ms)", "(now - window_ms) / slice_ms) + 1"),
    "a clock that never steps back": (RESERVE, "if now < at then", "if false then"),
    "all slices are counted": (RESERVE, "for slice = first, math.min", "for slice = first + 1, math.min"),
    "slots lapse": (RESERVE, "redis.call('HDEL', holds, held_name)", "local nothing"),
    "only the lapsed": (RESERVE, "if gone[owner(held_name)] then", "if true then"),
    "who asks is alive": (RESERVE, "local forgotten = renew()", "local forgotten = 0"),
    "who does not ask has gone": (RESERVE, "redis.call('ZREM', line, other)", "local nothing"),
    "the number that is settled": (SETTLE, "if number ~= tonumber(ARGV[9]) then return 0 end", ""),
    "refunds where it was counted": (SETTLE, "if slice >= first then", "if true then"),
    "no refund for what was used": (SETTLE, "refund(slice, 0, tokens - used)", "refund(slice, 0, tokens)"),
    "reservations nobody knows": (RECONCILE, "redis.call('HDEL', holds, name)", "local nothing"),
    "reservations of others": (RECONCILE, "owner(name) == replica and ", ""),
    "reservations on their way": (RECONCILE, "known[name] = true", ""),
    "reservations made since": (RECONCILE, "if number < tonumber(ARGV[8]) then", "if true then"),
}


def first_fault(script: Script, guard: str, instead: str, start: int = 0) -> Outcome | None:
    """Runs schedules from ``start`` on until one breaks a truth."""
    assert script.source.count(guard) == 1, f"there is no such guard, or more than one: {guard}"
    changed = script.source.replace(guard, instead)

    def mutate(source: str) -> str:
        return changed if source == script.source else source

    with uncollected():
        outcomes = (simulate_budgets(seed, mutate) for seed in range(start, start + LIMIT))
        return next((outcome for outcome in outcomes if outcome.faults), None)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_breaks_a_limit(part: int) -> None:
    """Whatever is killed, lost, delayed or restarted: no window holds more than the limits, no slot is given twice or
    left behind, everybody has his turn, and in the end the store has counted exactly what was sent."""
    sent = 0
    with uncollected():
        for seed in range(part * COUNT // PARTS, (part + 1) * COUNT // PARTS):
            outcome = simulate_budgets(seed)
            assert not outcome.faults, outcome
            sent += outcome.sent
    assert sent > 5 * COUNT // PARTS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("guard", MUTATIONS)
def test_a_missing_guard_is_seen(guard: str) -> None:
    """Without any one guard some schedule breaks a limit."""
    outcome = first_fault(*MUTATIONS[guard], start=RARE.get(guard, 0))
    assert outcome is not None
    print(f"without {guard}: seed {outcome.seed}: {outcome.faults[0]}")  # noqa: T201
