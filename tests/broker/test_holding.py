"""Schedules, pauses and drains where jobs go through RabbitMQ."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from llmstream.config import ModelSettings
from llmstream.server import Server
from tests.api.reading import finished, status, submit
from tests.broker.test_rabbitmq import order, result_of, settled
from tests.conftest import echo_settings
from tests.rabbit import Queues
from tests.waiting import wait_until


@pytest.fixture
async def server(tmp_path: Path, rabbit: Queues) -> AsyncIterator[Server]:
    """A server with two models that takes two jobs at once out of each queue."""
    model = ModelSettings(engine="echo", slots=2)
    models = {"echo": model, "other": model}
    async with Server(echo_settings(tmp_path, models=models, broker=rabbit.settings(prefetch=2))) as server:
        yield server


async def test_a_scheduled_job_waits_in_the_store(http: aiohttp.ClientSession, server: Server, rabbit: Queues) -> None:
    """It takes no place in RabbitMQ nor in anybody's hands, and begins at its time."""
    sleeping = [await submit(http, delay_s=1.0) for _ in range(5)]
    awake = await submit(http)
    assert (await finished(server, awake["task_id"])).status == "completed"
    assert await rabbit.count() == 0
    for job in sleeping:
        state = await finished(server, job["task_id"])
        assert (state.started_at or 0) >= job["not_before"]
    await settled(server, rabbit)


async def test_paused_jobs_do_not_hold_up_others(http: aiohttp.ClientSession, server: Server, rabbit: Queues) -> None:
    """More of them than a replica may hold move on into the store, and those behind them are answered; resumed, all
    are, each once."""
    async with http.post("/queues/pause", json={"model": "other"}) as response:
        assert response.status == 200
    held = [await submit(http, model="other") for _ in range(5)]
    free = await submit(http, model="echo")
    assert (await finished(server, free["task_id"])).status == "completed"

    async def all_aside() -> bool:
        async with http.get("/stats") as response:
            return bool((await response.json())["paused"] == len(held))

    await wait_until(all_aside)
    assert {(await status(http, job["task_id"]))["status"] for job in held} == {"queued"}
    async with http.post("/queues/resume", json={"all": True}) as response:
        assert response.status == 200
    states = [await finished(server, job["task_id"]) for job in held]
    assert [(state.status, state.attempt) for state in states] == [("completed", 1)] * len(held)
    await settled(server, rabbit)


async def test_a_drain_refuses_our_clients_and_finishes_what_others_posted(
    http: aiohttp.ClientSession, server: Server, rabbit: Queues
) -> None:
    """Over HTTP new jobs get 503 and leave nothing behind; what is in the queue has been accepted already."""
    async with http.post("/queues/drain", json={}) as response:
        assert response.status == 200
    async with http.post("/chat/async", json={"message": "x", "job_id": "refused"}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "queue_draining")
    async with http.get("/chat/refused") as response:
        assert response.status == 404
    await rabbit.post(json.dumps(order("theirs", "hello")).encode())
    assert (await result_of(server, "theirs"))["content"] == "hello"
    await settled(server, rabbit)
