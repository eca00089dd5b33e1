"""How the costs grow: with waiting jobs, stored logs, readers of one job, and events in one log."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import aiohttp

from llmstream.config import SchedulerSettings
from llmstream.types import GenerateRequest, Job, new_id
from tests.bench.bench import Bench, Cost, Running
from tests.bench.cases.jobs import finished_job
from tests.bench.proc import cpu_seconds
from tests.bench.report import Curve, say, short
from tests.bench.systems.llmstream import Llmstream
from tests.bench.tools import Load

POOL = "remote"
JOB = Load(tokens=16, clients=64, seconds=2.5, shape="whole")
AT_ONCE = 500
FILLS_S = 600.0
WARM_S = 1.0
LOWEST, HIGHEST = -10, 10
READ_EVENTS = 100
READ_DELAY_MS = 20
WAITS_MS = 4000
"""From the last reader's arrival to the first event."""


async def waiting(bench: Bench, case: str) -> None:
    """Cost of one job while N others wait.

    The others have the lowest priority and ageing is off; the measured ones have the highest, and there are more
    clients than slots: so the backlog stays as it is while jobs pass it.
    """
    limits = {"scheduler.max_waiting": 10**7, "scheduler.ageing_s": 10**6, "scheduler.remote_slots": 32}
    load = replace(JOB, seconds=FILLS_S, body={"priority": HIGHEST})
    servers, stores = [], []
    async with bench.fresh_store(), Llmstream(limits).serve(bench) as server, bench.under(server, load):
        await asyncio.sleep(WARM_S)
        for count in bench.effort.waiting:
            await _add_backlog(bench, server, count)
            before = await _waiting(server)
            server_us, store_us = await _cost_of_window(bench, server, JOB.seconds * bench.effort.factor)
            left = await _waiting(server)
            servers.append((count, server_us))
            stores.append((count, store_us))
            say(f"  {before:>9,} waiting, then {left:,}: {server_us:.0f} µs a job, {store_us:.0f} µs in the store")
    _add(bench, case, "cost of one job", "jobs waiting", "µs CPU per job", servers)
    _add(bench, case, "the same in the store", "jobs waiting", "µs CPU per job in the store", stores)


async def _cost_of_window(bench: Bench, server: Running, seconds: float) -> tuple[float, float]:
    """CPU of server and store for each job that runs while a load goes on, in microseconds."""
    assert server.pid is not None
    jobs, server_s, store_s = (await bench.upstream()).answers, cpu_seconds(server.pid), cpu_seconds(bench.store.pid)
    await asyncio.sleep(seconds)
    server_s, store_s = cpu_seconds(server.pid) - server_s, cpu_seconds(bench.store.pid) - store_s
    jobs = (await bench.upstream()).answers - jobs
    return server_s / max(jobs, 1) * 1e6, store_s / max(jobs, 1) * 1e6


async def _add_backlog(bench: Bench, server: Running, count: int) -> None:
    """Fills the queue up to ``count`` jobs, written as the server itself would."""
    missing = count - await _waiting(server)
    body = {"model": "mock-n1-d0", "messages": [{"role": "user", "content": "later"}]}
    request = GenerateRequest.of(kind="chat", model=body["model"], body=body)  # type: ignore[arg-type]
    async with bench.store.inside() as store:
        lanes = store.lanes(POOL, SchedulerSettings(max_waiting=10**7))

        async def put() -> None:
            job = Job(id=new_id(), request=request, pool=POOL, created_at=time.time(), priority=LOWEST)
            await store.jobs.create(job)
            await lanes.push(job, wake=False)

        for start in range(0, missing, AT_ONCE):
            await asyncio.gather(*(put() for _ in range(min(AT_ONCE, missing - start))))


async def _waiting(server: Running) -> int:
    async with aiohttp.ClientSession() as http, http.get(f"{server.url}/stats") as answer:
        return int((await answer.json())["waiting"])


async def stored(bench: Bench, case: str) -> None:
    """Cost of one job, and of reading an old log, when N logs are kept. The logs are made by the jobs themselves."""
    costs, reads, memory = [], [], []
    load = JOB.shortened(bench.effort.factor)
    async with bench.fresh_store() as store, Llmstream().serve(bench) as server:
        old = await finished_job(server, 64)
        kept = 0
        for count in bench.effort.stored:
            if count > kept:
                fill = Load(tokens=16, clients=64, seconds=3600, requests=count - kept, shape="whole")
                kept += (await bench.load(server, fill)).ok
            cost = await bench.cost(server, load)
            kept += cost.answers.ok
            costs.append((kept, _per(cost, cost.server_s, cost.answers.ok)))
            read = await bench.load(server, Load(tokens=64, read=old, requests=200, seconds=20))
            reads.append((kept, read.total.p50 if read.total else float("nan")))
            memory.append((kept, await store.memory_mb()))
            say(f"  {kept:>9,} stored: {costs[-1][1]:.0f} µs a job, {reads[-1][1]:.2f} ms to read the oldest")
    _add(bench, case, "cost of one job", "logs stored", "µs CPU per job", costs)
    _add(bench, case, "reading the oldest log", "logs stored", "ms for 64 events, p50", reads)
    _add(bench, case, "memory of the store", "logs stored", "MB", memory)


async def subscribers(bench: Bench, case: str) -> None:
    """Cost of one event for one reader when N clients read the same running job."""
    costs = []
    async with Llmstream().serve(bench) as server:
        for count in bench.effort.subscribers:
            # All readers are there before the first token.
            ramp_ms = max(3 * count, 200)
            job = Load(tokens=READ_EVENTS, delay_ms=READ_DELAY_MS, first_ms=ramp_ms + WAITS_MS)
            body = {"message": "count", "model": job.model}
            async with (
                aiohttp.ClientSession(server.url) as http,
                http.post("/chat/async", json=body) as accepted,
            ):
                path = (await accepted.json())["stream_url"]
            readers = Load(
                tokens=READ_EVENTS,
                read=path,
                clients=count,
                once=True,
                ramp_ms=ramp_ms,
                seconds=ramp_ms / 1000 + 1,
                drain_s=60,
            )
            cost = await _delivery(bench, server, readers, ramp_ms)
            costs.append((count, cost))
            say(f"  {count:>9,} readers: {cost:.1f} µs for each event and reader")
    _add(bench, case, "one event to one reader", "readers of one job", "µs CPU per delivered event", costs)


async def _delivery(bench: Bench, server: Running, readers: Load, ramp_ms: int) -> float:
    """CPU per delivered event in microseconds, without what opening and holding the connections takes."""
    assert server.pid is not None
    async with bench.under(server, readers) as running:
        await asyncio.sleep((ramp_ms + WAITS_MS / 2) / 1000)
        idle_from, idle_s = time.perf_counter(), cpu_seconds(server.pid)
        await asyncio.sleep(WAITS_MS / 4 / 1000)
        start, start_s = time.perf_counter(), cpu_seconds(server.pid)
        answers = await running
        busy_s = cpu_seconds(server.pid) - start_s
        idle_s = (start_s - idle_s) * (time.perf_counter() - start) / (start - idle_from)
    return (busy_s - idle_s) / max(answers.tokens, 1) * 1e6


async def events(bench: Bench, case: str) -> None:
    """Cost of writing and of replaying one event when the log has N of them."""
    writes, replays = [], []
    async with Llmstream().serve(bench) as server:
        assert server.pid is not None
        for count in bench.effort.events:
            start = cpu_seconds(server.pid)
            path = await finished_job(server, count)
            writes.append((count, (cpu_seconds(server.pid) - start) / count * 1e6))
            times = max(3, min(100, 20_000 // count))
            cost = await bench.cost(server, Load(tokens=count, read=path, requests=times, seconds=60))
            replays.append((count, _per(cost, cost.server_s, cost.answers.tokens)))
            say(f"  {count:>9,} events: {writes[-1][1]:.1f} µs to write, {replays[-1][1]:.2f} µs to replay each")
    _add(bench, case, "writing and sending", "events in one log", "µs CPU per event", writes)
    _add(bench, case, "replaying", "events in one log", "µs CPU per replayed event", replays)


def _per(cost: Cost, seconds: float, units: int) -> float:
    return seconds / units * 1e6 if units else float("nan")


def _add(bench: Bench, case: str, title: str, x: str, unit: str, points: list[tuple[int, float]]) -> None:
    bench.report.curves.append(Curve(case, title, x, unit, [(float(at), value) for at, value in points]))
    (least, first), (most, last) = points[0], points[-1]
    note = f"at {most:,} {x}; {short(first)} at {least:,}"
    bench.report.add(case, "llmstream", f"{unit}", [last], note)
    bench.report.add(case, "llmstream", f"× {unit}, {least:,} → {most:,}", [last / first])
