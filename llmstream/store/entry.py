"""How events are written into a stream entry. Pure.

One entry holds one or more events that waited for the same flush. Its stream id is the id of its *last* event; the
others count back from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from llmstream.errors import StoreError
from llmstream.types import Delta, Event, EventId, Finished, Payload, Restart, Started

FIELD = b"e"

_decoder = msgspec.json.Decoder(list[Started | Restart | Delta | Finished])


class Entry:
    """Consecutive events of one attempt, acknowledged together."""

    __slots__ = ("attempt", "last", "payloads", "rendered", "size", "start", "terminal")

    def __init__(self, last: EventId, payloads: Sequence[Payload], size: int) -> None:
        self.attempt, seq = last
        self.start = seq - len(payloads) + 1
        """``seq`` of the first event."""
        self.last = last
        self.payloads = payloads
        """What the events say, in order. Few readers need them as :attr:`events`, so these are made on demand."""
        self.size = size
        """Bytes of the encoded form."""
        self.terminal = isinstance(payloads[-1], Finished)
        """Whether the log ends with this entry."""
        self.rendered: dict[object, bytes] = {}
        """Wire forms by format: made once, shared by all who follow."""

    def after(self, position: EventId) -> Entry:
        """The part of the entry behind ``position``; the entry itself when that is all of it."""
        attempt, seq = position
        if attempt < self.attempt or seq < self.start:
            return self
        return Entry(self.last, self.payloads[seq - self.start + 1 :], self.size)

    @property
    def first(self) -> EventId:
        return EventId(self.attempt, self.start)

    @property
    def events(self) -> list[Event]:
        return [Event(EventId(self.attempt, seq), data) for seq, data in enumerate(self.payloads, self.start)]


encode_payloads: Callable[[Sequence[Payload]], bytes] = msgspec.json.Encoder().encode


def decode_entry(raw_id: bytes, fields: Sequence[bytes]) -> Entry:
    """Reads one stream entry as XRANGE returns it: its id and a flat list of names and values.

    Raises StoreError for one that this version does not understand, such as a newer replica's.
    """
    try:
        data = fields[fields.index(FIELD) + 1]
        return Entry(EventId.parse(raw_id), _decoder.decode(data), len(data))
    except (ValueError, IndexError, msgspec.MsgspecError) as error:
        raise StoreError(f"The log entry {raw_id!r} cannot be read by this version: {error}") from error
