"""Reads the answer of one job to its end, over as many connections as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from aiohttp import ClientError, ClientResponse

from llmstream.commands.frames import Frame, Frames
from llmstream.commands.service import Service, Unreachable, refusal
from llmstream.commands.terminal import Output, say
from llmstream.commands.timings import Timings
from llmstream.errors import LLMStreamError
from llmstream.types import TERMINAL, EventId

PATIENCE_S = 30.0
"""How long a server may stay away."""
STEADY_S = 5.0
"""A connection that lived so long was a good one."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
RETRYABLE = frozenset({404, 408, 429, 502, 503, 504})
"""404: while its server is away, another one that does not know the job may answer in its place."""

_STATUS = {"complete": "completed", "error": "failed", "cancelled": "cancelled"}


class Unfinished(LLMStreamError):
    """The reading ended before the answer did; it can be taken up again behind the last position."""


class Ending(NamedTuple):
    """How the job ended."""

    status: str
    message: str | None = None
    reason: str | None = None


class Answer:
    """The answer of one job on its way to the output: each character once, whatever happens to the connection."""

    def __init__(
        self,
        service: Service,
        find: Callable[[], Awaitable[Service | None]],
        output: Output,
        *,
        job_id: str,
        session_id: str,
        after: EventId | None = None,
        timings: Timings | None = None,
    ) -> None:
        self.job_id = job_id
        self.position = after
        """The last event whose text the output has; None when it has nothing."""
        self.timings = timings or Timings()
        self._session_id = session_id
        self._service = service
        self._find = find
        self._output = output
        self._wrote = False

    async def replay(self, text: str, position: EventId) -> None:
        """Writes what the log holds up to ``position`` at once."""
        await self._write(text)
        self.position = position

    async def read(self) -> Ending:
        """Reads to the end. Raises Unfinished when it cannot, LLMStreamError when the server refuses."""
        clock = asyncio.get_running_loop().time
        broken_since: float | None = None
        pause = FIRST_PAUSE_S
        while True:
            opened, before = clock(), self.position
            try:
                ending = await self._connection()
                if ending is not None:
                    return ending
                problem = "the stream was cut"
            except (ClientError, OSError, TimeoutError, Unreachable, msgspec.MsgspecError) as error:
                problem = str(error) or type(error).__name__
            if self.position != before or clock() - opened > STEADY_S:
                broken_since, pause = None, FIRST_PAUSE_S
            if broken_since is None:
                broken_since = clock()
                self._output.end_line()
                say(f"Connection lost ({problem}); reconnecting …")
            if clock() - broken_since > PATIENCE_S:
                raise Unfinished(f"The server did not come back within {PATIENCE_S:g} s: {problem}.")
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)
            # A server that was started again may listen on another port.
            self._service = await self._find() or self._service

    async def _connection(self) -> Ending | None:
        """One connection: the ending, or None when it was cut before."""
        headers = {"Last-Event-ID": str(self.position)} if self.position is not None else {}
        async with self._service.stream(f"/stream/{self._session_id}", {"task_id": self.job_id}, headers) as response:
            if response.status == 204:
                return ending_of(await self._service.get(f"/chat/{self.job_id}"))
            if response.status != 200:
                error = await refusal(response)
                raise Unreachable(error.message) if response.status in RETRYABLE else error
            return await self._frames(response)

    async def _frames(self, response: ClientResponse) -> Ending | None:
        frames = Frames()
        async for chunk in response.content.iter_any():
            for frame in frames.feed(chunk):
                ending = await self._take(frame)
                if ending is not None:
                    return ending
        return None

    async def _take(self, frame: Frame) -> Ending | None:
        body: dict[str, Any] = msgspec.json.decode(frame.data)
        kind = body.get("type")
        if kind == "chunk" and not body.get("index"):
            await self._write(body["content"])
        if frame.id is not None:
            self.position = EventId.parse(frame.id)
        if kind == "restart":
            self._start_over(body["reason"])
        elif kind == "queued":
            self._waiting(body)
        elif kind == "usage":
            self.timings.tokens = body["completion_tokens"]
        elif kind in _STATUS:
            message = body["error"]["message"] if kind == "error" else None
            return Ending(_STATUS[kind], message, body.get("finish_reason"))
        return None

    async def _write(self, text: str) -> None:
        if not text:
            return
        try:
            await self._output.write(text)
        except OSError as error:
            raise Unfinished(f"The output cannot be written: {error.strerror}.") from error
        self._wrote = True
        self.timings.note()

    def _start_over(self, reason: str) -> None:
        if not self._wrote:
            return
        if not self._output.terminal:
            raise Unfinished(f"The answer had to start over ({reason}); what was printed so far is void.")
        self._output.end_line()
        say(f"— the answer starts over: {reason} —")

    def _waiting(self, body: dict[str, Any]) -> None:
        ahead, eta = body.get("position"), body.get("eta_s")
        if ahead is not None:
            say(f"Waiting for a free slot, {ahead} ahead" + (f", about {eta:.0f} s." if eta is not None else "."))


def ending_of(job: dict[str, Any]) -> Ending | None:
    """How a job ended, from its status; None while it has not."""
    if job["status"] not in TERMINAL:
        return None
    error = job.get("error")
    return Ending(job["status"], error["message"] if error else None, job.get("finish_reason"))
