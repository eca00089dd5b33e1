"""Values of metrics at one moment, as processes tell each other, and how those of several make one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from llmstream.telemetry.metrics import Metric, Together


class Series(Struct, array_like=True):
    """One value with its labels. A histogram's value is the sum, with counts by bucket beside it."""

    labels: tuple[str, ...]
    value: float
    counts: list[int] | None = None


class Family(Struct, array_like=True):
    """All values of one metric."""

    name: str
    series: list[Series]


Snapshot = list[Family]


def merged(snapshots: Iterable[Snapshot], metrics: Mapping[str, Metric]) -> Snapshot:
    """One snapshot of several; what is not in ``metrics`` is left out."""
    gathered: dict[str, dict[tuple[str, ...], list[Series]]] = {name: {} for name in metrics}
    for snapshot in snapshots:
        for family in snapshot:
            if family.name in metrics:
                known = gathered[family.name]
                for series in family.series:
                    known.setdefault(series.labels, []).append(series)
    return [
        Family(name, [_one(series, metrics[name].together) for series in known.values()])
        for name, known in gathered.items()
    ]


def lasting(snapshot: Snapshot, metrics: Mapping[str, Metric]) -> Snapshot:
    """What remains of a process that ended: its counts stay counted, or totals would shrink."""
    return [family for family in snapshot if family.name in metrics and metrics[family.name].kind != "gauge"]


def _one(series: Sequence[Series], together: Together) -> Series:
    values = [each.value for each in series]
    value = max(values) if together == "max" else sum(values)
    if together == "mean":
        value /= len(values)
    counted = [each.counts for each in series if each.counts is not None]
    counts = [sum(column) for column in zip(*counted, strict=True)] if counted else None
    return Series(series[0].labels, value, counts)
