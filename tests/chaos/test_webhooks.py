"""Replicas that are killed while jobs end and while their ends are told: every receiver hears of every job."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.chaos.fleet import Fleet, Replica, open_fleet
from tests.waiting import wait_until
from tests.webhooks.receiver import SECRET, Receiver, hang

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = {
    "models.echo.engine": "echo",
    "models.echo.slots": "8",
    "scheduler.lease_s": "1",
    "webhooks.secret": SECRET,
    "webhooks.allow": "127.0.0.0/8",
    "webhooks.timeout_s": "1",
    "webhooks.base_s": "0.1",
    "webhooks.cap_s": "0.5",
}
JOBS = 40


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with open_fleet(tmp_path_factory.mktemp("fleet"), SETTINGS, count=2) as fleet:
        yield fleet


async def submit(replica: Replica, url: str, **echo: object) -> str | None:
    """The id of an accepted job; None where nobody answered."""
    body = {"message": "go", "model": "echo", "webhook": url, "echo": echo}
    try:
        async with aiohttp.ClientSession(replica.url) as http, http.post("/chat/async", json=body) as answer:
            told = await answer.json()
            assert answer.status == 202, told
            return str(told["task_id"])
    except (aiohttp.ClientError, OSError):
        return None


async def unsure(request: web.Request) -> web.StreamResponse:
    """Takes the event in, and never says so."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def kill_by_turns(replicas: list[Replica], rng: random.Random) -> None:
    for replica in replicas:
        await asyncio.sleep(rng.uniform(0.1, 0.3))
        await replica.end()
        await replica.start()


async def test_every_accepted_job_is_told_of(fleet: Fleet) -> None:
    """Both replicas are killed in turn while their jobs end and are told of, to a receiver that fails, loses answers
    and hangs: each accepted job's event comes at least once, the same each time, and ids tell repeats."""
    rng, replicas = random.Random(7), list(fleet.replicas)
    async with Receiver() as receiver:
        receiver.answers = [rng.choice((204, 500, unsure, 204, hang)) for _ in range(JOBS)]
        killing = asyncio.create_task(kill_by_turns(replicas, rng))
        accepted: list[str] = []
        while len(accepted) < JOBS or not killing.done():
            replica = rng.choice([each for each in replicas if each.up] or replicas)
            job_id = await submit(replica, receiver.url, tokens=5, delay_ms=rng.choice((0, 20, 60)))
            accepted += [job_id] if job_id is not None else []
            await asyncio.sleep(0.02)
        await killing
        await wait_until(lambda: all(receiver.of(job_id) for job_id in accepted), timeout=30)
        assert not receiver.bad
        for job_id in accepted:
            events = receiver.of(job_id)
            assert all(event == events[0] for event in events)
            assert events[0]["type"] == "response.completed"
        assert len({event["id"] for event in receiver.events}) == len(
            {event["data"]["id"] for event in receiver.events}
        )


async def test_a_replica_that_dies_as_it_delivers_is_replaced(fleet: Fleet) -> None:
    """The other replica sends the event again when the lease has ended, under the same id."""
    one, _ = fleet.replicas
    async with Receiver() as receiver:
        receiver.answers = [hang]
        async with fleet.only(one):
            job_id = await submit(one, receiver.url, tokens=1)
            await wait_until(lambda: receiver.open == 1)
            await one.end()
        await one.start()
        assert job_id is not None
        await wait_until(lambda: len(receiver.ids) == 2, timeout=20)
        assert receiver.ids[0] == receiver.ids[1]
        assert [event["data"]["id"] for event in receiver.events] == [job_id, job_id]
