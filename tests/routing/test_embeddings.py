"""Embeddings of remote providers: what they get, what is made of their answers, and who answers when they cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from llmstream.config import DisconnectSettings, ProviderSettings, RetrySettings, SchedulerSettings
from llmstream.server import Server
from llmstream.types import Delta, Restart
from llmstream.vectors import SLICE_INPUTS
from tests.api.reading import Json, finished, log_of
from tests.conftest import echo_settings
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

USAGE = {"prompt_tokens": 5, "total_tokens": 5}
GOOD = Reply(usage=USAGE)
MANY = [f"number {number}" for number in range(2 * SLICE_INPUTS + 3)]


@asynccontextmanager
async def serving(
    tmp_path: Path, upstream: Upstream, *, first: Json | None = None, **sections: Any
) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    """A server with two remote providers and a route ``r`` from one to the other."""
    given: Json = {
        "providers": {
            "one": {"base_url": upstream.url, "models": ["m", "a"], "api_key": "secret-key", **(first or {})},
            "two": {"base_url": upstream.url, "models": []},
        },
        "routes": {
            "r": {"targets": [{"provider": "one", "model": "a"}, {"provider": "two", "model": "b"}]},
            "mixed": {"targets": [{"provider": "echo"}, {"provider": "two", "model": "b"}]},
        },
        "scheduler": SchedulerSettings(max_attempts=2),
        "retry": RetrySettings(base_s=0.01),
        **sections,
    }
    async with Server(echo_settings(tmp_path, **given)) as server, aiohttp.ClientSession(server.url) as http:
        yield server, http


async def embed(http: aiohttp.ClientSession, model: str, inputs: Any, **body: Any) -> tuple[int, Json]:
    asked = {"model": model, "input": inputs, "encoding_format": "float", **body}
    async with http.post("/v1/embeddings", json=asked) as response:
        return response.status, await response.json()


def vectors(answer: Json) -> list[list[float]]:
    return [each["embedding"] for each in answer["data"]]


def numbered(inputs: list[str]) -> list[list[float]]:
    """What the upstream makes of inputs."""
    return [[float(number), float(len(text))] for number, text in enumerate(inputs)]


@pytest.mark.parametrize("numbers", [False, True], ids=["base64", "numbers"])
async def test_passed_on_as_it_came(tmp_path: Path, upstream: Upstream, numbers: bool) -> None:
    """The upstream gets the client's own fields and our key, nothing that is meant for us, in one request; its
    vectors come in the order of the inputs, its usage is taken over, and several entries hold them."""
    upstream.models["m"] = Reply(usage=USAGE, numbers=numbers)
    async with serving(tmp_path, upstream) as (server, http):
        status, answer = await embed(http, "m", MANY, dimensions=2, user="u", priority=3, job_id="mine", odd=[1])
        log = await log_of(server, "mine")
    assert (status, vectors(answer), answer["usage"], answer["model"]) == (200, numbered(MANY), USAGE, "m")
    (seen,) = upstream.requests
    fields = {"model": "m", "input": MANY, "dimensions": 2, "user": "u", "odd": [1], "encoding_format": "base64"}
    assert (seen.path, seen.body) == ("/v1/embeddings", fields)
    assert seen.headers["Authorization"] == "Bearer secret-key"
    assert [event.data.index for event in log if isinstance(event.data, Delta)] == list(range(len(MANY)))


async def test_the_official_client(tmp_path: Path, upstream: Upstream) -> None:
    """The client gets what the upstream said."""
    upstream.models["m"] = GOOD
    async with (
        serving(tmp_path, upstream) as (server, _),
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        answer = await client.embeddings.create(model="m", input=["a", "bb"])
    assert [each.embedding for each in answer.data] == numbered(["a", "bb"])


async def test_tokens_that_nobody_told(tmp_path: Path, upstream: Upstream) -> None:
    """Where the upstream tells no usage the tokens of the inputs are counted here, and marked so."""
    upstream.models["m"] = Reply(usage=None)
    async with serving(tmp_path, upstream) as (_, http):
        _, answer = await embed(http, "m", ["one two three", "four"])
    assert answer["usage"]["estimated"]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 4


async def test_an_upstream_that_fails_is_tried_again(tmp_path: Path, upstream: Upstream) -> None:
    """A server error costs an attempt, and the next one answers."""
    upstream.replies.extend([Reply(status=500, body={"error": {"message": "down"}}), GOOD])
    async with serving(tmp_path, upstream) as (_, http):
        status, answer = await embed(http, "m", ["a"])
    assert (status, vectors(answer), len(upstream.requests)) == (200, numbered(["a"]), 2)


async def test_the_next_target_answers(tmp_path: Path, upstream: Upstream) -> None:
    """A route's second target makes the vectors when the first cannot."""
    upstream.models["a"], upstream.models["b"] = Reply(status=503, body={"error": {"message": "full"}}), GOOD
    async with serving(tmp_path, upstream) as (_, http):
        status, answer = await embed(http, "r", ["a"])
    assert (status, vectors(answer)) == (200, numbered(["a"]))
    assert [seen.body["model"] for seen in upstream.requests] == ["a", "b"]


async def test_vectors_of_two_models_are_never_mixed(tmp_path: Path, upstream: Upstream) -> None:
    """What one model made of the first slices is void when another one has to go on."""
    upstream.models["b"] = GOOD
    fault = {"fault": "crash", "at": SLICE_INPUTS + 1}
    async with serving(tmp_path, upstream) as (server, http):
        status, answer = await embed(http, "mixed", MANY, echo=fault, job_id="both")
        log = await log_of(server, "both")
    assert (status, vectors(answer)) == (200, numbered(MANY))
    assert sum(isinstance(event.data, Restart) for event in log) == 1
    (seen,) = upstream.requests
    assert seen.body["input"] == MANY


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(vectors=[[1.0]]), "1 for 2 inputs"),
        (Reply(vectors=[[1.0], [1.0, 2.0]]), "not all the same"),
        (Reply(vectors=[[], []]), "no dimensions"),
        (Reply(body={"data": "none"}), "malformed"),
        (Reply(body={"data": []}), "0 for 2 inputs"),
        (Reply(body={"data": [{"embedding": "!!"}, {"embedding": "??"}]}), "vectors that are none"),
        (Reply(body={"error": {"message": "on fire", "type": "server_error"}}), "on fire"),
        (Reply(body="<html>", headers={"Content-Type": "text/html"}), "web page"),
    ],
)
async def test_what_is_no_answer(tmp_path: Path, upstream: Upstream, reply: Reply, words: str) -> None:
    """An answer that does not hold one vector for each input is a failure of the upstream that says so."""
    upstream.models["m"] = reply
    async with serving(tmp_path, upstream) as (_, http):
        status, answer = await embed(http, "m", ["a", "b"])
    assert status == 502, answer
    assert words in answer["error"]["message"]


async def test_a_refusal_is_the_clients(tmp_path: Path, upstream: Upstream) -> None:
    """What the upstream refuses for good is a 400 with its field, asked once."""
    error = {"message": "input too long", "param": "input", "type": "invalid_request_error"}
    upstream.models["m"] = Reply(status=400, body={"error": error})
    async with serving(tmp_path, upstream) as (_, http):
        status, answer = await embed(http, "m", ["a"])
    assert (status, answer["error"]["param"], len(upstream.requests)) == (400, "input", 1)


async def test_providers_that_cannot(tmp_path: Path, upstream: Upstream) -> None:
    """A provider without embeddings is not even asked."""
    async with serving(tmp_path, upstream, first={"embeddings": False}) as (_, http):
        status, answer = await embed(http, "m", ["a"])
    assert (status, answer["error"]["code"]) == (400, "unsupported_by_provider")
    assert answer["error"]["param"] == "model"
    assert upstream.requests == []


async def test_limits_count_embeddings(tmp_path: Path, upstream: Upstream) -> None:
    """A batch that can never fit the tokens of a minute is refused by its input; one request at once holds for
    embeddings and chats together."""
    gate = asyncio.Event()
    upstream.models["m"] = Reply(usage=USAGE, gates={-1: gate})
    async with serving(tmp_path, upstream, first={"tpm": 100, "concurrency": 1}) as (_, http):
        status, answer = await embed(http, "m", ["word " * 100])
        assert (status, answer["error"]["param"]) == (400, "input")
        waiting = [asyncio.create_task(embed(http, "m", [text])) for text in ("a", "b")]
        await wait_until(lambda: len(upstream.requests) == 1)
        gate.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
    assert upstream.most_busy == 1


async def test_behind_another_llmstream(tmp_path: Path) -> None:
    """The inner one makes the vectors; when the outer job is cancelled the inner one ends, as nobody waits for it."""
    inner_settings = echo_settings(tmp_path / "inner", disconnect=DisconnectSettings(grace_s=0.2))
    async with Server(inner_settings) as inner:
        provider = ProviderSettings(base_url=f"{inner.url}/v1", preset="llmstream", models=["*"])
        outer_settings = echo_settings(tmp_path / "outer", models={}, providers={"inner": provider})
        async with Server(outer_settings) as outer, aiohttp.ClientSession(outer.url) as http:
            status, answer = await embed(http, "echo", MANY)
            async with (
                aiohttp.ClientSession(inner.url) as direct,
                direct.post("/v1/embeddings", json={"model": "echo", "input": MANY}) as response,
            ):
                assert (status, answer) == (200, await response.json())
            slow = {"model": "echo", "texts": MANY, "echo": {"delay_ms": 100}}
            async with http.post("/embeddings", json=slow) as response:
                outer_job = (await response.json())["task_id"]

            async def begun() -> bool:
                return (await inner.gateway.recent(1))[0].status == "in_progress"

            await wait_until(begun)
            (newest,) = await inner.gateway.recent(1)
            async with http.post(f"/chat/{outer_job}/cancel") as response:
                assert response.status == 200
            assert (await finished(inner, newest.job.id)).status == "cancelled"
