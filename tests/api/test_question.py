"""``POST /question``: a text in, a text out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import ProviderSettings, load
from llmstream.config_routes import QuestionSettings
from llmstream.server import Server
from tests.api.reading import Json
from tests.conftest import echo_settings
from tests.upstream import Reply, Upstream

VARIABLES = {
    "LLM_SYSTEM_PROMPT": "You are a helpful AI assistant. Be polite and informative in your responses.",
    "LLM_TEMPERATURE": "0.2",
    "LLM_MAX_TOKENS": "1000",
    "REQUEST_TIMEOUT": "12.5",
}


async def ask(http: aiohttp.ClientSession, body: Json) -> tuple[int, Json]:
    async with http.post("/question", json=body) as response:
        return response.status, await response.json()


async def test_the_pages_request(http: aiohttp.ClientSession) -> None:
    """A text gives a text and nothing else."""
    assert await ask(http, {"text": "Hello! How are you?"}) == (200, {"text": "Hello! How are you?"})


async def test_the_pages_variables(tmp_path: Path) -> None:
    """The variables decide what the model gets; without them it gets the temperature of the page alone."""
    async with Upstream() as upstream:
        base = echo_settings(
            tmp_path, models={}, providers={"up": ProviderSettings(base_url=upstream.url, models=["m"])}
        )
        for env, expected in ((VARIABLES, (0.2, 1000)), ({}, (0.7, None))):
            settings = base.model_copy(update={"question": load(None, env).question})
            async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
                assert await ask(http, {"text": "Hi"}) == (200, {"text": "Hello there you"})
            seen = upstream.requests[-1].body
            assert (seen["temperature"], seen.get("max_tokens")) == expected
            system = {"role": "system", "content": VARIABLES["LLM_SYSTEM_PROMPT"]}
            assert seen["messages"] == [*([system] if env else []), {"role": "user", "content": "Hi"}]
        assert load(None, VARIABLES).question.timeout_s == 12.5
        assert load(None, {}).question.timeout_s == 30.0


async def test_the_time_limit(tmp_path: Path) -> None:
    """A model that does not answer within REQUEST_TIMEOUT gives 504 with a word about it."""
    settings = echo_settings(tmp_path, question=QuestionSettings(timeout_s=0.3))
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        code, answer = await ask(http, {"text": "Hi", "echo": {"tokens": 3, "fault": "stall", "at": 1}})
    assert (code, answer["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "text"), ({"text": ""}, "text"), ({"text": " \n"}, "text"), ({"text": 7}, "text"), ({"text": None}, "text")],
)
async def test_bad_questions(http: aiohttp.ClientSession, body: Json, param: str) -> None:
    """An empty or missing text is refused by name."""
    code, answer = await ask(http, body)
    assert (code, answer["error"]["param"]) == (400, param)


async def test_the_length_is_checked(tmp_path: Path) -> None:
    """A text of the greatest length is answered, one character more is refused."""
    settings = echo_settings(tmp_path, question=QuestionSettings(max_chars=10))
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        assert (await ask(http, {"text": "x" * 10}))[0] == 200
        code, answer = await ask(http, {"text": "x" * 11})
    assert (code, answer["error"]["code"], answer["error"]["param"]) == (400, "prompt_too_long", "text")
    assert "question.max_chars" in answer["error"]["message"]


@pytest.mark.parametrize(("status", "requests"), [(429, 2), (500, 2), (401, 1)])
async def test_what_is_tried_again(tmp_path: Path, status: int, requests: int) -> None:
    """Limits and server errors are tried again, a refused key never."""
    async with Upstream() as upstream:
        providers = {"up": ProviderSettings(base_url=upstream.url, models=["m"])}
        async with (
            Server(echo_settings(tmp_path, models={}, providers=providers)) as server,
            aiohttp.ClientSession(server.url) as http,
        ):
            refusal: dict[str, Any] = {"error": {"message": "not now", "type": "some_error"}}
            upstream.replies.append(Reply(status=status, body=refusal))
            code, answer = await ask(http, {"text": "Hi"})
        assert len(upstream.requests) == requests
        if requests > 1:
            assert (code, answer) == (200, {"text": "Hello there you"})
        else:
            assert code != 200
            assert answer["error"]["message"]
