"""One worker process, then two, on one store: jobs per second."""

from __future__ import annotations

from tests.bench.bench import Bench
from tests.bench.systems.llmstream import Llmstream
from tests.bench.tools import Load

LOAD = Load(tokens=16, clients=64, seconds=3.0, shape="whole")
CORES_NEEDED = 5
"""Two workers, the load generator with the upstream, the store, and the supervisor's rest."""


async def replicas(bench: Bench, case: str) -> None:
    load = LOAD.shortened(bench.effort.factor)
    cores = bench.cores.free
    wide = len(cores) >= CORES_NEEDED
    rates: dict[int, list[float]] = {1: [], 2: []}
    costs: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(bench.effort.rounds):
        for workers in rates:
            # Behind those of load and store, so that each worker has a core to itself.
            own = ",".join(cores[3 : 3 + workers]) if wide else bench.cores.server
            async with Llmstream({"server.workers": workers}).serve(bench, core=own) as server:
                await bench.load(server, load.shortened(0.3))
                cost = await bench.cost(server, load)
            rates[workers].append(cost.answers.ok / cost.answers.seconds)
            costs[workers].append(cost.server_s / max(cost.answers.ok, 1) * 1e6)
    for workers in rates:
        name = f"llmstream ×{workers}"
        bench.report.add(case, name, "µs CPU per job", costs[workers])
        if wide:
            bench.report.add(case, name, "jobs per second", rates[workers])
    if not wide:
        why = f"jobs per second: two workers beside load and store need {CORES_NEEDED} cores, here are {len(cores)}"
        bench.report.miss(case, "llmstream ×2", why)
        gain = [2 * one / two for one, two in zip(costs[1], costs[2], strict=True)]
        bench.report.add(case, "llmstream", "× jobs per second, from CPU per job", gain, "if each had a core")
