"""What becomes of an answer when its readers leave, counted over all replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llmstream.api.app import create_app
from llmstream.config import DisconnectSettings, ServerSettings, StoreSettings
from llmstream.scheduler import audience
from llmstream.server import Server
from llmstream.store.store import open_store
from tests.api.pair import two_clients, two_servers
from tests.api.reading import Json, conversation, status, submit, tokens
from tests.conftest import echo_settings
from tests.logs import finished as end_of
from tests.logs import new_job
from tests.waiting import wait_until

STALL = {"fault": "stall", "at": 3, "tokens": 9}
OPENAI = "/v1/chat/completions"
SHORT = DisconnectSettings(grace_s=0.3)


async def read_some(http: aiohttp.ClientSession, route: str, **more: Any) -> aiohttp.ClientResponse:
    """Begins to read an answer that stops in its middle; close the response to leave."""
    body = conversation(**{"echo": STALL, **more})
    response = await http.post(route, json={**body, "stream": True} if route == OPENAI else body)
    await _until_silent(response)
    return response


async def come_back(http: aiohttp.ClientSession, job_id: str) -> aiohttp.ClientResponse:
    response = await http.get(f"{OPENAI}/{job_id}?stream=true")
    await _until_silent(response)
    return response


async def _until_silent(response: aiohttp.ClientResponse) -> None:
    assert response.status == 200, await response.text()
    seen = b""
    while b"tok0002" not in seen:
        seen += await response.content.readany()


async def has(http: aiohttp.ClientSession, job_id: str, wanted: str) -> bool:
    found: str = (await status(http, job_id))["status"]
    return found == wanted


async def cancelled(http: aiohttp.ClientSession, job_id: str, timeout: float = 10.0) -> Json:
    """Waits until a job was cancelled."""
    await wait_until(lambda: has(http, job_id, "cancelled"), timeout)
    return await status(http, job_id)


@pytest.fixture
async def short(tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server with a short time of grace."""
    settings = echo_settings(tmp_path, disconnect=SHORT)
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        yield http


@pytest.mark.parametrize("policy", ["cancel", "grace", "grace(0.2s)", None])
async def test_an_openai_stream_that_is_left_ends(short: aiohttp.ClientSession, policy: str | None) -> None:
    """When the client of a silent stream leaves, the job is cancelled at once or after the grace time, by default too;
    what it had said is kept."""
    response = await read_some(short, OPENAI, **({"on_disconnect": policy} if policy else {}))
    response.close()
    job = await cancelled(short, response.headers["x-job-id"], timeout=6)
    assert job["text"] == tokens(3)


async def test_a_whole_answer_that_is_left_ends(short: aiohttp.ClientSession) -> None:
    """A client that no longer waits for its whole answer is noticed as well."""
    with pytest.raises(TimeoutError):
        await short.post(OPENAI, json=conversation(echo=STALL), timeout=aiohttp.ClientTimeout(total=0.3))
    async with short.get("/jobs") as response:
        job_id = (await response.json())["data"][0]["task_id"]
    await cancelled(short, job_id)


@pytest.mark.parametrize("route", ["/chat", OPENAI])
async def test_continue_goes_on(short: aiohttp.ClientSession, route: str) -> None:
    """With ``continue``, the default of ``/chat``, an answer is completed without a reader."""
    more = {"on_disconnect": "continue"} if route == OPENAI else {}
    response = await read_some(short, route, echo={"tokens": 60, "delay_ms": 10}, **more)
    response.close()
    job_id = response.headers["x-job-id"]
    await wait_until(lambda: has(short, job_id, "completed"))


@pytest.mark.parametrize("policy", ["often", "grace()", "grace(-1s)", "grace(30)", 5])
async def test_policies_are_checked(http: aiohttp.ClientSession, policy: Any) -> None:
    """A policy that is none is refused."""
    async with http.post("/chat", json={"message": "x", "on_disconnect": policy}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "on_disconnect"


async def test_a_reader_on_another_replica_keeps_the_job(tmp_path: Path) -> None:
    """A job is not cancelled when one of its readers leaves, only when the last does, wherever each reads."""
    async with two_clients(tmp_path) as (one, two):
        first = await read_some(one, OPENAI, on_disconnect="cancel")
        job_id = first.headers["x-job-id"]
        second = await come_back(two, job_id)
        third = await come_back(one, job_id)
        for response in (first, third):
            response.close()
        await _readers_left(tmp_path, job_id, 1)
        assert await has(one, job_id, "in_progress")
        second.close()
        await cancelled(one, job_id, timeout=6)


async def _readers_left(tmp_path: Path, job_id: str, count: int) -> None:
    settings = StoreSettings.model_validate({"url": f"unix://{tmp_path}/a/store/valkey.sock"})
    async with open_store(settings, tmp_path) as store:

        async def reached() -> bool:
            return bool(await store.writes.call("ZCARD", store.keys.readers(job_id)) == count)

        await wait_until(reached)


async def test_coming_back_within_the_grace_keeps_the_job(server: Server, http: aiohttp.ClientSession) -> None:
    """Whoever comes back in time finds the job alive, and the time counts anew from when they leave again."""
    store = server.gateway._store
    response = await read_some(http, OPENAI, on_disconnect="grace(3s)")
    job_id = response.headers["x-job-id"]
    unread = store.lanes("echo", server.settings.scheduler)._key("unread")

    async def alone() -> bool:
        return bool(await store.writes.call("HEXISTS", store.keys.job(job_id), "alone_since"))

    async def look_at() -> float:
        return float(await store.writes.call("ZSCORE", unread, job_id))

    begun = await look_at()

    async def soon() -> bool:
        return await look_at() < begun - 4000

    response.close()
    await wait_until(alone)
    await wait_until(soon)
    due = await look_at()
    back = await come_back(http, job_id)
    assert not await alone()

    async def looked_again() -> bool:
        return await look_at() > due + 4000

    await wait_until(looked_again)
    assert await has(http, job_id, "in_progress")
    back.close()
    await cancelled(http, job_id)


async def test_a_job_nobody_ever_reads(short: aiohttp.ClientSession) -> None:
    """A job submitted with ``cancel`` waits for its first reader for the grace time, and no longer."""
    job = await submit(short, on_disconnect="cancel", echo=STALL)
    await cancelled(short, job["task_id"])


async def test_a_waiting_job_that_is_left_never_runs(tmp_path: Path) -> None:
    """A job that is left before its turn came is taken out of the line."""
    async with Server(echo_settings(tmp_path, slots=1)) as server, aiohttp.ClientSession(server.url) as http:
        await submit(http, echo=STALL)
        async with http.post("/chat", json={"message": "x", "on_disconnect": "cancel"}) as response:
            job_id = response.headers["x-job-id"]
            assert await has(http, job_id, "queued")
        job = await cancelled(http, job_id)
        assert job["attempt"] == 0
        async with http.get("/stats") as response:
            assert (await response.json())["waiting"] == 0


async def test_readers_that_die_with_their_replica_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers whose replica says nothing more stop counting when their lease lapses; those of living ones go on."""
    monkeypatch.setattr(audience, "LEASE_S", 0.6)
    async with two_servers(tmp_path) as (one, two), aiohttp.ClientSession(one.url) as http:
        kept = await read_some(http, OPENAI, on_disconnect="cancel")
        left = await read_some(http, OPENAI, on_disconnect="cancel")
        # As if they had been on a replica that is no more: nobody renews, nobody says goodbye.
        for seat in list(one.gateway._scheduler.audience._taken):
            if seat._job_id == left.headers["x-job-id"]:
                seat.close()
        await cancelled(http, left.headers["x-job-id"])
        assert await has(http, kept.headers["x-job-id"], "in_progress")
        for response in (kept, left):
            response.close()
        assert two.gateway.replica != one.gateway.replica


async def test_a_replica_that_shuts_down_takes_no_job_with_it(tmp_path: Path) -> None:
    """Readers cut off by a deploy have the time of their lease to come back, whatever the policy."""
    async with (
        two_servers(tmp_path, server=ServerSettings(port=0, shutdown_grace_s=0)) as (one, two),
        aiohttp.ClientSession(one.url) as http,
        aiohttp.ClientSession(two.url) as other,
    ):
        response = await read_some(other, OPENAI, on_disconnect="cancel", echo={"tokens": 60, "delay_ms": 20})
        job_id = response.headers["x-job-id"]
        await two.__aexit__(None, None, None)
        assert (await status(http, job_id))["status"] in {"queued", "in_progress"}
        async with http.get(f"{OPENAI}/{job_id}") as answer:
            body = await answer.json()
        assert body["choices"][0]["message"]["content"] == tokens(60)


async def test_a_mounted_application_notices_too(tmp_path: Path) -> None:
    """The leave of a client is noticed on a runner that is not ours."""
    app = web.Application()
    app.add_subapp("/llm/", create_app(echo_settings(tmp_path)))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}/llm/") as http:
            response = await http.post(
                "v1/chat/completions", json=conversation(stream=True, on_disconnect="cancel", echo=STALL)
            )
            await _until_silent(response)
            response.close()

            async def over() -> bool:
                async with http.get(f"chat/{response.headers['x-job-id']}") as answer:
                    return bool((await answer.json())["status"] == "cancelled")

            await wait_until(over, timeout=6)
    finally:
        await runner.cleanup()


async def test_deciding_and_ending_are_one_step(server: Server) -> None:
    """Of a reader who comes and a check that finds nobody, one is first: who was counted before is never cut off."""
    store = server.gateway._store
    for _ in range(30):
        job = await new_job(store, grace_s=0.0)
        seat = server.gateway._scheduler.audience.seat()
        seat.bind(job, store.lanes("p", server.settings.scheduler), counted=False)
        look = server.gateway._scheduler.audience.look(job.id, store.lanes("p", server.settings.scheduler))
        await asyncio.gather(seat.take(), look)
        state = await store.jobs.get(job.id)
        assert state.status == "queued"
        await seat.leave()
        assert (await store.jobs.get(job.id)).status == "cancelled"
        assert (await store.jobs.end(job.id, end_of("failed"))).status == "cancelled"
