"""Conversations on the routes where a session's name alone means something else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import ServerSettings
from llmstream.config_routes import ChatHistorySettings
from llmstream.server import Server
from tests.api.pair import two_clients
from tests.api.reading import Json, conversation, finished, status, tokens
from tests.conftest import echo_settings
from tests.valkey import valkey
from tests.waiting import wait_until

STALL = {"tokens": 3, "fault": "stall", "at": 2}


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def said(text: str) -> Json:
    return {"role": "assistant", "content": text}


def native(text: str, **more: Any) -> Json:
    return {"message": text, **more}


ROUTES: list[tuple[str, Callable[..., Json], Json]] = [
    ("/chat", native, {}),
    ("/chat/async", native, {}),
    ("/v1/chat/completions", conversation, {}),
    ("/v1/chat/completions", conversation, {"stream": True}),
    ("/v1/chat/stream", conversation, {}),
]
"""Routes with the form of their bodies, and what else is in these."""


async def ask(http: aiohttp.ClientSession, route: str, body: Json, **headers: str) -> tuple[int, Json, str]:
    """Sends a message: the status, the refusal if it is one, and the job."""
    async with http.post(route, json=body, headers=headers) as response:
        refused = response.status >= 400
        answer = await response.json() if refused else {"": await response.read()}
        return response.status, answer, response.headers.get("x-job-id", "")


async def kept(http: aiohttp.ClientSession, session: str = "s") -> Json:
    async with http.get(f"/sessions/{session}") as response:
        body: Json = await response.json()
        return body


async def test_every_route_keeps_the_conversation(tmp_path: Path) -> None:
    """With ``history`` each route, on each replica, adds to the one conversation."""
    async with two_clients(tmp_path) as clients:
        before: list[Json] = []
        for number, (route, form, more) in enumerate([*ROUTES, ("/v1/chat", conversation, {})]):
            body = form(f"message {number}", session_id="s", history=True, **more)
            code, answer, job = await ask(clients[number % 2], route, body)
            assert code < 300, answer
            await wait_until(lambda job=job: over(clients[0], job))  # type: ignore[misc]
            found = (await kept(clients[0]))["messages"]
            assert found == [*before, user(f"message {number}"), said(f"message {number}")]
            before = found


async def over(http: aiohttp.ClientSession, job: str) -> bool:
    return bool((await status(http, job))["status"] == "completed")


@pytest.mark.parametrize(("route", "form", "more"), ROUTES)
async def test_what_the_model_gets(
    server: Server, http: aiohttp.ClientSession, route: str, form: Callable[..., Json], more: Json
) -> None:
    """The second message comes behind the first and its answer, and no field of ours reaches the model."""
    jobs = []
    for text in ("one", "two"):
        fields = {"session_id": "s", "history": True, "multitask": "wait", **more}
        _, answer, job = await ask(http, route, form(text, **fields))
        assert job, answer
        await finished(server, job)
        jobs.append(job)
    request = (await server.gateway.job(jobs[1])).job.request
    assert request.messages == [user("one"), said("one"), user("two")]
    assert not request.body.keys() & {"session_id", "history", "multitask", "message"}


@pytest.mark.parametrize(("route", "form", "more"), ROUTES)
async def test_a_session_alone_names_a_stream(
    server: Server, http: aiohttp.ClientSession, route: str, form: Callable[..., Json], more: Json
) -> None:
    """Without ``history`` nothing is added and nothing kept, as before."""
    for text in ("one", "two"):
        _, _, job = await ask(http, route, form(text, session_id="s", **more))
        await finished(server, job)
        assert (await server.gateway.job(job)).job.request.messages == [user(text)]
    assert (await kept(http))["error"]["code"] == "not_found"
    async with http.get("/stream/s") as response:
        assert response.headers["x-job-id"] == job


async def test_everywhere(tmp_path: Path) -> None:
    """``chat_history.everywhere`` keeps all sessions but those of requests that say otherwise."""
    settings = echo_settings(tmp_path, chat_history=ChatHistorySettings(everywhere=True))
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        for text, more in (("one", {}), ("aside", {"history": False}), ("two", {})):
            await ask(http, "/v1/chat/completions", conversation(text, session_id="s", **more))
        await ask(http, "/v1/chat/completions", conversation("no session"))
        await ask(http, "/v1/chat", conversation("not kept", session_id="s", history=False))
        assert (await kept(http))["messages"] == [user("one"), said("one"), user("two"), said("two")]


async def test_multitask(server: Server, http: aiohttp.ClientSession) -> None:
    """A message that comes while another is answered is refused or interrupts it, as its request says."""
    _, _, first = await ask(http, "/chat/async", native("one", session_id="s", history=True, echo=STALL))

    async def spoke() -> bool:
        return bool((await status(http, first))["text"] == tokens(2))

    await wait_until(spoke)
    for route, form in (("/v1/chat/completions", conversation), ("/chat", native), ("/chat/async", native)):
        busy = form("two", session_id="s", history=True, multitask="reject")
        code, refusal, _ = await ask(http, route, busy)
        assert (code, refusal["error"]["code"]) == (409, "session_busy")
    interrupting = native("three", session_id="s", history=True, multitask="interrupt")
    _, _, second = await ask(http, "/chat/async", interrupting)
    assert (await finished(server, first)).status == "cancelled"
    await finished(server, second)
    expected = [user("one"), said(tokens(2)), user("three"), said("three")]
    assert (await kept(http))["messages"] == expected


async def test_a_repeated_message_is_one_turn(server: Server, http: aiohttp.ClientSession) -> None:
    """A message that comes again under its key is the same job on every route, and is remembered once."""
    body = native("one", session_id="s", history=True)
    jobs = {(await ask(http, "/chat/async", body, **{"Idempotency-Key": "k"}))[2] for _ in range(3)}
    assert len(jobs) == 1
    await finished(server, jobs.pop())
    assert (await kept(http))["messages"] == [user("one"), said("one")]


async def test_a_turn_that_is_taken_over_is_kept(tmp_path: Path) -> None:
    """The replica that answers goes in the middle: the next message comes behind the whole answer of the other one."""
    slow = {"tokens": 40, "delay_ms": 20}
    async with valkey(tmp_path) as redis, AsyncExitStack() as gone:
        given: Json = {"store": {"url": redis.url}, "server": ServerSettings(port=0, shutdown_grace_s=0)}
        first = await gone.enter_async_context(Server(echo_settings(tmp_path, **given)))
        body = conversation("one", session_id="s", history=True, stream=True, echo=slow)
        async with (
            aiohttp.ClientSession(first.url) as old,
            old.post("/v1/chat/completions", json=body) as response,
        ):
            job = response.headers["x-job-id"]
            await response.content.readline()
            async with Server(echo_settings(tmp_path / "b", **given)) as second:
                await gone.aclose()
                async with aiohttp.ClientSession(second.url) as http:
                    again = conversation("two", session_id="s", history=True)
                    code, answer, _ = await ask(http, "/v1/chat/completions", again)
                    assert code == 200, answer
                    assert (await second.gateway.job(job)).replica == second.gateway.replica
                    expected = [user("one"), said(tokens(40)), user("two"), said("two")]
                    assert (await kept(http))["messages"] == expected


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"history": True}, "history"),
        ({"history": "yes", "session_id": "s"}, "history"),
        ({"multitask": "wait"}, "multitask"),
        ({"multitask": "wait", "session_id": "s"}, "multitask"),
        ({"multitask": "drop", "session_id": "s", "history": True}, "multitask"),
        ({"session_id": "s", "history": True, "durability": "memory"}, "durability"),
    ],
)
async def test_bad_fields(http: aiohttp.ClientSession, more: Json, param: str) -> None:
    """What is wrong is named, on every route."""
    for route, form, _ in ROUTES:
        code, refusal, _ = await ask(http, route, form("x", **more))
        assert (code, refusal["error"]["param"]) == (400, param), route
