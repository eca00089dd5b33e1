"""The client of all chaos tests: reads a stream as a browser would, and notes what came when."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import NamedTuple

import aiohttp

from llmstream.types import EventId
from tests.sse import Frame, Parser

ENDS = ("complete", "error", "cancelled")


class Piece(NamedTuple):
    """One piece of the answer as it arrived."""

    id: EventId
    text: str
    connection: int
    at: float
    """Seconds of the monotonic clock."""


class Reader:
    """Keeps the last event id and asks for the rest; one object for one answer, over however many connections."""

    def __init__(self) -> None:
        self.heard: list[Piece] = []
        """Everything that came, also what a restart voided later."""
        self.restarts = 0
        self.connections = 0
        self.end = ""
        """How the answer ended; empty while it has not."""
        self.last_id = ""
        self._valid_from = 0

    @property
    def pieces(self) -> list[Piece]:
        """The answer so far."""
        return self.heard[self._valid_from :]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    async def read(self, http: aiohttp.ClientSession, path: str) -> None:
        """Reads on until the answer or the connection ends; raises aiohttp.ClientError when it ends badly."""
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        async with http.get(path, headers=headers) as answer:
            answer.raise_for_status()
            self.connections += 1
            parser = Parser()
            async for data in answer.content.iter_any():
                for frame in parser.feed(data):
                    self._take(frame)

    async def read_at(self, url: str, path: str) -> None:
        """Like :meth:`read`, over a connection of its own; returns also when the connection ends badly."""
        async with aiohttp.ClientSession(url) as http:
            with suppress(aiohttp.ClientError):
                await self.read(http, path)

    def _take(self, frame: Frame) -> None:
        if frame.id is None:  # no event of the log: where the job stands, or why this connection ends
            return
        self.last_id, data = frame.id, frame.json
        if data["type"] == "restart":
            self.restarts += 1
            self._valid_from = len(self.heard)
        elif data["type"] == "chunk":
            self.heard.append(Piece(EventId.parse(frame.id), data["content"], self.connections, time.monotonic()))
        elif data["type"] in ENDS:
            self.end = data["type"]
