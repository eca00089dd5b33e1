"""What llmstream promises about its cost, and whether this run saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.bench.report import Report, short

Found = Callable[[Report], float | None]


class Target(NamedTuple):
    what: str
    limit: float
    found: Found
    at_least: bool = False

    def verdict(self, report: Report) -> dict[str, Any]:
        found = self.found(report)
        if found is None:
            state = "not measured"
        else:
            state = "met" if (found >= self.limit if self.at_least else found <= self.limit) else "MISSED"
        sign = "≥" if self.at_least else "≤"
        return {"target": self.what, "limit": f"{sign} {self.limit:g}", "found": found, "verdict": state}


def _figure(case: str, unit: str, system: str = "llmstream") -> Found:
    return lambda report: report.find(case, system, unit)


def _ratio(case: str, unit: str, other: str, system: str = "llmstream") -> Found:
    def found(report: Report) -> float | None:
        mine, theirs = report.find(case, system, unit), report.find(case, other, unit)
        return mine / theirs if mine is not None and theirs else None

    return found


def _scaling(report: Report) -> float | None:
    real = _ratio("replicas", "jobs per second", "llmstream ×1", "llmstream ×2")(report)
    return real if real is not None else report.find("replicas", "llmstream", "× jobs per second")


_ratio_of_litellm = _ratio("whole-64", "µs CPU per request", "llmstream", "litellm")
CHUNK, REQUEST = "µs CPU per chunk", "µs CPU per request"
TARGETS = (
    Target("burst: CPU per chunk, llmstream : smg", 1.0, _ratio("burst", CHUNK, "smg")),
    Target("burst: CPU per chunk, llmstream : nginx", 2.0, _ratio("burst", CHUNK, "nginx")),
    Target("paced, 128 open: CPU per chunk, llmstream : smg", 1.3, _ratio("paced", CHUNK, "smg")),
    Target("whole, 64 connections: CPU per request, llmstream : smg", 2.0, _ratio("whole-64", REQUEST, "smg")),
    Target("whole, 64 connections: CPU per request, LiteLLM : llmstream", 30, _ratio_of_litellm, at_least=True),
    Target("burst: CPU per chunk, log on : off", 1.4, _ratio("burst", CHUNK, "llmstream-memory")),
    Target("paced, 128 open: CPU per chunk, log on : off", 1.4, _ratio("paced", CHUNK, "llmstream-memory")),
    Target("first token added, idle, ms", 1.5, _figure("first-token", "ms added")),
    Target("first token added at 128 open, ms", 3.0, _figure("paced", "ms added")),
    Target("POST /chat/async to 202, ms", 5.0, _figure("accept", "ms from POST")),
    Target("MB per 1,000 open streams", 20.0, _figure("open-streams", "MB per")),
    Target("backlog: cost per job, growth", 1.2, _figure("waiting", "× µs CPU per job,")),
    Target("backlog: cost per job in the store, growth", 1.2, _figure("waiting", "× µs CPU per job in the store")),
    Target("replicas: jobs/s, 2 : 1", 1.8, _scaling, at_least=True),
    Target("resume of 4,000 events, ms", 25.0, _figure("resume", "ms to replay")),
    Target("resume: µs CPU per event", 5.0, _figure("resume", "µs CPU per replayed")),
    Target("cancel: ms to stop, same replica", 100.0, _figure("cancel", "ms to stop, from the same")),
    Target("cancel: ms to stop, another replica", 1000.0, _figure("cancel", "ms to stop, from another")),
    Target("kill -9: s until the answer goes on", 3.0, _figure("takeover", "s of pause")),
    Target("local engine: tokens/s, llmstream : direct", 0.97, _figure("local-engine", "× tokens"), at_least=True),
    Target("idle memory, MB", 80.0, _figure("idle-memory", "MB")),
)


def verdicts(report: Report) -> list[dict[str, Any]]:
    return [target.verdict(report) for target in TARGETS]


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    for row in found:
        value = "–" if row["found"] is None else short(row["found"])
        yield f"  {row['target']:62} {row['limit']:>8} {value:>8}  {row['verdict']}"
