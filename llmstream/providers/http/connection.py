"""One HTTP/1.1 connection, which hands answers to their reader straight from the socket.

The parser is llhttp (httptools), as in Node.js. A reader is called from ``data_received``: no task wakes up, nothing
is copied into a buffer to be read out again, and what arrived before a connection broke is handed over before the
error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

MAX_HEAD_BYTES = 64 * 1024
"""What may come without a byte of body in it: headers, trailers, interim answers."""

Take = Callable[[bytes], bool]
"""Takes the next bytes of a body; False: no more for now."""


class Broken(Exception):
    """The connection could not be made or kept, or what came over it is not HTTP; says which."""


class Connection(asyncio.Protocol):
    """Carries one exchange at a time: ``request``, then ``read`` until it returns False."""

    def __init__(self, on_rest: Callable[[Connection], None]) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names in lower case."""
        self.answered = False
        """Whether anything of the answer has come."""
        self.complete = True
        """Whether the whole answer has come; true also before the first request."""
        self._on_rest = on_rest
        """Told whenever nothing more will come unasked: the answer is complete or the connection lost."""
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._headed = False
        self._persistent = True
        self._paused = False
        self._idle_bytes = 0
        self._enough = False
        self._take: Take | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # called by the parser, without a Python frame in between
        self._parser = httptools.HttpResponseParser(self)

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def reusable(self) -> bool:
        return self.complete and self._persistent and self._error is None and self.alive

    async def request(self, data: bytes) -> None:
        """Sends a request and waits for the answer's status and headers. Raises Broken."""
        if self._transport is None:
            raise Broken("it was closed")
        self.status, self.headers = 0, {}
        self.answered = self.complete = self._headed = False
        self._idle_bytes = 0
        self._take = None
        self._transport.write(data)
        while not self._headed:
            self._check()
            await self._change()

    async def read(self, take: Take) -> bool:
        """Hands the body to ``take`` as it arrives.

        Returns True as soon as ``take`` wants no more for now, which stops the upstream until the next ``read``; False
        at the end of the body. Raises Broken when there is no such end, behind everything that came before.
        """
        self._take, self._enough = take, False
        try:
            if self._pieces:
                self._deliver(take)
            while not self._enough:
                self._check()
                if self.complete:
                    return False
                self._resume()
                await self._change()
            return True
        finally:
            self._take = None

    def forget(self) -> None:
        """Lets the rest of the answer come and go."""
        self._take = _ignore
        self._pieces.clear()
        self._resume()

    def abort(self) -> None:
        """Closes the connection at once, which tells the upstream to stop; nothing is handed over any more."""
        self._take = None
        self._pieces.clear()
        if not self.complete and self._error is None:
            self._error = Broken("it was closed from this side")
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.complete or self._error is not None:  # nobody asked
            self.transport.abort()
            return
        self.answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._persistent = False
            if not self.complete:
                self._error = Broken(f"it sent what is not HTTP ({error})")
        if self._pieces:
            self._idle_bytes = 0
            if self._take is not None:
                self._deliver(self._take)
        else:
            self._idle_bytes += len(data)
            if self._idle_bytes > MAX_HEAD_BYTES and not self.complete:
                self._error = Broken(f"it sent more than {MAX_HEAD_BYTES} bytes of headers")
        if self.complete or self._error is not None:
            self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.complete:
            if exc is None and self._headed and self._until_closed:
                self.complete = True
            elif self._error is None:
                end = "the answer is not whole" if self.answered else "there was no answer"
                self._error = Broken(str(exc) if exc else end)
        self._rest()

    def on_message_begin(self) -> None:
        if self.complete:
            raise Broken("it answered more than it was asked")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._headed:  # a trailer
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self.headers.clear()
            return
        self._headed = True
        self._persistent = self._parser.should_keep_alive()
        self._wake()

    def on_message_complete(self) -> None:
        self.complete = self._headed

    @property
    def _until_closed(self) -> bool:
        """Whether the answer ends where the connection does."""
        return (
            "content-length" not in self.headers and "chunked" not in self.headers.get("transfer-encoding", "").lower()
        )

    def _deliver(self, take: Take) -> None:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        try:
            self._enough = not take(data)
        except Exception as error:  # the reader's own, which belongs in its task and not in the event loop
            self._error = error
            return
        if self._enough:
            self._take = None
            self._pause()
            self._wake()

    def _pause(self) -> None:
        if not self.complete and self.alive:
            self._paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if self.alive:
                self.transport.resume_reading()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _change(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _rest(self) -> None:
        self._wake()
        self._on_rest(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _ignore(data: bytes) -> bool:
    return True
