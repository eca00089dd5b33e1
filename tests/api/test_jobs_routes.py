"""The queue's routes: submit, stream, look, cancel; mounted elsewhere and on several replicas."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import llmstream
from llmstream.config import ModelSettings, Settings, StoreSettings
from llmstream.server import Server
from llmstream.store.embedded import EmbeddedStore
from tests.api.reading import Json, conversation, finished, read_all, status, submit, tokens
from tests.conftest import echo_settings
from tests.sse import Frame, Parser
from tests.waiting import wait_until

STALL = {"tokens": 5, "fault": "stall", "at": 3}


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that runs one job at a time."""
    async with Server(echo_settings(tmp_path, slots=1)) as server:
        yield server


@pytest.fixture
async def line(narrow: Server) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of ``narrow``."""
    async with aiohttp.ClientSession(narrow.url) as session:
        yield session


async def cancel(http: aiohttp.ClientSession, job_id: str, *, delete: bool = False) -> Json:
    asked = http.delete(f"/chat/{job_id}") if delete else http.post(f"/chat/{job_id}/cancel")
    async with asked as response:
        body: Json = await response.json()
        assert response.status == 200, body
        return body


async def runs(http: aiohttp.ClientSession, job_id: str, text: str) -> None:
    """Waits until a job runs and has said so much."""

    async def there() -> bool:
        state = await status(http, job_id)
        return bool(state["status"] == "in_progress" and state["text"] == text)

    await wait_until(there)


async def test_submitting_answers_at_once(http: aiohttp.ClientSession) -> None:
    """POST /chat/async gives 202 with the four members that its page shows, and nothing else."""
    async with http.post("/chat/async", json={"message": "Hello!", "priority": 5}) as response:
        body = await response.json()
        assert response.status == 202
        assert response.headers["x-job-id"] == body["task_id"]
    assert body == {
        "status": "queued",
        "task_id": body["task_id"],
        "session_id": body["session_id"],
        "stream_url": f"/stream/{body['session_id']}",
    }


async def test_the_stream_is_the_one_of_the_page(http: aiohttp.ClientSession) -> None:
    """The stream holds the page's lines exactly, with ids, a retry time and our further types around them."""
    answer = await submit(http, message="Hello !", echo={})
    async with http.get(answer["stream_url"]) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-cache"
        raw = await response.read()
    assert raw == (
        b"retry: 1000\n\n"
        b'id: 1-0\ndata: {"type":"started","attempt":1}\n\n'
        b'id: 1-1\ndata: {"type":"chunk","content":"Hello"}\n\n'
        b'id: 1-2\ndata: {"type":"chunk","content":" !"}\n\n'
        b'data: {"type":"usage","prompt_tokens":2,"completion_tokens":2,"total_tokens":4}\n\n'
        b'id: 1-4\ndata: {"type":"complete"}\n\n'
    )


async def test_chat_streams_in_the_same_response(http: aiohttp.ClientSession) -> None:
    """POST /chat streams what the stream route streams, and says where to go on."""
    async with http.post("/chat", json={"message": "Hello !"}) as response:
        location = response.headers["Location"]
        frames = Parser().feed(await response.read())
    assert [frame.json["type"] for frame in frames] == ["started", "chunk", "chunk", "usage", "complete"]
    assert (await read_all(http, location))[1] == frames


async def test_a_session_streams_its_latest_answer(http: aiohttp.ClientSession) -> None:
    """A session of the caller's holds several jobs: its stream is the latest, each can be had by name."""
    first = await submit(http, message="one", session_id="s-1")
    second = await submit(http, message="two", session_id="s-1")
    assert first["stream_url"] == f"/stream/s-1?task_id={first['task_id']}"
    texts = []
    for url in (first["stream_url"], second["stream_url"], "/stream/s-1"):
        _, frames = await read_all(http, url)
        texts.append("".join(frame.json.get("content", "") for frame in frames))
    assert texts == ["one", "two", "two"]
    other = await submit(http, message="three")
    async with http.get("/stream/s-1", params={"task_id": other["task_id"]}) as response:
        assert response.status == 404


async def test_waiting_clients_hear_where_they_stand(narrow: Server, line: aiohttp.ClientSession) -> None:
    """A job that really waits streams queued frames without ids: position, and a time once one was measured."""
    await finished(narrow, (await submit(line))["task_id"])
    blockers = [(await submit(line, echo=STALL))["task_id"] for _ in range(2)]
    await runs(line, blockers[0], tokens(3))
    waiting = await submit(line, message="me")
    state = await status(line, waiting["task_id"])
    assert (state["status"], state["position"]) == ("queued", 1)
    seen: list[Frame] = []

    async def read() -> None:
        parser = Parser()
        async with line.get(waiting["stream_url"]) as response:
            async for chunk in response.content.iter_any():
                seen.extend(parser.feed(chunk))

    reader = asyncio.create_task(read())
    await wait_until(lambda: len(seen) == 1)
    assert seen[0].id is None
    assert seen[0].json.keys() == {"type", "position", "eta_s"}
    assert (seen[0].json["type"], seen[0].json["position"]) == ("queued", 1)
    assert seen[0].json["eta_s"] > 0
    await cancel(line, blockers[1])
    await wait_until(lambda: len(seen) == 2)
    assert (seen[1].json["type"], seen[1].json["position"]) == ("queued", 0)
    await cancel(line, blockers[0])
    await reader
    assert [frame.json["type"] for frame in seen[2:]] == ["started", "chunk", "usage", "complete"]


async def test_a_job_is_told_over_its_whole_life(narrow: Server, line: aiohttp.ClientSession) -> None:
    """GET /chat/{id} tells position, then the text so far, then the end, with times that grow."""
    blocker = (await submit(line, echo=STALL))["task_id"]
    await runs(line, blocker, tokens(3))
    job = await submit(line, priority=-7, echo={"tokens": 4, "fault": "crash", "at": 2, "attempts": 1})
    waiting = await status(line, job["task_id"])
    assert (waiting["status"], waiting["position"], waiting["attempt"], waiting["text"]) == ("queued", 0, 0, "")
    assert (waiting["lane"], waiting["priority"], waiting["session_id"]) == ("low", -7, job["session_id"])
    assert waiting["timings"]["started_at"] is None
    running = await status(line, blocker)
    assert (running["status"], running["attempt"], running["text"]) == ("in_progress", 1, tokens(3))
    assert "position" not in running
    assert running["last_event_id"] == "1-3"
    await cancel(line, blocker)
    await finished(narrow, job["task_id"])
    done = await status(line, job["task_id"])
    assert (done["status"], done["attempt"], done["text"], done["finish_reason"]) == ("completed", 2, tokens(4), "stop")
    assert done["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    assert done["error"] is None
    times = done["timings"]
    assert times["created_at"] <= times["started_at"] <= times["finished_at"]
    assert times["queue_s"] == pytest.approx(times["started_at"] - times["created_at"], abs=1e-5)


@pytest.mark.parametrize("delete", [False, True])
async def test_cancelling_twice_is_fine(narrow: Server, line: aiohttp.ClientSession, delete: bool) -> None:
    """A waiting and a running job are cancelled from POST and DELETE alike, once and again, and keep their text."""
    running = await submit(line, echo=STALL)
    waiting = await submit(line)
    await runs(line, running["task_id"], tokens(3))
    for job, text in ((waiting, ""), (running, tokens(3))):
        first = await cancel(line, job["task_id"], delete=delete)
        assert (first["status"], first["text"]) == ("cancelled", text)
        again = await cancel(line, job["task_id"], delete=not delete)
        assert again == first
        _, frames = await read_all(line, job["stream_url"])
        assert [frame.json["type"] for frame in frames].count("cancelled") == 1
        assert frames[-1].json == {"type": "cancelled"}
    async with line.get(f"/v1/chat/completions/{running['task_id']}") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (409, "cancelled")
    assert (await finished(narrow, (await submit(line))["task_id"])).status == "completed"
    async with line.post("/chat/unknown/cancel") as response:
        assert response.status == 404


async def test_cancelling_what_has_ended_changes_nothing(server: Server, http: aiohttp.ClientSession) -> None:
    """A job that has completed stays completed, however often it is cancelled."""
    job = (await submit(http))["task_id"]
    await finished(server, job)
    before = await status(http, job)
    assert await cancel(http, job) == before


async def test_a_failed_job_says_why(server: Server, http: aiohttp.ClientSession) -> None:
    """A job that fails ends its stream with an error and tells the same by its status."""
    job = await submit(http, echo={"tokens": 4, "fault": "reject", "at": 2})
    _, frames = await read_all(http, job["stream_url"])
    assert [frame.json["type"] for frame in frames] == ["started", "chunk", "chunk", "error"]
    state = await status(http, job["task_id"])
    assert (state["status"], state["text"]) == ("failed", tokens(2))
    assert frames[-1].json["error"] == state["error"]
    assert state["error"]["code"] == "upstream_rejected"


async def test_an_answer_that_starts_over_says_so(server: Server, http: aiohttp.ClientSession) -> None:
    """Two choices cannot be continued: after a crash a restart frame voids what came before."""
    job = await submit(http, n=2, echo={"tokens": 3, "fault": "crash", "at": 2, "attempts": 1})
    _, frames = await read_all(http, job["stream_url"])
    kinds = [frame.json["type"] for frame in frames]
    assert kinds == ["started", *["chunk"] * 4, "started", "restart", *["chunk"] * 6, "usage", "complete"]
    async with http.get(f"/v1/chat/completions/{job['task_id']}") as response:
        choices = (await response.json())["choices"]
    assert [choice["message"]["content"] for choice in choices] == [tokens(3)] * 2


async def test_who_comes_after_the_restart_reads_one_answer(server: Server, http: aiohttp.ClientSession) -> None:
    """A plain OpenAI stream that showed void text ends in an error; read anew it is the valid answer alone."""
    job = await submit(http, n=2, echo={"tokens": 3, "fault": "crash", "at": 2, "attempts": 1})
    await read_all(http, job["stream_url"])
    url = f"/v1/chat/completions/{job['task_id']}?stream=true"
    _, anew = await read_all(http, url)
    assert anew[-1].data == "[DONE]"
    text = {0: "", 1: ""}
    for frame in anew[:-1]:
        for choice in frame.json["choices"]:
            text[choice["index"]] += choice["delta"].get("content", "")
    assert text == {0: tokens(3), 1: tokens(3)}
    async with http.get(url, headers={"Last-Event-ID": "1-2"}) as response:
        assert '"code":"restarted"' in await response.text()


async def test_jobs_lists_the_latest_first(server: Server, http: aiohttp.ClientSession) -> None:
    """GET /jobs gives the latest jobs, newest first, as many as asked for."""
    ids = [(await submit(http, priority=priority))["task_id"] for priority in (10, 0, -10)]
    for job_id in ids:
        await finished(server, job_id)
    async with http.get("/jobs") as response:
        rows = (await response.json())["data"]
    assert [row["task_id"] for row in rows] == ids[::-1]
    assert [row["lane"] for row in rows] == ["low", "default", "high"]
    assert {row["status"] for row in rows} == {"completed"}
    async with http.get("/jobs", params={"limit": "2"}) as response:
        assert [row["task_id"] for row in (await response.json())["data"]] == ids[:0:-1]


async def test_stats_count_what_waits_and_runs(narrow: Server, line: aiohttp.ClientSession) -> None:
    """GET /stats counts lanes, waiting and running jobs and names this replica."""
    blocker = (await submit(line, echo=STALL))["task_id"]
    await runs(line, blocker, tokens(3))
    for priority in (9, 0, 0, -9):
        await submit(line, priority=priority)
    async with line.get("/stats") as response:
        body = await response.json()
    assert body["lanes"] == {"high": 1, "default": 2, "low": 1}
    assert (body["waiting"], body["running"], body["replicas"]) == (4, 1, [narrow.gateway.replica])
    assert body["pools"]["echo"]["slots"] == 1


async def test_health_is_liveness_and_health_full_is_everything(server: Server, http: aiohttp.ClientSession) -> None:
    """/health says that the process answers, /health/full looks at store, providers and queue."""
    async with http.get("/health") as response:
        assert await response.json() == {"status": "healthy", "model_loaded": True, "model_name": "echo"}
    async with http.get("/health/full") as response:
        body = await response.json()
        assert (response.status, body["status"], body["store"]["status"]) == (200, "ok", "ok")
    assert body["store"]["took_ms"] >= 0
    assert body["providers"]["echo"]["status"] == "ok"
    assert body["queue"]["echo"]["slots"] == 4


async def test_without_its_store_a_server_says_so(tmp_path: Path) -> None:
    """With the store gone /health still answers; /health/full and all job routes give 503, these with Retry-After."""
    async with EmbeddedStore(tmp_path / "store") as embedded, contextlib.AsyncExitStack() as stack:
        given: Any = {"store": StoreSettings.model_validate({"url": embedded.url, "timeout_s": 0.5, "outage_s": 1})}
        server = await stack.enter_async_context(Server(echo_settings(tmp_path, **given)))
        http = await stack.enter_async_context(aiohttp.ClientSession(server.url))
        job = (await submit(http))["task_id"]
        await finished(server, job)
        await embedded.__aexit__(None, None, None)
        async with http.get("/health") as response:
            assert response.status == 200
        async with http.get("/health/full") as response:
            body = await response.json()
            assert (response.status, body["status"], body["store"]["status"]) == (503, "degraded", "error")
            assert body["providers"]["echo"]["status"] == "ok"
        asks = [http.get(f"/chat/{job}"), http.get("/stats"), http.post("/chat/async", json={"message": "x"})]
        for ask in [*asks, http.post("/v1/chat/completions", json=conversation())]:
            async with ask as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "store_unavailable")
                assert int(response.headers["Retry-After"]) >= 1


async def test_mounted_under_a_prefix(tmp_path: Path) -> None:
    """Mounted into someone else's application every URL that we name bears the prefix, and errors keep their shape."""
    outer = web.Application()
    outer.add_subapp("/llm", llmstream.create_app(echo_settings(tmp_path)))
    async with TestServer(outer) as host, aiohttp.ClientSession(host.make_url("/")) as http:
        async with http.post("/llm/chat/async", json={"message": "Hello !"}) as response:
            job = await response.json()
            assert response.headers["x-request-id"]
        assert job["stream_url"] == f"/llm/stream/{job['session_id']}"
        assert (await read_all(http, job["stream_url"]))[1][-1].json == {"type": "complete"}
        for path, body in (("/llm/chat", {"message": "Hi"}), ("/llm/v1/chat/completions", conversation())):
            async with http.post(path, json=body) as response:
                location = response.headers["Location"]
                assert location.startswith("/llm/")
            await read_all(http, location)
        for method, path, code in (("GET", "/llm/nope", 404), ("PUT", "/llm/chat", 405), ("POST", "/llm/chat", 400)):
            async with http.request(method, path, data=b"{") as response:
                assert response.status == code
                assert (await response.json())["error"]["message"]


async def test_mounted_apps_survive_broken_bodies(tmp_path: Path) -> None:
    """Without our own connections, too, an unreadable body is a 400 in our shape."""
    outer = web.Application()
    outer.add_subapp("/llm", llmstream.create_app(echo_settings(tmp_path)))
    async with TestServer(outer) as host, aiohttp.ClientSession(host.make_url("/")) as http:
        async with http.post("/llm/chat", data=b"{}", headers={"Content-Encoding": "klingon"}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (415, "unsupported_encoding")
        async with http.post("/llm/chat", data=b"junk", headers={"Content-Encoding": "gzip"}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_body")


class Pair:
    """Two replicas on one store."""

    def __init__(self, a: Server, b: Server, at_a: aiohttp.ClientSession, at_b: aiohttp.ClientSession) -> None:
        self.a, self.b, self.at_a, self.at_b = a, b, at_a, at_b


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Replica A runs ``echo``; B has another model and can only read and cancel A's jobs."""
    async with EmbeddedStore(tmp_path / "shared") as embedded, contextlib.AsyncExitStack() as stack:
        servers = []
        for name, models in (("a", {"echo": 4}), ("b", {"other": 4})):
            settings = Settings.model_validate(
                {
                    "data_dir": tmp_path / name,
                    "server": {"port": 0, "shutdown_grace_s": 2},
                    "store": {"url": embedded.url},
                    "models": {model: ModelSettings(engine="echo", slots=slots) for model, slots in models.items()},
                }
            )
            servers.append(await stack.enter_async_context(Server(settings)))
        clients = [await stack.enter_async_context(aiohttp.ClientSession(server.url)) for server in servers]
        yield Pair(servers[0], servers[1], clients[0], clients[1])


async def test_another_replica_streams_a_running_job(pair: Pair) -> None:
    """A job that A runs is read at B while it runs, live and byte for byte the same."""
    job = await submit(pair.at_a, echo={"tokens": 60, "delay_ms": 5})
    seen: list[Frame] = []
    raw = b""
    parser = Parser()
    live = False
    async with pair.at_b.get(job["stream_url"]) as response:
        async for chunk in response.content.iter_any():
            raw += chunk
            seen.extend(parser.feed(chunk))
            live = live or ((await pair.a.gateway.job(job["task_id"])).status == "in_progress" and len(seen) > 5)
    assert live
    assert "".join(frame.json.get("content", "") for frame in seen) == tokens(60)
    assert raw == (await read_all(pair.at_a, job["stream_url"]))[0]
    async with pair.at_b.get("/jobs") as response:
        rows = (await response.json())["data"]
    assert [row["task_id"] for row in rows] == [job["task_id"]]


async def test_another_replica_cancels_a_running_job(pair: Pair) -> None:
    """A job that A runs and B cancels stops at A within a second, and both tell the same end."""
    job = await submit(pair.at_a, echo=STALL)
    await runs(pair.at_b, job["task_id"], tokens(3))
    provider = pair.a.gateway.providers[0]
    assert (await provider.health())["running"] == 1
    reader = asyncio.create_task(read_all(pair.at_a, job["stream_url"]))
    assert (await cancel(pair.at_b, job["task_id"]))["status"] == "cancelled"

    async def idle() -> bool:
        return (await provider.health())["running"] == 0

    await wait_until(idle, timeout=1)
    assert (await reader)[1][-1].json == {"type": "cancelled"}
    assert await status(pair.at_a, job["task_id"]) == await status(pair.at_b, job["task_id"])
