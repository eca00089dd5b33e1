"""Memory of ``serve`` that has nothing to do and no model loaded."""

from __future__ import annotations

import asyncio

from tests.bench.bench import Bench
from tests.bench.proc import memory_mb
from tests.bench.systems.llmstream import Llmstream

SETTLES_S = 2.0


async def idle(bench: Bench, case: str) -> None:
    found = []
    for _ in range(min(bench.effort.rounds, 3)):
        async with Llmstream().serve(bench) as server:
            await asyncio.sleep(SETTLES_S)
            assert server.pid is not None
            found.append(memory_mb(server.pid))
    bench.report.add(case, "llmstream", "MB, store apart", found)
