"""Pausing, draining and resuming parts of the queue over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.server import Server
from tests.api.keyed import client, keyed_settings, secret
from tests.api.pair import two_clients
from tests.api.reading import conversation, finished, status, submit
from tests.conftest import echo_settings
from tests.waiting import wait_until


async def call(http: aiohttp.ClientSession, action: str, **part: Any) -> list[dict[str, Any]]:
    async with http.post(f"/queues/{action}", json=part) as response:
        body: dict[str, Any] = await response.json()
        assert response.status == 200, body
        rules: list[dict[str, Any]] = body["rules"]
        return rules


async def get(http: aiohttp.ClientSession, path: str) -> Any:
    async with http.get(path) as response:
        return await response.json()


async def is_done(http: aiohttp.ClientSession, job_id: str) -> bool:
    return bool((await status(http, job_id))["status"] == "completed")


async def test_paused_jobs_wait_and_are_seen_everywhere(tmp_path: Path) -> None:
    """A pause made at one replica holds at the other: its jobs are accepted, wait, and say why; counts, health, metrics
    and the list of rules show it; resumed they are answered."""
    async with two_clients(tmp_path) as (one, two):
        (rule,) = await call(one, "pause", lane="low", model="ech*")
        assert (rule["mode"], rule["lane"], rule["model"]) == ("paused", "low", "ech*")
        assert await call(two, "pause", lane="low", model="ech*") == [rule]
        held, free = await submit(two, priority=-5), await submit(one)
        await wait_until(lambda: is_done(two, free["task_id"]))
        shown = await status(one, held["task_id"])
        assert (shown["status"], shown["position"], shown["paused"]) == ("queued", None, True)
        for http in (one, two):
            stats = await get(http, "/stats")
            assert (stats["waiting"], stats["paused"], stats["rules"]) == (0, 1, [rule])
            full = await get(http, "/health/full")
            assert (full["rules"], full["queue"]["echo"]["paused"]) == ([rule], 1)
            async with http.get("/metrics") as response:
                text = await response.text()
            assert 'llmstream_jobs_paused{pool="echo"} 1' in text
            assert 'llmstream_queue_rules{mode="paused"} 1' in text
            assert 'llmstream_queue_rules{mode="draining"} 0' in text
            queues = await get(http, "/queues")
            assert queues["rules"] == [{**rule, "by": "local", "waiting": 1, "running": 0}]
            assert queues["pools"]["echo"]["paused"] == 1
        assert await call(two, "resume", lane="low") == [rule]
        assert await call(two, "resume", lane="low", model="ech*") == []
        await wait_until(lambda: is_done(one, held["task_id"]))


async def test_a_draining_part_refuses_new_jobs_and_finishes_the_others(tmp_path: Path) -> None:
    """New jobs get 503 with a code and a time to ask again, at any replica and on any route, and leave nothing behind;
    a repeated request for one that waits is that one; what waits is answered."""
    async with two_clients(tmp_path) as (one, two):
        await call(one, "pause", model="echo")
        made = await submit(one, job_id="own", priority=3)
        (_, rule) = await call(one, "drain", model="echo")
        assert rule["mode"] == "draining"
        for http in (one, two):
            for path, body in (("/chat/async", {"message": "x"}), ("/v1/chat/completions", conversation())):
                async with http.post(path, json=body) as response:
                    assert response.status == 503, await response.text()
                    assert (await response.json())["error"]["code"] == "queue_draining"
                    assert int(response.headers["Retry-After"]) >= 1
        assert (await submit(two, job_id="own", priority=3))["task_id"] == made["task_id"]
        assert [row["task_id"] for row in (await get(one, "/jobs"))["data"]] == ["own"]
        assert await call(two, "resume", model="echo") == []
        await wait_until(lambda: is_done(one, "own"))
        await submit(one)


async def test_everything_can_be_paused_also_memory_jobs(tmp_path: Path) -> None:
    """Without words a pause covers all there is; memory jobs wait in their replica and say so. One that is refused by a
    drain is 503 as well."""
    async with Server(echo_settings(tmp_path)) as server, aiohttp.ClientSession(server.url) as http:
        await call(http, "pause")
        logged, memory = await submit(http), await submit(http, durability="memory")
        for job in (logged, memory):
            assert (await status(http, job["task_id"]))["paused"] is True
        assert await call(http, "resume", all=True) == []
        for job in (logged, memory):
            assert (await finished(server, job["task_id"])).status == "completed"
        await call(http, "drain", lane="default")
        async with http.post("/chat/async", json={"message": "x", "durability": "memory"}) as response:
            assert (await response.json())["error"]["code"] == "queue_draining"
        made = await submit(http, priority=5, durability="memory")
        assert (await finished(server, made["task_id"])).status == "completed"


async def test_a_pause_survives_all_replicas(tmp_path: Path) -> None:
    """The rule is the store's: a server that starts later on the same data keeps to it, and finishes after it."""
    async with Server(echo_settings(tmp_path)) as server, aiohttp.ClientSession(server.url) as http:
        rules = await call(http, "pause", model="echo")
        made = await submit(http)
    async with Server(echo_settings(tmp_path)) as server, aiohttp.ClientSession(server.url) as http:
        assert (await get(http, "/stats"))["rules"] == rules
        assert (await status(http, made["task_id"]))["paused"] is True
        await call(http, "resume", all=True)
        assert (await finished(server, made["task_id"])).status == "completed"


@pytest.mark.parametrize(
    ("action", "words", "param"),
    [
        ("pause", {"lane": "fast"}, "lane"),
        ("pause", {"model": "a;b"}, "model"),
        ("drain", {"model": ""}, "model"),
        ("drain", {"modle": "echo"}, "modle"),
        ("resume", {"all": True, "lane": "low"}, "all"),
    ],
)
async def test_a_wrong_part_is_refused(
    http: aiohttp.ClientSession, action: str, words: dict[str, Any], param: str
) -> None:
    """A mistyped word never pauses everything: it is a 400 that names it."""
    async with http.post(f"/queues/{action}", json=words) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, param)
    async with http.post(f"/queues/{action}") as response:
        assert response.status == 400
    assert (await get(http, "/queues"))["rules"] == []


async def test_the_list_says_who_it_was(tmp_path: Path) -> None:
    """Admins see who paused what; statistics and health do not tell."""
    async with Server(keyed_settings(tmp_path)) as server, client(server, secret("admin")) as http:
        await call(http, "pause", lane="high")
        assert [rule["by"] for rule in (await get(http, "/queues"))["rules"]] == ["admin"]
        assert "by" not in (await get(http, "/stats"))["rules"][0]
