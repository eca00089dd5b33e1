"""Jobs that are accepted now and begin later."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.api.times import moment
from llmstream.config import SchedulerSettings
from llmstream.scheduler import scheduler as scheduler_module
from llmstream.server import Server
from tests.api.pair import two_clients
from tests.api.reading import conversation, finished, read_all, status, submit
from tests.conftest import echo_settings
from tests.sse import Frame, Parser

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": conversation(),
    "/v1/chat/stream": conversation(),
    "/chat": {"message": "hello"},
    "/chat/async": {"message": "hello"},
    "/generate": {"content": "hello"},
    "/chat_completion": {"messages": [{"role": "user", "content": "hello"}]},
    "/question": {"text": "hello"},
    "/v1/generate": {"prompt": "hello"},
    "/v1/chat": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/embeddings": {"model": "echo", "input": "hello"},
    "/embeddings": {"model": "echo", "texts": ["hello"]},
}


async def started_at(http: aiohttp.ClientSession, job_id: str) -> float:
    at: float = (await status(http, job_id))["timings"]["started_at"]
    return at


@pytest.mark.parametrize("path", ROUTES)
async def test_every_route_takes_a_time(server: Server, http: aiohttp.ClientSession, path: str) -> None:
    """Wherever a job can be made it can be told when to begin; it begins then, and its model hears nothing of it."""
    when = time.time() + 0.25
    async with http.post(path, json={**ROUTES[path], "not_before": when}) as response:
        text = await response.text()
        assert response.status in (200, 202), text
        job_id = response.headers["x-job-id"]
    state = await finished(server, job_id)
    assert state.status == "completed"
    assert await started_at(http, job_id) >= when
    assert {"not_before", "delay_s"}.isdisjoint(state.job.request.body)


async def test_a_sleeping_job_says_until_when(server: Server, http: aiohttp.ClientSession) -> None:
    """It is accepted at once and on record: queued, without a position, with its time, in the status, in lists, in
    frames; cancelled it is gone at once."""
    when = datetime.now(timezone(timedelta(hours=2))) + timedelta(hours=1)
    made = await submit(http, not_before=when.isoformat())
    assert (made["status"], made["not_before"]) == ("queued", pytest.approx(when.timestamp()))
    job_id = made["task_id"]
    shown = await status(http, job_id)
    assert (shown["status"], shown["position"], shown["eta_s"]) == ("queued", None, None)
    assert shown["not_before"] == pytest.approx(when.timestamp(), abs=0.0011)
    async with http.get("/jobs") as response:
        (row,) = (await response.json())["data"]
    assert row["not_before"] == made["not_before"]
    async with http.get("/stats") as response:
        stats = await response.json()
    assert (stats["waiting"], stats["scheduled"], stats["pools"]["echo"]["scheduled"]) == (0, 1, 1)
    async with http.get("/metrics") as response:
        assert 'llmstream_jobs_scheduled{pool="echo"} 1' in await response.text()
    async with http.get(made["stream_url"]) as response:
        parser, frames = Parser(), list[Frame]()
        while not frames:
            frames += parser.feed(await response.content.readany())
    assert frames[0].json["type"] == "queued"
    assert frames[0].json["not_before"] == shown["not_before"]
    async with http.post(f"/chat/{job_id}/cancel") as response:
        assert (await response.json())["status"] == "cancelled"
    async with http.get("/stats") as response:
        assert (await response.json())["scheduled"] == 0


async def test_a_delay_counts_from_now(server: Server, http: aiohttp.ClientSession) -> None:
    """``delay_s`` is ``not_before`` without a clock of the caller's; nothing and the past mean now."""
    before = time.time()
    made = await submit(http, delay_s=0.2)
    assert before + 0.15 < made["not_before"] < time.time() + 0.25
    await finished(server, made["task_id"])
    assert await started_at(http, made["task_id"]) >= made["not_before"]
    for words in ({"not_before": before - 60}, {"not_before": "2020-01-01T00:00:00Z"}, {"delay_s": 0}):
        made = await submit(http, **words)
        assert "not_before" not in made
        await finished(server, made["task_id"])


@pytest.mark.parametrize(
    ("words", "param", "says"),
    [
        ({"not_before": "tomorrow"}, "not_before", "2030-01-31T09:00:00Z"),
        ({"not_before": "2030-01-31T09:00:00"}, "not_before", "time zone"),
        ({"not_before": True}, "not_before", "seconds since the epoch"),
        ({"not_before": -1}, "not_before", "seconds since the epoch"),
        ({"not_before": 1e300}, "not_before", "max_delay_s"),
        ({"not_before": int(time.time() * 1000)}, "not_before", "in seconds since the epoch"),
        ({"delay_s": 8 * 24 * 3600}, "delay_s", "max_delay_s"),
        ({"delay_s": -1}, "delay_s", "greater than or equal to 0"),
        ({"delay_s": 5, "not_before": 5}, "delay_s", "either"),
        ({"delay_s": 5, "durability": "memory"}, "delay_s", "memory"),
        ({"delay_s": 5, "deadline_s": 4}, "deadline_s", "deadline_s counts from now"),
    ],
)
async def test_what_cannot_be_scheduled_is_refused(
    http: aiohttp.ClientSession, words: dict[str, Any], param: str, says: str
) -> None:
    """Each has a 400 that names the field and says what to do; nothing is left behind."""
    async with http.post("/chat/async", json={"message": "hello", **words}) as response:
        body = await response.json()
        assert response.status == 400, body
    assert body["error"]["param"] == param
    assert says in body["error"]["message"]
    async with http.get("/jobs") as response:
        assert (await response.json())["data"] == []


async def test_a_turn_of_a_conversation_is_not_scheduled(http: aiohttp.ClientSession) -> None:
    """What a conversation says next depends on what came before; it has no time of its own."""
    body = {"messages": [{"role": "user", "content": "x"}], "session_id": "s", "delay_s": 1}
    async with http.post("/v1/chat", json=body) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "delay_s")


async def test_too_many_are_refused(tmp_path: Path) -> None:
    """The bound is a 429 of its own and leaves room for those that may begin at once."""
    settings = echo_settings(tmp_path, scheduler=SchedulerSettings(max_scheduled=1))
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        await submit(http, delay_s=60)
        async with http.post("/chat/async", json={"message": "x", "delay_s": 60}) as response:
            assert response.status == 429
            assert (await response.json())["error"]["code"] == "too_many_scheduled"
            assert "Retry-After" in response.headers
        made = await submit(http)
        assert (await finished(server, made["task_id"])).status == "completed"


async def test_who_accepts_a_job_wakes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica that accepted a job knows its time without a heartbeat: here there is none for a minute."""
    monkeypatch.setattr(scheduler_module, "MAX_BEAT_S", 60.0)
    settings = echo_settings(tmp_path, scheduler=SchedulerSettings(lease_s=240))
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        made = await submit(http, delay_s=0.1)
        assert (await finished(server, made["task_id"])).status == "completed"


async def test_a_scheduled_request_gets_no_old_answer(http: aiohttp.ClientSession) -> None:
    """The cache has an answer of now; who asks for one of later gets it later."""
    for _ in range(2):
        async with http.post("/v1/generate", json={"prompt": "hello"}) as response:
            cached = (await response.json())["cached"]
    assert cached
    async with http.post("/v1/generate", json={"prompt": "hello", "delay_s": 0.05}) as response:
        assert not (await response.json())["cached"]


async def test_another_replica_knows_and_ends_it(tmp_path: Path) -> None:
    """A job that sleeps can be read at, and is run by, whichever replica is there; the wait is no wait in the queue."""
    async with two_clients(tmp_path) as (one, two):
        made = await submit(one, delay_s=0.6)
        assert (await status(two, made["task_id"]))["not_before"] == pytest.approx(made["not_before"], abs=0.0011)
        raw, frames = await read_all(two, made["stream_url"])
        assert frames[-1].json["type"] == "complete", raw
        waited = 0.0
        for http in (one, two):
            async with http.get("/metrics") as response:
                for line in (await response.text()).splitlines():
                    if line.startswith("llmstream_queue_wait_seconds_sum"):
                        waited += float(line.rpartition(" ")[2])
        assert 0 < waited < 0.5


def test_times_are_read_as_people_write_them() -> None:
    """Numbers are seconds since the epoch, text is ISO 8601 with any zone."""
    expected = datetime(2030, 1, 31, 9, tzinfo=UTC).timestamp()
    for text in ("2030-01-31T09:00:00Z", "2030-01-31T10:00:00+01:00", "2030-01-31 09:00Z", "20300131T090000Z"):
        assert moment(text) == expected
    assert moment(12) == 12.0
