"""Conversations that the server keeps: merged, one message after the other, trimmed, forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import ModelSettings, StoreSettings
from llmstream.config_routes import ChatHistorySettings
from llmstream.conversations import Conversations
from llmstream.errors import Conflict
from llmstream.server import Server
from llmstream.types import GenerateRequest, Principal
from tests.api.pair import two_clients
from tests.api.reading import Json, finished, status, tokens
from tests.conftest import assert_every_key_expires, echo_settings
from tests.sse import parse
from tests.tiny_gguf import write_tiny_gguf
from tests.waiting import wait_until

STALL = {"tokens": 3, "fault": "stall", "at": 2}


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def said(text: str) -> Json:
    return {"role": "assistant", "content": text}


@asynccontextmanager
async def serving(tmp_path: Path, **sections: Any) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    async with Server(echo_settings(tmp_path, **sections)) as server, aiohttp.ClientSession(server.url) as http:
        yield server, http


async def chat(http: aiohttp.ClientSession, text: str, session: str = "s", **more: Any) -> tuple[int, Json]:
    """Adds a message; the answer, with the id of its job."""
    headers = {name.replace("_", "-"): more.pop(name) for name in ("Idempotency_Key",) if name in more}
    body = {"session_id": session, "messages": [user(text)], **more}
    async with http.post("/v1/chat", json=body, headers=headers) as response:
        return response.status, {**await response.json(), "job": response.headers.get("x-job-id")}


async def conversation(http: aiohttp.ClientSession, session: str = "s") -> Json:
    async with http.get(f"/sessions/{session}") as response:
        body: Json = await response.json()
        return body


async def runs(http: aiohttp.ClientSession, session: str = "s", text: str = tokens(2)) -> str:
    """Waits until an answer of the session runs and has said so much; its job."""

    async def there() -> bool:
        job = (await conversation(http, session)).get("running")
        return job is not None and (await status(http, job))["text"] == text

    await wait_until(there)
    return str((await conversation(http, session))["running"])


async def asked(server: Server, job_id: str) -> list[Json]:
    """What the model was asked."""
    return (await server.gateway.job(job_id)).job.request.messages


async def test_a_follow_up_knows_what_was_said(tmp_path: Path) -> None:
    """The page's two requests: the second one reaches the model behind the first and its answer, on any replica."""
    async with two_clients(tmp_path) as clients:
        one, first = await chat(clients[0], "What is Python?", "user-123-conversation", max_tokens=100)
        two, second = await chat(clients[1], "What are its main features?", "user-123-conversation", max_tokens=100)
        assert (one, two) == (200, 200)
        expected = [user("What is Python?"), said("What is Python?"), user("What are its main features?")]
        found = await conversation(clients[0], "user-123-conversation")
        assert found["messages"] == [*expected, said("What are its main features?")]
        assert found["running"] is None
        assert 7100 < found["expires_in_s"] <= 7200
        assert {name: second[name] for name in ("model", "tokens_generated", "cached")} == {
            "model": "echo",
            "tokens_generated": 5,
            "cached": False,
        }
        assert first["message"] == said("What is Python?")


async def test_what_the_model_gets(tmp_path: Path) -> None:
    """The whole conversation goes to the model; streamed or whole makes no difference."""
    async with serving(tmp_path) as (server, http):
        await chat(http, "one")
        body = {"session_id": "s", "messages": [user("two")], "stream": True}
        async with http.post("/v1/chat", json=body) as response:
            frames, job = parse(await response.read()), response.headers["x-job-id"]
        assert frames[-1].json == {"type": "complete"}
        assert await asked(server, job) == [user("one"), said("one"), user("two")]
        _, answer = await chat(http, "three")
        expected = [user("one"), said("one"), user("two"), said("two"), user("three")]
        assert await asked(server, answer["job"]) == expected
        _, other = await chat(http, "hello", "other")
        assert await asked(server, other["job"]) == [user("hello")]
        await assert_every_key_expires(server.gateway._store)


async def test_messages_wait_for_each_other(tmp_path: Path) -> None:
    """By default messages are answered in the order of their arrival, each with what was said before, on two
    replicas."""
    async with two_clients(tmp_path) as clients:
        sent = []
        for number in range(6):
            sent.append(
                asyncio.create_task(chat(clients[number % 2], f"m{number}", echo={"tokens": 2, "delay_ms": 20}))
            )
            await asyncio.sleep(0.03)
        answers = await asyncio.gather(*sent)
        assert [code for code, _ in answers] == [200] * 6
        found = (await conversation(clients[0]))["messages"]
        expected = [message for number in range(6) for message in (user(f"m{number}"), said(tokens(2)))]
        assert [(m["role"], m["content"].strip()) for m in found] == [
            (m["role"], m["content"].strip()) for m in expected
        ]


async def test_a_storm_loses_nothing(tmp_path: Path) -> None:
    """Messages that come at the same moment are all answered and all remembered, each with its own answer."""
    async with two_clients(tmp_path) as clients:
        answers = await asyncio.gather(*(chat(clients[n % 2], f"m{n}") for n in range(10)))
        assert [code for code, _ in answers] == [200] * 10
        found = (await conversation(clients[0]))["messages"]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        assert sorted(pair[0]["content"] for pair in pairs) == sorted(f"m{n}" for n in range(10))
        assert all(pair == (user(pair[0]["content"]), said(pair[0]["content"])) for pair in pairs)


async def test_reject(tmp_path: Path) -> None:
    """``reject`` gives 409 while another message is answered, leaves no trace, and is taken afterwards."""
    async with serving(tmp_path) as (server, http):
        first = asyncio.create_task(chat(http, "one", echo=STALL))
        job = await runs(http)
        code, refusal = await chat(http, "two", multitask="reject")
        assert (code, refusal["error"]["code"], refusal["error"]["param"]) == (409, "session_busy", "session_id")
        await http.post(f"/chat/{job}/cancel")
        assert (await first)[0] == 409
        code, answer = await chat(http, "three", multitask="reject")
        assert code == 200
        assert await asked(server, answer["job"]) == [user("one"), said(tokens(2)), user("three")]


async def test_interrupt(tmp_path: Path) -> None:
    """``interrupt`` ends the running answer; what it had said stays in the conversation."""
    history = ChatHistorySettings(multitask="interrupt")
    async with serving(tmp_path, chat_history=history) as (server, http):
        first = asyncio.create_task(chat(http, "one", echo=STALL))
        job = await runs(http)
        code, answer = await chat(http, "two")
        assert (code, answer["message"]) == (200, said("two"))
        assert (await first)[1]["error"]["code"] == "cancelled"
        assert (await finished(server, job)).status == "cancelled"
        assert await asked(server, answer["job"]) == [user("one"), said(tokens(2)), user("two")]


async def test_an_interrupted_message_without_answer_goes_on(tmp_path: Path) -> None:
    """A message that was interrupted before anything was said is not lost: the next one goes on in it."""
    async with serving(tmp_path) as (server, http):
        first = asyncio.create_task(chat(http, "a poem", echo={"tokens": 3, "fault": "stall", "at": 0}))
        await runs(http, text="")
        _, answer = await chat(http, "about cats", multitask="interrupt")
        await first
        assert await asked(server, answer["job"]) == [user("a poem\n\nabout cats")]


async def test_a_failed_turn_leaves_nothing(tmp_path: Path) -> None:
    """A message whose answer failed is not in the conversation, so it can be sent again."""
    async with serving(tmp_path) as (server, http):
        code, _ = await chat(http, "one", echo={"tokens": 3, "fault": "error", "at": 1})
        assert code == 502
        _, answer = await chat(http, "one")
        assert await asked(server, answer["job"]) == [user("one")]


async def test_a_refused_message_leaves_nothing(tmp_path: Path) -> None:
    """What the gateway refuses is not in the conversation and does not hold it."""
    async with serving(tmp_path) as (_, http):
        assert (await chat(http, "one", model="nobody"))[0] == 404
        assert (await conversation(http))["error"]["code"] == "not_found"
        assert (await chat(http, "two", multitask="reject"))[0] == 200


async def test_waiting_has_an_end(tmp_path: Path) -> None:
    """A message that waited for too long is refused; nothing is left of it."""
    async with serving(tmp_path, chat_history=ChatHistorySettings(wait_s=0.2)) as (_, http):
        first = asyncio.create_task(chat(http, "one", echo=STALL))
        job = await runs(http)
        assert (await chat(http, "two"))[1]["error"]["code"] == "session_busy"
        await http.post(f"/chat/{job}/cancel")
        await first
        assert [m["content"] for m in (await conversation(http))["messages"]] == ["one", tokens(2)]


@pytest.mark.parametrize("multitask", ["wait", "interrupt", "reject"])
@pytest.mark.parametrize("name", [{"Idempotency_Key": "k"}, {"job_id": "mine"}])
async def test_a_repeated_message_is_one_turn(tmp_path: Path, multitask: str, name: Json) -> None:
    """A message that comes again under its name is the same job, does not end itself, and is remembered once."""
    async with serving(tmp_path) as (_, http):
        more = {**name, "multitask": multitask, "echo": {"tokens": 5, "delay_ms": 30}}
        first = asyncio.create_task(chat(http, "one", **more))
        await runs(http, text=tokens(1))
        again = await chat(http, "one", **more)
        assert again == await first
        assert again[1]["message"] == said(tokens(5))
        assert (await conversation(http))["messages"] == [user("one"), said(tokens(5))]
        code, refusal = await chat(http, "two", **more)
        assert (code, refusal["error"]["param"]) in {(422, "Idempotency-Key"), (409, "job_id")}


async def test_the_oldest_turns_go_first(tmp_path: Path) -> None:
    """What does not fit into the context is left out from the oldest turn on; the system message and the new one
    stay, and the conversation itself is kept."""
    models = {"echo": ModelSettings(engine="echo", context=32)}
    async with serving(tmp_path, models=models) as (server, http):
        system = {"role": "system", "content": "be brief"}
        body = {"session_id": "s", "messages": [system, user("0 a b c d")]}
        async with http.post("/v1/chat", json=body) as response:
            assert response.status == 200
        for number in range(1, 5):
            code, answer = await chat(http, f"{number} a b c d")
            assert code == 200
        messages = await asked(server, answer["job"])
        kept = [message for number in (2, 3) for message in (user(f"{number} a b c d"), said(f"{number} a b c d"))]
        assert messages == [system, *kept, user("4 a b c d")]
        assert len((await conversation(http))["messages"]) == 11
        code, refusal = await chat(http, "word " * 40)
        assert (code, refusal["error"]["code"]) == (400, "context_length_exceeded")


async def test_a_long_limit_leaves_no_history_out(tmp_path: Path) -> None:
    """An answer that may be longer than the context is left a quarter of it, not all."""
    weights = write_tiny_gguf(tmp_path / "tiny.gguf", context=128)
    models = {"tiny": ModelSettings(source=str(weights), slots=1, threads=1, system_prompt=None)}
    async with serving(tmp_path, models=models) as (server, http):
        await chat(http, "a", max_tokens=3)
        code, answer = await chat(http, "b")
        assert code == 200, answer
        assert [message["role"] for message in await asked(server, answer["job"])] == ["user", "assistant", "user"]


async def test_a_conversation_is_bounded(tmp_path: Path) -> None:
    """No more is kept than chat_history.max_bytes."""
    async with serving(tmp_path, chat_history=ChatHistorySettings(max_bytes=300)) as (server, http):
        for number in range(10):
            _, answer = await chat(http, f"{number} {'x' * 20}")
        messages = await asked(server, answer["job"])
        assert messages[-1] == user(f"9 {'x' * 20}")
        assert len(messages) == 5


async def test_list_read_delete(http: aiohttp.ClientSession) -> None:
    """Sessions are listed latest first, read, and forgotten; afterwards the conversation begins anew."""
    for session in ("a", "b", "a"):
        await chat(http, "hello", session)
    async with http.get("/sessions") as response:
        listed = await response.json()
    assert [each["session_id"] for each in listed["data"]] == ["a", "b"]
    assert len((await conversation(http, "a"))["messages"]) == 4
    async with http.delete("/sessions/a") as response:
        assert (response.status, await response.json()) == (200, {"session_id": "a", "deleted": True})
    for asked_for in (http.get("/sessions/a"), http.delete("/sessions/a")):
        async with asked_for as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")
    async with http.get("/sessions") as response:
        assert [each["session_id"] for each in (await response.json())["data"]] == ["b"]
    await chat(http, "again", "a")
    assert (await conversation(http, "a"))["messages"] == [user("again"), said("again")]


async def test_what_is_forgotten_stays_forgotten(tmp_path: Path) -> None:
    """A message that waited while the conversation was deleted does not bring it back."""
    async with serving(tmp_path) as (server, http):
        await chat(http, "secret")
        conversations, who = Conversations(server.gateway), Principal()

        async def never() -> bool:
            return False

        request = GenerateRequest.of("chat", "echo", {"model": "echo", "messages": [user("two")]})

        async def deleted_meanwhile() -> None:
            async with conversations.turn(who, "s", request, "wait", never) as turn:
                job = await server.gateway.submit(turn.request)
                turn.job_id = job.id
                await conversations.forget(who, "s")

        with pytest.raises(Conflict, match="went on meanwhile"):
            await deleted_meanwhile()
        assert (await conversation(http))["error"]["code"] == "not_found"
        _, answer = await chat(http, "three")
        assert await asked(server, answer["job"]) == [user("three")]


async def test_a_running_answer_is_shown_as_such(tmp_path: Path) -> None:
    """While an answer runs, the conversation ends with what was asked and names the job; its stream can be read."""
    async with serving(tmp_path) as (_, http):
        first = asyncio.create_task(chat(http, "one", echo=STALL))
        job = await runs(http)
        found = await conversation(http)
        assert (found["messages"], found["running"]) == ([user("one")], job)
        await http.post(f"/chat/{job}/cancel")
        await first
        async with http.get("/stream/s") as response:
            assert parse(await response.read())[-1].json == {"type": "cancelled"}


async def test_sessions_expire(tmp_path: Path) -> None:
    """A conversation is forgotten when its time is over, which is never longer than that of the answers in it."""
    for name, sections in (
        ("a", {"chat_history": ChatHistorySettings(ttl_seconds=0.3)}),
        ("b", {"store": StoreSettings(retention_s=0.3)}),
    ):
        async with serving(tmp_path / name, **sections) as (_, http):
            await chat(http, "one")
            await asyncio.sleep(0.35)
            assert (await conversation(http))["error"]["code"] == "not_found"
            async with http.get("/sessions") as response:
                assert (await response.json())["data"] == []


async def test_a_crashed_replica_does_not_hold_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stood in the line and says nothing any more is passed over."""
    monkeypatch.setattr("llmstream.conversations.LEASE_S", 0.3)
    async with serving(tmp_path) as (server, http):
        place = await server.gateway.sessions.enter("local", "s", "crashed", 0.3)
        assert place.first
        assert (await chat(http, "one", multitask="reject"))[0] == 409
        assert (await chat(http, "one"))[0] == 200


async def test_sessions_belong_to_their_principal(tmp_path: Path) -> None:
    """Another principal's session of the same name is another one, and there is no way to read or delete it."""
    async with serving(tmp_path) as (server, http):
        await chat(http, "one")
        conversations = Conversations(server.gateway)
        assert (await conversations.read(Principal(), "s"))["messages"][0] == user("one")
        for attempt in (conversations.read, conversations.forget):
            with pytest.raises(Exception, match="There is no session"):
                await attempt(Principal(id="eve"), "s")
        assert await conversations.latest(Principal(id="eve"), 10) == []


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"session_id": "a b"}, "session_id"),
        ({"session_id": ""}, "session_id"),
        ({"session_id": "s", "multitask": "drop"}, "multitask"),
        ({"session_id": "s", "durability": "memory"}, "durability"),
    ],
)
async def test_bad_fields(http: aiohttp.ClientSession, more: Json, param: str) -> None:
    """What is wrong is named."""
    async with http.post("/v1/chat", json={"messages": [user("x")], **more}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, param)


async def test_sessions_can_be_switched_off(tmp_path: Path) -> None:
    """CHAT_HISTORY__ENABLED=false: a session is refused in plain words, all else works."""
    async with serving(tmp_path, chat_history=ChatHistorySettings(enabled=False)) as (_, http):
        code, refusal = await chat(http, "one")
        assert (code, refusal["error"]["param"]) == (400, "session_id")
        assert "chat_history.enabled" in refusal["error"]["message"]
        async with http.post("/v1/chat", json={"messages": [user("one")]}) as response:
            assert response.status == 200
