"""What is known about an API is what is sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llmstream.config import ProviderSettings
from llmstream.errors import BadRequest
from llmstream.presets import PRESETS
from llmstream.providers.base import CannotContinue
from llmstream.providers.openai import OpenAIProvider
from llmstream.types import Delta, GenerateRequest, Usage
from tests.providers.asking import collect, logged, text_of
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

ASKED: dict[str, dict[str, Any]] = {
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    "logprobs": {"logprobs": True},
    "choices": {"n": 2},
}
PLAIN: dict[str, Any] = {"tools": [], "response_format": {"type": "json_object"}, "logprobs": False, "n": 1}


@asynccontextmanager
async def connected(upstream: Upstream, preset: str, **settings: Any) -> AsyncIterator[OpenAIProvider]:
    given = ProviderSettings.model_validate({"base_url": upstream.url, "preset": preset, **settings})
    provider = OpenAIProvider("far", given, slots=8)
    await provider.open()
    try:
        yield provider
    finally:
        await provider.close()


def ask(**body: Any) -> GenerateRequest:
    return GenerateRequest.of("chat", "m", {"model": "m", "messages": [{"role": "user", "content": "hi"}], **body})


@pytest.mark.parametrize("ability", ASKED)
@pytest.mark.parametrize("preset", PRESETS)
async def test_what_it_cannot_do_is_refused(upstream: Upstream, preset: str, ability: str) -> None:
    """A request for what an API cannot do gets a bad request that names the member and the setting; others pass."""
    async with connected(upstream, preset) as provider:
        await provider.check(ask(**PLAIN))
        if getattr(PRESETS[preset].can, ability):
            await provider.check(ask(**ASKED[ability]))
            return
        with pytest.raises(BadRequest, match=rf"providers\.far\.{ability}") as refused:
            await provider.check(ask(**ASKED[ability]))
        assert [refused.value.param] == list(ASKED[ability])
    async with connected(upstream, preset, **{ability: True}) as provider:
        await provider.check(ask(**ASKED[ability]))


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False, "x": 1}}])
@pytest.mark.parametrize("preset", PRESETS)
async def test_usage_is_asked_for_where_that_is_allowed(upstream: Upstream, preset: str, options: Any) -> None:
    """stream_options go only to APIs that know them; the tokens are taken wherever they come."""
    async with connected(upstream, preset) as provider:
        deltas = await collect(provider, ask(**options))
    sent = upstream.requests[0].body.get("stream_options")
    wanted = {**options.get("stream_options", {}), "include_usage": True}
    assert sent == (wanted if PRESETS[preset].can.stream_usage == "asked" else None)
    assert deltas[-1].usage == Usage(7, 3)


@pytest.mark.parametrize(
    ("preset", "body", "sent"),
    [
        ("openai", {"max_tokens": 5}, {"max_completion_tokens": 5}),
        ("openai", {"max_tokens": 5, "max_completion_tokens": 6}, {"max_completion_tokens": 6}),
        ("mistral", {"max_completion_tokens": 5, "seed": 7}, {"max_tokens": 5, "random_seed": 7}),
        ("vllm", {"max_completion_tokens": 5, "seed": 7}, {"max_completion_tokens": 5, "seed": 7}),
    ],
)
async def test_members_are_called_what_the_api_calls_them(
    upstream: Upstream, preset: str, body: dict[str, Any], sent: dict[str, Any]
) -> None:
    """A member goes up under the API's own name, and only under that."""
    async with connected(upstream, preset) as provider:
        await collect(provider, ask(**body))
    seen = upstream.requests[0].body
    assert {name: seen[name] for name in seen.keys() - {"model", "messages", "stream", "stream_options"}} == sent


@pytest.mark.parametrize(
    ("preset", "mark", "members", "path"),
    [
        ("llama-server", {}, {}, "/v1/chat/completions"),
        ("deepseek", {"prefix": True}, {}, "/beta/chat/completions"),
        ("mistral", {"prefix": True}, {}, "/v1/chat/completions"),
        ("vllm", {}, {"continue_final_message": True, "add_generation_prompt": False}, "/v1/chat/completions"),
    ],
)
async def test_forms_of_continuation(
    upstream: Upstream, preset: str, mark: dict[str, Any], members: dict[str, Any], path: str
) -> None:
    """A cut answer goes on in the API's own form, and what it repeats is taken off."""
    repeats = PRESETS[preset].can.continue_by == "prefix_repeated"
    upstream.replies.append(Reply(pieces=("Hel", "lo there", " you") if repeats else (" you",)))
    so_far = logged([Delta("Hello there")])
    async with connected(upstream, preset) as provider:
        assert provider.can_continue(ask(), so_far)
        assert text_of(await collect(provider, ask(), so_far)) == " you"
    seen = upstream.requests[0]
    assert seen.path == path
    assert seen.body["messages"][-1] == {"role": "assistant", "content": "Hello there", **mark}
    assert {name: seen.body[name] for name in members} == members


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.can.continue_by == "none"])
async def test_without_a_safe_form_nothing_is_continued(upstream: Upstream, preset: str) -> None:
    """An API that may begin anew behind a prefill is not asked to go on, unless the settings say that it can."""
    so_far = logged([Delta("Hello")])
    async with connected(upstream, preset) as provider:
        assert not provider.can_continue(ask(), so_far)
    async with connected(upstream, preset, continue_by="assistant_prefill") as provider:
        assert provider.can_continue(ask(), so_far)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(pieces=("Hello", " world")),
        Reply(pieces=("Hello",)),
        Reply(pieces=(" you",)),
        Reply(pieces=({"reasoning_content": "hm"}, "Hello there you")),
        Reply(status=400, body={"error": {"message": "prefill is incompatible with thinking"}}),
    ],
    ids=["another", "shorter", "no repetition", "reasoning first", "refused"],
)
async def test_what_does_not_fit_is_not_stitched(upstream: Upstream, reply: Reply) -> None:
    """A continuation that turns out to be another answer, or is refused, says so, with nothing put."""
    upstream.replies.append(reply)
    async with connected(upstream, "mistral") as provider:
        put: list[Delta] = []
        with pytest.raises(CannotContinue):
            put += await collect(provider, ask(), logged([Delta("Hello there")]))
        assert put == []


async def test_never_more_at_once_than_it_takes(upstream: Upstream) -> None:
    """With max_parallel further requests wait for their turn."""
    gate = asyncio.Event()
    upstream.models["m"] = Reply(gates={0: gate})
    async with connected(upstream, "ollama", max_parallel=2) as provider:
        tasks = [asyncio.create_task(collect(provider, ask())) for _ in range(5)]
        await wait_until(lambda: len(upstream.requests) == 2)
        assert sum(not seen.answered for seen in upstream.requests) == 2
        gate.set()
        await asyncio.gather(*tasks)
    assert len(upstream.requests) == 5


async def test_models_tell_what_they_can(upstream: Upstream) -> None:
    """Each model of a provider comes with its capabilities."""
    async with connected(upstream, "anthropic", models="a,b", tools=False) as provider:
        assert [model.name for model in provider.models] == ["a", "b"]
        told = provider.models[0].extra["capabilities"]
    assert (told["tools"], told["json_schema"], told["continue_by"]) == (False, False, "none")
