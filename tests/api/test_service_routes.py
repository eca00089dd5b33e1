"""The service around one model: ``/health``, ``/status``, ``/v1/generate``, ``/v1/chat``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from llmstream.config import ModelSettings, ProviderSettings, load
from llmstream.config_routes import ModelDefaults
from llmstream.server import Server
from tests.api.reading import Json, read_all, tokens
from tests.conftest import echo_settings
from tests.sse import parse
from tests.tiny_gguf import write_tiny_gguf
from tests.upstream import Reply, Upstream

QUESTION = {"role": "user", "content": "What is the capital of France?"}


async def post(http: aiohttp.ClientSession, route: str, body: Json) -> tuple[int, Json]:
    async with http.post(route, json=body) as response:
        return response.status, await response.json()


@pytest.fixture
async def gemma(tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server of the page's model."""
    models = {"google/gemma-2-2b-it": ModelSettings(engine="echo")}
    async with (
        Server(echo_settings(tmp_path, models=models)) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        yield session


async def test_health(gemma: aiohttp.ClientSession) -> None:
    """GET /health gives the page's three members."""
    async with gemma.get("/health") as response:
        assert await response.json() == {
            "status": "healthy",
            "model_loaded": True,
            "model_name": "google/gemma-2-2b-it",
        }


async def test_generate(gemma: aiohttp.ClientSession) -> None:
    """The page's request gives the page's five members."""
    prompt = "Explain quantum computing in simple terms"
    code, answer = await post(gemma, "/v1/generate", {"prompt": prompt, "max_tokens": 200, "temperature": 0.7})
    assert (code, answer) == (
        200,
        {
            "generated_text": prompt,
            "prompt": prompt,
            "model": "google/gemma-2-2b-it",
            "tokens_generated": 6,
            "cached": False,
        },
    )


async def test_chat(gemma: aiohttp.ClientSession) -> None:
    """The page's request without a session gives the page's four members."""
    code, answer = await post(gemma, "/v1/chat", {"messages": [QUESTION], "max_tokens": 100, "temperature": 0.7})
    assert (code, answer) == (
        200,
        {
            "message": {"role": "assistant", "content": QUESTION["content"]},
            "model": "google/gemma-2-2b-it",
            "tokens_generated": 6,
            "cached": False,
        },
    )


async def test_an_answer_is_cut_at_max_tokens(gemma: aiohttp.ClientSession) -> None:
    """An answer that reached its limit is an answer."""
    code, answer = await post(gemma, "/v1/generate", {"prompt": "one two three", "max_tokens": 2})
    assert (code, answer["generated_text"], answer["tokens_generated"]) == (200, "one two", 2)


async def test_chat_streams(gemma: aiohttp.ClientSession) -> None:
    """``stream`` gives chunks and a last word, which can be read on after a cut."""
    body = {"messages": [QUESTION], "stream": True, "echo": {"tokens": 5}}
    async with gemma.post("/v1/chat", json=body) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        frames, location = parse(await response.read()), response.headers["Location"]
    said = [frame.json["content"] for frame in frames if frame.json["type"] == "chunk"]
    assert "".join(said) == tokens(5)
    assert frames[-1].json == {"type": "complete"}
    numbered = [frame for frame in frames if frame.id]
    _, rest = await read_all(gemma, location, headers={"Last-Event-ID": numbered[2].id or ""})
    assert [frame for frame in rest if frame.id] == numbered[3:]


async def test_tool_calls_are_told(tmp_path: Path) -> None:
    """An answer that calls a tool says so."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    async with Upstream() as upstream:
        upstream.models["m"] = Reply(pieces=({"tool_calls": [call]},), finish_reason="tool_calls")
        providers = {"up": ProviderSettings(base_url=upstream.url, models=["m"])}
        async with (
            Server(echo_settings(tmp_path, models={}, providers=providers)) as server,
            aiohttp.ClientSession(server.url) as http,
        ):
            _, answer = await post(http, "/v1/chat", {"messages": [QUESTION]})
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "f"


async def test_defaults(tmp_path: Path) -> None:
    """A request that says nothing gets the settings' model, limit and temperature; fields beside ours travel on."""
    async with Upstream() as upstream:
        providers = {"up": ProviderSettings(base_url=upstream.url, models=["first", "second"])}
        settings = echo_settings(tmp_path, models={}, providers=providers)
        for env, expected in (
            ({}, ("first", 512, 0.7)),
            (
                {"MODEL__NAME": "second", "MODEL__MAX_TOKENS": "9", "MODEL__TEMPERATURE": "0.1"},
                ("second", 9, 0.1),
            ),
        ):
            loaded = settings.model_copy(update={"model": load(None, env).model})
            async with Server(loaded) as server, aiohttp.ClientSession(server.url) as http:
                for route, body in (("/v1/generate", {"prompt": "x"}), ("/v1/chat", {"messages": [QUESTION]})):
                    code, answer = await post(http, route, {**body, "seed": 7})
                    assert (code, answer["model"]) == (200, expected[0])
                    seen = upstream.requests[-1].body
                    assert (seen["model"], seen["max_tokens"], seen["temperature"]) == expected
                    assert seen["seed"] == 7


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/generate", {}, "prompt"),
        ("/v1/generate", {"prompt": ""}, "prompt"),
        ("/v1/generate", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("/v1/generate", {"prompt": "x", "temperature": -1}, "temperature"),
        ("/v1/chat", {}, "messages"),
        ("/v1/chat", {"messages": []}, "messages"),
        ("/v1/chat", {"messages": [{"role": "pope", "content": "x"}]}, "messages.0.role"),
        ("/v1/chat", {"messages": [QUESTION], "stream": "yes"}, "stream"),
    ],
)
async def test_bad_fields(http: aiohttp.ClientSession, route: str, body: Json, param: str) -> None:
    """What is wrong is named."""
    code, refusal = await post(http, route, body)
    assert (code, refusal["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("route", "body", "code"),
    [
        ("/v1/generate", {"prompt": "x"}, 200),
        ("/v1/chat", {"messages": [QUESTION], "stream": True}, 200),
        ("/question", {"text": "x"}, 200),
        ("/v1/generate", {}, 400),
        ("/nowhere", {}, 404),
    ],
)
async def test_every_answer_says_how_long_it_took(
    http: aiohttp.ClientSession, route: str, body: Json, code: int
) -> None:
    """X-Process-Time holds seconds, on streams and errors too."""
    async with http.post(route, json=body) as response:
        assert response.status == code
        assert 0 < float(response.headers["X-Process-Time"]) < 60


async def test_the_pages_defaults() -> None:
    """Without configuration, the limits, the cache and the history are those of the page."""
    settings = load(None, {})
    assert (settings.model.max_tokens, settings.model.temperature) == (512, 0.7)
    assert (settings.cache.enabled, settings.cache.size, settings.cache.ttl_seconds) == (True, 100, 3600)
    assert (settings.chat_history.enabled, settings.chat_history.ttl_seconds) == (True, 7200)


async def test_no_model_by_name(tmp_path: Path) -> None:
    """Where only a wildcard is configured, a request without a model is told what to do, unless a default is set."""
    async with Upstream() as upstream:
        settings = echo_settings(
            tmp_path, models={}, providers={"up": ProviderSettings(base_url=upstream.url, models=["*"])}
        )
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
            code, answer = await post(http, "/v1/generate", {"prompt": "x"})
            assert (code, answer["error"]["param"]) == (400, "model")
        named = settings.model_copy(update={"model": ModelDefaults(name="any")})
        async with Server(named) as server, aiohttp.ClientSession(server.url) as http:
            assert (await post(http, "/v1/generate", {"prompt": "x"}))[1]["model"] == "any"


async def test_the_pages_file_serves(tmp_path: Path) -> None:
    """A model that ``model.name`` and ``model.source`` name is loaded, answers, and is shown under its name; so is the
    service."""
    weights = write_tiny_gguf(tmp_path / "gemma-2b.gguf", context=128)
    file = tmp_path / "config.yml"
    file.write_text(
        f"app: {{name: LLM FastAPI Service, host: 127.0.0.1, port: 0}}\n"
        f"model: {{name: {weights}, source: local, device: cpu, max_tokens: 5}}\ndata_dir: {tmp_path}\n"
    )
    async with Server(load(file, env={})) as server, aiohttp.ClientSession(server.url) as http:
        async with http.get("/health") as response:
            assert await response.json() == {"status": "healthy", "model_loaded": True, "model_name": "gemma-2b"}
        async with http.get("/status") as response:
            assert (await response.json())["service"] == "LLM FastAPI Service"
        async with http.post("/v1/generate", json={"prompt": "a"}) as response:
            answer = await response.json()
            assert (response.status, answer["model"], answer["tokens_generated"]) == (200, "gemma-2b", 5), answer
