"""``/v1/embeddings`` with the official client, ``/embeddings`` as a job, and what both refuse."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from llmstream.config_routes import CacheSettings
from llmstream.providers import echo_vectors
from llmstream.server import Server
from llmstream.types import Delta
from llmstream.vectors import SLICE_INPUTS
from tests.api.reading import Json, finished
from tests.conftest import echo_settings
from tests.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = ["the cat sat", "the dog sat", "shares fell"]
MANY = [f"text number {number}" for number in range(3 * SLICE_INPUTS + 5)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with Server(echo_settings(tmp_path_factory.mktemp("embeddings"))) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def http(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as session:
        yield session


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def expected(value: str | list[int]) -> list[float]:
    """What the echo model makes of an input, as 32-bit floats."""
    return [float(each) for each in np.array(echo_vectors.vector(value), np.float32)]


async def post(http: aiohttp.ClientSession, url: str = "/v1/embeddings", **body: Any) -> tuple[int, Json]:
    async with http.post(url, json={"model": "echo", **body}) as response:
        return response.status, await response.json()


async def test_the_official_client_gets_vectors(client: AsyncOpenAI) -> None:
    """One text or several give vectors in their order, with usage; the client asks for base64 by itself."""
    one = await client.embeddings.create(model="echo", input="the cat sat")
    many = await client.embeddings.create(model="echo", input=TEXTS, user="somebody")
    assert [each.embedding for each in many.data] == [expected(text) for text in TEXTS]
    assert [each.index for each in many.data] == [0, 1, 2]
    assert one.data[0].embedding == many.data[0].embedding
    assert (many.usage.prompt_tokens, many.usage.total_tokens) == (8, 8)
    assert (many.model, many.object, many.data[0].object) == ("echo", "list", "embedding")


async def test_base64_and_numbers_are_the_same(http: aiohttp.ClientSession) -> None:
    """The base64 of 32-bit floats and the list of numbers say exactly the same."""
    _, numbers = await post(http, input=MANY, encoding_format="float")
    _, text = await post(http, input=MANY, encoding_format="base64")
    _, default = await post(http, input=MANY)
    decoded = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4").tolist() for each in text["data"]]
    assert [each["embedding"] for each in numbers["data"]] == decoded == [expected(each) for each in MANY]
    assert default == numbers


async def test_token_ids(client: AsyncOpenAI) -> None:
    """A list of ids is one input; a list of such lists is several."""
    one = await client.embeddings.create(model="echo", input=[5, 6, 7])
    several = await client.embeddings.create(model="echo", input=[[5, 6, 7], [8]])
    assert [each.embedding for each in one.data] == [expected([5, 6, 7])]
    assert [each.embedding for each in several.data] == [expected([5, 6, 7]), expected([8])]
    assert several.usage.total_tokens == 4


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "list"),
        ({"input": ["a", ""]}, "input", "number 1 is empty"),
        ({"input": ["a", 1]}, "input", "number 1 is of another kind"),
        ({"input": [[1], []]}, "input", "number 1 is empty"),
        ({"input": [[1], [2.5]]}, "input", "no token id"),
        ({"input": [True]}, "input", "no token id"),
        ({"input": [-1]}, "input", "no token id"),
        ({"input": [None]}, "input", "another kind"),
        ({"input": {"a": 1}}, "input", "expected a text"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "a " * 5000}, "input", "5000 tokens"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater"),
        ({"input": "a", "dimensions": 7}, "dimensions", "64 dimensions"),
        ({"input": "a", "model": "nobody"}, "model", "does not exist"),
        ({"input": "a", "temperature": 1}, "temperature", "leave it out"),
        ({"input": "a", "priority": 11}, "priority", "less than"),
    ],
)
async def test_what_is_wrong_is_named(http: aiohttp.ClientSession, body: Json, param: str, words: str) -> None:
    """Bad input gets a 4xx in OpenAI's form that names the field and says what is wrong with it."""
    status, answer = await post(http, **body)
    assert status == (404 if body.get("model") else 400), answer
    assert (answer["error"]["param"], answer["error"]["type"]) == (param, "invalid_request_error")
    assert words in answer["error"]["message"]


async def test_a_model_must_be_named(http: aiohttp.ClientSession) -> None:
    """As at OpenAI; on ``/embeddings`` the first model that makes them stands in."""
    async with http.post("/v1/embeddings", json={"input": "a"}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "model")
    async with http.post("/embeddings", json={"input": "a"}) as response:
        assert (response.status, (await response.json())["model"]) == (200, "echo")


async def test_a_batch_as_a_job(http: aiohttp.ClientSession, server: Server) -> None:
    """``texts`` are accepted at once; the vectors are there when the job is completed."""
    async with http.post("/embeddings", json={"texts": TEXTS, "user_id": "u1", "priority": 5}) as response:
        accepted = await response.json()
        assert response.status == 202
    assert accepted["status"] == "queued"
    assert accepted["status_url"] == f"/embeddings/{accepted['task_id']}"
    state = await finished(server, accepted["task_id"])
    assert (state.job.lane, state.job.request.body["user"]) == ("high", "u1")
    async with http.get(accepted["status_url"]) as response:
        answer = await response.json()
    assert (answer["status"], answer["ready"], answer["done"]) == ("completed", True, 3)
    assert answer["result"]["embeddings"] == [expected(text) for text in TEXTS]
    assert (answer["result"]["count"], answer["result"]["dimensions"]) == (3, 64)


async def test_it_is_a_job_like_others(http: aiohttp.ClientSession, client: AsyncOpenAI) -> None:
    """It is listed, has a status, and its log can be streamed; no chat route takes it for an answer."""
    raw = await client.embeddings.with_raw_response.create(model="echo", input=TEXTS)
    job_id = raw.headers["x-job-id"]
    async with http.get("/jobs") as response:
        assert job_id in [job["task_id"] for job in (await response.json())["data"]]
    async with http.get(f"/chat/{job_id}") as response:
        status = await response.json()
    assert (status["status"], status["usage"]["prompt_tokens"], status["usage"]["completion_tokens"]) == (
        "completed",
        8,
        0,
    )
    async with http.get(f"/stream/{job_id}") as response:
        text = await response.text()
    assert text.count('"embedding":') == 3
    assert text.endswith('data: {"type":"complete"}\n\n')
    async with http.get(f"/v1/chat/completions/{job_id}") as response:
        assert response.status == 404
    chat = await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
    async with http.get(f"/embeddings/{chat.id.removeprefix('chatcmpl-')}") as response:
        assert response.status == 404


async def slices_of(server: Server, job_id: str) -> dict[int, list[list[int]]]:
    """For each attempt the inputs whose vectors came together."""
    await finished(server, job_id)
    found: dict[int, list[list[int]]] = {}
    with server.gateway.follow(job_id) as follower:
        async for entries in follower:
            for entry in entries:
                made = [data.index for data in entry.payloads if isinstance(data, Delta) and data.fields]
                found.setdefault(entry.attempt, []).append(made)
    return {attempt: [made for made in parts if made] for attempt, parts in found.items()}


async def test_a_batch_is_logged_slice_by_slice(http: aiohttp.ClientSession, server: Server) -> None:
    """The vectors of a slice are one entry of the log, in the order of the inputs."""
    async with http.post("/embeddings", json={"texts": MANY, "echo": {"delay_ms": 2}}) as response:
        job_id = (await response.json())["task_id"]
    starts = range(0, len(MANY), SLICE_INPUTS)
    expected = [list(range(len(MANY)))[start : start + SLICE_INPUTS] for start in starts]
    assert await slices_of(server, job_id) == {1: expected}


async def test_a_chat_has_its_turn_beside_a_batch(http: aiohttp.ClientSession, client: AsyncOpenAI) -> None:
    """While a batch runs, chats and small requests to the same model are answered."""
    async with http.post("/embeddings", json={"texts": MANY, "echo": {"delay_ms": 50}}) as response:
        accepted = await response.json()
    await client.embeddings.create(model="echo", input="small")
    await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
    async with http.get(accepted["status_url"]) as response:
        assert (await response.json())["status"] == "in_progress"
    async with http.post(f"/chat/{accepted['task_id']}/cancel") as response:
        assert response.status == 200


async def test_cancelled_between_slices(http: aiohttp.ClientSession, server: Server) -> None:
    """A cancelled batch stops in the middle, keeps what it has, and says so."""
    async with http.post("/embeddings", json={"texts": MANY, "echo": {"delay_ms": 10}}) as response:
        accepted = await response.json()

    async def begun() -> bool:
        async with http.get(accepted["status_url"]) as response:
            return bool((await response.json())["done"])

    await wait_until(begun)
    async with http.post(f"/chat/{accepted['task_id']}/cancel") as response:
        assert (await response.json())["status"] == "cancelled"
    async with http.get(accepted["status_url"]) as response:
        answer = await response.json()
    assert (answer["status"], answer["ready"]) == ("cancelled", False)
    assert 0 < answer["done"] < len(MANY)
    await wait_until(lambda: not any(getattr(each, "running", 0) for each in server.gateway.providers))


async def test_the_clients_leave_ends_it(http: aiohttp.ClientSession, server: Server) -> None:
    """With ``on_disconnect`` ``cancel`` nothing is computed for a client that is gone."""
    body: Json = {"model": "echo", "input": MANY, "on_disconnect": "cancel", "job_id": "left", "echo": {"delay_ms": 50}}
    asking = asyncio.create_task(post(http, **body))

    async def running() -> bool:
        return any(getattr(each, "running", 0) for each in server.gateway.providers)

    await wait_until(running)
    asking.cancel()
    assert (await finished(server, "left")).status == "cancelled"


async def test_a_failure_in_the_middle(http: aiohttp.ClientSession) -> None:
    """Half a batch is no answer: the whole request fails and says why."""
    status, answer = await post(http, input=MANY, echo={"fault": "reject", "at": SLICE_INPUTS + 1})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    status, answer = await post(http, input=MANY, echo={"fault": "crash", "at": SLICE_INPUTS + 1})
    assert (status, answer["error"]["code"]) == (502, "engine_crashed")


async def test_a_crash_goes_on_with_the_next_slice(http: aiohttp.ClientSession, server: Server) -> None:
    """After a crash the next attempt begins behind the last logged slice; each vector is there once."""
    fault = {"fault": "crash", "at": SLICE_INPUTS + 1, "attempts": 1}
    status, answer = await post(http, input=MANY, echo=fault, job_id="crashed-once", encoding_format="float")
    assert status == 200
    assert [each["embedding"] for each in answer["data"]] == [expected(text) for text in MANY]
    assert answer["usage"]["total_tokens"] == 3 * len(MANY)
    made = await slices_of(server, "crashed-once")
    assert (made[1], made[2][0][0]) == ([list(range(SLICE_INPUTS))], SLICE_INPUTS)
    assert (await server.gateway.job("crashed-once")).attempt == 2


async def test_the_same_key_is_the_same_job(http: aiohttp.ClientSession) -> None:
    """A request under its Idempotency-Key again is the same job, however its vectors are written; another one is
    refused."""
    ids = set()
    for body in ({"input": TEXTS}, {"input": TEXTS, "encoding_format": "base64"}):
        headers = {"Idempotency-Key": "vectors"}
        async with http.post("/v1/embeddings", json={"model": "echo", **body}, headers=headers) as response:
            assert response.status == 200
            ids.add(response.headers["x-job-id"])
    assert len(ids) == 1
    headers = {"Idempotency-Key": "vectors"}
    async with http.post("/v1/embeddings", json={"model": "echo", "input": "b"}, headers=headers) as response:
        assert response.status == 422


async def test_a_cached_batch(tmp_path: Path) -> None:
    """Where the cache is for all routes an equal request gets the vectors that are there, in whichever form."""
    settings = echo_settings(tmp_path, cache=CacheSettings(everywhere=True))
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        found = []
        for encoding in ("float", "base64"):
            body = {"model": "echo", "input": TEXTS, "encoding_format": encoding}
            async with http.post("/v1/embeddings", json=body) as response:
                found.append((response.headers["x-job-id"], response.headers.get("X-Cache")))
                vector = (await response.json())["data"][1]["embedding"]
    assert found == [(found[0][0], None), (found[0][0], "hit")]
    assert np.frombuffer(base64.b64decode(vector), "<f4").tolist() == expected(TEXTS[1])


async def test_in_memory(http: aiohttp.ClientSession) -> None:
    """A memory job makes vectors as well."""
    status, answer = await post(http, input=TEXTS, durability="memory", encoding_format="float")
    assert (status, answer["data"][2]["embedding"]) == (200, expected(TEXTS[2]))


async def test_errors_reach_the_official_client(client: AsyncOpenAI) -> None:
    """The client raises its own error with the field in it."""
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(model="echo", input="a", dimensions=3)
    assert caught.value.param == "dimensions"
