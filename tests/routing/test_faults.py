"""Every fault of an upstream, wherever it happens, whoever asks: one truthful end; the right text, attempts, usage."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import aiohttp
import pytest

from llmstream.config import DeadlineSettings, ProviderSettings, RetrySettings, SchedulerSettings
from llmstream.server import Server
from llmstream.types import Event, Finished, JobState, Restart, Started
from tests.api.reading import finished, log_of
from tests.conftest import echo_settings
from tests.logs import text_of
from tests.sse import Parser
from tests.upstream import Fault, Reply, Upstream

PIECES = ("Hello", " there", " you")
WHOLE = "".join(PIECES)
GOOD = Reply(PIECES, counts=True)
Way = Literal["stream", "whole", "native"]
ATTEMPTS = 3


@dataclass(frozen=True)
class Cell:
    """One question: how its provider fails, who asks, and what has to come out."""

    bad: Reply
    prefill: bool
    way: Way
    at: int = 0
    """Pieces that come before the fault."""
    times: int = 1
    """So often it fails."""
    retryable: bool = True

    @property
    def continues(self) -> bool:
        return self.at == 0 or self.prefill

    @property
    def survives(self) -> bool:
        """Whether the job gets its whole answer."""
        mended = self.retryable and self.times < ATTEMPTS
        return mended and (self.continues or self.way != "stream")

    @property
    def attempts(self) -> int:
        if not self.retryable or (not self.continues and self.way == "stream"):
            return 1
        return min(self.times + 1, ATTEMPTS)

    @property
    def text(self) -> str:
        """What is left in the end."""
        return WHOLE if self.survives else "".join(PIECES[: self.at])

    @property
    def restarts(self) -> int:
        return 0 if self.continues else self.attempts - 1


@pytest.fixture
async def server(tmp_path: Path, upstream: Upstream) -> AsyncIterator[Server]:
    settings = echo_settings(
        tmp_path,
        providers={
            "prefill": ProviderSettings(base_url=upstream.url, models=["prefill"], continue_by="assistant_prefill"),
            "plain": ProviderSettings(base_url=upstream.url, models=["plain"], continue_by="none"),
        },
        scheduler=SchedulerSettings(lease_s=0.8, max_attempts=ATTEMPTS),
        deadlines=DeadlineSettings(first_token_s=0.5, stall_s=0.5),
        retry=RetrySettings(base_s=0.01),
        breaker={"failures": 1_000_000},
    )
    async with Server(settings) as server:
        yield server


async def check(server: Server, http: aiohttp.ClientSession, upstream: Upstream, cell: Cell) -> None:
    message = f"question {len(upstream.scripts)}"
    bad, good = (replace(reply, prefill=cell.prefill) for reply in (cell.bad, GOOD))
    again = replace(bad, at=0) if cell.prefill else bad  # one that goes on fails before its first piece
    upstream.scripts[message] = deque([bad, *[again] * (cell.times - 1), *[good] * ATTEMPTS])
    told = await ask(http, message, cell)
    log, state = await log_of(server, told.job_id), await finished(server, told.job_id)
    asked = [seen for seen in upstream.requests if seen.body["messages"][0]["content"] == message]
    ends = [event.data for event in log if isinstance(event.data, Finished)]
    assert ends == [log[-1].data], "not one terminal event"
    assert sum(isinstance(event.data, Started) for event in log) == cell.attempts == state.attempt
    assert len(asked) == cell.attempts
    assert sum(isinstance(event.data, Restart) for event in log) == cell.restarts
    assert last_text(log) == cell.text
    assert state.status == ("completed" if cell.survives else "failed")
    agrees(told, cell, state)
    if cell.survives:
        assert state.usage is not None
        assert (state.usage.prompt_tokens, state.usage.completion_tokens) == (7, len(PIECES))


@dataclass
class Told:
    """What the client got."""

    job_id: str
    text: str = ""
    ends: tuple[str, ...] = ()
    usage: Any = None


async def ask(http: aiohttp.ClientSession, message: str, cell: Cell) -> Told:
    model = "prefill" if cell.prefill else "plain"
    messages = [{"role": "user", "content": message}]
    if cell.way == "native":
        return await ask_native(http, {"messages": messages, "model": model})
    body: dict[str, Any] = {"messages": messages, "model": model, "stream": cell.way == "stream"}
    if cell.way == "stream":
        body["stream_options"] = {"include_usage": True}
    async with http.post("/v1/chat/completions", json=body) as response:
        raw = await response.read()
        told = Told(response.headers["x-job-id"])
    if cell.way == "stream":
        for frame in Parser().feed(raw):
            take_chunk(told, frame.data)
        return told
    answer = json.loads(raw)
    told.ends = ("error",) if "error" in answer else ("[DONE]",)
    if "error" not in answer:
        told.text, told.usage = answer["choices"][0]["message"]["content"], answer["usage"]
    return told


def take_chunk(told: Told, data: str) -> None:
    if data == "[DONE]":
        told.ends += ("[DONE]",)
        return
    chunk = json.loads(data)
    if "error" in chunk:
        told.ends += ("error",)
        return
    told.usage = chunk.get("usage") or told.usage
    told.text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


async def ask_native(http: aiohttp.ClientSession, body: dict[str, Any]) -> Told:
    async with http.post("/chat", json=body) as response:
        told = Told(response.headers["x-job-id"])
        for frame in Parser().feed(await response.read()):
            match frame.json["type"]:
                case "chunk":
                    told.text += frame.json["content"]
                case "restart":
                    told.text = ""
                case "usage":
                    told.usage = frame.json
                case "complete":
                    told.ends += ("[DONE]",)
                case "error":
                    told.ends += ("error",)
    return told


def agrees(told: Told, cell: Cell, state: JobState) -> None:
    """The client was told what the log says."""
    assert told.ends == (("[DONE]",) if cell.survives else ("error",)), told
    if cell.survives or cell.way != "whole":
        assert told.text == cell.text
    if cell.survives:
        assert (told.usage["prompt_tokens"], told.usage["completion_tokens"]) == (7, len(PIECES))


def last_text(log: list[Event]) -> str:
    restarts = [number for number, event in enumerate(log) if isinstance(event.data, Restart)]
    return text_of(log[restarts[-1] :] if restarts else log)


async def check_all(server: Server, upstream: Upstream, cells: list[Cell]) -> None:
    async with aiohttp.ClientSession(server.url) as http:
        outcomes = await asyncio.gather(
            *(check(server, http, upstream, cell) for cell in cells), return_exceptions=True
        )
    wrong = [f"{cell}: {outcome!r}" for cell, outcome in zip(cells, outcomes, strict=True) if outcome is not None]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("fault", get_args(Fault))
async def test_a_stream_that_breaks(server: Server, upstream: Upstream, fault: Fault) -> None:
    """At the first byte, in the middle and in place of the last chunk; once, and until no attempt is left."""
    places = [len(PIECES)] if fault == "no_finish" else [0, 1, len(PIECES)]
    cells = [
        Cell(Reply(PIECES, fault=fault, at=at, counts=True), prefill, way, at, times)
        for at in places
        for prefill in (True, False)
        for way in get_args(Way)
        for times in (1, 2, ATTEMPTS)
    ]
    await check_all(server, upstream, cells)


CALL = {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize("piece", [CALL, {"reasoning_content": "because"}])
@pytest.mark.parametrize("way", get_args(Way))
async def test_what_is_not_text_is_never_stitched(
    server: Server, upstream: Upstream, piece: dict[str, Any], way: Way
) -> None:
    """A cut behind a tool call or a thought: who can be told of it, or saw nothing yet, gets a new answer; a stream
    that cannot take back what it showed fails."""
    bad = Reply([piece, " and so"], fault="cut", at=1, gates={})
    cell = Cell(replace(bad, counts=True), prefill=True, way=way, at=0)
    upstream.scripts["q"] = deque([cell.bad, replace(GOOD, prefill=True)])
    async with aiohttp.ClientSession(server.url) as http:
        told = await ask(http, "q", cell)
    log, state = await log_of(server, told.job_id), await finished(server, told.job_id)
    assert sum(isinstance(event.data, Restart) for event in log) == (way != "stream")
    assert sum(isinstance(event.data, Started) for event in log) == len(upstream.requests) == (2 - (way == "stream"))
    assert state.status == ("failed" if way == "stream" else "completed")
    assert told.ends == (("error",) if way == "stream" else ("[DONE]",))
    assert all(len(seen.body["messages"]) == 1 for seen in upstream.requests)
    assert told.text == ("" if way == "stream" else WHOLE)


@pytest.mark.parametrize("setting", ["fail", "restart"])
@pytest.mark.parametrize("asked", [None, "fail", "restart"])
async def test_whether_a_stream_may_start_over(
    tmp_path: Path, upstream: Upstream, setting: str, asked: str | None
) -> None:
    """``on_cut`` of the request, else ``retry.on_cut``, decides what becomes of a plain stream that breaks off."""
    settings = echo_settings(
        tmp_path,
        providers={"plain": ProviderSettings(base_url=upstream.url, models=["plain"])},
        retry={"base_s": 0.01, "on_cut": setting},
    )
    upstream.replies += [Reply(PIECES, fault="cut", at=1), GOOD]
    body = {"model": "plain", "messages": [{"role": "user", "content": "q"}], "stream": True, "on_cut": asked}
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        async with http.post("/v1/chat/completions", json=body) as response:
            frames = Parser().feed(await response.read())
        log = await log_of(server, response.headers["x-job-id"])
    error = next(frame.json["error"] for frame in frames if "error" in frame.data)
    restarts = (asked or setting) == "restart"
    assert error["code"] == ("restarted" if restarts else "upstream_broken")
    assert last_text(log) == (WHOLE if restarts else PIECES[0])
    assert all("on_cut" not in seen.body for seen in upstream.requests)


REFUSALS = {
    "rate limit": (Reply(status=429, headers={"Retry-After": "0.05"}, body={"error": {"message": "slow"}}), True),
    "server error": (Reply(status=503, body={"error": {"message": "down"}}), True),
    "timeout": (Reply(status=504, body="too late"), True),
    "error instead of an answer": (Reply(body={"error": {"message": "the model is on fire"}}), True),
    "an answer without sense": (Reply(body="<html>"), True),
    "auth": (Reply(status=401, body={"error": {"message": "who are you"}}), False),
    "bad request": (Reply(status=400, body={"error": {"message": "what"}}), False),
    "context length": (Reply(status=400, body={"error": {"code": "context_length_exceeded", "message": "x"}}), False),
    "content filter": (Reply(status=400, body={"error": {"code": "content_filter", "message": "x"}}), False),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_refusal(server: Server, upstream: Upstream, refusal: str) -> None:
    """Before an answer begins: what may pass is tried three times, what will not is tried once."""
    bad, retryable = REFUSALS[refusal]
    cells = [
        Cell(bad, prefill, way, 0, times, retryable)
        for prefill in (True, False)
        for way in get_args(Way)
        for times in (1, ATTEMPTS)
    ]
    await check_all(server, upstream, cells)
