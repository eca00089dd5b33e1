"""Serves a job's log as a stream of server-sent events, from any position."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter
from aiohttp_sse import EventSourceResponse

from llmstream.api.keys import GATEWAY, PINGS, STREAMS
from llmstream.api.observing import note_upstream
from llmstream.api.pings import STALL_S, Pings
from llmstream.api.presence import Attended
from llmstream.api.render import Format, render_entry
from llmstream.errors import BadRequest, LLMStreamError, StoreError, StoreUnavailable
from llmstream.store.entry import Entry
from llmstream.store.follower import Follower
from llmstream.types import BEGINNING, EventId

RETRY_FRAME = b"retry: 1000\n\n"
PING_FRAME = b": ping\n\n"
QUEUE_LOOK_S = 1.0
CONGESTED_BYTES = 64 * 1024
"""What may wait for a slow client; the rest stays in the log."""
PROMPT_S = 0.1
"""A job that starts so soon was hardly waiting: nothing is said about it."""

logger = logging.getLogger(__name__)

Waiting = Callable[[], Awaitable[bytes]]
"""Makes the frame that tells a waiting client where it stands; empty when there is nothing to tell."""


class Stream(EventSourceResponse):
    """aiohttp-sse's headers and disconnect; frames are written as ready bytes, and one timer serves all streams."""

    def __init__(self, pings: Pings, *, headers: dict[str, str]) -> None:
        super().__init__(allow_all_methods=True, headers=headers, send_timeout=None)
        self._pings = pings
        self._last_look = (-1, 0)
        self._same_since = 0.0
        self._writer: StreamWriter | None = None
        self._transport: asyncio.Transport | None = None
        self._headed = False
        self.ending = b""
        """The last frames, which go out together with the end of the body."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if request.transport is None:
            raise ConnectionResetError("the client is gone")
        writer = await super().prepare(request)
        if isinstance(writer, StreamWriter):  # the server prepares each response once more when its handler returns
            self._writer, self._transport = writer, request.transport
        return writer

    def put(self, frames: bytes) -> bool:
        """Writes without waiting; False when the client should be waited for before more is written.

        Raises ConnectionError when the client is gone.
        """
        writer, transport = self._writer, self._transport
        assert writer is not None
        assert transport is not None
        if transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if frames:
            if self._headed:
                # What aiohttp's own write does without compression, less a coroutine and four calls for each token.
                transport.write(b"%x\r\n%b\r\n" % (len(frames), frames) if writer.chunked else frames)
                writer.output_size += len(frames)
                writer.buffer_size += len(frames)  # what makes its write() wait for a slow client
            else:  # in one packet with the headers
                self._headed = True
                with suppress(StopIteration):
                    writer.write(frames, drain=False).send(None)
        return transport.get_write_buffer_size() < CONGESTED_BYTES

    async def drained(self) -> None:
        """Waits while the client takes less than it is sent. Raises ConnectionError when it is gone."""
        assert self._writer is not None
        await self._writer.drain()

    def look(self, now: float) -> None:
        """Called by :class:`Pings`."""
        writer, transport = self._writer, self._transport
        assert writer is not None
        assert transport is not None
        found = (writer.output_size, transport.get_write_buffer_size())
        if found != self._last_look:
            self._last_look, self._same_since = found, now
        elif found[1]:
            if now - self._same_since >= STALL_S:
                transport.abort()
        elif now - self._same_since >= self._pings.ping_s and not transport.is_closing():
            self.put(PING_FRAME)

    async def _ping(self) -> None:
        """What would be a sleeping task for each stream."""

    async def __aenter__(self) -> Self:
        self._pings.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pings.discard(self)
        await super().__aexit__(kind, error, trace)


def position(request: web.Request, protocol: str) -> EventId:
    """Where a client wants to go on: ``Last-Event-ID`` header, ``?last_event_id=`` or ``?starting_after=``.

    ``protocol`` names what it speaks, for the metrics.
    """
    for name, text in (
        ("Last-Event-ID", request.headers.get("Last-Event-ID")),
        ("last_event_id", request.query.get("last_event_id")),
        ("starting_after", request.query.get("starting_after")),
    ):
        if text:
            try:
                found = EventId.parse(text)
            except ValueError as error:
                raise BadRequest(f"{name}: {error}.", param=name) from None
            if found != BEGINNING:
                request.app[GATEWAY].observer.metrics.resumes.add(protocol)
            return found
    return BEGINNING


async def serve(
    request: web.Request,
    follower: Follower,
    wire: Format,
    *,
    headers: dict[str, str],
    waiting: Waiting | None = None,
) -> web.StreamResponse:
    """Streams everything behind the follower's position up to the terminal event; closes the follower.

    A client that goes away ends its own stream; what becomes of the job is the decision of its ``on_disconnect``.
    """
    task = asyncio.current_task()
    assert task is not None
    follower.hurry()
    streams = request.app[STREAMS]
    streams.add(task)
    response = Stream(request.app[PINGS], headers=headers)
    try:
        with follower:
            async with Attended(request, follower.seat):
                await response.prepare(request)
                async with response:
                    if waiting is not None:
                        await response.write(RETRY_FRAME)
                        await _announce(response, follower, waiting)
                    await _pump(response, follower, wire)
                await response.write_eof(response.ending)
    except ConnectionError:
        logger.debug("the client went away", extra={"job_id": headers.get("x-job-id")})
    except Exception:
        if not response.prepared:
            raise
        # A middleware would answer a second time, into the middle of the first answer.
        logger.exception("a stream broke", extra={"job_id": headers.get("x-job-id")})
        if request.transport is not None:
            request.transport.abort()
    finally:
        streams.discard(task)
        note_upstream(request, follower)
    return response


class Outlet(Protocol):
    """Where a log goes to."""

    def put(self, entry: Entry) -> bool:
        """Takes an entry at the moment it is logged; False: wait for ``drained`` before there is more."""

    def write(self, entries: list[Entry]) -> None:
        """Takes what has gathered."""

    async def drained(self) -> None:
        """Returns when there is room for more."""


async def deliver(follower: Follower, outlet: Outlet) -> None:
    """Reads a log to its end. Nothing is read ahead for an outlet without room, so that one that stalls holds nothing.
    While the store is away the reader waits: the answer is still coming.

    Raises NotFound when the log has expired, StoreError when this version cannot read it.
    """
    while True:
        try:
            await follower.push(outlet.put)
            await outlet.drained()
            async for entries in follower:
                outlet.write(entries)
                del entries
                await outlet.drained()
                await follower.push(outlet.put)
                await outlet.drained()
            return
        except StoreError:
            raise
        except StoreUnavailable as error:
            logger.warning("a reader waits for the store: %s", error.message)
            await asyncio.sleep(error.retry_after or 1.0)


class _Frames:
    """Entries as frames of one wire format."""

    __slots__ = ("_response", "_wire")

    def __init__(self, response: Stream, wire: Format) -> None:
        self._response = response
        self._wire = wire

    def put(self, entry: Entry) -> bool:
        frames = render_entry(entry, self._wire)
        if not entry.terminal:
            return self._response.put(frames)
        self._response.ending = frames
        return True

    def write(self, entries: list[Entry]) -> None:
        frames = b"".join([render_entry(entry, self._wire) for entry in entries])
        if entries[-1].terminal:
            self._response.ending = frames
        else:
            self._response.put(frames)

    async def drained(self) -> None:
        await self._response.drained()


async def _pump(response: Stream, follower: Follower, wire: Format) -> None:
    try:
        await deliver(follower, _Frames(response, wire))
    except LLMStreamError as error:
        # Ending without a word would look like the end of the answer.
        logger.warning("a stream ended early: %s", error.message)
        await response.write(wire.broken(error.failure()))
        response.force_close()


async def _announce(response: Stream, follower: Follower, waiting: Waiting) -> None:
    """Tells where the job stands, again whenever that changes, until its log has something to show."""
    said = b""
    with suppress(LLMStreamError):  # what it means for the stream is decided when its log is read
        while not await follower.ready(QUEUE_LOOK_S if said else PROMPT_S):
            frame = await waiting()
            if not frame:
                return
            if frame != said:
                await response.write(frame)
                said = frame
