"""One load on every system in turn, round after round: CPU per unit of work, and how long the first token takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.bench.bench import Bench, Running
from tests.bench.processes import Unavailable
from tests.bench.tools import Answers, Load

Unit = Literal["chunk", "request"]


@dataclass(frozen=True)
class Comparison:
    """A load, the unit of work that its CPU is divided by, and what else it tells: throughput or latency."""

    load: Load
    unit: Unit
    tells: Literal["rate", "first"]


COMPARISONS = {
    "burst": Comparison(Load(tokens=64, clients=32, seconds=2.5), "chunk", "rate"),
    "paced": Comparison(Load(tokens=64, delay_ms=20, clients=128, seconds=2.5, ramp_ms=1280), "chunk", "first"),
    "whole-64": Comparison(Load(tokens=16, clients=64, seconds=2.5, shape="whole"), "request", "rate"),
    "whole-1": Comparison(Load(tokens=16, clients=1, seconds=2.0, shape="whole"), "request", "first"),
    "first-token": Comparison(Load(tokens=8, clients=1, seconds=1.5), "request", "first"),
}


@dataclass
class _Seen:
    server: list[float] = field(default_factory=list)
    store: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    right: int = 0
    trouble: str = ""

    @property
    def note(self) -> str:
        return self.trouble or f"{self.right:,} answers right"


async def compare(bench: Bench, systems: Sequence[Running], case: str) -> None:
    """Measures one comparison on all systems, the direct one first."""
    comparison = COMPARISONS[case]
    seen = {system.name: _Seen() for system in systems}
    load = comparison.load.shortened(bench.effort.factor)
    for _ in range(bench.effort.rounds):
        direct_ms: float | None = None
        for system in systems:
            first_ms = await _measure(bench, system, load, comparison.unit, seen[system.name])
            if system.pid is None:
                direct_ms = first_ms
            elif first_ms is not None and direct_ms is not None:
                seen[system.name].added.append(first_ms - direct_ms)
    for name, found in seen.items():
        _report(bench, case, name, comparison, found)


def _report(bench: Bench, case: str, name: str, comparison: Comparison, found: _Seen) -> None:
    if not found.rate:
        bench.report.miss(case, name, found.note)
        return
    if found.server:
        bench.report.add(case, name, f"µs CPU per {comparison.unit}", found.server, found.note)
    if found.store:
        bench.report.add(case, name, f"µs CPU per {comparison.unit} in the store", found.store)
    if comparison.tells == "rate":
        bench.report.add(case, name, f"{comparison.unit}s per second", found.rate)
    elif found.added:
        bench.report.add(case, name, "ms added to the first token, p50", found.added)
    else:
        bench.report.add(case, name, "ms to the first token, p50", found.first)


async def _measure(bench: Bench, system: Running, load: Load, unit: Unit, seen: _Seen) -> float | None:
    """One round of one system; the time to its first token in milliseconds."""
    try:
        if system.pid is None:
            answers = await bench.load(system, load)
        else:
            answers, server_s, store_s = await bench.cost(system, load)
    except (Unavailable, TimeoutError) as error:
        seen.trouble = str(error) or "the load generator did not end in time"
        return None
    seen.right += answers.ok
    seen.trouble = answers.faults or seen.trouble
    units = _units(answers, unit)
    if not units or answers.first is None:
        return None
    seen.first.append(answers.first.p50)
    seen.rate.append(units / answers.seconds)
    if system.pid is not None:
        seen.server.append(server_s / units * 1e6)
        if system.keeps_log:
            seen.store.append(store_s / units * 1e6)
    return answers.first.p50


def _units(answers: Answers, unit: Unit) -> int:
    return answers.tokens if unit == "chunk" else answers.ok
