"""The whole service with a real model: SmolLM2 through the real store, over HTTP."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from llmstream.config import ModelSettings, ServerSettings, Settings
from llmstream.providers.local import LocalProvider
from llmstream.server import Server
from tests.waiting import wait_until
from tests.weights_fixture import smollm2_weights

STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
LONG_PROMPT = [{"role": "user", "content": "The lamp turns and turns above the sea. " * 165}]
"""About 1,500 tokens."""
GENEROUS_MS = 1000


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with the real weights in two slots."""
    settings = Settings(
        data_dir=tmp_path,
        server=ServerSettings(port=0, shutdown_grace_s=2),
        models={"smollm2": ModelSettings(source=str(smollm2_weights()), slots=2)},
    )
    async with Server(settings) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as session:
        yield session


async def submit(http: aiohttp.ClientSession, messages: list[dict[str, str]], **fields: object) -> str:
    body = {"messages": messages, "temperature": 0, **fields}
    async with http.post("/chat/async", json=body) as response:
        assert response.status == 202, await response.text()
        accepted = await response.json()
    return str(accepted["task_id"])


async def job(http: aiohttp.ClientSession, job_id: str) -> dict[str, object]:
    async with http.get(f"/chat/{job_id}") as response:
        found: dict[str, object] = await response.json()
        return found


async def running(server: Server) -> int:
    census = (await server.gateway.stats())["smollm2"]
    return sum(census.running.values())


async def shows_text(http: aiohttp.ClientSession, job_id: str) -> bool:
    return len(str((await job(http, job_id))["text"])) > 20


async def slots_are_free(server: Server) -> bool:
    census = (await server.gateway.stats())["smollm2"]
    return not census.running


async def cancel_and_time(server: Server, http: aiohttp.ClientSession, job_id: str) -> float:
    """Milliseconds from the request to cancel until the engine's slot is free."""
    start = time.perf_counter()
    async with http.post(f"/chat/{job_id}/cancel") as response:
        assert response.status == 200
    await wait_until(lambda: slots_are_free(server))
    return (time.perf_counter() - start) * 1000


async def test_it_knows_the_capital_of_france(client: AsyncOpenAI) -> None:
    """A sensible answer streams through the official client, and comes whole with the same text."""
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
    text = ""
    async for chunk in await client.chat.completions.create(
        model="smollm2", messages=question, temperature=0, max_tokens=24, stream=True
    ):
        text += chunk.choices[0].delta.content or ""
    assert "Paris" in text
    whole = await client.chat.completions.create(model="smollm2", messages=question, temperature=0, max_tokens=24)
    assert whole.choices[0].message.content == text
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 4


async def test_a_prompt_that_does_not_fit_is_refused_with_the_excess(client: AsyncOpenAI) -> None:
    """A prompt longer than the context gives a BadRequestError that says by how many tokens."""
    with pytest.raises(openai.BadRequestError, match=r"exceeds the context of \d+ tokens by \d+ tokens") as refused:
        await client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "lamp " * 20_000}])
    assert refused.value.code == "context_length_exceeded"


async def test_cancelling_a_running_answer_frees_its_slot(
    server: Server, http: aiohttp.ClientSession, record_property: Callable[[str, object], None]
) -> None:
    """A cancelled answer keeps its partial text, ends its log with ``cancelled`` and frees the slot at once."""
    job_id = await submit(http, STORY, max_tokens=400)
    await wait_until(lambda: shows_text(http, job_id))
    took = await cancel_and_time(server, http, job_id)
    record_property("slot_free_ms", took)
    assert took < GENEROUS_MS
    found = await job(http, job_id)
    assert (found["status"], len(str(found["text"])) > 20) == ("cancelled", True)
    transcript = await server.gateway.transcript(job_id)
    assert transcript.finished is not None
    assert transcript.finished.status == "cancelled"


async def test_cancelling_in_a_long_prompt_frees_its_slot(
    server: Server, http: aiohttp.ClientSession, record_property: Callable[[str, object], None]
) -> None:
    """A job that is still reading a prompt of 1,500 tokens stops as fast as one that is writing."""
    job_id = await submit(http, LONG_PROMPT, max_tokens=50)

    async def begun() -> bool:
        return (await job(http, job_id))["status"] == "in_progress"

    await wait_until(begun)
    took = await cancel_and_time(server, http, job_id)
    record_property("slot_free_ms", took)
    assert took < GENEROUS_MS
    found = await job(http, job_id)
    assert (found["status"], found["text"]) == ("cancelled", "")


async def test_cancelling_a_waiting_job_takes_it_out_of_the_line(server: Server, http: aiohttp.ClientSession) -> None:
    """A job that is cancelled while it waits never runs, and those behind it move up."""
    running = [await submit(http, STORY, max_tokens=400) for _ in range(2)]
    await wait_until(lambda: shows_text(http, running[1]))
    first, second = [await submit(http, STORY, max_tokens=4) for _ in range(2)]
    assert (await job(http, second))["position"] == 1
    async with http.delete(f"/chat/{first}") as response:
        assert (await response.json())["status"] == "cancelled"
    assert (await job(http, second))["position"] == 0
    for job_id in running:
        await cancel_and_time(server, http, job_id) if job_id == running[-1] else await http.delete(f"/chat/{job_id}")
    found = await job(http, first)
    assert (found["attempt"], found["text"]) == (0, "")


async def test_a_crash_of_the_engine_costs_an_attempt_and_nothing_else(
    server: Server, http: aiohttp.ClientSession
) -> None:
    """The engine is killed in the middle of an answer: the answer goes on from its last logged token."""
    job_id = await submit(http, STORY, max_tokens=48)
    await wait_until(lambda: shows_text(http, job_id))
    before = str((await job(http, job_id))["text"])
    (provider,) = server.gateway.providers
    assert isinstance(provider, LocalProvider)
    assert provider.pid is not None
    os.kill(provider.pid, signal.SIGKILL)
    with server.gateway.follow(job_id) as follower:
        async for _ in follower:
            pass
    found = await job(http, job_id)
    assert (found["status"], found["attempt"], found["finish_reason"]) == ("incomplete", 2, "length")
    assert str(found["text"]).startswith(before)
    usage = found["usage"]
    assert isinstance(usage, dict)
    assert usage["completion_tokens"] == 48
    async with http.get("/health/full") as response:
        assert response.status == 200
