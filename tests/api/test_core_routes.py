"""The queue in front of an LLM core: ``/generate`` and ``/chat_completion``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import ModelSettings, ProviderSettings
from llmstream.server import Server
from tests.api.pair import two_clients
from tests.api.reading import Json, status, tokens
from tests.conftest import echo_settings
from tests.tiny_gguf import write_tiny_gguf
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

PAGE_META = {"temperature": 0.5, "tokens_limit": 1000, "stop_words": ["stop"], "model": "gpt-model"}


async def post(http: aiohttp.ClientSession, route: str, body: Json) -> tuple[int, Json]:
    async with http.post(route, json=body) as response:
        return response.status, await response.json()


async def test_the_pages_requests(tmp_path: Path) -> None:
    """The page's two example requests give the text alone, and the model gets what their ``meta`` says."""
    async with Upstream() as upstream:
        provider = ProviderSettings(base_url=upstream.url, models=["gpt-model"])
        settings = echo_settings(tmp_path, models={}, providers={"up": provider})
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
            body: Json = {"job_id": "12345", "meta": PAGE_META, "content": "What is AI?"}
            assert await post(http, "/generate", body) == (200, {"content": "Hello there you"})
            seen = upstream.requests[-1].body
            expected = {"model": "gpt-model", "temperature": 0.5, "max_tokens": 1000, "stop": ["stop"]}
            assert {name: seen[name] for name in expected} == expected
            assert seen["messages"] == [{"role": "user", "content": "What is AI?"}]
            turns = [
                {"role": "user", "content": "What is AI?"},
                {"role": "assistant", "content": "Artificial Intelligence is..."},
            ]
            body = {"job_id": "12346", "meta": PAGE_META, "messages": turns}
            assert await post(http, "/chat_completion", body) == (200, {"content": "Hello there you"})
            assert upstream.requests[-1].body["messages"] == turns
            assert await post(http, "/generate", {"content": "Hi", "meta": {"stop_words": []}}) == (
                200,
                {"content": "Hello there you"},
            )
            seen = upstream.requests[-1].body
            assert (seen["temperature"], seen["max_tokens"], seen.get("stop")) == (0.2, 8096, None)


async def test_the_callers_id_is_the_job(tmp_path: Path) -> None:
    """The same id is the same job on every replica, while it runs and after; with a different request it is refused."""
    body = {"job_id": "mine-1", "content": "x", "echo": {"tokens": 20, "delay_ms": 10}}
    async with two_clients(tmp_path) as clients:
        answers = await asyncio.gather(*(post(clients[n % 2], "/generate", body) for n in range(6)))
        assert answers == [(200, {"content": tokens(20)})] * 6
        assert (await status(clients[1], "mine-1"))["attempt"] == 1
        assert await post(clients[1], "/generate", body) == (200, {"content": tokens(20)})
        code, refusal = await post(clients[0], "/generate", {**body, "content": "y"})
        assert (code, refusal["error"]["param"], refusal["error"]["code"]) == (409, "job_id", "conflict")


async def test_a_core_goes_on_without_its_client(http: aiohttp.ClientSession) -> None:
    """A client that left finds the answer under its id, as it did when results lay in a store."""
    body = {"job_id": "left", "content": "x", "echo": {"tokens": 5, "delay_ms": 20}}
    with pytest.raises(TimeoutError):
        await http.post("/generate", json=body, timeout=aiohttp.ClientTimeout(total=0.05))

    async def done() -> bool:
        return bool((await status(http, "left"))["status"] == "completed")

    await wait_until(done)
    assert await post(http, "/generate", body) == (200, {"content": tokens(5)})


async def test_limits_are_upper_limits(tmp_path: Path) -> None:
    """More tokens than the context holds are as many as fit, here and where a page's default asks for them; a prompt
    that does not fit is refused."""
    weights = write_tiny_gguf(tmp_path / "tiny.gguf", context=128)
    models = {"tiny": ModelSettings(source=str(weights), slots=1, threads=1)}
    async with (
        Server(echo_settings(tmp_path, models=models)) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        for route, body in (
            ("/generate", {"content": "a"}),
            ("/generate", {"content": "a", "meta": {"tokens_limit": 5000}}),
            ("/v1/generate", {"prompt": "a"}),
        ):
            code, answer = await post(http, route, body)
            assert code == 200, answer
        code, answer = await post(http, "/generate", {"content": "word " * 500})
        assert (code, answer["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "content"),
        ({"content": ""}, "content"),
        ({"content": "x", "meta": {"temperature": 3}}, "meta.temperature"),
        ({"content": "x", "meta": {"tokens_limit": 0}}, "meta.tokens_limit"),
        ({"content": "x", "meta": {"stop_words": "stop"}}, "meta.stop_words"),
        ({"content": "x", "meta": {"top_k": 3}}, "meta.top_k"),
        ({"content": "x", "job_id": "a b"}, "job_id"),
    ],
)
async def test_bad_fields(http: aiohttp.ClientSession, body: Json, param: str) -> None:
    """What is wrong is named."""
    code, refusal = await post(http, "/generate", body)
    assert (code, refusal["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate", {"content": "x"}),
        ("/question", {"text": "x"}),
        ("/v1/generate", {"prompt": "x"}),
        ("/v1/chat", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
async def test_a_failed_answer_is_an_error(tmp_path: Path, route: str, body: Json) -> None:
    """No route of the old systems reports a refused or broken answer as one."""
    async with Upstream() as upstream:
        provider = ProviderSettings(base_url=upstream.url, models=["m"])
        settings = echo_settings(tmp_path, models={}, providers={"up": provider})
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
            refusal: dict[str, Any] = {"error": {"message": "no", "type": "authentication_error"}}
            upstream.replies.append(Reply(status=401, body=refusal))
            code, answer = await post(http, route, body)
            assert code >= 400
            assert answer["error"]["message"]
            assert len(upstream.requests) == 1
