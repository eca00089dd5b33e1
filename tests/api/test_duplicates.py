"""A request that comes again attaches to its job, whichever replica it reaches."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from llmstream.api.duplicates import fingerprint
from llmstream.config import SchedulerSettings, ServerSettings
from llmstream.duplicates import Duplicates, Identity
from llmstream.server import Server
from llmstream.store.repeats import digest
from llmstream.store.store import Store
from llmstream.types import GenerateRequest, Job, new_id
from tests.api.pair import two_clients
from tests.api.reading import Json, conversation, finished, status, submit, tokens
from tests.conftest import echo_settings
from tests.logs import begin, new_job
from tests.sse import parse
from tests.waiting import wait_until

SLOW = {"tokens": 20, "delay_ms": 10}
ROUTES = ["/v1/chat/completions", "/chat", "/chat/async"]


def body_for(route: str, **more: Any) -> Json:
    body = conversation(**more)
    return {**body, "stream": True} if route.startswith("/v1") else body


async def post(http: aiohttp.ClientSession, route: str, body: Json, **headers: str) -> tuple[str, bytes]:
    """Posts a request; the id of its job and the whole answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(route, json=body, headers=named) as response:
        raw = await response.read()
        assert response.status in {200, 202}, raw
        return response.headers["x-job-id"], raw


async def refused(http: aiohttp.ClientSession, route: str, body: Json, **headers: str) -> tuple[int, Json, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(route, json=body, headers=named) as response:
        return response.status, (await response.json())["error"], response.headers


async def jobs(http: aiohttp.ClientSession) -> list[str]:
    async with http.get("/jobs") as response:
        return [job["task_id"] for job in (await response.json())["data"]]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("by", ["key", "job_id"])
async def test_a_storm_of_duplicates_is_one_job(tmp_path: Path, route: str, by: str) -> None:
    """Equal requests that reach two replicas at the same moment are one job, and all get the same whole answer."""
    body = body_for(route, echo=SLOW, **({"job_id": "mine:1"} if by == "job_id" else {}))
    headers = {"Idempotency_Key": "k"} if by == "key" else {}
    async with two_clients(tmp_path) as clients:
        answers = await asyncio.gather(*(post(clients[n % 2], route, body, **headers) for n in range(20)))
        ids = {job_id for job_id, _ in answers}
        assert await jobs(clients[0]) == list(ids)
        if by == "job_id":
            assert ids == {"mine:1"}
        if route != "/chat/async":
            logs = {tuple((frame.id, frame.data) for frame in parse(raw) if frame.id) for _, raw in answers}
            assert len(logs) == 1
        again, raw = await post(clients[1], route, body, **headers)
        assert {again} == ids
        if route == "/v1/chat/completions":
            words = [frame.json["choices"][0]["delta"].get("content", "") for frame in parse(raw)[:-1]]
            assert "".join(words) == tokens(20)


async def test_a_name_is_for_one_request(http: aiohttp.ClientSession) -> None:
    """A key or an id with a different request is refused with a message that names it and is not to be retried; how
    the answer is read makes no difference."""
    route = "/v1/chat/completions"
    first, _ = await post(http, route, conversation("a"), Idempotency_Key="k")
    whole, _ = await post(http, route, conversation("a", stream=True), Idempotency_Key="k")
    assert whole == first
    code, error, _ = await refused(http, route, conversation("b"), Idempotency_Key="k")
    assert (code, error["code"], error["param"]) == (422, "idempotency_key_reused", "Idempotency-Key")
    assert "'k'" in error["message"]
    await post(http, route, conversation("a", job_id="j"))
    code, error, headers = await refused(http, route, conversation("b", job_id="j"))
    assert (code, error["code"], error["param"], headers["x-should-retry"]) == (409, "conflict", "job_id", "false")
    assert "'j'" in error["message"]
    assert len(await jobs(http)) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_keys_are_checked(http: aiohttp.ClientSession, key: str) -> None:
    """A key that is empty, too long or not printable is refused."""
    code, error, _ = await refused(http, "/chat", conversation(), Idempotency_Key=key)
    assert (code, error["param"]) == (400, "Idempotency-Key")


@pytest.mark.parametrize("job_id", ["", "a b", "{x}", "x" * 129, 7])
async def test_job_ids_are_checked(http: aiohttp.ClientSession, job_id: Any) -> None:
    """An id that is no plain name is refused."""
    code, error, _ = await refused(http, "/chat/async", conversation(job_id=job_id))
    assert (code, error["param"]) == (400, "job_id")


@pytest.mark.parametrize("by", ["key", "job_id"])
async def test_a_refusal_does_not_burn_the_name(tmp_path: Path, by: str) -> None:
    """A request refused because the queue was full, or because it was wrong, runs when it comes again, also with
    another body; and leaves no job behind meanwhile."""
    settings = echo_settings(tmp_path, slots=1, scheduler=SchedulerSettings(max_waiting=1))
    named = {"job_id": "j"} if by == "job_id" else {}
    headers = {"Idempotency_Key": "k"} if by == "key" else {}
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        assert (await refused(http, "/chat", conversation(**named, model="none"), **headers))[0] == 404
        running = await submit(http, echo={"fault": "stall", "tokens": 2, "at": 1})

        async def claimed() -> bool:
            return bool((await status(http, running["task_id"]))["status"] == "in_progress")

        await wait_until(claimed)
        waiting = await submit(http)
        codes = await asyncio.gather(*(refused(http, "/chat/async", conversation(**named), **headers) for _ in "ab"))
        assert [code for code, _, _ in codes] == [429, 429]
        assert len(await jobs(http)) == 2
        if by == "job_id":
            async with http.get("/chat/j") as response:
                assert response.status == 404
        for job in (running, waiting):
            await http.delete(f"/chat/{job['task_id']}")
        job_id, _ = await post(http, "/chat", conversation("other", **named), **headers)
        assert (await status(http, job_id))["text"] == "other"


async def test_an_attached_job_says_how_far_it_is(http: aiohttp.ClientSession, server: Server) -> None:
    """Submitting a finished job again tells its status and where to read it, under the session it was given first."""
    first = await submit(http, job_id="j")
    await finished(server, "j")
    again = await submit(http, job_id="j")
    assert again == {**first, "status": "completed"}


async def test_an_official_sdk_that_times_out_gets_its_first_job(http: aiohttp.ClientSession, server: Server) -> None:
    """The SDK's own retry after a timeout attaches to the job that still runs, and gets its answer."""
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="x", max_retries=3, timeout=0.5, http_client=None
    ) as client:
        answer = await client.chat.completions.create(
            model="echo",
            messages=[{"role": "user", "content": "hi"}],
            extra_body={"echo": {"tokens": 40, "delay_ms": 20}},
        )
    assert answer.choices[0].message.content == tokens(40)
    assert await jobs(http) == [answer.id.removeprefix("chatcmpl-")]


async def test_only_retries_attach(tmp_path: Path) -> None:
    """Equal first requests of an SDK are jobs of their own; a retry finds the latest, on any replica, also when it is
    over; another body, or a retry outside of the window, is new."""
    route = "/v1/chat/completions"
    async with two_clients(tmp_path) as (one, two):
        first, _ = await post(one, route, conversation("a"), x_stainless_retry_count="0")
        second, _ = await post(one, route, conversation("a"), x_stainless_retry_count="0")
        assert first != second
        assert (await post(two, route, conversation("a"), x_stainless_retry_count="1"))[0] == second
        assert (await post(two, route, conversation("b"), x_stainless_retry_count="1"))[0] not in {first, second}
        assert len(await jobs(one)) == 3
    async with two_clients(tmp_path / "off", server=ServerSettings(port=0, retry_window_s=0)) as (one, two):
        first, _ = await post(one, route, conversation("a"), x_stainless_retry_count="0")
        assert (await post(two, route, conversation("a"), x_stainless_retry_count="1"))[0] != first


async def test_a_retry_of_a_cancelled_job_starts_one_new(http: aiohttp.ClientSession, server: Server) -> None:
    """Retries of a request whose job was cancelled share one new job; an Idempotency-Key keeps naming the old one."""
    route = "/v1/chat/completions"
    stall = conversation(echo={"fault": "stall", "tokens": 2, "at": 1})
    job = await server.gateway.submit(
        GenerateRequest.of(kind="chat", model="echo", body=stall), identity=Identity(fingerprint(stall), retry=0)
    )
    await server.gateway.cancel(job.id)
    retried = [
        asyncio.create_task(post(http, route, {**stall, "stream": True}, x_stainless_retry_count="1")) for _ in range(8)
    ]

    async def begun() -> bool:
        return len(await jobs(http)) == 2

    await wait_until(begun)
    await server.gateway.cancel(next(found for found in await jobs(http) if found != job.id))
    answers = {job_id for job_id, _ in await asyncio.gather(*retried)}
    assert len(answers) == 1
    assert job.id not in answers


def plain_job() -> Job:
    return Job(id=new_id(), request=GenerateRequest.of(kind="chat", model="echo", body={}), pool="echo", created_at=1.0)


@pytest.mark.parametrize("died", ["before the record", "before the queue", "after the store forgot the queue"])
async def test_a_crash_on_the_way_in_loses_nothing(http: aiohttp.ClientSession, server: Server, died: str) -> None:
    """When a replica dies between claiming the key and queueing the job, the repeated request runs it, once; also when
    it had begun by then."""
    store: Store = server.gateway._store
    body = conversation("again")
    known = Identity(fingerprint(body), key="k")
    job = await Duplicates(store, key_s=60, retry_window_s=60).identify(plain_job(), known)
    if died != "before the record":
        assert await store.jobs.create(job)
    begun = died == "after the store forgot the queue"
    if begun:
        await begin(store, job)
    answers = await asyncio.gather(*(post(http, "/chat", body, Idempotency_Key="k") for _ in range(5)))
    assert {job_id for job_id, _ in answers} == {job.id}
    assert await jobs(http) == [job.id]
    assert (await status(http, job.id))["attempt"] == 1 + begun


async def test_names_are_claimed_once(store: Store) -> None:
    """Of many who claim a name at once one succeeds; a void one is replaced once; names expire."""
    ids = [new_id() for _ in range(50)]
    held = await asyncio.gather(*(store.repeats.point("n", job_id, 60) for job_id in ids))
    assert len(set(held)) == 1
    more = await asyncio.gather(*(store.repeats.point("n", new_id(), 60, instead_of=held[0]) for _ in range(50)))
    assert len(set(more)) == 1
    assert more[0] != held[0]
    assert await store.repeats.point("short", "a", 0.001) == "a"
    assert 0 < await store.writes.call("PTTL", store.keys.repeat("n")) <= 60_000


async def test_a_record_goes_with_the_last_refused_submission(store: Store) -> None:
    """One of two submissions of a job that is refused leaves the record to the other; the last takes it away."""
    job = await new_job(store, fingerprint="f")
    created = await store.jobs.create(Job(**{**_fields(job), "created_at": 5.0}))
    assert created is not None
    assert (created.job, created.status) == (job, "queued")
    await store.jobs.discard(job.id)
    assert await store.jobs.find(job.id) is not None
    await store.jobs.discard(job.id)
    assert await store.jobs.find(job.id) is None
    await store.jobs.discard(job.id)
    assert await store.writes.call("DBSIZE") == 0


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__struct_fields__}


def test_fingerprints_ignore_order_and_reading() -> None:
    """The order of fields and the way of reading do not matter; anything else does."""
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1, "stream": True})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert digest("ab", "c") != digest("a", "bc")
