from __future__ import annotations

import asyncio
import email.utils
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llmstream.config import ProviderSettings
from llmstream.errors import (
    ConfigError,
    LLMStreamError,
    ProviderError,
    UpstreamBroken,
    UpstreamDenied,
    UpstreamFailed,
    UpstreamFiltered,
    UpstreamLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamTooLong,
    UpstreamUnknown,
    UpstreamUnreachable,
)
from llmstream.providers import openai as openai_module
from llmstream.providers.base import Provider
from llmstream.providers.openai import OpenAIProvider
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, GenerateRequest, Usage
from tests.providers.asking import Tray, batches, collect
from tests.providers.http.raw import Heard, RawServer
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

KEY = "sk-very-secret-0123456789"
USAGE = Usage(prompt_tokens=7, completion_tokens=3)


@pytest.fixture
async def provider(upstream: Upstream) -> AsyncIterator[OpenAIProvider]:
    provider = connect(upstream.url, continue_by="assistant_prefill")
    await provider.open()
    yield provider
    await provider.close()


def connect(base_url: str, *, slots: int = 8, **settings: Any) -> OpenAIProvider:
    settings = {"api_key": KEY, "models": ["m"], **settings}
    return OpenAIProvider("far", ProviderSettings(base_url=base_url, **settings), slots=slots)


def ask(**body: Any) -> GenerateRequest:
    messages = [{"role": "user", "content": "hi"}]
    return GenerateRequest.of(kind="chat", model="m", body={"model": "m", "messages": messages, **body})


async def until_error(
    provider: Provider, request: GenerateRequest, gate: asyncio.Event | None = None, at: int = 0
) -> tuple[list[Delta], LLMStreamError]:
    """What came before the error, and the error; opens ``gate`` when ``at`` deltas have come."""
    deltas: list[Delta] = []
    answer = batches(provider, request)
    while True:
        if gate is not None and len(deltas) == at:
            gate.set()
        try:
            deltas += await anext(answer)
        except LLMStreamError as error:
            return deltas, error


@contextmanager
def deaf() -> Iterator[str]:
    """The address of a socket whose queue of connections is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield "{}:{}".format(*listener.getsockname())


def transcript(deltas: list[Delta]) -> Transcript:
    return Transcript(Event(EventId(1, seq), delta) for seq, delta in enumerate(deltas, 1))


async def test_answer(provider: OpenAIProvider, upstream: Upstream) -> None:
    """An answer comes chunk by chunk, with its finish reason and usage."""
    assert await collect(provider, ask()) == [
        Delta("Hello"),
        Delta(" there"),
        Delta(" you"),
        Delta(finish_reason="stop"),
        Delta(usage=USAGE),
    ]


async def test_request_goes_up_as_it_came(provider: OpenAIProvider, upstream: Upstream) -> None:
    """The upstream gets every member of the body but ours, a stream is asked for, with usage, and the key is sent."""
    sent = {
        "temperature": 0.5,
        "unknown": {"a": [1, None]},
        "stream": False,
        "stream_options": {"include_obfuscation": False},
    }
    ours = {
        "provider": "far",
        "priority": 3,
        "session_id": "s",
        "on_disconnect": "cancel",
        "deadline_s": 3,
        "job_id": "j",
        "echo": {"tokens": 3},
    }
    await collect(provider, ask(**sent, **ours))
    seen = upstream.requests[0]
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    assert seen.body == {
        **ask().body,
        **sent,
        "stream": True,
        "stream_options": {"include_obfuscation": False, "include_usage": True},
    }


async def test_members_of_the_upstream_with_our_names(provider: OpenAIProvider, upstream: Upstream) -> None:
    """A routing object named provider and a flag named echo belong to the upstream and go up."""
    request = GenerateRequest.of(
        kind="completion", model="m", body={"model": "m", "prompt": "x", "echo": True, "provider": {"order": ["a"]}}
    )
    assert transcript(await collect(provider, request)).text == "Hello there you"
    seen = upstream.requests[0]
    assert seen.path == "/v1/completions"
    assert (seen.body["echo"], seen.body["provider"]) == (True, {"order": ["a"]})


@pytest.mark.parametrize(
    "reply",
    [
        Reply(newline="\r\n"),
        Reply(newline="\r"),
        Reply(split=1),
        Reply(split=7, newline="\r\n"),
        Reply(done=False),
        Reply(whole=True),
    ],
    ids=["crlf", "cr", "bytes", "sevens", "no DONE", "json"],
)
async def test_framings(provider: OpenAIProvider, upstream: Upstream, reply: Reply) -> None:
    """The answer is the same in any framing, without [DONE], and as one JSON object."""
    upstream.replies.append(reply)
    answer = transcript(await collect(provider, ask()))
    assert (answer.text, answer.finish_reason, answer.usage) == ("Hello there you", "stop", USAGE)


async def test_several_choices(provider: OpenAIProvider, upstream: Upstream) -> None:
    """Choices are told apart, and an upstream that gives fewer than asked for has not answered."""
    upstream.replies += [Reply(choices=2), Reply(choices=1)]
    choices = transcript(await collect(provider, ask(n=2))).choices
    assert [choices[index].text for index in (0, 1)] == ["Hello there you"] * 2
    _, error = await until_error(provider, ask(n=2))
    assert isinstance(error, UpstreamBroken)


@pytest.mark.parametrize("whole", [False, True])
async def test_tool_calls_and_reasoning(provider: OpenAIProvider, upstream: Upstream, whole: bool) -> None:
    """Tool calls and reasoning pass through unharmed, streamed or not."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    streamed: list[dict[str, Any]] = [
        {"reasoning_content": "because"},
        {"tool_calls": [{"index": 0, **call, "function": {"name": "f", "arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ]
    pieces = [{"reasoning_content": "because", "tool_calls": [call]}] if whole else streamed
    upstream.replies.append(Reply(pieces=pieces, whole=whole, finish_reason="tool_calls"))
    answer = transcript(await collect(provider, ask()))
    assert answer.finish_reason == "tool_calls"
    assert answer.choices[0].message["tool_calls"] == [call]
    assert answer.choices[0].message["reasoning_content"] == "because"
    assert not provider.can_continue(ask(), answer)


async def test_logprobs_and_missing_usage(provider: OpenAIProvider, upstream: Upstream) -> None:
    """Log probabilities pass through, and an upstream without usage leaves it unknown."""
    upstream.replies.append(Reply(logprobs=True, usage=None))
    answer = transcript(await collect(provider, ask(logprobs=True)))
    assert answer.choices[0].logprobs is not None
    assert [entry["token"] for entry in answer.choices[0].logprobs["content"]] == ["Hello", " there", " you"]
    assert answer.usage is None


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "broke the connection off"),
        ("reset", "broke the connection off"),
        ("malformed", "sent something malformed"),
        ("error", "the model is on fire"),
        ("done", "said [DONE] before"),
        ("end", "a finish reason is missing"),
    ],
)
async def test_faults_in_the_stream(
    upstream: Upstream, provider: OpenAIProvider, fault: Any, words: str, at: int
) -> None:
    """A stream that breaks at any place keeps what came before and ends in a truthful, retryable error."""
    gate = asyncio.Event()
    upstream.replies.append(Reply(fault=fault, at=at, gates={at: gate}))
    deltas, error = await until_error(provider, ask(), gate, at)
    assert [delta.text for delta in deltas] == ["Hello", " there", " you"][:at]
    assert isinstance(error, UpstreamBroken)
    assert error.retryable
    assert words in error.message
    assert "'far'" in error.message


async def test_missing_finish_reason(provider: OpenAIProvider, upstream: Upstream) -> None:
    """A stream with [DONE] but without a finish reason is not an answer."""
    upstream.replies.append(Reply(fault="no_finish"))
    deltas, error = await until_error(provider, ask())
    assert transcript(deltas).text == "Hello there you"
    assert isinstance(error, UpstreamBroken)


async def test_web_page(provider: OpenAIProvider, upstream: Upstream) -> None:
    """A web page in place of an answer points to the base URL."""
    upstream.replies.append(Reply(body="<html>", headers={"Content-Type": "text/html"}))
    _, error = await until_error(provider, ask())
    assert "base_url" in error.message


async def test_compressed(provider: OpenAIProvider, upstream: Upstream) -> None:
    """An answer is asked for without compression, and one that comes compressed all the same is named."""
    upstream.replies.append(Reply(headers={"Content-Encoding": "gzip"}))
    _, error = await until_error(provider, ask())
    assert upstream.requests[0].headers["Accept-Encoding"] == "identity"
    assert "gzip" in error.message


def wrong(message: str, **members: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **members}}


@pytest.mark.parametrize(
    ("reply", "kind", "expected"),
    [
        (
            Reply(status=400, body=wrong("bad temperature", param="temperature", code="out_of_range")),
            UpstreamRejected,
            {"param": "temperature", "code": "out_of_range", "status": 400, "words": "bad temperature"},
        ),
        (Reply(status=404, body=wrong("no such model")), UpstreamUnknown, {"status": 404, "words": "no such model"}),
        (Reply(status=413, body="<html>"), UpstreamTooLong, {"status": 413, "words": "gave no reason"}),
        (Reply(status=422, body={"detail": [{"loc": "x"}]}), UpstreamRejected, {"status": 422, "words": "loc"}),
        (Reply(status=400, body={"error": "bad"}), UpstreamRejected, {"status": 400, "words": "bad"}),
        (
            Reply(status=401, body=wrong(f"Incorrect API key: {KEY}")),
            UpstreamDenied,
            {"words": "providers.far.api_key"},
        ),
        (Reply(status=403, body=wrong(f"{KEY} is banned")), UpstreamDenied, {"words": "is banned"}),
        (Reply(status=402, body=wrong("no money")), UpstreamDenied, {"words": "no money"}),
        (Reply(status=307, headers={"Location": "http://x/"}, body=""), ProviderError, {"words": "base_url"}),
        (Reply(status=408, body=""), UpstreamTimeout, {"words": "408"}),
        (Reply(status=500, body=[wrong("oh")]), UpstreamFailed, {"words": "oh"}),
        (Reply(status=529, headers={"retry-after": "3"}, body=wrong("busy")), UpstreamFailed, {"retry_after": 3.0}),
        (Reply(status=504, body=""), UpstreamTimeout, {"words": "504", "status": 504}),
        (Reply(status=400, body=wrong("no", code="context_length_exceeded")), UpstreamTooLong, {"status": 400}),
        (
            Reply(status=400, body=wrong("This model's maximum context length is 8 tokens.")),
            UpstreamTooLong,
            {"code": "context_length_exceeded"},
        ),
        (Reply(status=400, body=wrong("shocking", code="content_filter")), UpstreamFiltered, {"status": 400}),
        (Reply(status=429, body=wrong("pay", code="insufficient_quota")), UpstreamDenied, {"words": "pay"}),
        (Reply(status=429, body=wrong("slow", code="rate")), UpstreamLimited, {"code": "rate", "status": 429}),
        (Reply(status=429, headers={"retry-after": "2.5"}, body=""), UpstreamLimited, {"retry_after": 2.5}),
        (
            Reply(status=429, headers={"retry-after-ms": "250", "retry-after": "9"}, body=""),
            UpstreamLimited,
            {"retry_after": 0.25},
        ),
        (Reply(status=429, headers={"retry-after": "soon"}, body=""), UpstreamLimited, {"retry_after": None}),
        (Reply(status=429, headers={"retry-after": "-1"}, body=""), UpstreamLimited, {"retry_after": None}),
        (Reply(status=429, headers={"retry-after": "inf"}, body=""), UpstreamLimited, {"retry_after": None}),
    ],
)
async def test_refusals(
    provider: OpenAIProvider, upstream: Upstream, reply: Reply, kind: type[LLMStreamError], expected: dict[str, Any]
) -> None:
    """Every refusal becomes the error that says what to do, retryable only where trying again can help."""
    upstream.replies.append(reply)
    deltas, error = await until_error(provider, ask())
    assert deltas == []
    assert type(error) is kind
    assert error.retryable == issubclass(kind, UpstreamBroken | UpstreamLimited)
    found = {
        "param": error.param,
        "code": error.error_code,
        "status": error.http_status,
        "retry_after": error.retry_after,
        "words": error.message,
    }
    assert expected.pop("words", "") in error.message
    assert found | expected == found
    assert KEY not in repr(error) + json.dumps(error.body())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "slow down", "code": 429}, UpstreamLimited),
        ({"message": "gone", "code": 502}, UpstreamFailed),
        ({"message": "it took too long", "code": "timeout", "status": 504}, UpstreamTimeout),
        ({"message": "wrong key", "code": 401}, UpstreamDenied),
        ({"message": "too hot", "type": "invalid_request_error", "param": "temperature"}, UpstreamRejected),
        ({"message": "too much", "type": "invalid_request_error", "code": "context_length_exceeded"}, UpstreamTooLong),
        ({"message": "no", "code": "content_filter"}, UpstreamFiltered),
        ({"message": "on fire"}, UpstreamFailed),
        (f"the key {KEY} burns", UpstreamFailed),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
async def test_an_error_behind_a_200(
    provider: OpenAIProvider, upstream: Upstream, error: Any, kind: type[LLMStreamError], whole: bool
) -> None:
    """An error object where an answer belongs is of the kind that it says, and shows no key."""
    body = {"error": error}
    if whole:
        reply = Reply(body=body)
    else:
        reply = Reply(body=f"data: {json.dumps(body)}\n\n", headers={"Content-Type": "text/event-stream"})
    upstream.replies.append(reply)
    deltas, found = await until_error(provider, ask())
    assert (deltas, type(found)) == ([], kind)
    assert KEY not in found.message


async def test_retry_after_as_a_date(provider: OpenAIProvider, upstream: Upstream) -> None:
    """A date in retry-after becomes the seconds until then."""
    later = email.utils.formatdate(time.time() + 60, usegmt=True)
    upstream.replies.append(Reply(status=429, headers={"retry-after": later}, body=""))
    _, error = await until_error(provider, ask())
    assert error.retry_after is not None
    assert 50 < error.retry_after <= 60


async def test_unreachable(unused_tcp_port: int) -> None:
    """An upstream that does not listen is a retryable error."""
    provider = connect(f"http://127.0.0.1:{unused_tcp_port}/v1")
    await provider.open()
    deltas, error = await until_error(provider, ask())
    assert (deltas, type(error)) == ([], UpstreamUnreachable)
    await provider.close()


async def test_silent_host() -> None:
    """A host that accepts no connection is given up after the connect timeout."""
    with deaf() as address:
        provider = connect(f"http://{address}/v1", connect_timeout_s=0.2)
        await provider.open()
        _, error = await until_error(provider, ask())
        assert isinstance(error, UpstreamBroken)
        assert "no connection in time" in error.message
        await provider.close()


@pytest.mark.parametrize("position", [-1, 0, 2, 3])
async def test_closing_hangs_up(provider: OpenAIProvider, upstream: Upstream, position: int) -> None:
    """Stopping the generation ends the upstream's connection at once, before the first byte, mid-stream and last."""
    upstream.replies.append(Reply(gates={position: asyncio.Event()}))
    task = asyncio.create_task(collect(provider, ask()))
    await wait_until(lambda: bool(upstream.requests))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        await upstream.requests[0].hung_up.wait()


async def test_closing_the_iterator_hangs_up(provider: OpenAIProvider, upstream: Upstream) -> None:
    """Closing the iterator between two batches ends the upstream's connection."""
    upstream.replies.append(Reply(fault="stall", at=2))
    answer = batches(provider, ask())
    await anext(answer)
    await answer.aclose()
    async with asyncio.timeout(5):
        await upstream.requests[0].hung_up.wait()


async def test_connections_are_reused_and_bounded(upstream: Upstream) -> None:
    """Answers one after another share a connection, and never more are open than there are slots."""
    provider = connect(upstream.url, slots=2)
    await provider.open()
    for reply in (Reply(), Reply(whole=True), Reply(done=False), Reply(status=404, body=wrong("no")), Reply()):
        upstream.replies.append(reply)
        if reply.status == 200:
            await collect(provider, ask())
        else:
            await until_error(provider, ask())
    assert len({id(seen.connection) for seen in upstream.requests}) == 1
    gate = asyncio.Event()
    upstream.models["m"] = Reply(gates={0: gate})
    tasks = [asyncio.create_task(collect(provider, ask())) for _ in range(6)]
    await wait_until(lambda: sum(not seen.answered for seen in upstream.requests) == 2)
    gate.set()
    await asyncio.gather(*tasks)
    assert len({id(seen.connection) for seen in upstream.requests}) == 2
    await provider.close()


@pytest.mark.parametrize("ends", [True, False])
async def test_end_behind_done(provider: OpenAIProvider, upstream: Upstream, ends: bool) -> None:
    """An end that follows [DONE] a little later saves the connection, and one that never comes holds nothing up."""
    end = asyncio.Event()
    upstream.replies.append(Reply(gates={4: end}))
    async with asyncio.timeout(5):
        async for batch in batches(provider, ask()):
            if ends and batch[-1].usage:
                end.set()
    if ends:
        client = provider._client
        assert client is not None
        await wait_until(lambda: not client._lingering)
    await collect(provider, ask())
    assert len({id(seen.connection) for seen in upstream.requests}) == (1 if ends else 2)


async def test_slow_reader_slows_the_upstream(provider: OpenAIProvider, upstream: Upstream) -> None:
    """An answer that nobody takes stops being read, so that it does not fill the memory."""
    upstream.replies.append(Reply(pieces=["x" * 65536] * 1000))
    tray = Tray()
    task = asyncio.create_task(provider.generate(ask(), None, tray))
    await wait_until(lambda: tray.full)
    held = -1
    while tray.characters > held:
        held = tray.characters
        await asyncio.sleep(0.02)
    assert held < 10_000_000
    assert not upstream.requests[0].answered
    taken = len("".join(delta.text for delta in tray.take()))
    while not task.done() or tray.full:
        taken += sum(len(delta.text) for delta in tray.take())
        await asyncio.sleep(0)
    assert taken == 65536 * 1000


async def test_a_refusal_without_end() -> None:
    """The reason of a refusal is read only so far."""

    async def script(heard: Heard) -> None:
        await heard.say(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not heard.hung_up:
            await heard.say(b"1000\r\n%b\r\n" % (b"x" * 4096))

    async with RawServer(script) as server:
        provider = connect(server.url)
        await provider.open()
        async with asyncio.timeout(openai_module._ERROR_BODY_S / 2):
            _, error = await until_error(provider, ask())
            await wait_until(lambda: server.requests[0].hung_up)
        assert len(error.message) < 2000
        await provider.close()


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_what_came_before_the_cut(provider: OpenAIProvider, upstream: Upstream, fault: Any) -> None:
    """What arrived right before a connection broke is kept."""
    upstream.replies.append(Reply(fault=fault, at=3))
    deltas, error = await until_error(provider, ask())
    assert transcript(deltas).text == "Hello there you"
    assert isinstance(error, UpstreamBroken)


async def test_prefill(provider: OpenAIProvider, upstream: Upstream) -> None:
    """A cut answer goes on behind what was logged, in fewer tokens, and its usage is that of the whole."""
    gate = asyncio.Event()
    upstream.replies += [
        Reply(fault="cut", at=2, gates={2: gate}),
        Reply(prefill=True, usage={"prompt_tokens": 8, "completion_tokens": 1, "x": 1}),
    ]
    deltas, _ = await until_error(provider, ask(max_tokens=10), gate, 2)
    so_far = transcript([*deltas, Delta(usage=Usage(5, 2))])
    assert provider.can_continue(ask(max_tokens=10), so_far)
    rest = await collect(provider, ask(max_tokens=10), so_far)
    assert transcript([*deltas, *rest]).text == "Hello there you"
    assert rest[-1].usage == Usage(5, 3, {"x": 1})
    assert upstream.requests[1].body["max_tokens"] == 8
    assert upstream.requests[1].body["messages"] == [*ask().messages, {"role": "assistant", "content": "Hello there"}]


async def test_prefill_of_the_client(provider: OpenAIProvider, upstream: Upstream) -> None:
    """What was logged joins a prefill that the client sent itself; where nobody counted, a piece is a token."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "He", "name": "a"}]
    await collect(provider, ask(messages=messages, max_tokens=10), transcript([Delta("llo")]))
    seen = upstream.requests[0].body
    assert seen["messages"] == [messages[0], {"role": "assistant", "content": "Hello", "name": "a"}]
    assert seen["max_tokens"] == 9


async def test_limit_reached_before_the_cut(provider: OpenAIProvider, upstream: Upstream) -> None:
    """An answer that had its tokens when it was cut ends without asking the upstream again."""
    so_far = transcript([Delta("Hello", usage=Usage(7, 4))])
    assert await collect(provider, ask(max_tokens=4), so_far) == [Delta(finish_reason="length", usage=Usage(7, 4))]
    assert upstream.requests == []


def test_what_can_be_continued(upstream: Upstream) -> None:
    """Only plain text of one choice is continued, and only where the settings say that it works."""
    text, able = transcript([Delta("Hello")]), connect("http://x/v1", continue_by="assistant_prefill")
    assert able.can_continue(ask(), text)
    assert able.can_continue(ask(), Transcript())
    assert not connect("http://x/v1").can_continue(ask(), text)
    assert not able.can_continue(ask(n=2), text)
    assert not able.can_continue(ask(response_format={"type": "json_object"}), text)
    assert not able.can_continue(ask(), transcript([Delta("a", fields={"tool_calls": [{"index": 0}]})]))
    assert not able.can_continue(GenerateRequest.of(kind="completion", model="m", body={"prompt": "x"}), text)


async def test_health(provider: OpenAIProvider, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health is a look at the list of models, with the time taken, and tells errors without raising."""
    assert (await provider.health())["status"] == "ok"
    assert "took_ms" in await provider.health()
    upstream.models["GET /models"] = Reply(status=401, body=wrong(KEY))
    told = await provider.health()
    assert (told["status"], "401" in str(told["error"]), KEY in str(told)) == ("error", True, False)
    upstream.models["GET /models"] = Reply(body="<html>", headers={"Content-Type": "text/html"})
    assert "base_url" in str((await provider.health())["error"])
    monkeypatch.setattr("llmstream.providers.openai.HEALTH_S", 0.1)
    upstream.models["GET /models"] = Reply(gates={-1: asyncio.Event()})
    assert "0.1 s" in str((await provider.health())["error"])
    await provider.close()
    assert (await provider.health())["status"] == "error"


async def test_environment_stays_here(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment holds for OpenAI is not sent to another API, and without a key none is sent."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "for-openai-only")
    provider = connect(upstream.url, api_key=None)
    await provider.open()
    await collect(provider, ask())
    assert (await provider.health())["status"] == "ok"
    await provider.close()
    sent = [*upstream.requests[0].headers.items(), *upstream.listings[0].items()]
    assert not [name for name, value in sent if "for-openai-only" in value or name.lower() == "authorization"]


async def test_two_closings_and_none_open(upstream: Upstream) -> None:
    """A provider can be closed twice and unopened, and generates nothing when it is not open."""
    provider = connect(upstream.url)
    await provider.close()
    _, error = await until_error(provider, ask())
    assert "not open" in error.message
    await provider.open()
    await provider.close()
    await provider.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "https://u:p@x/v1"}, "not both"),
        ({"base_url": f"https://{'x' * 64}/v1", "api_key": "geheim"}, "name of its host"),
        ({"base_url": "https://x/v1", "api_key": "schlüssel-geheim"}, "api_key"),
        ({"base_url": "https://x/v1", "api_key": "geheim\nx: y"}, "api_key"),
    ],
)
async def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    """Settings that cannot work are refused at the start, by name and without their secrets."""
    provider = connect(**settings)
    with pytest.raises(ConfigError, match=words) as caught:
        await provider.open()
    assert "geheim" not in str(caught.value)


async def test_urls(upstream: Upstream) -> None:
    """A slash at the end of the base URL and a query do not lead astray, nor does a newline behind the key."""
    provider = connect(f"{upstream.url}/?api-version=1", api_key=f"{KEY}\n")
    await provider.open()
    await collect(provider, ask())
    assert (await provider.health())["status"] == "ok"
    assert upstream.requests[0].path == "/v1/chat/completions"
    assert upstream.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert (provider.name, provider.pool, [model.name for model in provider.models]) == ("far", "remote", ["m"])
    assert KEY not in repr(provider)
    await provider.close()
