"""What the tests of the HTTP surface do again and again: submit, read, cut."""

from __future__ import annotations

from typing import Any

import aiohttp

from llmstream.server import Server
from llmstream.types import Event, JobState
from tests.sse import Frame, Parser
from tests.waiting import wait_until

Json = dict[str, Any]


def conversation(text: str = "say something", **more: Any) -> Json:
    """The body of a chat completion; ``echo`` in ``more`` steers the model."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


async def submit(http: aiohttp.ClientSession, **body: Any) -> Json:
    """Posts a job to ``/chat/async``."""
    async with http.post("/chat/async", json={"message": "say something", **body}) as response:
        answer: Json = await response.json()
        assert response.status == 202, answer
        return answer


async def status(http: aiohttp.ClientSession, job_id: str) -> Json:
    async with http.get(f"/chat/{job_id}") as response:
        body: Json = await response.json()
        assert response.status == 200, body
        return body


async def read_all(http: aiohttp.ClientSession, url: str, **more: Any) -> tuple[bytes, list[Frame]]:
    """Reads a stream to its end: its bytes and its frames."""
    async with http.get(url, **more) as response:
        raw = await response.read()
        assert response.status == 200, raw
        return raw, Parser().feed(raw)


async def read_some(response: aiohttp.ClientResponse, parser: Parser, limit: int) -> tuple[list[Frame], bool]:
    """Reads up to ``limit`` bytes and cuts the connection there; True when the stream ended before that."""
    frames: list[Frame] = []
    while limit > 0:
        chunk = await response.content.read(limit)
        if not chunk:
            return frames, True
        limit -= len(chunk)
        frames += parser.feed(chunk)
    response.close()
    return frames, False


async def finished(server: Server, job_id: str) -> JobState:
    """Waits until a job has ended."""

    async def done() -> bool:
        return (await server.gateway.job(job_id)).done

    await wait_until(done, timeout=20)
    return await server.gateway.job(job_id)


async def log_of(server: Server, job_id: str) -> list[Event]:
    """Every event of a job, read from the store once the job is over."""
    await finished(server, job_id)
    with server.gateway.follow(job_id) as follower:
        return [event async for entries in follower for entry in entries for event in entry.events]


def tokens(count: int) -> str:
    """The text of an echo answer of so many tokens."""
    return "".join(f" tok{position:04d}" for position in range(count))
