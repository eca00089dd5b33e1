"""What a run finds: printed as it comes, kept for JSON and pictures."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """One quantity of one system, measured once a round."""

    case: str
    system: str
    unit: str
    values: list[float]
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        spread = f"{short(min(self.values))} – {short(max(self.values))}" if len(self.values) > 1 else ""
        return f"  {self.system:16} {short(self.median):>9}  {self.unit:34} {spread:19} {self.note}".rstrip()


class Missing(msgspec.Struct, frozen=True):
    """What was not measured, and why."""

    case: str
    system: str
    why: str

    def __str__(self) -> str:
        return f"  {self.system:16} {'–':>9}  not measured: {self.why}"


class Curve(msgspec.Struct, frozen=True):
    """How a cost grows."""

    case: str
    title: str
    x: str
    unit: str
    points: list[tuple[float, float]]


class Report:
    """Everything one run found. Prints each finding as it comes."""

    def __init__(self) -> None:
        self.machine: dict[str, str] = {}
        self.systems: dict[str, str] = {}
        self.figures: list[Figure] = []
        self.missing: list[Missing] = []
        self.curves: list[Curve] = []
        self.faults: list[str] = []
        """Answers of llmstream that were not what they should be."""

    def add(self, case: str, system: str, unit: str, values: list[float], note: str = "") -> None:
        self.figures.append(Figure(case, system, unit, values, note))
        say(str(self.figures[-1]))

    def miss(self, case: str, system: str, why: object) -> None:
        self.missing.append(Missing(case, system, str(why)))
        say(str(self.missing[-1]))

    def fault(self, case: str, system: str, what: str) -> None:
        """Notes wrong answers: those of llmstream make the whole run fail."""
        if system.startswith("llmstream"):
            self.faults.append(f"{case}, {system}: {what}")

    def find(self, case: str, system: str, unit: str) -> float | None:
        """The median of a figure whose unit begins like ``unit``; None when it was not measured."""
        for figure in self.figures:
            if (figure.case, figure.system) == (case, system) and figure.unit.startswith(unit):
                return figure.median
        return None

    def write(self, path: Path, verdicts: list[dict[str, Any]]) -> None:
        found = {
            "machine": self.machine,
            "systems": self.systems,
            "figures": [{**msgspec.to_builtins(figure), "median": figure.median} for figure in self.figures],
            "curves": self.curves,
            "missing": self.missing,
            "faults": self.faults,
            "targets": verdicts,
        }
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))


def short(value: float) -> str:
    """A number as people read it: three digits that matter."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
