"""Other people's jobs: whoever asks for them in whatever way gets 404, hears nothing and changes nothing.

Every route of the application is here. One that is missing, or has no rule of its own, fails a test.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from llmstream.access.credentials import issue
from llmstream.api.access import RULES
from llmstream.api.app import create_app
from llmstream.server import Server
from tests.api.keyed import client, keyed_settings, secret
from tests.api.reading import Json, finished, submit
from tests.waiting import wait_until
from tests.webhooks.receiver import SECRET

pytestmark = pytest.mark.asyncio(loop_scope="module")

MARK = "xylophone"
"""Stands in every answer of the victim's."""
USER = {"role": "user", "content": MARK}
STALLED = {"tokens": 9, "fault": "stall", "at": 3}
CRASHED = {"tokens": 9, "fault": "crash", "at": 3}

WITH_AN_ID = {
    ("GET", "/v1/chat/completions/{completion_id}"),
    ("GET", "/stream/{session_id}"),
    ("GET", "/chat/{task_id}"),
    ("GET", "/embeddings/{task_id}"),
    ("POST", "/chat/{task_id}/cancel"),
    ("DELETE", "/chat/{task_id}"),
    ("POST", "/jobs/{task_id}/requeue"),
    ("GET", "/sessions/{session_id}"),
    ("DELETE", "/sessions/{session_id}"),
    ("POST", "/webhooks/deliveries/{task_id}/retry"),
}
"""Leads to one job: attacked with every id and every query."""
SUBMITTING = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/stream"),
    ("POST", "/v1/chat"),
    ("POST", "/chat"),
    ("POST", "/chat/async"),
}
"""Could lead to another's job by what a request is known by."""
ASKING = {
    ("POST", "/generate"): {"content": MARK},
    ("POST", "/chat_completion"): {"messages": [{"role": "user", "content": MARK}]},
    ("POST", "/question"): {"text": MARK},
    ("POST", "/v1/generate"): {"prompt": MARK},
    ("POST", "/v1/embeddings"): {"model": "echo", "input": MARK},
    ("POST", "/embeddings"): {"input": MARK},
}
"""The same, without sessions and with bodies of their own."""
LISTING = {
    ("GET", "/jobs"),
    ("GET", "/jobs/dead"),
    ("GET", "/stats"),
    ("GET", "/sessions"),
    ("GET", "/status"),
    ("GET", "/webhooks/deliveries"),
}
"""Could name another's jobs."""
BY_FILTER = {("POST", "/jobs/cancel")}
"""Could end another's jobs."""
FOR_ADMINS = {("GET", "/queues"), ("POST", "/queues/pause"), ("POST", "/queues/drain"), ("POST", "/queues/resume")}
"""Holds up everybody's jobs, or names them."""
HARMLESS = {
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/health/full"),
    ("GET", "/v1/health"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/docs/{file}"),
    ("GET", "/redoc"),
    ("GET", "/webhooks/secret"),
}
"""Knows no jobs."""
WEBHOOKS = {"secret": SECRET, "allow": ["127.0.0.1"], "base_s": 3600}
NOBODY_LISTENS = "http://127.0.0.1:9/hook"


class Victim(NamedTuple):
    """What belongs to alice."""

    server: Server
    done: Json
    running: Json
    failed: Json
    memory: Json
    own_name: Json
    """Made with ``job_id: order-17``."""
    keyed: Json
    """Made with an Idempotency-Key."""
    vectors: Json
    """A batch of embeddings."""

    @property
    def jobs(self) -> list[Json]:
        return [self.done, self.running, self.failed, self.memory, self.own_name, self.keyed, self.vectors]

    @property
    def ids(self) -> set[str]:
        """Every word that alice could have lost."""
        jobs = {job["task_id"] for job in self.jobs} | {job["session_id"] for job in self.jobs}
        return jobs | {"order-17", "alice:order-17", "demo"}

    async def states(self) -> list[tuple[str, str]]:
        """What has become of the jobs, as the server itself knows it."""
        states = [await self.server.gateway.job(job["task_id"]) for job in self.jobs]
        return [(state.job.id, state.status) for state in states]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def victim(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Victim]:
    settings = keyed_settings(tmp_path_factory.mktemp("victim"), webhooks=WEBHOOKS)
    async with Server(settings) as server, client(server, secret("alice")) as http:
        made = Victim(
            server,
            done=await submit(http, message=MARK, session_id="demo", webhook=NOBODY_LISTENS),
            running=await submit(http, message=MARK, echo=STALLED, on_disconnect="continue"),
            failed=await submit(http, message=MARK, echo=CRASHED, session_id="broken"),
            memory=await submit(http, message=MARK, echo=STALLED, durability="memory"),
            own_name=await submit(http, message=MARK, job_id="order-17"),
            keyed=await _with_key(http, message=MARK, session_id="demo2"),
            vectors=await _batch(http),
        )
        async with http.post("/v1/chat", json={"session_id": "demo", "messages": [USER]}) as response:
            assert response.status == 200, await response.text()
        for job in (made.done, made.failed, made.own_name, made.keyed, made.vectors):
            await finished(server, job["task_id"])

        async def both_run() -> bool:
            states = [await server.gateway.job(job["task_id"]) for job in (made.running, made.memory)]
            return all(state.status == "in_progress" for state in states)

        await wait_until(both_run)
        yield made


async def _batch(http: aiohttp.ClientSession) -> Json:
    body = {"texts": [MARK], "session_id": "vectors", "job_id": "order-18"}
    async with http.post("/embeddings", json=body) as response:
        answer: Json = await response.json()
        assert response.status == 202, answer
        return {**answer, "session_id": "vectors", "stream_url": ""}


async def _with_key(http: aiohttp.ClientSession, **body: Any) -> Json:
    async with http.post("/chat/async", json=body, headers={"Idempotency-Key": "once"}) as response:
        answer: Json = await response.json()
        assert response.status == 202, answer
        return answer


def routes() -> set[tuple[str, str]]:
    """Method and path of every route of the application."""
    app = create_app(keyed_settings_anywhere())
    found = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    return {(method, path.replace("{model:.+}", "{model}")) for method, path in found if method != "HEAD"}


def keyed_settings_anywhere() -> Any:
    from pathlib import Path

    return keyed_settings(Path("unused"))


async def test_every_route_has_a_decision() -> None:
    """Each route is in one of this file's tables, and its handler says who may call it."""
    assert routes() == WITH_AN_ID | SUBMITTING | set(ASKING) | LISTING | BY_FILTER | FOR_ADMINS | HARMLESS
    app: web.Application = create_app(keyed_settings_anywhere())
    undecided = [route for route in app.router.routes() if route.handler not in RULES]
    assert undecided == []


def queries(victim: Victim) -> Iterator[dict[str, str]]:
    """Everything that routes read from a query, with values that could help."""
    stream_tokens = [job["stream_url"].partition("token=")[2] for job in victim.jobs]
    yield from ({}, {"stream": "true"}, {"stream": "true", "include_usage": "true"})
    yield from ({"stream": "true", "starting_after": "1-1"}, {"last_event_id": "1-1"}, {"limit": "500"})
    for job in victim.jobs:
        yield {"task_id": job["task_id"]}
        yield {"task_id": job["task_id"], "last_event_id": "0-1"}
    yield {"task_id": "order-17"}
    for token in stream_tokens:
        for other in ("bob", "admin", ""):
            until, _, rest = token.partition(".")
            yield {"token": f"{until}.{rest.partition('.')[0]}.{other}"}


def attackers() -> list[tuple[str, dict[str, str], int]]:
    """Who tries, and what they hear at most."""
    return [
        ("another principal", {"Authorization": f"Bearer {secret('bob')}"}, 404),
        ("another principal, the other header", {"X-API-Key": secret("bob")}, 404),
        ("a reader", {"Authorization": f"Bearer {secret('reader')}"}, 404),
        ("nobody", {}, 401),
        ("a wrong key", {"Authorization": f"Bearer {secret('alice')}x"}, 401),
    ]


@pytest.mark.parametrize(("who", "headers", "at_most"), attackers(), ids=lambda value: str(value)[:40])
@pytest.mark.parametrize(("method", "path"), sorted(WITH_AN_ID))
async def test_no_id_leads_to_the_job(
    victim: Victim, method: str, path: str, who: str, headers: dict[str, str], at_most: int
) -> None:
    """Every id of the victim's with every query is refused on every route that takes one, and nothing changes."""
    before = await victim.states()
    more = [{}, {"Last-Event-ID": "1-1"}, {"X-Principal": "alice", "X-User": "alice"}]
    async with aiohttp.ClientSession(victim.server.url, headers=headers) as http:
        for given, query in itertools.product(sorted(victim.ids), queries(victim)):
            prefix = "chatcmpl-" if "completion_id" in path else ""
            url = path[: path.index("{")] + prefix + given + path[path.index("}") + 1 :]
            for extra in more if not query else more[:1]:
                async with http.request(method, url, params=query, headers=extra) as response:
                    text = await response.text()
                allowed = {at_most, 403} if who == "a reader" and method != "GET" else {at_most}
                assert response.status in allowed, (url, query, response.status, text)
                assert MARK not in text
                assert "tok0" not in text
    assert await victim.states() == before


@pytest.mark.parametrize(("method", "path"), sorted(WITH_AN_ID))
async def test_what_is_not_there_looks_the_same(victim: Victim, method: str, path: str) -> None:
    """The refusal does not tell whether there is such a job."""
    answers = set()
    async with client(victim.server, secret("bob")) as http:
        for given in (victim.done["task_id"], "01m7zzzzzzzzzzzzzzzzzzzzzz", victim.memory["task_id"]):
            url = path[: path.index("{")] + given + path[path.index("}") + 1 :]
            async with http.request(method, url) as response:
                answers.add((response.status, (await response.text()).replace(given, "ID"), *sorted(response.headers)))
    assert len(answers) == 1


@pytest.mark.parametrize("path", sorted(path for _, path in SUBMITTING))
@pytest.mark.parametrize("known_by", ["key", "job_id", "qualified", "retry", "session"])
async def test_no_repeated_request_leads_to_the_job(victim: Victim, path: str, known_by: str) -> None:
    """The victim's own request, sent again by somebody else under the same name, is a job of the sender's."""
    before = await victim.states()
    body: Json = {"model": "echo", "messages": [{"role": "user", "content": MARK}]}
    headers: dict[str, str] = {}
    if known_by == "key":
        headers["Idempotency-Key"] = "once"
        body["session_id"] = "demo2"
    elif known_by in ("job_id", "qualified"):
        body["job_id"] = "order-17" if known_by == "job_id" else "alice:order-17"
    elif known_by == "retry":
        headers["x-stainless-retry-count"] = "1"
    else:
        body["session_id"] = "demo"
    async with client(victim.server, secret("bob")) as http:
        async with http.post(path, json=body, headers=headers) as response:
            text = await response.text()
            assert response.status in (200, 202), text
            job_id = response.headers["x-job-id"]
        assert job_id not in victim.ids
        assert (await finished(victim.server, job_id)).job.principal == "bob"
        async with http.get(f"/chat/{job_id}") as response:
            assert response.status == 200
        if known_by in ("job_id", "qualified"):
            async with http.get(f"/chat/{body['job_id']}") as response:
                assert (await response.json())["task_id"] == job_id
        if known_by == "session":
            async with http.get("/stream/demo") as response:
                assert response.headers["x-job-id"] == job_id
    assert await victim.states() == before


@pytest.mark.parametrize("durability", ["full", "memory"])
async def test_a_session_is_its_principals(victim: Victim, durability: str) -> None:
    """Sessions of the same name are different sessions: each principal reads its own latest answer."""
    session, made = f"shared-{durability}", {}
    for name in ("alice", "bob"):
        async with client(victim.server, secret(name)) as http:
            job = await submit(http, message=f"for {name}", session_id=session, durability=durability)
            made[name] = job["task_id"]
    for name in ("alice", "bob"):
        async with client(victim.server, secret(name)) as http, http.get(f"/stream/{session}") as response:
            assert response.headers["x-job-id"] == made[name]


@pytest.mark.parametrize(("route", "body"), ASKING.items(), ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("known_by", ["job_id", "key", "cache"])
async def test_no_equal_request_leads_to_the_job(
    victim: Victim, route: tuple[str, str], body: Json, known_by: str
) -> None:
    """Whoever asks what another principal asked, under whatever name, gets an answer of its own."""
    made: dict[str, list[tuple[str, str | None]]] = {}
    own = f"own{route[1].replace('/', '-')}"
    asked = {**body, "job_id": own} if known_by == "job_id" else body
    headers = {"Idempotency-Key": own} if known_by == "key" else {}
    for name in ("alice", "bob", "bob"):
        async with (
            client(victim.server, secret(name)) as http,
            http.post(route[1], json=asked, headers=headers) as response,
        ):
            assert response.status == 200, await response.text()
            made.setdefault(name, []).append((response.headers["x-job-id"], response.headers.get("X-Cache")))
    assert made["alice"][0][0] != made["bob"][0][0]
    assert made["bob"][0][1] is None
    assert (await victim.server.gateway.job(made["bob"][0][0])).job.principal == "bob"
    if known_by != "cache" or route[1] == "/v1/generate":
        assert made["bob"][0][0] == made["bob"][1][0]


async def test_no_equal_batch_leads_to_the_job(victim: Victim) -> None:
    """The victim's own batch, sent by somebody else under the same name, is a job of the sender's."""
    async with client(victim.server, secret("bob")) as http:
        made = await _batch(http)
        assert made["task_id"] == "bob:order-18"
        assert (await finished(victim.server, made["task_id"])).job.principal == "bob"
    async with client(victim.server, secret("alice")) as http, http.get("/embeddings/order-18") as response:
        assert (await response.json())["task_id"] == victim.vectors["task_id"] == "alice:order-18"


async def test_a_conversation_is_its_principals(victim: Victim) -> None:
    """Nobody else's message goes into a conversation, and nothing of it comes out."""
    told = {"session_id": "talk", "messages": [USER]}
    async with client(victim.server, secret("alice")) as http, http.post("/v1/chat", json=told) as response:
        assert response.status == 200
    async with client(victim.server, secret("bob")) as http:
        for url in ("/sessions/talk", "/sessions/alice%2Ftalk"):
            async with http.get(url) as response:
                assert (response.status, MARK in await response.text()) == (404, False)
            async with http.delete(url) as response:
                assert response.status == 404
        body = {"session_id": "talk", "messages": [{"role": "user", "content": "what did we say?"}]}
        async with http.post("/v1/chat", json=body) as response:
            job_id = response.headers["x-job-id"]
        assert MARK not in str((await victim.server.gateway.job(job_id)).job.request.messages)
        async with http.delete("/sessions/talk") as response:
            assert response.status == 200
    async with client(victim.server, secret("alice")) as http, http.get("/sessions/talk") as response:
        assert [message["content"] for message in (await response.json())["messages"]] == [MARK, MARK]


@pytest.mark.parametrize(("method", "path"), sorted(LISTING))
async def test_no_list_names_the_jobs(victim: Victim, method: str, path: str) -> None:
    """Lists and statistics hold nothing of the victim's; its own lists do, and an admin's."""
    texts = {}
    for name in ("alice", "bob", "reader", "admin"):
        query = {} if path == "/stats" else {"limit": "500"}
        async with client(victim.server, secret(name)) as http, http.request(method, path, params=query) as response:
            assert response.status == 200
            texts[name] = await response.text()
    own_words = {job["task_id"] for job in victim.jobs} - {"alice:order-17"}
    for name in ("bob", "reader"):
        assert not [word for word in own_words if word in texts[name]]
        assert '"alice' not in texts[name]
    if path == "/jobs":
        own = {row["task_id"] for row in json.loads(texts["alice"])["data"]}
        assert own >= {job["task_id"] for job in victim.jobs} - {victim.memory["task_id"]}
        for job_id in own:
            assert (await victim.server.gateway.job(job_id)).job.principal == "alice"
        assert own < {row["task_id"] for row in json.loads(texts["admin"])["data"]}
    if path == "/webhooks/deliveries":
        for name in ("alice", "admin"):
            assert [row["task_id"] for row in json.loads(texts[name])["data"]] == [victim.done["task_id"]]
    if path == "/jobs/dead":
        for name in ("alice", "admin"):
            assert [row["task_id"] for row in json.loads(texts[name])["data"]] == [victim.failed["task_id"]]


@pytest.mark.parametrize(
    "words", [{"all": True}, {"principal": "alice"}, {"session_id": "demo"}, {"model": "*"}, {"status": "in_progress"}]
)
async def test_no_filter_reaches_the_jobs(victim: Victim, words: Json) -> None:
    """Whatever a filter says, it ends jobs of whoever sends it and no others, and does not name them."""
    before = await victim.states()
    for who, allowed in (("bob", 200), ("reader", 403)):
        async with client(victim.server, secret(who)) as http, http.post("/jobs/cancel", json=words) as response:
            text = await response.text()
            assert response.status == allowed, text
        assert not [word for word in victim.ids if word in text]
    assert await victim.states() == before


@pytest.mark.parametrize(("method", "path"), sorted(FOR_ADMINS))
async def test_only_admins_hold_up_jobs(victim: Victim, method: str, path: str) -> None:
    """Keys without the scope are refused, and nothing is paused."""
    for _, headers, at_most in attackers():
        async with (
            aiohttp.ClientSession(victim.server.url, headers=headers) as http,
            http.request(method, path, json={}) as response,
        ):
            assert response.status == (401 if at_most == 401 else 403)
    assert (await victim.server.gateway.control.look()).rules == ()


async def test_a_secret_is_its_principals(victim: Victim) -> None:
    """What verifies somebody's events is told to nobody else, and a key that may only read gets none."""
    found = {}
    for name in ("alice", "bob", "admin"):
        async with client(victim.server, secret(name)) as http, http.get("/webhooks/secret") as response:
            found[name] = (await response.json())["key"]
    assert len(set(found.values())) == 3
    assert SECRET not in found.values()
    async with client(victim.server, secret("reader")) as http, http.get("/webhooks/secret") as response:
        assert response.status == 403


async def test_the_owner_and_an_admin_can(victim: Victim) -> None:
    """What is refused to others works for the owner with any of its keys, by its own names too, and for an admin."""
    made, key = issue("alice", scopes=["read"], models=None, now=time.time(), expires_at=time.time() + 60)
    await victim.server.gateway._store.api_keys.add(key, time.time())
    for shown in (secret("alice"), made, secret("admin")):
        async with client(victim.server, shown) as http:
            for job in victim.jobs:
                async with http.get(f"/chat/{job['task_id']}") as response:
                    assert (await response.json())["task_id"] == job["task_id"]
    async with client(victim.server, secret("alice")) as http:
        for path in ("/chat/order-17", "/stream/order-17", "/v1/chat/completions/chatcmpl-order-17", "/stream/demo"):
            async with http.get(path) as response:
                assert (response.status, MARK in await response.text()) == (200, True), path
    async with client(victim.server, secret("admin")) as http:
        made_here = await submit(http, message="x", echo=STALLED, job_id="made-here")
        for job_id in (made_here["task_id"], "made-here"):
            async with http.post(f"/chat/{job_id}/cancel") as response:
                assert (await response.json())["status"] == "cancelled"


async def test_an_admin_requeues_for_the_owner(victim: Victim) -> None:
    """A job that an admin requeues stays its owner's: the new one, too."""
    async with client(victim.server, secret("alice")) as http:
        failed = await submit(http, message=MARK, echo={**CRASHED, "attempts": 1})
        await finished(victim.server, failed["task_id"])
    async with (
        client(victim.server, secret("admin")) as http,
        http.post(f"/jobs/{failed['task_id']}/requeue") as response,
    ):
        new_id = (await response.json())["task_id"]
    assert (await finished(victim.server, new_id)).job.principal == "alice"
    async with client(victim.server, secret("bob")) as http, http.get(f"/chat/{new_id}") as response:
        assert response.status == 404
