"""Durability ``memory``: jobs that are nowhere but in the replica that accepted them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
from openai import AsyncOpenAI

from llmstream.config import DisconnectSettings, SchedulerSettings, ServerSettings, StoreSettings
from llmstream.server import Server
from llmstream.store.store import Store, open_store
from tests.api.pair import two_clients
from tests.api.reading import Json, conversation, read_all, status, submit, tokens
from tests.conftest import echo_settings
from tests.sse import Frame, Parser
from tests.waiting import wait_until

STALL = {"fault": "stall", "at": 3, "tokens": 9}
OPENAI = "/v1/chat/completions"
ONE_SLOT = {"echo": {"engine": "echo", "slots": 1}}


@asynccontextmanager
async def serving(tmp_path: Path, **sections: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server; keywords are settings of the server."""
    async with Server(echo_settings(tmp_path, **sections)) as server, aiohttp.ClientSession(server.url) as http:
        yield http


@asynccontextmanager
async def store_of(tmp_path: Path) -> AsyncIterator[Store]:
    settings = StoreSettings.model_validate({"url": f"unix://{tmp_path}/store/valkey.sock"})
    async with open_store(settings, tmp_path) as store:
        yield store


async def ask(http: aiohttp.ClientSession, **body: Any) -> Json:
    """Posts a memory job."""
    return await submit(http, durability="memory", **body)


async def ended(http: aiohttp.ClientSession, job_id: str, *wanted: str) -> Json:
    async def reached() -> bool:
        found: str = (await status(http, job_id))["status"]
        return found in wanted

    await wait_until(reached)
    return await status(http, job_id)


async def silent(http: aiohttp.ClientSession, **body: Any) -> Json:
    """A memory job that has said three tokens and says no more."""
    job = await ask(http, echo=STALL, **body)

    async def spoken() -> bool:
        return bool((await status(http, job["task_id"]))["text"] == tokens(3))

    await wait_until(spoken)
    return job


def text_of(frames: list[Frame]) -> str:
    return "".join(frame.json.get("content", "") for frame in frames)


async def refused(response: Any) -> tuple[int, str, str | None]:
    async with response as answer:
        error = (await answer.json())["error"]
        return answer.status, error["code"], error["param"]


def on_disk(folder: Path, what: str) -> bool:
    """Whether any file of the store holds a text."""
    return any(what.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def in_keys(store: Store, what: str) -> bool:
    """Whether the name or the value of any key holds a text."""
    cursor, found = b"0", False
    while True:
        cursor, names = await store.writes.call("SCAN", cursor, "COUNT", 1000)
        for name in names:
            found = found or what.encode() in name or what.encode() in (await store.writes.call("DUMP", name) or b"")
        if cursor == b"0":
            return found


async def test_nothing_reaches_the_store(tmp_path: Path) -> None:
    """Neither the prompt nor the answer of a memory job, nor its id or session, is ever in the store's keys or files,
    however the job is read and ends; what a logged job says is."""
    secret, public = "xyzzy4711", "plugh0815"
    sections = {"store": StoreSettings(durability="memory"), "models": ONE_SLOT}
    async with serving(tmp_path, **sections) as http, store_of(tmp_path) as store:
        job = await submit(http, message=secret, session_id=f"s-{secret}")
        assert text_of((await read_all(http, job["stream_url"]))[1]) == secret
        headers = {"x-stainless-retry-count": "0"}
        for stream in (False, True):
            body = conversation(secret, stream=stream)
            async with http.post(OPENAI, json=body, headers=headers) as response:
                assert secret in await response.text()
        left = await silent(http, message=secret, priority=7)
        late = await submit(http, message=secret, deadline_s=0.1)
        await ended(http, late["task_id"], "failed")
        await http.post(f"/chat/{left['task_id']}/cancel")
        failed = await submit(http, message=secret, echo={"fault": "error", "at": 0})
        await ended(http, failed["task_id"], "failed")
        control = await submit(http, message=public, durability="full")
        await ended(http, control["task_id"], "completed")
        assert await in_keys(store, public)
        assert on_disk(tmp_path, public)
        for text in (secret, job["task_id"].partition("~")[0]):
            assert not await in_keys(store, text)
            assert not on_disk(tmp_path, text)


async def test_the_routes_serve_it(http: aiohttp.ClientSession) -> None:
    """A memory job is read, resumed in its middle and after its end, and shown like any other."""
    job = await ask(http, echo={"tokens": 40, "delay_ms": 5}, session_id="mine")
    url = job["stream_url"]
    async with http.get(url) as response:
        parser, first = Parser(), list[Frame]()
        while len(first) < 10:
            first += parser.feed(await response.content.readany())
    assert (await status(http, job["task_id"]))["status"] == "in_progress"
    named = [frame for frame in first if frame.id]
    _, rest = await read_all(http, url, headers={"Last-Event-ID": named[-1].id or ""})
    assert text_of(named + rest) == tokens(40)
    assert rest[-1].json["type"] == "complete"
    _, again = await read_all(http, "/stream/mine")
    assert text_of(again) == tokens(40)
    async with http.get(url, headers={"Last-Event-ID": rest[-1].id or ""}) as response:
        assert response.status == 204
    long = await ask(http, echo={"tokens": 20_000})
    await ended(http, long["task_id"], "completed")
    assert text_of((await read_all(http, long["stream_url"]))[1]) == tokens(20_000)
    shown = await status(http, job["task_id"])
    assert (shown["status"], shown["text"], shown["attempt"]) == ("completed", tokens(40), 1)
    assert shown["usage"]["completion_tokens"] == 40
    assert shown["timings"]["run_s"] > 0


async def test_the_latest_job_of_a_session(http: aiohttp.ClientSession) -> None:
    """A session shows its latest job, whether that is logged or in memory."""
    for number, durability in enumerate(("full", "memory", "memory", "full", "memory")):
        job = await submit(http, durability=durability, echo={"tokens": number + 1}, session_id="mixed")
        assert text_of((await read_all(http, "/stream/mixed"))[1]) == tokens(number + 1)
        await ended(http, job["task_id"], "completed")


async def test_the_official_client(server: Server) -> None:
    """The OpenAI client completes, streams and retrieves memory jobs."""
    hello: Any = [{"role": "user", "content": "over the wire"}]
    memory = {"durability": "memory"}
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        whole = await client.chat.completions.create(model="echo", messages=hello, extra_body=memory)
        assert whole.choices[0].message.content == "over the wire"
        assert await client.chat.completions.retrieve(whole.id) == whole
        stream = await client.chat.completions.create(model="echo", messages=hello, stream=True, extra_body=memory)
        said = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == "over the wire"
        assert said[-1].choices[0].finish_reason == "stop"


async def test_slots_are_shared_in_the_order_of_priority(tmp_path: Path) -> None:
    """Memory jobs and logged ones share the slots, and those that wait are served by priority, whichever they are."""
    async with serving(tmp_path, models=ONE_SLOT) as http:
        blocker = await silent(http)
        waiting = {0: "memory", 5: "full", 9: "memory", -5: "full", 4: "memory", 8: "full", -9: "memory"}
        jobs = [
            await submit(http, durability=durability, priority=priority, echo={"tokens": 2})
            for priority, durability in waiting.items()
        ]
        shown = [await status(http, job["task_id"]) for job in jobs]
        assert [each["status"] for each in shown] == ["queued"] * len(jobs)
        # The store knows no memory job, so the logged ones count only one another.
        assert [each["position"] for each in shown] == [4, 1, 0, 2, 3, 0, 6]
        await http.post(f"/chat/{blocker['task_id']}/cancel")
        done = [await ended(http, job["task_id"], "completed") for job in jobs]
        done.sort(key=lambda each: each["timings"]["started_at"])
        assert [each["priority"] for each in done] == sorted(waiting, reverse=True)
        times = [each["timings"] for each in done]
        assert all(a["finished_at"] <= b["started_at"] for a, b in pairwise(times))


async def test_several_free_slots_are_shared_in_order(tmp_path: Path) -> None:
    """When two slots become free at once and the most urgent job waits here, the second one still goes to the next most
    urgent, which waits in the store."""
    async with serving(tmp_path, models={"echo": {"engine": "echo", "slots": 2}}) as http:
        blockers = [await silent(http, deadline_s=0.7) for _ in range(2)]
        waiting = {9: "memory", 5: "full", 0: "memory", -5: "full"}
        jobs = {
            priority: await submit(http, durability=durability, priority=priority, echo=STALL)
            for priority, durability in waiting.items()
        }
        for job in blockers:
            await ended(http, job["task_id"], "failed")
        for priority in (9, 5):
            await ended(http, jobs[priority]["task_id"], "in_progress")
        for priority in (0, -5):
            assert (await status(http, jobs[priority]["task_id"]))["status"] == "queued"
        for job in jobs.values():
            await http.delete(f"/chat/{job['task_id']}")


async def test_the_store_is_not_asked_whose_it_is(server: Server, http: aiohttp.ClientSession) -> None:
    """A replica that compares its jobs with the store, or writes its claims again, leaves memory jobs alone."""
    job = await silent(http)
    pool = server.gateway._scheduler.pools["echo"]
    pool.life, beats = -1, pool.beats
    await wait_until(lambda: pool.life != -1 and not pool.unsure and pool.beats > beats + 1)
    assert (await status(http, job["task_id"]))["status"] == "in_progress"
    assert not await in_keys(server.gateway._store, job["task_id"])
    await http.delete(f"/chat/{job['task_id']}")


async def test_a_waiting_client_hears_where_it_stands(tmp_path: Path) -> None:
    """A memory job that waits says so on its stream."""
    async with serving(tmp_path, models=ONE_SLOT) as http:
        blocker = await silent(http)
        job = await ask(http, echo={"tokens": 2})
        async with http.get(job["stream_url"]) as response:
            parser, frames = Parser(), list[Frame]()
            while not any(frame.json["type"] == "queued" for frame in frames if frame.data):
                frames += parser.feed(await response.content.readany())
            await http.post(f"/chat/{blocker['task_id']}/cancel")
            frames += parser.feed(await response.read())
        assert text_of([frame for frame in frames if frame.data]) == tokens(2)


async def test_cancel(tmp_path: Path) -> None:
    """A memory job is cancelled where it runs and where it waits, once or twice; what it said can be read."""
    async with serving(tmp_path, models=ONE_SLOT) as http:
        running = await silent(http)
        waiting = await ask(http)
        for job in (waiting, running, running):
            async with http.delete(f"/chat/{job['task_id']}") as response:
                assert (await response.json())["status"] == "cancelled"
        _, frames = await read_all(http, running["stream_url"])
        assert text_of(frames) == tokens(3)
        assert frames[-1].json["type"] == "cancelled"
        assert [f.json["type"] for f in (await read_all(http, waiting["stream_url"]))[1] if f.id] == ["cancelled"]
        last = await ask(http, echo={"tokens": 2})  # the slot is free again
        await ended(http, last["task_id"], "completed")


async def test_deadlines(tmp_path: Path) -> None:
    """A memory job fails at its deadline, running or waiting."""
    async with serving(tmp_path, models=ONE_SLOT) as http:
        running = await silent(http, deadline_s=0.6)
        waiting = await ask(http, deadline_s=0.2)
        for job in (waiting, running):
            shown = await ended(http, job["task_id"], "failed")
            assert shown["error"]["code"] == "deadline_exceeded"


async def test_attempts_go_on_from_what_was_said(http: aiohttp.ClientSession) -> None:
    """After a fault of the provider the next attempt continues the answer; when attempts are used up it fails."""
    job = await ask(http, echo={"tokens": 12, "fault": "cut", "at": 5, "attempts": 1}, session_id="nonce")
    _, frames = await read_all(http, job["stream_url"])
    assert text_of(frames) == tokens(12)
    assert [f.json.get("attempt") for f in frames if f.json["type"] == "started"] == [1, 2]
    assert not any(frame.json["type"] == "restart" for frame in frames)
    dead = await ask(http, echo={"tokens": 12, "fault": "crash", "at": 5})
    shown = await ended(http, dead["task_id"], "failed")
    assert (shown["text"], shown["attempt"], shown["error"]["code"]) == (tokens(5), 3, "engine_crashed")
    assert (await refused(http.post(f"/jobs/{dead['task_id']}/requeue")))[:2] == (409, "conflict")


async def test_the_last_reader_decides(tmp_path: Path) -> None:
    """A memory job ends when its last reader leaves, as ``on_disconnect`` says; coming back in time keeps it."""
    short = DisconnectSettings(grace_s=0.4)
    async with serving(tmp_path, disconnect=short) as http:
        nobody = await silent(http, on_disconnect="cancel")
        jobs = [await silent(http, on_disconnect=policy) for policy in ("cancel", "grace", "grace(0.1s)")]
        readers = [(await http.get(job["stream_url"]), await http.get(job["stream_url"])) for job in jobs]
        await ended(http, nobody["task_id"], "cancelled")
        for first, _ in readers:
            first.close()
        await asyncio.sleep(0.4)  # longer than it takes to notice; what must not happen takes its time
        assert all([(await status(http, job["task_id"]))["status"] == "in_progress" for job in jobs])
        for _, second in readers:
            second.close()
        await ended(http, jobs[0]["task_id"], "cancelled")
        async with http.get(jobs[1]["stream_url"]):
            await ended(http, jobs[2]["task_id"], "cancelled")
            await asyncio.sleep(0.5)
            assert (await status(http, jobs[1]["task_id"]))["status"] == "in_progress"
        await ended(http, jobs[1]["task_id"], "cancelled")


async def test_another_replica_says_so(tmp_path: Path) -> None:
    """Another replica answers 409 for a memory job that is not its own, and knows a session of its own."""
    async with two_clients(tmp_path) as (one, two):
        job = await silent(one)
        job_id = job["task_id"]
        asks = [
            two.get(f"/chat/{job_id}"),
            two.get(job["stream_url"]),
            two.get(f"/stream/{job_id}"),
            two.get(f"{OPENAI}/chatcmpl-{job_id}"),
            two.post(f"/chat/{job_id}/cancel"),
        ]
        for response in asks:
            async with response as answer:
                assert answer.status == 409
                assert "another replica" in (await answer.json())["error"]["message"]
        assert (await status(one, job_id))["status"] == "in_progress"
        await one.delete(f"/chat/{job_id}")
        assert (await refused(two.get("/chat/nobody")))[0] == 404


async def test_a_shut_down_fails_it(tmp_path: Path) -> None:
    """At a shutdown a memory job gets the grace time to end; one that does not end, or waits, fails and says why."""
    sections: dict[str, Any] = {
        "server": ServerSettings(port=0, shutdown_grace_s=0.5),
        "models": {"echo": {"engine": "echo", "slots": 2}},
    }
    async with Server(echo_settings(tmp_path, **sections)) as server, aiohttp.ClientSession(server.url) as http:
        jobs = [
            await ask(http, echo={"tokens": 30, "delay_ms": 10}),
            await silent(http),
            await ask(http),
        ]
        readers = [asyncio.create_task(read_all(http, job["stream_url"])) for job in jobs]
        await wait_until(lambda: all(server.gateway.follow(job["task_id"])._channel.followers > 1 for job in jobs))
        await server.gateway.close()
        short, stalled, waiting = [frames for _, frames in await asyncio.gather(*readers)]
    assert (text_of(short), short[-1].json["type"]) == (tokens(30), "complete")
    assert text_of(stalled) == tokens(3)
    for frames in (stalled, waiting):
        assert (frames[-1].json["type"], frames[-1].json["error"]["code"]) == ("error", "shutting_down")


async def test_an_answer_has_a_limit(tmp_path: Path) -> None:
    """An answer that grows beyond the limit is cut and fails with the name of the setting, streamed and whole."""
    async with serving(tmp_path, store=StoreSettings(memory_answer_bytes=50_000)) as http:
        job = await ask(http, echo={"tokens": 10_000})
        shown = await ended(http, job["task_id"], "failed")
        assert shown["error"]["code"] == "answer_too_large"
        assert "store.memory_answer_bytes" in shown["error"]["message"]
        assert shown["text"]
        assert tokens(10_000).startswith(shown["text"])
        assert len(shown["text"]) < 50_000
        _, frames = await read_all(http, job["stream_url"])
        assert frames[-1].json["error"]["code"] == "answer_too_large"
        body = conversation(echo={"tokens": 10_000}, durability="memory")
        async with http.post(OPENAI, json=body) as response:
            assert (response.status, response.headers["x-should-retry"]) == (507, "false")
        # It is the last word that does not fit: the model was done when that was noticed.
        last = await ask(http, echo={"tokens": 480})
        assert (await ended(http, last["task_id"], "failed", "completed"))["error"]["code"] == "answer_too_large"
        small = await ask(http, echo={"tokens": 100})
        await ended(http, small["task_id"], "completed")
        body = {"model": "echo", "input": ["a vector of 344 bytes"] * 200, "durability": "memory"}
        async with http.post("/v1/embeddings", json=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (507, "answer_too_large")


async def test_all_together_have_a_limit(tmp_path: Path) -> None:
    """Ended memory jobs give way to new ones; when only living ones are left, a new one is refused."""
    async with serving(tmp_path, store=StoreSettings(memory_bytes=10_000)) as http:
        text = "word " * 600
        for _ in range(5):
            latest = await ask(http, message=text, max_tokens=1)
            await ended(http, latest["task_id"], "incomplete")
        living = [await silent(http, message=text) for _ in range(2)]
        for _ in range(2):
            body = {"message": text, "durability": "memory"}
            assert await refused(http.post("/chat/async", json=body)) == (429, "queue_full", None)
        assert (await refused(http.get(f"/chat/{latest['task_id']}")))[0] == 404
        for job in living:
            await http.delete(f"/chat/{job['task_id']}")
        again = await ask(http, message=text, max_tokens=1)
        await ended(http, again["task_id"], "incomplete")


async def test_the_line_has_a_limit(tmp_path: Path) -> None:
    """No more memory jobs wait than logged ones may."""
    sections = {"models": ONE_SLOT, "scheduler": SchedulerSettings(max_waiting=2)}
    async with serving(tmp_path, **sections) as http:
        running = await silent(http)
        waiting = [await ask(http) for _ in range(2)]
        body = {"message": "x", "durability": "memory"}
        assert (await refused(http.post("/chat/async", json=body)))[:2] == (429, "queue_full")
        await http.delete(f"/chat/{waiting[0]['task_id']}")
        await ask(http)
        await http.delete(f"/chat/{running['task_id']}")


async def test_it_is_gone_a_while_after_its_end(tmp_path: Path) -> None:
    """After the retention time nothing of a memory job is left."""
    async with Server(echo_settings(tmp_path, store=StoreSettings(memory_retention_s=0.2))) as server:
        async with aiohttp.ClientSession(server.url) as http:
            job = await ask(http, session_id="s")
            await read_all(http, job["stream_url"])

            async def gone() -> bool:
                async with http.get(f"/chat/{job['task_id']}") as response:
                    return response.status == 404

            await wait_until(gone)
            for url in (job["stream_url"], "/stream/s"):
                assert (await refused(http.get(url)))[0] == 404
        memory = server.gateway._store.memory
        assert (memory._kept, memory._sessions, memory._bytes) == ({}, {}, 0)
        assert not server.gateway._store.tail.channels
        assert not server.gateway._scheduler.pools["echo"].unclaimed


async def test_a_name_needs_a_record(http: aiohttp.ClientSession) -> None:
    """``job_id`` and ``Idempotency-Key`` are refused: other replicas could not find the job. An SDK's retry is a new
    job."""
    body = {"message": "x", "durability": "memory"}
    asked = await refused(http.post("/chat/async", json={**body, "job_id": "mine"}))
    assert (asked[0], asked[2]) == (400, "job_id")
    asked = await refused(http.post("/chat/async", json=body, headers={"Idempotency-Key": "k"}))
    assert (asked[0], asked[2]) == (400, "Idempotency-Key")
    ids = set()
    for count in ("0", "1"):
        async with http.post("/chat/async", json=body, headers={"x-stainless-retry-count": count}) as response:
            ids.add((await response.json())["task_id"])
    assert len(ids) == 2
    async with http.post("/chat/async", json={"message": "x", "job_id": "a~b"}) as response:
        assert response.status == 400  # nobody can make an id look like that of a memory job


async def test_it_needs_no_store(tmp_path: Path) -> None:
    """While the store takes no writes and logged jobs are refused, memory jobs are accepted, run and end, also those
    that have to wait."""
    sections = {"models": ONE_SLOT, "store": StoreSettings(timeout_s=0.3)}
    async with serving(tmp_path, **sections) as http, store_of(tmp_path) as store:
        await store.writes.call("CLIENT", "PAUSE", 60_000, "WRITE")
        try:
            await wait_until(lambda: _is_refused(http))
            jobs = [await ask(http, echo={"tokens": 20, "delay_ms": 1}) for _ in range(3)]
            async with asyncio.timeout(20):  # well before the store comes back by itself
                for job in jobs:
                    assert text_of((await read_all(http, job["stream_url"]))[1]) == tokens(20)
        finally:
            await store.writes.call("CLIENT", "UNPAUSE")


async def _is_refused(http: aiohttp.ClientSession) -> bool:
    async with http.post("/chat/async", json={"message": "x"}) as response:
        return response.status == 503
