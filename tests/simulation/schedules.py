"""Many schedules on all cores, and what they amount to."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.simulation.world import Outcome, simulate, uncollected

CHUNK = 250
SHOWN = 5


@dataclass
class Total:
    """What many schedules came to."""

    schedules: int = 0
    attempts: int = 0
    commands: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    failed: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.schedules += 1
        self.attempts += outcome.attempts
        self.commands += outcome.commands
        self.statuses.update(outcome.statuses)
        self.troubles.update(step.split()[1] for step in outcome.plan)
        if outcome.faults:
            self.failed.append(outcome)

    def merge(self, other: Total) -> None:
        self.schedules += other.schedules
        self.attempts += other.attempts
        self.commands += other.commands
        self.statuses += other.statuses
        self.troubles += other.troubles
        self.failed += other.failed

    def __str__(self) -> str:
        lines = [
            f"{self.schedules} schedules, {len(self.failed)} of them broke a truth; {self.commands} commands, "
            f"{sum(self.statuses.values())} jobs, {self.attempts} attempts",
            f"ends      {_counts(self.statuses)}",
            f"troubles  {_counts(self.troubles)}",
        ]
        for outcome in self.failed[:SHOWN]:
            lines.append(f"again with: python -m tests.simulation --seed {outcome.seed}")
            lines += [f"    {line}" for line in (*outcome.faults, *sorted(outcome.plan, key=_moment))]
        return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def _moment(step: str) -> float:
    return float(step.split()[0])


def run_chunk(first: int, count: int) -> Total:
    """Runs the schedules of consecutive seeds, one after the other."""
    total = Total()
    with uncollected():
        for seed in range(first, first + count):
            total.add(simulate(seed))
    return total


def run_schedules(first: int, count: int) -> Total:
    """Runs the schedules of consecutive seeds on all cores."""
    if count <= CHUNK:
        return run_chunk(first, count)
    total = Total()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as executor:
        chunks = [
            executor.submit(run_chunk, start, min(CHUNK, first + count - start))
            for start in range(first, first + count, CHUNK)
        ]
        for chunk in chunks:
            total.merge(chunk.result())
    return total
