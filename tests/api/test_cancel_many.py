"""Ending many jobs at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.server import Server
from tests.api.keyed import client, keyed_settings, secret
from tests.api.reading import Json, status, submit
from tests.conftest import echo_settings
from tests.waiting import wait_until

STALLED = {"tokens": 9, "fault": "stall", "at": 3}


async def cancel(http: aiohttp.ClientSession, **words: Any) -> Json:
    async with http.post("/jobs/cancel", json=words) as response:
        body: Json = await response.json()
        assert response.status == 200, body
        assert body["cancelled"] == len(body["task_ids"])
        return body


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, dict[str, str]]]:
    """A server with one slot, and a job of each kind by name."""
    async with Server(echo_settings(tmp_path, slots=1)) as server, aiohttp.ClientSession(server.url) as http:
        kinds: dict[str, dict[str, Any]] = {
            "running": {"echo": STALLED},
            "early": {},
            "high": {"priority": 7},
            "low": {"priority": -7, "session_id": "talk"},
            "asleep": {"delay_s": 60, "priority": 1},
        }
        ids = {}
        for name, words in kinds.items():
            ids[name] = (await submit(http, **words))["task_id"]
            if name == "running":
                await wait_until(lambda: _runs(http, ids["running"]))
            elif name == "early":
                ids["time"] = str(time.time())
                await asyncio.sleep(0)
        yield http, ids


async def _runs(http: aiohttp.ClientSession, job_id: str) -> bool:
    return bool((await status(http, job_id))["status"] == "in_progress")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ({"all": True}, {"running", "early", "high", "low", "asleep"}),
        ({"status": "queued"}, {"early", "high", "low", "asleep"}),
        ({"status": "scheduled"}, {"asleep"}),
        ({"status": "in_progress"}, {"running"}),
        ({"lane": "low"}, {"low"}),
        ({"min_priority": 1}, {"high", "asleep"}),
        ({"max_priority": 0, "status": "queued"}, {"early", "low"}),
        ({"model": "ec?o", "lane": "high"}, {"high"}),
        ({"model": "other"}, set()),
        ({"session_id": "talk"}, {"low"}),
        ({"principal": "local", "lane": "high"}, {"high"}),
        ({"principal": "somebody"}, set()),
        ({"created_before": "TIME"}, {"running", "early"}),
        ({"created_after": "TIME", "lane": "default"}, {"asleep"}),
    ],
)
async def test_exactly_those_that_fit_are_cancelled(
    busy: tuple[aiohttp.ClientSession, dict[str, str]], words: Json, names: set[str]
) -> None:
    """Each word narrows the filter; what fits is ended and named, the rest goes on, and a second call finds nothing."""
    http, ids = busy
    words = {name: float(ids["time"]) if value == "TIME" else value for name, value in words.items()}
    answer = await cancel(http, **words)
    assert set(answer["task_ids"]) == {ids[name] for name in names}
    assert answer["more"] is False
    for name in ("early", "high", "low", "asleep", "running"):
        ended = (await status(http, ids[name]))["status"] == "cancelled"
        # With the running one gone the others have begun to end by themselves.
        assert ended == (name in names)
    if "running" not in names:
        assert (await cancel(http, **words))["cancelled"] == 0


async def test_many_are_cancelled_in_calls_of_bounded_work(tmp_path: Path) -> None:
    """A call ends no more than its limit and says that there are more, until there are none; paused ones are found."""
    async with Server(echo_settings(tmp_path)) as server, aiohttp.ClientSession(server.url) as http:
        async with http.post("/queues/pause", json={}) as response:
            assert response.status == 200
        made = {(await submit(http))["task_id"] for _ in range(130)}
        found: list[Json] = [await cancel(http, status="queued", limit=60) for _ in range(3)]
        assert [answer["cancelled"] for answer in found] == [60, 60, 10]
        assert [answer["more"] for answer in found] == [True, True, False]
        assert {job_id for answer in found for job_id in answer["task_ids"]} == made
        async with http.get("/stats") as response:
            assert (await response.json())["paused"] == 0


async def test_two_at_once_end_each_job_once(tmp_path: Path) -> None:
    """Calls at the same time do no harm: every job has one end."""
    async with Server(echo_settings(tmp_path)) as server, aiohttp.ClientSession(server.url) as http:
        made = [(await submit(http, delay_s=60))["task_id"] for _ in range(20)]
        await asyncio.gather(*(cancel(http, all=True) for _ in range(3)))
        for job_id in made:
            state = await server.gateway.job(job_id)
            assert state.status == "cancelled"
            transcript = await server.gateway.transcript(job_id)
            assert transcript.position == (1, 0)


async def test_an_admin_ends_anybodys(tmp_path: Path) -> None:
    """An owner ends its own jobs, an admin those of the principal it names."""
    async with Server(keyed_settings(tmp_path)) as server:
        made = {}
        for name in ("alice", "bob", "admin"):
            async with client(server, secret(name)) as http:
                made[name] = (await submit(http, model="echo", delay_s=60))["task_id"]
        async with client(server, secret("alice")) as http:
            assert (await cancel(http, principal="bob"))["task_ids"] == []
            assert (await cancel(http, all=True))["task_ids"] == [made["alice"]]
        async with client(server, secret("admin")) as http:
            assert (await cancel(http, principal="bob"))["task_ids"] == [made["bob"]]
            assert (await cancel(http, all=True))["task_ids"] == [made["admin"]]


@pytest.mark.parametrize(
    ("words", "param"),
    [
        ({}, "all"),
        ({"all": False}, "all"),
        ({"limit": 5}, "all"),
        ({"status": "completed"}, "status"),
        ({"lane": "lwo"}, "lane"),
        ({"created_before": "yesterday"}, "created_before"),
        ({"modle": "echo"}, "modle"),
        ({"all": True, "limit": 0}, "limit"),
    ],
)
async def test_an_empty_or_wrong_filter_is_refused(http: aiohttp.ClientSession, words: Json, param: str) -> None:
    """Forgetting or misspelling a word never cancels everything."""
    async with http.post("/jobs/cancel", json=words) as response:
        body = await response.json()
        assert (response.status, body["error"]["param"]) == (400, param), body
