"""What a client sends reaches the provider, and what the provider says reaches the client, unharmed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from llmstream.config import ProviderSettings
from llmstream.server import Server
from tests.conftest import echo_settings
from tests.sse import Parser
from tests.upstream import Reply, Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MEMBERS = {
    "messages": r"""[{"role":"user", "content":[
        {"type":"text","text":"caf\u00e9 \ud83d\ude00 <\/script> naïve \u0000"},
        {"type":"image_url","image_url":{"url":"data:image\/png;base64,iVBORw0KGgo=","detail":"low"}},
        {"type":"input_audio","input_audio":{"data":"UklGRg==","format":"wav"}}]},
      {"role":"assistant","content":null,"tool_calls":[{"type":"function","id":"c1",
        "function":{"arguments":"{ \"a\":1.0 }","name":"f"}}]},
      {"role":"tool","tool_call_id":"c1","content":"1e-7"}]""",
    "temperature": "1.0",
    "top_p": "1e-1",
    "seed": "-9223372036854775808",
    "logprobs": "true",
    "tools": r"""[ {"type":"function",
        "function":{"strict":true,"name":"f","parameters":{"z":1,"a":{"minimum":0.10,"b":[]}}}} ]""",
    "response_format": r"""{"type":"json_schema","json_schema":{"schema":{"enum":[1.0,1,1e0]},"name":"n"}}""",
    "x_provider": r"""{"big":123456789012345678901234567890,"small":1.10e-300,"deep":[[[ ]]],"dup":1,"dup":2}""",
    "metadata": "null",
    "stop": r"""["\n","\u20ac"]""",
}
"""Members of a request, each in a spelling that decoding and encoding again would change."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    providers = {"far": ProviderSettings(base_url=upstream.url, models=["m"])}
    data_dir: Path = tmp_path_factory.mktemp("passing")
    async with Server(echo_settings(data_dir, models={}, providers=providers)) as server:
        yield server


def body_of(**members: str) -> bytes:
    return "{{{}}}".format(" ,\n".join(f'"{name}" : {value}' for name, value in members.items())).encode()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat"])
@pytest.mark.parametrize("ours", [{}, {"priority": "3", "session_id": '"s"', "job_id": "null"}], ids=["plain", "ours"])
async def test_every_member_goes_up_as_it_was_written(
    server: Server, upstream: Upstream, path: str, ours: dict[str, str]
) -> None:
    """Numbers, escapes, spaces and the order of members reach the provider byte for byte; only ours are left out."""
    sent = body_of(model='"m"', **MEMBERS, **ours)
    async with aiohttp.ClientSession(server.url) as http, http.post(path, data=sent) as response:
        assert response.status == 200, await response.text()
        await response.read()
    raw = upstream.requests[-1].raw.decode()
    for name, value in MEMBERS.items():
        assert f'"{name}":{value}' in raw
    arrived = list(json.loads(raw))
    assert arrived == ["model", *MEMBERS, "stream", "stream_options"]


async def test_a_plain_message_goes_up_as_it_was_written(server: Server, upstream: Upstream) -> None:
    """The message of a native request becomes a message of the user with the same spelling."""
    sent = body_of(model='"m"', message=r'"caf\u00e9 \/"', x="1.0")
    async with aiohttp.ClientSession(server.url) as http, http.post("/chat", data=sent) as response:
        assert response.status == 200
        await response.read()
    raw = upstream.requests[-1].raw
    assert rb'"messages":[{"role":"user","content":"caf\u00e9 \/"}]' in raw
    assert b'"x":1.0' in raw
    assert b'"message"' not in raw


LOGPROBS = {
    "content": [
        {"token": "é", "bytes": [195, 169], "logprob": -1e-10, "top_logprobs": [{"token": "e", "logprob": -9.5}]}
    ],
    "refusal": None,
}
PIECES: list[dict[str, Any]] = [
    {"reasoning_content": "because ", "x_signature": {"big": 2**80, "float": 1.0, "null": None}},
    {"content": "é\u2028"},
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "1.0}"}}]},
    {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
    {"audio": {"id": "a1", "data": "UklGRg==", "transcript": "x"}},
    {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
    {"annotations": [{"type": "url_citation", "url_citation": {"url": "http://x", "start_index": 0}}]},
]


async def test_every_delta_comes_back_as_it_was_said(server: Server, upstream: Upstream) -> None:
    """Tool calls, reasoning, audio, images and members that nobody knows stream through piece by piece."""
    upstream.replies.append(Reply(pieces=PIECES, finish_reason="tool_calls"))
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    async with aiohttp.ClientSession(server.url) as http, http.post("/v1/chat/completions", json=body) as response:
        frames = Parser().feed(await response.read())
    chunks = [json.loads(frame.data) for frame in frames if frame.data and frame.data != "[DONE]"]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1 : 1 + len(PIECES)] == PIECES
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] == ["tool_calls"]


async def test_a_whole_answer_holds_what_was_said(server: Server, upstream: Upstream) -> None:
    """The official client finds tool calls, log probabilities and the members of others in the message."""
    upstream.replies.append(Reply(pieces=PIECES, finish_reason="tool_calls"))
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    message = answer.choices[0].message.model_dump()
    calls = message["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("c1", '{"a": 1.0}'), ("c2", "{}")]
    assert message["reasoning_content"] == "because "
    assert message["x_signature"] == {"big": 2**80, "float": 1.0, "null": None}
    assert message["audio"]["data"] == "UklGRg=="
    assert message["content"] == "é\u2028"


@pytest.mark.parametrize("whole", [False, True])
async def test_log_probabilities_come_back_as_they_were_said(server: Server, upstream: Upstream, whole: bool) -> None:
    """Log probabilities keep every digit, byte and alternative, whether the provider streams or not."""
    members = {"delta": {"content": "é"}} if not whole else {"message": {"role": "assistant", "content": "é"}}
    choice = {"index": 0, **members, "logprobs": LOGPROBS, "finish_reason": "stop"}
    upstream.replies.append(Reply(body={"id": "x", "object": "chat.completion", "choices": [choice]}))
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], logprobs=True
        )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.model_dump(exclude_none=True)["content"] == LOGPROBS["content"]
