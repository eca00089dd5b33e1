"""Many open streams at one chunk a second through one process: memory, and whether all keep pace."""

from __future__ import annotations

import asyncio

from tests.bench.bench import Bench, Running
from tests.bench.proc import memory_mb, open_files_limit
from tests.bench.processes import Unavailable
from tests.bench.systems.base import System
from tests.bench.systems.llmstream import Llmstream
from tests.bench.systems.nginx import Nginx
from tests.bench.systems.smg import Smg
from tests.bench.tools import Load

CHUNKS = 12
LATE_MS = 2000
"""A stream keeps pace when no chunk comes later than a second after its time."""


async def open_streams(bench: Bench, case: str) -> None:
    wanted = bench.effort.open_streams
    # A proxy needs two sockets for each stream and some files of its own.
    streams = min(wanted, (open_files_limit() - 200) // 2)
    if streams < wanted:
        why = f"this user may open {open_files_limit():,} files (ulimit -Hn), so {streams:,} were taken"
        bench.report.miss(case, f"{wanted:,} streams", why)
    everything: list[System] = [Llmstream({"scheduler.remote_slots": wanted}), Smg(), Nginx()]
    for system in everything:
        if system.name not in bench.systems:
            continue
        try:
            await system.prepare(bench)
            async with system.serve(bench) as server:
                await _measure(bench, case, server, streams)
        except (Unavailable, TimeoutError) as error:
            bench.report.miss(case, system.name, error)


async def _measure(bench: Bench, case: str, server: Running, streams: int) -> None:
    assert server.pid is not None
    load = Load(
        tokens=CHUNKS,
        delay_ms=1000,
        clients=streams,
        once=True,
        ramp_ms=max(streams // 2, 500),
        seconds=max(streams / 2000, 0.5) + 1,
        drain_s=CHUNKS + 15,
    )
    await bench.load(server, Load(clients=16, seconds=0.3))
    idle = peak = memory_mb(server.pid)
    run = asyncio.create_task(bench.cost(server, load), name="open-streams")
    try:
        while not run.done():
            await asyncio.wait([run], timeout=1)
            peak = max(peak, memory_mb(server.pid))
    finally:
        answers, server_s, _ = await run
    megabytes = (peak - idle) / streams * 1000
    if answers.faults:
        bench.report.miss(case, server.name, f"{megabytes:.1f} MB per 1,000, but {answers.faults}")
    else:
        note = f"all {answers.ok:,} right"
        bench.report.add(case, server.name, "MB per 1,000 open streams", [megabytes], note)
    bench.report.add(case, server.name, "µs CPU per chunk", [server_s / max(answers.tokens, 1) * 1e6])
    if answers.gap:
        pace = "all kept pace" if answers.gap.max < LATE_MS else "some fell behind"
        note = f"max {answers.gap.max:.0f}: {pace}"
        bench.report.add(case, server.name, "ms between chunks, p99", [answers.gap.p99], note)
