"""What is redacted reaches no model, reader, store or log, on any route; what is restored only its caller."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from llmstream.config import ProviderSettings
from llmstream.providers import echo_vectors
from llmstream.server import Server
from tests.api.pair import two_servers
from tests.api.reading import Json, log_of
from tests.conftest import echo_settings
from tests.scrape import Scrape
from tests.sse import parse
from tests.test_secrets import files_below, logged
from tests.upstream import Reply, Upstream

EMAIL, PHONE, CARD, CODE = "bob@example.com", "+49 170 1234567", "4111 1111 1111 1111", "EMP-1234"
FILTERS = {
    "email": {},
    "card": {"direction": "out"},
    "employee": {"pattern": r"\bEMP-[0-9]{4}\b"},
    "phone": {"action": "restore"},
}
PROMPT = f"I am {EMAIL}, {CODE}; call {PHONE} or {PHONE}."
ASKED = "I am [EMAIL], [EMPLOYEE]; call <PHONE_1> or <PHONE_1>."
SAID = ("Sure", ", e", "ve@exa", "mple.org", ": 4111 1", "111 1111 11", "11; EM", "P-9876 calls <PH", "ONE_", "1> now")
ANSWERED = f"Sure, [EMAIL]: [CARD]; [EMPLOYEE] calls {PHONE} now"
REDACTED = (EMAIL, CODE, "eve@example.org", CARD, "EMP-9876")
REPLY = Reply(SAID)

CHAT = {"model": "up", "messages": [{"role": "user", "content": PROMPT}]}
ROUTES: dict[str, Json] = {
    "/v1/chat/completions": CHAT,
    "/v1/chat/stream": CHAT,
    "/chat": {"model": "up", "message": PROMPT},
    "/v1/chat": CHAT,
    "/v1/generate": {"model": "up", "prompt": PROMPT},
    "/question": {"text": PROMPT},
    "/generate": {"content": PROMPT, "meta": {"model": "up"}},
    "/chat_completion": {"messages": CHAT["messages"], "meta": {"model": "up"}},
}


@asynccontextmanager
async def filtering(tmp_path: Path, upstream: Upstream, **sections: Any) -> AsyncIterator[aiohttp.ClientSession]:
    given = {"filters": FILTERS, "model": {"name": "up"}, **sections}
    providers = {"up": ProviderSettings(base_url=upstream.url, models=["up"])}
    settings = echo_settings(tmp_path, providers=providers, **given)
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        yield http


def text_of(raw: bytes, kind: str) -> str:
    """The answer in whatever form it came."""
    if kind == "text/event-stream":
        text = ""
        for frame in parse(raw):
            if frame.data != "[DONE]":
                data = frame.json
                for choice in data.get("choices", ()):
                    text += choice["delta"].get("content") or ""
                text += data.get("content", "")
        return text
    body = json.loads(raw)
    if "choices" in body:
        return str(body["choices"][0]["message"]["content"])
    message = body.get("message") or {}
    return str(message.get("content") or body.get("generated_text") or body.get("text") or body.get("content"))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("route", ROUTES)
async def test_what_is_redacted_is_nowhere(
    tmp_path: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture, route: str, streamed: bool
) -> None:
    """Neither the model nor the reader, nor any stored byte, log line or metric has what was to be redacted, cut into
    whatever pieces; what is restored comes back to the caller, and the model does not see it."""
    if streamed and route not in ("/v1/chat/completions", "/v1/chat"):
        pytest.skip("has one form only")
    caplog.set_level(logging.DEBUG)
    upstream.models["up"] = REPLY
    body = {**ROUTES[route], **({"stream": True} if streamed else {})}
    async with filtering(tmp_path, upstream) as http:
        async with http.post(route, json=body) as response:
            raw = await response.read()
            assert response.status == 200, raw
            job_id = response.headers["x-job-id"]
        answer = text_of(raw, response.content_type)
        async with http.get(f"/chat/{job_id}") as response:
            told = await response.read()
        async with http.get("/metrics") as response:
            metrics = await response.text()
    assert answer == ANSWERED
    (seen,) = upstream.requests
    assert seen.body["messages"][-1]["content"] == ASKED
    kept = files_below(tmp_path) + logged(caplog).encode() + metrics.encode() + told
    own = raw if route != "/v1/generate" else answer.encode()  # which repeats the prompt to the caller
    for planted in REDACTED:
        assert planted.encode() not in kept + own + seen.raw, planted
    assert PHONE.encode() not in seen.raw + logged(caplog).encode() + metrics.encode()
    found = Scrape(metrics)
    for name, direction, action, count in (
        ("email", "in", "redact", 1),
        ("email", "out", "redact", 1),
        ("card", "out", "redact", 1),
        ("employee", "in", "redact", 1),
        ("employee", "out", "redact", 1),
        ("phone", "in", "restore", 2),
        ("phone", "out", "restore", 1),
    ):
        assert found.value("llmstream_filtered_total", filter=name, direction=direction, action=action) == count
    assert found.total("llmstream_filtered_total") == 8


async def test_nothing_is_looked_at_without_filters(tmp_path: Path, upstream: Upstream) -> None:
    """Without filters requests and answers pass as they are."""
    upstream.models["up"] = REPLY
    async with (
        filtering(tmp_path, upstream, filters={}) as http,
        http.post("/v1/chat/completions", json=CHAT) as response,
    ):
        assert (await response.json())["choices"][0]["message"]["content"] == "".join(SAID)
    assert upstream.requests[0].body["messages"] == CHAT["messages"]


async def test_other_replicas_and_resumed_streams_show_the_same(tmp_path: Path, upstream: Upstream) -> None:
    """A stream that goes on behind any event, on another replica, shows the rest of the same filtered answer."""
    upstream.models["up"] = REPLY
    providers = {"up": ProviderSettings(base_url=upstream.url, models=["up"])}
    filters = echo_settings(tmp_path, filters=FILTERS).filters
    async with two_servers(tmp_path, filters=filters, providers=providers) as (one, two):
        async with aiohttp.ClientSession(one.url) as http, http.post("/chat", json=ROUTES["/chat"]) as response:
            frames = [frame for frame in parse(await response.read()) if frame.id]
            url = response.headers["Location"]
        assert "".join(frame.json.get("content", "") for frame in frames) == ANSWERED
        async with aiohttp.ClientSession(two.url) as http:
            for at, frame in enumerate(frames[:-1]):
                async with http.get(url, headers={"Last-Event-ID": str(frame.id)}) as response:
                    rest = [each for each in parse(await response.read()) if each.id]
                assert rest == frames[at + 1 :]


@pytest.mark.parametrize("route", ["/v1/chat", "/v1/chat/completions"])
async def test_conversations_keep_what_may_be_kept(tmp_path: Path, upstream: Upstream, route: str) -> None:
    """A session holds redacted texts and restored ones; with every turn the model sees the same placeholders, also for
    what it was told to say before."""
    upstream.models["up"] = REPLY
    async with filtering(tmp_path, upstream) as http:
        for text in (PROMPT, f"Again: {PHONE}, {EMAIL}, and +49 170 7654321"):
            body = {"messages": [{"role": "user", "content": text}], "session_id": "s", "history": True, "model": "up"}
            async with http.post(route, json=body) as response:
                answer = await response.json()
                message = answer["choices"][0]["message"] if "choices" in answer else answer["message"]
                assert message["content"] == ANSWERED
        async with http.get("/sessions/s") as response:
            messages = (await response.json())["messages"]
    said = [message["content"] for message in upstream.requests[1].body["messages"]]
    assert said == [
        ASKED,
        "Sure, [EMAIL]: [CARD]; [EMPLOYEE] calls <PHONE_1> now",
        "Again: <PHONE_1>, [EMAIL], and <PHONE_2>",
    ]
    assert [message["content"] for message in messages] == [
        f"I am [EMAIL], [EMPLOYEE]; call {PHONE} or {PHONE}.",
        ANSWERED,
        f"Again: {PHONE}, [EMAIL], and +49 170 7654321",
        ANSWERED,
    ]
    for planted in REDACTED:
        assert planted.encode() not in files_below(tmp_path)


async def test_the_cache_knows_requests_as_they_are_kept(tmp_path: Path, upstream: Upstream) -> None:
    """Requests that differ in what is redacted are the same; those that differ in what is restored are not, for their
    answers do."""
    upstream.models["up"] = Reply(("I call <PHONE_1>",))
    async with filtering(tmp_path, upstream, cache={"everywhere": True}) as http:

        async def ask(route: str, text: str) -> tuple[str, bool]:
            body = {"messages": [{"role": "user", "content": text}], "model": "up"}
            async with http.post(route, json=body) as response:
                hit = response.headers.get("X-Cache") == "hit"
                return text_of(await response.read(), response.content_type), hit

        for route in ("/v1/chat", "/v1/chat/completions"):
            assert await ask(route, f"{route} {EMAIL} {PHONE}") == (f"I call {PHONE}", False)
            assert await ask(route, f"{route} eve@example.org {PHONE}") == (f"I call {PHONE}", True)
            assert await ask(route, f"{route} {EMAIL} +49 170 7654321") == ("I call +49 170 7654321", False)


async def test_memory_jobs_are_filtered_too(tmp_path: Path, upstream: Upstream) -> None:
    """A job that is kept nowhere goes through the same filters, and leaves not even what is restored in the store."""
    upstream.models["up"] = REPLY
    async with (
        filtering(tmp_path, upstream) as http,
        http.post("/v1/chat/completions", json={**CHAT, "durability": "memory"}) as response,
    ):
        assert (await response.json())["choices"][0]["message"]["content"] == ANSWERED
    assert PHONE.encode() not in files_below(tmp_path)


async def test_the_log_holds_no_token_ids_of_what_was_redacted(tmp_path: Path) -> None:
    """Token ids could be turned into text again."""
    async with Server(echo_settings(tmp_path, filters={"card": {"direction": "out"}})) as server:
        async with aiohttp.ClientSession(server.url) as http:
            body = {"model": "echo", "messages": [{"role": "user", "content": f"pay {CARD} now"}]}
            async with http.post("/v1/chat/completions", json=body) as response:
                job_id = response.headers["x-job-id"]
                assert (await response.json())["choices"][0]["message"]["content"] == "pay [CARD] now"
        log = await log_of(server, job_id)
    ids = [token for event in log for token in getattr(event.data, "tokens", ())]
    assert ids == [0, 5]


async def test_embeddings_are_made_of_what_is_left(tmp_path: Path, upstream: Upstream) -> None:
    """The texts that vectors are made of are filtered; the vectors are no text."""
    body = {"model": "echo", "input": [f"I am {EMAIL}", f"call {PHONE}"], "encoding_format": "float"}
    async with filtering(tmp_path, upstream) as http, http.post("/v1/embeddings", json=body) as response:
        vectors = [each["embedding"] for each in (await response.json())["data"]]
    asked = ("I am [EMAIL]", "call <PHONE_1>")
    assert vectors == [[float(each) for each in np.array(echo_vectors.vector(text), np.float32)] for text in asked]
    assert EMAIL.encode() not in files_below(tmp_path)
