"""Server-sent events for tests, from bytes to frames. No I/O.

Follows https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation to the letter, so
that it takes nothing that a browser would not.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_LINE_END = re.compile(rb"\r\n|\r|\n")


class Frame(NamedTuple):
    """One dispatched event."""

    data: str
    id: str | None = None
    """The event's own id; None where it has none."""
    event: str = "message"

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Parser:
    """Takes bytes cut anywhere and gives the events that they complete."""

    def __init__(self) -> None:
        self.last_id = ""
        """What an EventSource would send as ``Last-Event-ID``."""
        self.retry_ms: int | None = None
        self.comments: list[str] = []
        self._rest = b""
        self._first = True
        self._data: list[str] = []
        self._event = ""
        self._id: str | None = None

    def feed(self, chunk: bytes) -> list[Frame]:
        buffer = self._rest + chunk
        if self._first and len(buffer) >= 3:
            buffer, self._first = buffer.removeprefix(b"\xef\xbb\xbf"), False
        # A CR at the very end may be half of a CRLF, so it has to wait.
        whole = buffer[:-1] if buffer.endswith(b"\r") else buffer
        lines = _LINE_END.split(whole)
        self._rest = lines.pop() + buffer[len(whole) :]
        taken = (self._take(line.decode("utf-8", "replace")) for line in lines)
        return [frame for frame in taken if frame is not None]

    def _take(self, line: str) -> Frame | None:
        if not line:
            return self._dispatch()
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name and colon:
            self.comments.append(value)
        elif name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)
        return None

    def _dispatch(self) -> Frame | None:
        data, event, own = self._data, self._event, self._id
        self._data, self._event, self._id = [], "", None
        if own is not None:
            self.last_id = own
        return Frame("\n".join(data), own, event or "message") if data else None


def parse(raw: bytes) -> list[Frame]:
    """All events of a whole stream."""
    return Parser().feed(raw)
