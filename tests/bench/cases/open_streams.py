"""Many open streams at one chunk a second through one process: memory, CPU, and whether all keep pace.

The streams open one after another, slowly enough that opening is not what is measured; figures are taken while all are
open. Each step has more of them, up to the first that falls behind: that is what one process on one core can hold.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from tests.bench.bench import Bench, Running
from tests.bench.proc import cpu_seconds, memory_mb, open_files_limit
from tests.bench.processes import Unavailable
from tests.bench.report import Curve, say
from tests.bench.systems.base import System
from tests.bench.systems.llmstream import Llmstream
from tests.bench.systems.nginx import Nginx
from tests.bench.systems.smg import Smg
from tests.bench.tools import Answers, Load

OPENED_PER_S = 250
"""New streams a second: a fraction of what any of the systems can do."""
SETTLES_S = 4.0
LOOKS_S = 8.0
LATE_MS = 2000
"""A stream keeps pace when no chunk comes later than a second after its time."""
SPARE_FILES = 200


class _Seen(NamedTuple):
    streams: int
    megabytes: float
    """For each 1,000 streams, beyond what the idle process has."""
    share: float
    """Of a core, while all are open."""
    answers: Answers

    @property
    def keeps_pace(self) -> bool:
        return not self.answers.faults and self.answers.gap is not None and self.answers.gap.max < LATE_MS

    def __str__(self) -> str:
        gap = self.answers.gap
        pace = f"gaps p99 {gap.p99:.0f} ms, max {gap.max:.0f} ms" if gap else "no gaps measured"
        size = f"{self.megabytes:.1f} MB per 1,000, {self.share:.0%} of a core"
        return f"{self.streams:>7,} open: {size}, {pace} {self.answers.faults}".rstrip()


async def open_streams(bench: Bench, case: str) -> None:
    most = bench.effort.open_streams[-1]
    # A proxy needs two sockets for each stream and some files of its own.
    limit = (open_files_limit() - SPARE_FILES) // 2
    if limit < most:
        why = f"this user may open {open_files_limit():,} files (ulimit -Hn), so {limit:,} were taken"
        bench.report.miss(case, f"{most:,} streams", why)
    everything: list[System] = [Llmstream({"scheduler.remote_slots": most}), Smg(), Nginx()]
    for system in everything:
        if system.name not in bench.systems:
            continue
        try:
            await system.prepare(bench)
            seen = await _up_to_the_knee(
                bench, system, sorted({min(count, limit) for count in bench.effort.open_streams})
            )
        except (Unavailable, TimeoutError) as error:
            bench.report.miss(case, system.name, error)
        else:
            _report(bench, case, system.name, seen)


async def _up_to_the_knee(bench: Bench, system: System, counts: list[int]) -> list[_Seen]:
    found: list[_Seen] = []
    for count in counts:
        async with system.serve(bench) as server:
            found.append(await _measure(bench, server, count))
        say(f"  {system.name:16} {found[-1]}")
        if not found[-1].keeps_pace:
            break
    return found


async def _measure(bench: Bench, server: Running, streams: int) -> _Seen:
    assert server.pid is not None
    ramp_s = streams / OPENED_PER_S
    load = Load(
        tokens=int(ramp_s + SETTLES_S + LOOKS_S + 4),
        delay_ms=1000,
        clients=streams,
        once=True,
        ramp_ms=int(ramp_s * 1000),
        seconds=ramp_s + 1,
        drain_s=ramp_s + SETTLES_S + LOOKS_S + 20,
    )
    await bench.load(server, Load(clients=16, seconds=0.3))
    idle = memory_mb(server.pid)
    async with bench.under(server, load) as running:
        await asyncio.sleep(ramp_s + SETTLES_S)
        start = cpu_seconds(server.pid)
        await asyncio.sleep(LOOKS_S)
        share = (cpu_seconds(server.pid) - start) / LOOKS_S
        megabytes = (memory_mb(server.pid) - idle) / streams * 1000
        answers = await running
    return _Seen(streams, megabytes, share, answers)


def _report(bench: Bench, case: str, name: str, seen: list[_Seen]) -> None:
    best = max((each for each in seen if each.keeps_pace), key=lambda each: each.streams, default=None)
    if best is None:
        bench.report.miss(case, name, f"{seen[0].streams:,} streams did not keep pace: {seen[0].answers.faults}")
        return
    note = f"with {best.streams:,} open, all {best.answers.ok:,} right and in time"
    bench.report.add(case, name, "streams at 1 chunk/s that keep pace", [best.streams])
    bench.report.add(case, name, "MB per 1,000 open streams", [best.megabytes], note)
    bench.report.add(case, name, "µs CPU per chunk", [best.share / best.streams * 1e6])
    if len(seen) > 1:
        points = [(float(each.streams), each.share * 100) for each in seen]
        bench.report.curves.append(Curve(case, f"{name}, 1 chunk/s", "open streams", "% of a core", points))
        points = [(float(each.streams), each.answers.gap.max) for each in seen if each.answers.gap]
        bench.report.curves.append(Curve(case, "longest gap", "open streams", "ms between chunks", points))
