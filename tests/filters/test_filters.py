"""Requests before anything of them is kept: where texts stand, and what they become."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from msgspec import Raw

from llmstream.config_filters import FilterSettings, PresidioSettings
from llmstream.filters.filters import Filters
from llmstream.telemetry.metrics import Counter
from llmstream.types import GenerateRequest

EMAIL = "bob@example.com"
RESTORE = FilterSettings(action="restore")


def filters(**settings: FilterSettings) -> Filters:
    return Filters(settings, PresidioSettings())


def request(**body: Any) -> GenerateRequest:
    return GenerateRequest.of("chat", "m", {"model": "m", **body}, "p")


async def test_every_text_of_a_request_is_looked_at() -> None:
    """Messages and their parts, calls and results of tools, schemas, metadata; names, ids and data stay as they are."""
    call = {"id": EMAIL, "type": "function", "function": {"name": "f", "arguments": f'{{"to": "{EMAIL}"}}'}}
    image = {"type": "image_url", "image_url": {"url": f"https://x/{EMAIL}"}}
    given = request(
        messages=[
            {"role": "system", "content": f"You serve {EMAIL}."},
            {"role": "user", "content": [{"type": "text", "text": EMAIL}, image], "name": "bob"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": EMAIL, "content": f"sent to {EMAIL}"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "description": f"mail {EMAIL}"}}],
        user=EMAIL,
        metadata={"who": EMAIL},
        session_id=EMAIL,
        temperature=0.5,
        stop=None,
    )
    found = await filters(email=FilterSettings()).redacted(given)
    kept = {**call, "function": {"name": "f", "arguments": '{"to": "[EMAIL]"}'}}
    assert found.body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You serve [EMAIL]."},
            {"role": "user", "content": [{"type": "text", "text": "[EMAIL]"}, image], "name": "bob"},
            {"role": "assistant", "content": None, "tool_calls": [kept]},
            {"role": "tool", "tool_call_id": EMAIL, "content": "sent to [EMAIL]"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "mail [EMAIL]"}}],
        "user": "[EMAIL]",
        "metadata": {"who": "[EMAIL]"},
        "session_id": EMAIL,
        "temperature": 0.5,
        "stop": None,
    }
    assert (found.kind, found.model, found.provider, found.redacted) == ("chat", "m", "p", True)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [(f"{EMAIL}!", "[EMAIL]!"), ([f"{EMAIL}!", "two"], ["[EMAIL]!", "two"]), ([1, 2], [1, 2])],
)
async def test_text_completions(prompt: Any, asked: Any) -> None:
    """A prompt may be a text or several; token ids pass."""
    given = GenerateRequest.of("completion", "m", {"prompt": prompt})
    assert (await filters(email=FilterSettings()).redacted(given)).body == {"prompt": asked}


async def test_what_holds_nothing_stays_byte_for_byte() -> None:
    """A request without a match is passed on as it came."""
    raw = b'{ "messages" : [{"role":"user","content":"caf\\u00e9 1.0"}], "temperature": 1.0 }'
    given = GenerateRequest(kind="chat", model="m", raw=Raw(raw))
    found = filters(email=FilterSettings(), phone=RESTORE)
    assert bytes((await found.masked(await found.redacted(given))).raw) == raw


async def test_the_same_text_has_the_same_name() -> None:
    """Placeholders are numbered in order of appearance over the whole request, and never one that the request itself
    holds."""
    given = request(
        messages=[
            {"role": "user", "content": f"{EMAIL}, eve@x.org or <EMAIL_2>?"},
            {"role": "user", "content": f"eve@x.org, {EMAIL} (+1 415-555-0123)"},
        ]
    )
    found = await filters(email=RESTORE, phone=RESTORE).masked(given)
    assert [message["content"] for message in found.messages] == [
        "<EMAIL_1>, <EMAIL_3> or <EMAIL_2>?",
        "<EMAIL_3>, <EMAIL_1> (<PHONE_1>)",
    ]
    assert found.names == {"<EMAIL_1>": EMAIL, "<EMAIL_3>": "eve@x.org", "<PHONE_1>": "+1 415-555-0123"}


async def test_twice_is_as_good_as_once() -> None:
    """A request that comes through again, as a requeued job's, stays as it is."""
    given = request(messages=[{"role": "user", "content": f"{EMAIL}, 123-45-6789, +1 415-555-0123"}])
    found = filters(email=FilterSettings(), phone=RESTORE)
    once = await found.masked(await found.redacted(given))
    assert await found.masked(await found.redacted(once)) is once
    assert await filters(email=RESTORE, ssn=RESTORE).masked(once) is once  # its names would be lost
    fresh = GenerateRequest.of("chat", "m", once.body, "p")
    assert (await found.masked(await found.redacted(fresh))).body == once.body


async def test_directions_and_counts() -> None:
    """A filter looks only where it is to; every match is counted by filter, direction and action."""
    counter = Counter("x", "", ("filter", "direction", "action"))
    settings = {"email": FilterSettings(direction="out"), "ssn": FilterSettings(direction="in"), "phone": RESTORE}
    found = Filters(settings, PresidioSettings(), counter)
    given = request(messages=[{"role": "user", "content": f"{EMAIL} 123-45-6789 123-45-6788 +1 415-555-0123"}])
    asked = await found.masked(await found.redacted(given))
    assert asked.messages[0]["content"] == f"{EMAIL} [SSN] [SSN] <PHONE_1>"
    assert {series.labels: series.value for series in counter.read()} == {
        ("ssn", "in", "redact"): 2,
        ("phone", "in", "restore"): 1,
    }
    assert found.outward(asked) is not None
    assert filters(ssn=FilterSettings(direction="in")).outward(given) is None


async def test_large_requests_do_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large request is looked at in a thread."""
    threads: list[Any] = []

    async def to_thread(function: Any, *given: Any) -> Any:
        threads.append(function)
        return function(*given)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    found = filters(email=FilterSettings())
    await found.redacted(request(messages=[{"role": "user", "content": EMAIL}]))
    assert not threads
    large = request(messages=[{"role": "user", "content": f"word {EMAIL} " * 5000}])
    start = time.process_time()
    asked = await found.redacted(large)
    assert time.process_time() - start < 10  # in a thread, but not for as long as it likes: each match costs the same
    assert len(threads) == 1
    assert EMAIL not in asked.messages[0]["content"]
