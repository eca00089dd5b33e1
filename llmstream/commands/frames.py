"""Server-sent events, from bytes to frames. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Frame(NamedTuple):
    """One event of a stream."""

    data: str
    id: str | None = None
    """The event's own id; None where it has none."""
    event: str = "message"


class Frames:
    """Collects bytes as they come and gives the frames that are whole. Lines end with LF or CRLF."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """Takes the next bytes, cut anywhere; comments and frames without data are left out."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r").decode("utf-8", "replace")
            if line:
                self._add(line)
                continue
            fields, self._fields = self._fields, {}
            if "data" in fields:
                yield Frame(fields["data"], fields.get("id"), fields.get("event") or "message")

    def _add(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data" and "data" in self._fields:
            value = f"{self._fields['data']}\n{value}"
        if name:
            self._fields[name] = value
