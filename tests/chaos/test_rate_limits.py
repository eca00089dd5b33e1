"""Limits of callers hold over three replicas that are hammered, and one of which is killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from llmstream.config import SchedulerSettings
from llmstream.store.keys import QUEUE_PARTS
from llmstream.store.lanes import Census
from llmstream.store.store import Store
from tests.api.keyed import secret
from tests.chaos.fleet import Fleet, open_fleet
from tests.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS, TOKENS, RUNNING, WAITING = 30, 60_000, 4, 20
SETTINGS = {
    "models.echo.engine": "echo",
    "models.echo.slots": 8,
    "scheduler.lease_s": 1.0,
    "keys.rates.value": secret("rates"),
    "keys.rates.requests_per_minute": 1,
    "keys.rates.burst_size": REQUESTS,
    "keys.rates.tokens_per_minute": TOKENS,
    "keys.jobs.value": secret("jobs"),
    "keys.jobs.concurrent_jobs": RUNNING,
    "keys.jobs.queued_jobs": WAITING,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder: Path = tmp_path_factory.mktemp("rates")
    async with open_fleet(folder, SETTINGS) as fleet:
        yield fleet


async def ask(url: str, name: str, tokens: int) -> tuple[int, str]:
    """The status, and the id of the job where there is one; 0 from a replica that was killed."""
    body = {"message": "say something", "max_tokens": 100, "echo": {"tokens": tokens, "delay_ms": 20}}
    try:
        async with (
            aiohttp.ClientSession(url, headers={"X-API-Key": secret(name)}) as http,
            http.post("/chat/async", json=body) as answer,
        ):
            return answer.status, (await answer.json()).get("task_id", "")
    except aiohttp.ClientError:
        return 0, ""


async def hammer(fleet: Fleet, name: str, count: int, tokens: int) -> list[tuple[int, str]]:
    urls = [replica.url for replica in fleet.replicas if replica.up]
    return await asyncio.gather(*(ask(urls[number % len(urls)], name, tokens) for number in range(count)))


def accepted(found: Sequence[tuple[int, str]]) -> list[str]:
    return [job_id for code, job_id in found if code == 202]


async def until_completed(store: Store, jobs: list[str]) -> None:
    """Waits for the end of all jobs, which has to be a good one."""

    async def done() -> bool:
        return all(state.done for state in await store.jobs.find_all(jobs))

    await wait_until(done, timeout=60)
    assert [state.status for state in await store.jobs.find_all(jobs)] == ["completed"] * len(jobs)


async def test_requests_and_tokens(fleet: Fleet) -> None:
    """Of hundreds of requests to three replicas exactly as many are accepted as there may be, also while one of them is
    killed; every job ends, and what it used is counted once."""
    async with fleet.inside() as store:
        began = time.monotonic()
        found = await hammer(fleet, "rates", REQUESTS // 2, 40)
        assert len(accepted(found)) == REQUESTS // 2
        rest = asyncio.create_task(hammer(fleet, "rates", 120, 40))
        await asyncio.sleep(0.05)
        await fleet.replicas[0].end(signal.SIGKILL)
        found += await rest
        found += await hammer(fleet, "rates", 30, 40)
        codes, refilled = Counter(code for code, _ in found), int((time.monotonic() - began) / 60)
        # A replica that was killed may have taken what it could not tell.
        assert REQUESTS - codes[0] <= codes[202] <= REQUESTS + refilled
        assert codes.keys() <= {202, 429, 0}
        await until_completed(store, accepted(found))
        notes = [store.keys.noted("rates", job_id) for job_id in accepted(found)]

        async def settled() -> bool:
            return all(
                value == b"settled"
                for value in await asyncio.gather(*(store.writes.call("GET", note) for note in notes))
            )

        await wait_until(settled)


@asynccontextmanager
async def watched(store: Store) -> AsyncIterator[list[Census]]:
    """Looks at the queue all the time."""
    lanes, seen = store.lanes("echo", SchedulerSettings()), list[Census]()

    async def watch() -> None:
        while True:
            seen.append(await lanes.census())
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def totals(seen: Sequence[Census], part: str) -> Iterator[int]:
    return (sum(getattr(census, part).values()) for census in seen)


async def test_jobs_at_once_and_in_line(fleet: Fleet) -> None:
    """At no moment more jobs of a caller run or wait than may, on all replicas together; those of one that was killed
    go on elsewhere, its slots are used again, and in the end nothing is left."""
    if not fleet.replicas[0].up:
        await fleet.replicas[0].start()
    async with fleet.inside() as store, watched(store) as seen:
        found = await hammer(fleet, "jobs", 120, 25)
        assert {code for code, _ in found} == {202, 429}
        assert len(accepted(found)) >= WAITING
        await wait_until(lambda: list(totals(seen[-1:], "running")) == [RUNNING])
        assert max(totals(seen, "waiting")) == WAITING
        await fleet.replicas[1].end(signal.SIGKILL)
        found += await hammer(fleet, "jobs", 30, 25)
        await until_completed(store, accepted(found))
        assert max(totals(seen, "running")) == RUNNING
        # Those that the dead one ran wait again, beside the others.
        assert max(map(sum, zip(totals(seen, "waiting"), totals(seen, "running"), strict=True))) == WAITING + RUNNING
        keys = dict(zip(QUEUE_PARTS, store.keys.queue("echo"), strict=True))

        async def empty() -> bool:
            left: int = await store.writes.call("EXISTS", keys["callers"], keys["parked"], keys["meta"])
            return left == 0

        await wait_until(empty)
