from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstream.config import ModelSettings
from llmstream.errors import (
    BadRequest,
    ContextLengthExceeded,
    EngineCrashed,
    LLMStreamError,
    ProviderError,
    UpstreamBroken,
    UpstreamRejected,
)
from llmstream.providers.base import Provider
from llmstream.providers.echo import EchoProvider
from llmstream.transcript import Transcript
from llmstream.types import Delta, Event, EventId, GenerateRequest, Usage
from tests.providers.asking import batches
from tests.waiting import wait_until


def echo(**settings: Any) -> EchoProvider:
    return EchoProvider("echo", ModelSettings(engine="echo", **settings))


def ask(text: str = "one two  three", **body: Any) -> GenerateRequest:
    messages = [{"role": "user", "content": "before"}, {"role": "user", "content": text}]
    return GenerateRequest.of(kind="chat", model="echo", body={"model": "echo", "messages": messages, **body})


async def collect(
    provider: Provider, request: GenerateRequest, so_far: Transcript | None = None, into: list[Delta] | None = None
) -> list[Delta]:
    deltas: list[Delta] = [] if into is None else into
    async for batch in batches(provider, request, so_far):
        deltas += batch
    return deltas


def transcript(deltas: list[Delta]) -> Transcript:
    return Transcript(Event(EventId(1, seq), delta) for seq, delta in enumerate(deltas, 1))


async def test_repeats_the_user() -> None:
    """The words of the last user message come back as tokens, with positions as ids and usage counted in words."""
    assert await collect(echo(), ask()) == [
        Delta("one", tokens=(0,)),
        Delta(" two", tokens=(1,)),
        Delta(" three", tokens=(2,)),
        Delta(finish_reason="stop", usage=Usage(prompt_tokens=4, completion_tokens=3)),
    ]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "image_url"}]}]}, "a b"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
        ({"messages": [{"role": "system", "content": "a"}]}, ""),
        ({"messages": [{"role": "user", "content": None}]}, ""),
    ],
)
async def test_kinds_of_messages(body: dict[str, Any], text: str) -> None:
    """Text parts count as text, and a conversation without a user's words has an empty answer."""
    assert transcript(await collect(echo(), ask(**body))).text == text


async def test_text_completion() -> None:
    """A text completion repeats its prompt, also when it asks for that in the API's own way."""
    request = GenerateRequest.of(kind="completion", model="echo", body={"prompt": "a b", "echo": True})
    deltas = await collect(echo(), request)
    assert transcript(deltas).text == "a b"
    assert deltas[-1].usage == Usage(prompt_tokens=2, completion_tokens=2)


async def test_numbered_tokens() -> None:
    """A number of tokens in the settings gives that many, and one in the request goes before it."""
    deltas = await collect(echo(tokens=100), ask())
    assert transcript(deltas).text == "".join(f" tok{number:04d}" for number in range(100))
    assert transcript(deltas).tokens == list(range(100))
    assert transcript(await collect(echo(tokens=100), ask(echo={"tokens": 2}))).text == " tok0000 tok0001"


@pytest.mark.parametrize(("limit", "reason"), [(2, "length"), (3, "stop"), (4, "stop")])
async def test_max_tokens(limit: int, reason: str) -> None:
    """An answer longer than max_tokens is cut and says so."""
    deltas = await collect(echo(), ask(max_tokens=limit))
    assert len(transcript(deltas).tokens) == min(limit, 3)
    assert deltas[-1].finish_reason == reason


async def test_choices() -> None:
    """Each of n choices is complete and counted."""
    deltas = await collect(echo(), ask(n=3))
    choices = transcript(deltas).choices
    found = [(index, choice.text, choice.finish_reason) for index, choice in choices.items()]
    assert found == [(index, "one two three", "stop") for index in range(3)]
    assert [delta.usage for delta in deltas if delta.usage] == [Usage(prompt_tokens=4, completion_tokens=9)]


@given(tokens=st.integers(0, 80), cut=st.integers(0, 80), limit=st.none() | st.integers(1, 80))
def test_continuation_is_exact(tokens: int, cut: int, limit: int | None) -> None:
    """A continued answer and its beginning make the uninterrupted answer, token by token, with the same end."""
    provider, request = echo(), ask(echo={"tokens": tokens}, max_tokens=limit)
    whole = asyncio.run(collect(provider, request))
    so_far = transcript(whole[:-1][:cut])
    assert provider.can_continue(request, so_far)
    assert whole[:-1][:cut] + asyncio.run(collect(provider, request, so_far)) == whole


def test_what_cannot_be_continued() -> None:
    """Another model's words and answers of several choices are not continued."""
    provider = echo()
    assert provider.can_continue(ask(), Transcript())
    assert provider.can_continue(ask(), transcript([Delta("one", tokens=(0,))]))
    assert not provider.can_continue(ask(), transcript([Delta("other", tokens=(7,))]))
    assert not provider.can_continue(ask(), transcript([Delta("one", tokens=tuple(range(9)))]))
    assert not provider.can_continue(ask(n=2), Transcript())


@pytest.mark.parametrize(
    ("fault", "error"),
    [("crash", EngineCrashed), ("cut", UpstreamBroken), ("error", ProviderError), ("reject", UpstreamRejected)],
)
@pytest.mark.parametrize("at", [0, 1, 3])
async def test_faults(fault: str, error: type[LLMStreamError], at: int) -> None:
    """A fault comes before the token it was asked for, at the first, in the middle and at the end."""
    provider, request = echo(), ask(echo={"fault": fault, "at": at})
    deltas: list[Delta] = []
    with pytest.raises(LLMStreamError) as caught:
        await collect(provider, request, into=deltas)
    assert type(caught.value) is error
    assert caught.value.retryable == (fault in {"crash", "cut"})
    assert transcript(deltas).tokens == list(range(at))
    assert provider.running == 0


async def test_fault_of_some_attempts() -> None:
    """A fault limited to two attempts is gone in the third, for that request only."""
    provider, request = echo(), ask(echo={"fault": "crash", "attempts": 2})
    for _ in range(2):
        with pytest.raises(EngineCrashed):
            await collect(provider, request)
    assert transcript(await collect(provider, request)).text == "one two three"
    with pytest.raises(EngineCrashed):
        await collect(provider, ask("other", echo={"fault": "crash", "attempts": 2}))


async def test_continuation_behind_a_fault() -> None:
    """A continuation that begins behind the place of a fault does not meet it."""
    provider, request = echo(), ask(echo={"fault": "crash", "at": 1})
    rest = await collect(provider, request, transcript([Delta("one", tokens=(0,)), Delta(" two", tokens=(1,))]))
    assert [delta.text for delta in rest] == [" three", ""]


async def test_pace() -> None:
    """Every token waits as long as asked, and comes alone."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    provider = EchoProvider("echo", ModelSettings(engine="echo", delay_ms=20), sleep=sleep)
    sizes = [len(batch) async for batch in batches(provider, ask())]
    assert (slept, sizes) == ([0.02] * 3, [1, 1, 1, 1])
    slept.clear()
    await collect(provider, ask(echo={"delay_ms": 5}))
    assert slept == [0.005] * 3


async def test_others_run_meanwhile() -> None:
    """A long answer without pauses lets others run in between."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count())
    await collect(echo(), ask(echo={"tokens": 1000}))
    other.cancel()
    assert turns > 10


async def test_closing_the_iterator() -> None:
    """Closing the iterator ends the generation at once."""
    provider = echo()
    answer = batches(provider, ask(echo={"tokens": 1000}))
    await anext(answer)
    assert provider.running == 1
    await answer.aclose()
    assert provider.running == 0


@pytest.mark.parametrize("options", [{"fault": "stall", "at": 1}, {"tokens": 3, "delay_ms": 3_600_000}])
async def test_cancelling(options: dict[str, Any]) -> None:
    """A generation that stalls or sleeps can be cancelled."""
    provider = echo()
    task = asyncio.create_task(collect(provider, ask(echo=options)))
    await wait_until(lambda: provider.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert provider.running == 0


async def test_closing_the_provider() -> None:
    """Closing the provider ends what stalls in it and what begins later."""
    provider = echo()
    task = asyncio.create_task(collect(provider, ask(echo={"fault": "stall"})))
    await wait_until(lambda: provider.running == 1)
    await provider.close()
    await provider.close()
    with pytest.raises(EngineCrashed):
        await task
    with pytest.raises(EngineCrashed):
        await collect(provider, ask())


@pytest.mark.parametrize(("words", "excess"), [(30, 0), (31, 1), (99, 69)])
async def test_context(words: int, excess: int) -> None:
    """A prompt that leaves no room for an answer is refused with the number of tokens too many."""
    provider = echo(context=32)
    request = ask(" ".join(["x"] * words))
    if excess == 0:
        await provider.check(request)
        return
    with pytest.raises(ContextLengthExceeded, match=f"by {excess} tokens"):
        await provider.check(request)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tokenz": 1}, "tokenz"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": 10**12}, "tokens"),
        ({"fault": "burn"}, "burn"),
        ({"attempts": 0}, "attempts"),
        ("loud", "object"),
    ],
)
async def test_wrong_options(options: Any, word: str) -> None:
    """Options that do not exist or make no sense are refused by name, before and while generating."""
    with pytest.raises(BadRequest, match=word):
        await echo().check(ask(echo=options))
    with pytest.raises(BadRequest, match=word):
        await collect(echo(), ask(echo=options))


async def test_introduces_itself() -> None:
    """The provider serves one model under its own name, in a pool of its own, and is healthy."""
    provider: Provider = echo(slots=3)
    await provider.open()
    assert (provider.name, provider.pool, provider.slots) == ("echo", "echo", 3)
    assert [(model.name, model.provider, model.context) for model in provider.models] == [("echo", "echo", 4096)]
    assert (await provider.health())["status"] == "ok"
