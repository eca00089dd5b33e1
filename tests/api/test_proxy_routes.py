"""The streaming proxy with providers: ``/v1/health``, ``provider`` in the body, ``/v1/chat/stream``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest

from llmstream.config import ModelSettings, ProviderSettings
from llmstream.server import Server
from tests.api.reading import Json
from tests.conftest import echo_settings
from tests.sse import parse
from tests.upstream import Reply, Upstream

MODEL = "meta-llama/llama-3.2-3b-instruct:free"
PAGE_BODY = {
    "provider": "openrouter",
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hello, who are you?"}],
    "temperature": 0.7,
    "max_tokens": 100,
    "stream": False,
}


@pytest.fixture
async def upstreams() -> AsyncIterator[dict[str, Upstream]]:
    """Two providers that answer differently."""
    async with Upstream() as ollama, Upstream() as openrouter:
        ollama.models[MODEL] = Reply(pieces=("I am", " ollama"))
        openrouter.models[MODEL] = Reply(pieces=("I am", " openrouter"))
        yield {"ollama": ollama, "openrouter": openrouter}


@pytest.fixture
async def proxy(tmp_path: Path, upstreams: dict[str, Upstream]) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server in front of both."""
    providers = {name: ProviderSettings(base_url=up.url, models=["*"]) for name, up in upstreams.items()}
    settings = echo_settings(tmp_path, models={}, providers=providers)
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as session:
        yield session


async def test_health_lists_the_providers(tmp_path: Path) -> None:
    """GET /v1/health names everything that ``provider`` can name: remote APIs and local models."""
    providers = {name: ProviderSettings(base_url="http://127.0.0.1:9/v1") for name in ("ollama", "openrouter")}
    settings = echo_settings(tmp_path, models={"echo": ModelSettings(engine="echo")}, providers=providers)
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        async with http.get("/v1/health") as response:
            body = await response.json()
        assert (response.status, body["status"]) == (200, "healthy")
        assert sorted(body["providers"]) == ["echo", "ollama", "openrouter"]


async def test_the_body_names_the_provider(proxy: aiohttp.ClientSession, upstreams: dict[str, Upstream]) -> None:
    """The page's request runs at the provider it names, which never sees that name, and gives a whole completion."""
    for name in upstreams:
        async with proxy.post("/v1/chat/completions", json={**PAGE_BODY, "provider": name}) as response:
            answer: Json = await response.json()
        assert answer["choices"][0]["message"]["content"] == f"I am {name}"
        seen = upstreams[name].requests[-1].body
        assert (seen["model"], seen["temperature"], seen["max_tokens"]) == (MODEL, 0.7, 100)
        assert "provider" not in seen
    assert [len(upstream.requests) for upstream in upstreams.values()] == [1, 1]
    async with proxy.post("/v1/chat/completions", json={**PAGE_BODY, "provider": "nobody"}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "provider")


@pytest.mark.parametrize("stream", [{"stream": True}, {"stream": False}, {}])
async def test_the_stream_route_always_streams(proxy: aiohttp.ClientSession, stream: Json) -> None:
    """POST /v1/chat/stream takes the same body and gives server-sent events whatever ``stream`` says."""
    body = {name: value for name, value in PAGE_BODY.items() if name != "stream"} | stream
    async with proxy.post("/v1/chat/stream", json=body) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        frames = parse(await response.read())
    assert frames[-1].data == "[DONE]"
    words = [frame.json["choices"][0]["delta"].get("content", "") for frame in frames[:-1]]
    assert "".join(words) == "I am openrouter"
    assert all(frame.id for frame in frames)


async def test_a_proxy_stream_can_be_resumed(proxy: aiohttp.ClientSession) -> None:
    """What came before a cut is read on where ``Location`` says."""
    async with proxy.post("/v1/chat/stream", json=PAGE_BODY) as response:
        frames, location = parse(await response.read()), response.headers["Location"]
    async with proxy.get(location, headers={"Last-Event-ID": frames[1].id or ""}) as response:
        assert parse(await response.read()) == frames[2:]


async def test_an_official_client_with_a_provider(tmp_path: Path, upstreams: dict[str, Upstream]) -> None:
    """OpenAI's SDK names a provider by ``extra_body``."""
    providers = {name: ProviderSettings(base_url=up.url, models=["*"]) for name, up in upstreams.items()}
    async with (
        Server(echo_settings(tmp_path, models={}, providers=providers)) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], extra_body={"provider": "ollama"}
        )
    assert answer.choices[0].message.content == "I am ollama"
