"""The official OpenAI client, unmodified, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from llmstream.config import ModelSettings, SchedulerSettings
from llmstream.server import Server
from tests.api.reading import finished, tokens
from tests.conftest import echo_settings
from tests.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: Any = [{"role": "user", "content": "over the wire"}]
TEXT = "over the wire"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with Server(echo_settings(tmp_path_factory.mktemp("openai"))) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def echo(**options: Any) -> dict[str, Any]:
    return {"echo": options}


async def test_completes(client: AsyncOpenAI) -> None:
    """The client gets a whole answer with usage and a reason."""
    answer = await client.chat.completions.create(model="echo", messages=HELLO)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    assert answer.model == "echo"
    assert answer.id.startswith("chatcmpl-")


async def test_streams(client: AsyncOpenAI) -> None:
    """The client gets the role first, then the text, then the reason, and no usage unless it asks."""
    stream = await client.chat.completions.create(model="echo", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert not any(chunk.usage for chunk in chunks)


async def test_streams_usage_when_asked(client: AsyncOpenAI) -> None:
    """With include_usage the last chunk has no choices and the tokens of the whole answer."""
    stream = await client.chat.completions.create(
        model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert not any(chunk.usage for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 3)


async def test_stream_helper_accumulates(client: AsyncOpenAI) -> None:
    """The client's own accumulator puts an answer of two choices together."""
    async with client.chat.completions.stream(
        model="echo", messages=HELLO, n=2, stream_options={"include_usage": True}
    ) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


async def test_the_synchronous_client(server: Server) -> None:
    """The synchronous client completes, streams, lists and retrieves."""

    def work() -> tuple[str | None, str, list[str]]:
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            whole = client.chat.completions.create(model="echo", messages=HELLO)
            stream = client.chat.completions.create(model="echo", messages=HELLO, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert client.chat.completions.retrieve(whole.id).choices == whole.choices
            return whole.choices[0].message.content, text, [model.id for model in client.models.list()]

    assert await asyncio.to_thread(work) == (TEXT, TEXT, ["echo"])


async def test_several_choices(client: AsyncOpenAI) -> None:
    """With n=2 both choices come, whole and streamed."""
    whole = await client.chat.completions.create(model="echo", messages=HELLO, n=2)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(0, TEXT), (1, TEXT)]
    texts, reasons = ["", ""], ["", ""]
    async for chunk in await client.chat.completions.create(model="echo", messages=HELLO, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert (texts, reasons) == ([TEXT, TEXT], ["stop", "stop"])


async def test_max_tokens_cut_the_answer(client: AsyncOpenAI) -> None:
    """An answer that max_tokens cuts is an answer, with the reason length."""
    answer = await client.chat.completions.create(model="echo", messages=HELLO, max_tokens=2)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("over the", "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_say_where_to_go_on(client: AsyncOpenAI, stream: bool) -> None:
    """The raw response names the job and where its stream can be read again."""
    raw = await client.chat.completions.with_raw_response.create(model="echo", messages=HELLO, stream=stream)
    job_id = raw.headers["x-job-id"]
    assert raw.headers["location"] == f"/v1/chat/completions/chatcmpl-{job_id}?stream=true"
    assert raw.headers["x-request-id"] == raw.request_id
    assert float(raw.headers["x-process-time"]) >= 0
    stored = await client.chat.completions.retrieve(f"chatcmpl-{job_id}")
    assert stored.choices[0].message.content == TEXT


async def test_retrieves_what_is_stored(client: AsyncOpenAI) -> None:
    """A stored completion equals the one that was answered; while it is made, retrieving waits for it."""
    answer = await client.chat.completions.create(model="echo", messages=HELLO)
    assert await client.chat.completions.retrieve(answer.id) == answer
    raw = await client.chat.completions.with_raw_response.create(
        model="echo", messages=HELLO, stream=True, extra_body=echo(tokens=20, delay_ms=5)
    )
    stored = await client.chat.completions.retrieve(raw.headers["x-job-id"])
    assert stored.choices[0].message.content == tokens(20)


async def test_models(client: AsyncOpenAI) -> None:
    """Models are listed and found by name; others are not found."""
    assert [model.id async for model in client.models.list()] == ["echo"]
    model = await client.models.retrieve("echo")
    assert (model.object, model.owned_by) == ("model", "echo")
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("no/such:model")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "param", "code", "said"),
    [
        ({"messages": []}, "messages", "invalid_value", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "invalid_value", "'assistant'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_value", "valid string"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_field", "required"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"temperature": "warm"}, "temperature", "invalid_value", "'warm'"),
        ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value", "integer"),
        ({"stop": [1]}, "stop.0", "invalid_value", "string"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream is true"),
        ({"extra_body": {"priority": 11}}, "priority", "invalid_value", "less than or equal to 10"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_bodies_are_bad_requests(
    client: AsyncOpenAI, stream: bool, change: dict[str, Any], param: str, code: str, said: str
) -> None:
    """A wrong field gives BadRequestError that names it, before any stream begins."""
    if stream and "stream_options" in change:
        return
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**({"model": "echo", "messages": HELLO, "stream": stream} | change))
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert said in error.message


async def test_missing_fields_are_bad_requests(client: AsyncOpenAI) -> None:
    """A body without model or messages gives BadRequestError with the name of what is missing."""
    for body, missing in (({"messages": HELLO}, "model"), ({"model": "echo"}, "messages")):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/chat/completions", body=body, cast_to=object)
        assert (caught.value.param, caught.value.code) == (missing, "missing_field")


async def test_unknown_models_are_not_found(client: AsyncOpenAI) -> None:
    """An unknown model gives NotFoundError that says which there are and which may have been meant."""
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="ecoh", messages=HELLO)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "Did you mean 'echo'?" in caught.value.message


async def test_a_prompt_that_is_too_long_says_by_how_much(client: AsyncOpenAI) -> None:
    """A prompt beyond the context gives BadRequestError with the number of tokens too many."""
    long: Any = [{"role": "user", "content": "word " * 4100}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="echo", messages=long)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    assert "too long by 5 tokens" in caught.value.message


@pytest.mark.parametrize(("fault", "code"), [("error", "provider_error"), ("reject", "upstream_rejected")])
async def test_a_job_that_fails_in_the_middle_raises(
    server: Server, client: AsyncOpenAI, fault: str, code: str
) -> None:
    """A stream that fails after its first tokens raises in the client, and the partial answer is kept."""
    raw = await client.chat.completions.with_raw_response.create(
        model="echo", messages=HELLO, stream=True, extra_body=echo(tokens=9, fault=fault, at=4)
    )
    seen: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        await _collect(raw.parse(), seen)
    assert ("".join(seen), caught.value.code) == (tokens(4), code)
    job_id = raw.headers["x-job-id"]
    assert (await finished(server, job_id)).status == "failed"
    assert (await server.gateway.transcript(job_id)).text == tokens(4)
    with pytest.raises(openai.APIStatusError):
        await client.chat.completions.retrieve(job_id)


async def test_a_job_that_fails_is_not_sent_again(server: Server) -> None:
    """The client does not repeat by itself a request whose job was accepted and has failed."""
    before = len(await server.gateway.recent())
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=3) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="echo", messages=HELLO, extra_body=echo(fault="error"))
    assert caught.value.code == "provider_error"
    assert caught.value.response.headers["x-job-id"]
    assert len(await server.gateway.recent()) == before + 1


async def test_a_crash_is_mended_unseen(client: AsyncOpenAI) -> None:
    """A model that crashes once in the middle costs the client nothing but time."""
    stream = await client.chat.completions.create(
        model="echo", messages=HELLO, stream=True, extra_body=echo(tokens=9, fault="crash", at=4, attempts=1)
    )
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == tokens(9)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_job_raises(server: Server, client: AsyncOpenAI, stream: bool) -> None:
    """A job that somebody cancels ends in the client as an error that says so."""
    asked = asyncio.create_task(_exhaust(client, stream))
    await wait_until(lambda: _running(server, 1))
    await server.gateway.cancel((await server.gateway.recent())[0].job.id)
    with pytest.raises(openai.APIError) as caught:
        await asked
    assert caught.value.code == "cancelled"


async def _collect(stream: Any, seen: list[str]) -> None:
    async for chunk in stream:
        seen += [choice.delta.content or "" for choice in chunk.choices]


async def _exhaust(client: AsyncOpenAI, stream: bool) -> None:
    options: Any = {"stream": stream, "extra_body": echo(tokens=5, fault="stall", at=3)}
    answer = await client.chat.completions.create(model="echo", messages=HELLO, **options)
    if stream:
        await _collect(answer, [])


async def _running(server: Server, count: int) -> bool:
    return sum(sum(census.running.values()) for census in (await server.gateway.stats()).values()) == count


async def test_a_full_queue_is_a_rate_limit(tmp_path: Any) -> None:
    """When too many jobs wait the client gets RateLimitError with the time after which it may try again."""
    given: Any = {
        "models": {"echo": ModelSettings(engine="echo", slots=1)},
        "scheduler": SchedulerSettings(max_waiting=1),
    }
    async with Server(echo_settings(tmp_path, **given)) as server, aiohttp.ClientSession(server.url) as http:
        stall = {"message": "x", "echo": {"tokens": 5, "fault": "stall"}}
        jobs = []
        for _ in range(2):
            async with http.post("/chat/async", json=stall) as response:
                jobs.append((await response.json())["task_id"])
            await wait_until(lambda: _running(server, 1))
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model="echo", messages=HELLO)
            assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
            headers = caught.value.response.headers
            assert int(headers["retry-after"]) >= 1
            assert 0 < int(headers["retry-after-ms"]) <= 1000 * int(headers["retry-after"])
        refused = asyncio.Event()

        async def note(response: Any) -> None:
            refused.set()

        patient = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", http_client=patient) as client:
            asked = asyncio.ensure_future(
                client.chat.completions.with_raw_response.create(model="echo", messages=HELLO)
            )
            await refused.wait()
            await asyncio.gather(*(server.gateway.cancel(job_id) for job_id in jobs))
            answer = await asked
            assert answer.retries_taken == 1
            assert answer.parse().choices[0].message.content == TEXT
        assert len(await server.gateway.recent()) == 3
