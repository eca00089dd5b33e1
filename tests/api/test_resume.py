"""Truths 1 and 2 over HTTP: logged before seen; exactly once, in order, without a gap."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstream.api.render import ChatFormat, Format, NativeFormat
from llmstream.config import StoreSettings
from llmstream.server import Server
from llmstream.store.embedded import EmbeddedStore
from llmstream.store.store import open_store
from llmstream.types import Event, EventId, Restart
from tests.api.reading import conversation, finished, log_of, read_all, read_some, submit, tokens
from tests.conftest import echo_settings
from tests.sse import Frame, Parser
from tests.waiting import wait_until


class Cut(NamedTuple):
    """Where a connection ends and how the next one says where to go on."""

    after_bytes: int
    by_header: bool


class Case(NamedTuple):
    """One answer and one unlucky client."""

    openai: bool
    length: int
    delay_ms: float
    crash_at: int | None
    choices: int
    late: bool
    cuts: list[Cut]


CASES = st.builds(
    Case,
    openai=st.booleans(),
    length=st.integers(0, 60),
    delay_ms=st.sampled_from([0, 0, 0.5]),
    crash_at=st.none() | st.none() | st.integers(0, 60),
    choices=st.sampled_from([1, 1, 2]),
    late=st.booleans(),
    cuts=st.lists(st.builds(Cut, st.integers(1, 3000), st.booleans()), max_size=8),
)


def _body(case: Case) -> dict[str, Any]:
    echo: dict[str, object] = {"tokens": case.length, "delay_ms": case.delay_ms}
    if case.crash_at is not None:
        echo |= {"fault": "crash", "at": min(case.crash_at, case.length), "attempts": 1}
    return {"echo": echo, "n": case.choices, "on_cut": "restart"}


async def _read_with_cuts(http: aiohttp.ClientSession, url: str, cuts: list[Cut]) -> list[Frame]:
    """Reads a stream to its end over as many connections as the cuts make."""
    parser, frames = Parser(), list[Frame]()
    limits = [*cuts, Cut(1 << 40, True)]
    for cut in limits:
        headers, params = {}, {}
        if parser.last_id and cut.by_header:
            headers = {"Last-Event-ID": parser.last_id}
        elif parser.last_id:
            params = {"last_event_id": parser.last_id}
        async with http.get(url, headers=headers, params=params) as response:
            if response.status == 204:
                break
            assert response.status == 200, await response.text()
            last_id, parser = parser.last_id, Parser()
            parser.last_id = last_id
            more, ended = await read_some(response, parser, cut.after_bytes)
            frames += more
            if ended:
                break
    return frames


def _expected(wire: Format, log: Sequence[Event]) -> list[Frame]:
    raw = b"".join(wire.render(*event.id, event.data) for event in log)
    return [frame for frame in Parser().feed(raw) if frame.id is not None]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES)
async def test_cut_and_resumed_streams_hold_the_log(server: Server, http: aiohttp.ClientSession, case: Case) -> None:
    """Wherever a stream is cut and however it is resumed, its frames are the log's, each once and in order."""
    if case.openai:
        async with http.post("/v1/chat/completions", json=conversation(stream=True, **_body(case))) as response:
            job_id, url = response.headers["x-job-id"], response.headers["Location"]
            response.close()
    else:
        answer = await submit(http, **_body(case))
        job_id, url = answer["task_id"], answer["stream_url"]
    if case.late:
        await finished(server, job_id)
    frames = await _read_with_cuts(http, url, case.cuts)
    log = await log_of(server, job_id)
    state = await server.gateway.job(job_id)
    # A plain OpenAI stream that is first read after a restart begins there.
    restart = next((event.id for event in log if isinstance(event.data, Restart)), None)
    begins_at = restart if case.openai and restart is not None and frames[0].id == str(restart) else None
    wire: Format = ChatFormat(state.job, begins_at=begins_at) if case.openai else NativeFormat()
    visible = [event for event in log if begins_at is None or event.id >= begins_at]
    assert [frame for frame in frames if frame.id is not None] == _expected(wire, visible)
    assert [event.id for event in log] == sorted({event.id for event in log})
    assert state.status == "completed"
    assert (await server.gateway.transcript(job_id)).text == tokens(case.length)


async def test_readers_at_once_and_late_see_the_same_bytes(server: Server, http: aiohttp.ClientSession) -> None:
    """Two clients that read while the answer is made and one that comes later get the same bytes."""
    body = conversation(stream=True, echo={"tokens": 80, "delay_ms": 2}, session_id="shared")
    async with http.post("/v1/chat/completions", json=body) as response:
        location = response.headers["Location"]
        others = [asyncio.create_task(read_all(http, location)) for _ in range(2)]
        first = await response.read()
    early = await asyncio.gather(*others)
    late = await read_all(http, location)
    assert {first, early[0][0], early[1][0], late[0]} == {first}
    text = "".join(choice["delta"].get("content", "") for f in late[1][:-1] for choice in f.json["choices"])
    assert text == tokens(80)


async def test_native_readers_at_once_and_late_see_the_same_bytes(server: Server, http: aiohttp.ClientSession) -> None:
    """The old stream route gives simultaneous and late readers the same bytes, too."""
    url = (await submit(http, echo={"tokens": 80, "delay_ms": 2}))["stream_url"]
    early = await asyncio.gather(read_all(http, url), read_all(http, url))
    late = await read_all(http, url)
    assert {early[0][0], early[1][0], late[0]} == {late[0]}
    assert "".join(frame.json.get("content", "") for frame in late[1]) == tokens(80)


@pytest.mark.parametrize("openai", [False, True])
async def test_nothing_more_is_204(server: Server, http: aiohttp.ClientSession, openai: bool) -> None:
    """Whoever has read everything gets 204 without a body, which tells an EventSource to stop."""
    if openai:
        async with http.post("/v1/chat/completions", json=conversation(stream=True)) as response:
            url, frames = response.headers["Location"], Parser().feed(await response.read())
    else:
        url = (await submit(http))["stream_url"]
        _, frames = await read_all(http, url)
    asks: list[Any] = [{"headers": {"Last-Event-ID": frames[-1].id}}, {"params": {"last_event_id": frames[-1].id}}]
    for more in asks:
        async with http.get(url, **more) as response:
            assert (response.status, await response.read()) == (204, b"")
    before_last = [frame.id for frame in frames if frame.id][-2]
    _, rest = await read_all(http, url, headers={"Last-Event-ID": before_last})
    assert [frame.id for frame in rest if frame.id] == [frames[-1].id]


@pytest.mark.parametrize("bad", ["x", "1", "1-", "-1", "1-2-3", "1.5-2", "٣-٤", "1-99999999999999999999", "0x1-2", " "])
async def test_bad_positions_are_named(server: Server, http: aiohttp.ClientSession, bad: str) -> None:
    """A position that is no event id is refused with 400 and its own name, in header and query."""
    url = (await submit(http))["stream_url"]
    asks = [
        ("last_event_id", {"params": {"last_event_id": bad}}),
        ("starting_after", {"params": {"starting_after": bad}}),
    ]
    if bad.strip():
        asks.append(("Last-Event-ID", {"headers": {"Last-Event-ID": bad}}))
    for name, more in asks:
        async with http.get(url, **more) as response:  # type: ignore[arg-type]
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, name)
            assert bad in error["message"] or repr(bad) in error["message"]


async def test_a_position_that_never_was_gives_no_false_end(server: Server, http: aiohttp.ClientSession) -> None:
    """A client that claims to have seen more than there is gets an error or 204, never an answer with a hole."""
    answer = await submit(http, echo={"tokens": 5, "delay_ms": 5})
    async with http.get(answer["stream_url"], headers={"Last-Event-ID": "7-1"}) as response:
        frames = Parser().feed(await response.read())
    assert not [frame for frame in frames if frame.json["type"] in {"chunk", "complete"}]
    await finished(server, answer["task_id"])
    async with http.get(answer["stream_url"], headers={"Last-Event-ID": "7-1"}) as response:
        assert response.status == 204


async def test_no_frame_is_seen_before_it_is_logged(tmp_path: Path) -> None:
    """While the store takes no writes the model goes on and nobody sees a word that is not in the log."""
    async with EmbeddedStore(tmp_path / "shared") as embedded:
        given: Any = {"store": StoreSettings.model_validate({"url": embedded.url})}
        async with (
            open_store(StoreSettings.model_validate({"url": embedded.url}), tmp_path) as other,
            Server(echo_settings(tmp_path, **given)) as server,
            aiohttp.ClientSession(server.url) as http,
        ):
            answer = await submit(http, echo={"tokens": 400, "delay_ms": 1})
            parser, seen = Parser(), list[Frame]()

            async def read() -> None:
                async with http.get(answer["stream_url"]) as response:
                    async for chunk in response.content.iter_any():
                        new = [frame for frame in parser.feed(chunk) if frame.id]
                        end = await other.log.end(answer["task_id"])
                        assert all(EventId.parse(frame.id or "") <= end for frame in new)
                        seen.extend(new)

            reader = asyncio.create_task(read())
            await wait_until(lambda: len(seen) > 20)
            for _ in range(3):
                await other.writes.call("CLIENT", "PAUSE", 60_000, "WRITE")
                end = await other.log.end(answer["task_id"])
                for _ in range(100):  # each look gives the model and the reader a turn
                    assert await other.log.end(answer["task_id"]) == end
                    assert EventId.parse(seen[-1].id or "") <= end
                await other.writes.call("CLIENT", "UNPAUSE")
                await wait_until(lambda end=end: EventId.parse(seen[-1].id or "") > end)  # type: ignore[misc]
            await reader
            assert "".join(frame.json.get("content", "") for frame in seen) == tokens(400)


async def test_a_log_that_expires_under_its_reader_is_no_end(tmp_path: Path) -> None:
    """A reader whose log expires before it got everything is told so, and never that the answer is complete."""
    async with EmbeddedStore(tmp_path / "shared") as embedded:
        outside = StoreSettings.model_validate({"url": embedded.url})
        given: Any = {"store": outside}
        async with (
            open_store(outside, tmp_path) as other,
            Server(echo_settings(tmp_path, **given)) as server,
            aiohttp.ClientSession(server.url, read_bufsize=1024) as http,
        ):
            answer = await submit(http, echo={"tokens": 200_000})
            await finished(server, answer["task_id"])
            async with http.get(answer["stream_url"]) as response:
                gone = [key(answer["task_id"]) for key in (other.keys.job, other.keys.log)]
                await other.writes.call("DEL", *gone)
                frames = Parser().feed(await response.read())
            assert len(frames) < 200_000
            assert frames[-1].id is None
            assert (frames[-1].json["type"], frames[-1].json["error"]["code"]) == ("error", "not_found")
            async with http.get(answer["stream_url"], headers={"Last-Event-ID": frames[-2].id or ""}) as response:
                assert response.status == 404
