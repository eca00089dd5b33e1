"""Answers that come in one piece: a log read to its end, and what became of it."""

from __future__ import annotations

from aiohttp import web

from llmstream.api.middleware import retry_after
from llmstream.api.observing import note_upstream
from llmstream.api.presence import Attended
from llmstream.api.render import CANCELLED
from llmstream.api.sse import deliver
from llmstream.errors import error_body
from llmstream.routing.gates import NobodyLeft
from llmstream.store.entry import Entry
from llmstream.store.follower import Follower
from llmstream.transcript import Transcript
from llmstream.types import Failure


class _Gathered:
    """A log as one transcript."""

    __slots__ = ("_transcript",)

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript

    def put(self, entry: Entry) -> bool:
        self._transcript.extend(entry.payloads, entry.last)
        return True

    def write(self, entries: list[Entry]) -> None:
        for entry in entries:
            self.put(entry)

    async def drained(self) -> None:
        """There is always room."""


async def read_whole(request: web.Request, follower: Follower) -> Transcript:
    """Reads a job to its end while the client is there."""
    transcript = Transcript()

    async with Attended(request, follower.seat):
        await deliver(follower, _Gathered(transcript))
    note_upstream(request, follower)
    return transcript


def failed(transcript: Transcript, headers: dict[str, str]) -> web.Response | None:
    """What to answer for a job that failed or was cancelled; None for one that has an answer."""
    finished = transcript.finished
    failure = finished.failure if finished else None
    if finished is not None and finished.status == "cancelled":
        failure = CANCELLED
    if failure is None:
        return None
    return ended_badly(failure, headers)


def ended_badly(failure: Failure, headers: dict[str, str]) -> web.Response:
    """The error of a job that was accepted and has no answer."""
    status = 409 if failure.code == "cancelled" else failure.status
    if failure.retry_after is not None and status in {429, 503}:
        headers = {**headers, **retry_after(failure.retry_after)}
    if failure.code != NobodyLeft.code:
        # The job was accepted and has ended: trying the same again is the caller's decision, not their SDK's.
        headers = {**headers, "x-should-retry": "false"}
    return web.json_response(error_body(failure), status=status, headers=headers)
