"""What only a gateway with jobs has: accepting, resuming, cancelling, going on elsewhere."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time

import aiohttp

from tests.bench.bench import Bench, Running
from tests.bench.processes import Unavailable
from tests.bench.systems.llmstream import Llmstream
from tests.bench.tools import Load

LOG_EVENTS = 4_000
WAIT_S = 30.0


async def accept(bench: Bench, case: str) -> None:
    """``POST /chat/async`` to 202, one client that waits for each answer."""
    async with Llmstream().serve(bench) as server:
        times = []
        for _ in range(bench.effort.rounds):
            answers = await bench.load(server, Load(tokens=16, seconds=2 * bench.effort.factor, shape="accepted"))
            if answers.accepted is None:
                bench.report.miss(case, server.name, f"POST /chat/async gave no job: {answers.faults}")
                return
            times.append(answers.accepted.p50)
        bench.report.add(case, server.name, "ms from POST /chat/async to 202, p50", times)


async def resume(bench: Bench, case: str) -> None:
    """Reading a finished log of 4,000 events, each in an entry of its own, from the beginning."""
    async with Llmstream().serve(bench) as server:
        path = await finished_job(server, LOG_EVENTS, delay_ms=1)
        times, costs = [], []
        for _ in range(bench.effort.rounds):
            cost = await bench.cost(server, Load(tokens=LOG_EVENTS, read=path, requests=10, seconds=WAIT_S))
            if cost.answers.total is None:
                bench.report.miss(case, server.name, cost.answers.faults)
                return
            times.append(cost.answers.total.p50)
            costs.append(cost.server_s / cost.answers.tokens * 1e6)
        bench.report.add(case, server.name, f"ms to replay {LOG_EVENTS:,} events, p50", times)
        bench.report.add(case, server.name, "µs CPU per replayed event", costs)


async def cancel(bench: Bench, case: str) -> None:
    """From the cancellation to the moment the model has nobody to talk to any more."""
    async with Llmstream().serve(bench) as one, Llmstream(name="llmstream-2").serve(bench) as two:
        for asked, told, where in ((one, one, "the same replica"), (one, two, "another replica")):
            times = [await _cancel_ms(bench, asked, told) for _ in range(max(bench.effort.rounds, 3))]
            bench.report.add(case, "llmstream", f"ms to stop, from {where}", times)


async def _cancel_ms(bench: Bench, asked: Running, told: Running) -> float:
    model = Load(tokens=2000, delay_ms=10).model
    request = {"model": model, "stream": True, "messages": [{"role": "user", "content": "count"}]}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)) as http,
        http.post(f"{asked.url}/v1/chat/completions", json=request) as answer,
    ):
        await _until_upstream_streams(bench, 1)
        await _check_place(http, asked, answer.headers["x-job-id"])
        start = time.perf_counter()
        async with http.post(f"{told.url}/chat/{answer.headers['x-job-id']}/cancel") as cancelled:
            if cancelled.status != 200:
                raise Unavailable(f"the cancellation was answered with {cancelled.status}")
        await _until_upstream_streams(bench, 0)
        return (time.perf_counter() - start) * 1000


async def _check_place(http: aiohttp.ClientSession, server: Running, job_id: str) -> None:
    """Raises Unavailable when another replica runs the job."""
    async with http.get(f"{server.url}/health/full") as health, http.get(f"{server.url}/jobs?limit=10") as jobs:
        name = (await health.json())["replica"]
        places = {job["task_id"]: job["replica"] for job in (await jobs.json())["data"]}
    if places.get(job_id) != name:
        raise Unavailable(f"the job runs at {places.get(job_id)}, not at {name}")


async def _until_upstream_streams(bench: Bench, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if (await bench.upstream()).open_streams == count:
                return
            await asyncio.sleep(0.001)


async def takeover(bench: Bench, case: str) -> None:
    """``kill -9`` of the replica that writes: the pause a reader at another one sees, and what it has in the end."""
    pauses: list[float] = []
    tokens = 300
    settings = {"models.echo.engine": "echo", "models.echo.delay_ms": 20}
    async with Llmstream(settings, name="llmstream-2").serve(bench) as survivor:
        for _ in range(bench.effort.rounds):
            async with Llmstream(settings).serve(bench) as victim:
                pause, text = await _kill(victim, survivor, tokens)
            if text != "".join(f" tok{number:04d}" for number in range(tokens)):
                bench.report.fault(case, "llmstream", "tokens were lost or doubled")
            pauses.append(pause)
    note = f"{tokens} tokens in order, none lost or doubled"
    bench.report.add(case, "llmstream", "s of pause after kill -9", pauses, note)


async def _kill(victim: Running, survivor: Running, tokens: int) -> tuple[float, str]:
    assert victim.pid is not None
    text, arrivals = "", []
    body = {"message": "count", "model": "echo", "echo": {"tokens": tokens}}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)) as http:
        async with http.post(f"{victim.url}/chat/async", json=body) as accepted:
            path = (await accepted.json())["stream_url"]
        async with http.get(f"{survivor.url}{path}") as stream:
            async for line in stream.content:
                if line.startswith(b"data:") and (content := json.loads(line[5:]).get("content")):
                    text += content
                    arrivals.append(time.perf_counter())
                    if len(arrivals) == 50:
                        os.kill(victim.pid, signal.SIGKILL)
    return max(later - earlier for earlier, later in itertools.pairwise(arrivals)), text


async def finished_job(server: Running, tokens: int, *, delay_ms: int = 0) -> str:
    """Runs a job to its end and returns where its log can be read."""
    body = {"message": "count", "model": Load(tokens=tokens, delay_ms=delay_ms).model}
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(total=300)) as http:
        async with http.post("/chat/async", json=body) as accepted:
            path = str((await accepted.json())["stream_url"])
        async with http.get(path) as stream:
            async for _ in stream.content.iter_chunked(1 << 16):
                pass
    return path
