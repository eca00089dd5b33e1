"""What the supervisor and a replica process tell each other.

Down the process's standard input goes one :class:`Start`; then the pipe stays open, and its end means that the
supervisor is gone. Up its standard output come lines: one :class:`Ready` or :class:`Failed`, and before and after it
:class:`Alive` again and again.

Over a socket of their own go the counts of the metrics, as lines in both directions: whichever process is scraped asks
for those of all (:class:`Wanted`), the supervisor asks every process (:class:`Tell`), and answers when it was told.
"""

from __future__ import annotations

import pickle
from typing import BinaryIO, NamedTuple

from msgspec import Struct

from llmstream.config import Settings
from llmstream.telemetry.snapshot import Snapshot

_LENGTH = 8


class Start(NamedTuple):
    """What a replica process has to know."""

    settings: Settings
    descriptors: list[int]
    """Bound sockets to listen on."""
    counts: int
    """The socket for the counts."""


class Ready(Struct, frozen=True, tag=True):
    """The replica listens."""

    replica: str
    pools: list[str]
    models: list[str]


class Failed(Struct, frozen=True, tag=True):
    """The replica cannot start, and why."""

    message: str
    misconfigured: bool
    """Trying again cannot help."""


class Alive(Struct, frozen=True, tag=True):
    """The replica's event loop goes round."""


Report = Ready | Failed | Alive


class Wanted(Struct, frozen=True, tag=True):
    """Up: somebody scrapes this process and wants the counts of all."""

    number: int


class Everything(Struct, frozen=True, tag=True):
    """Down: the answer to Wanted."""

    number: int
    snapshots: list[Snapshot]


class Tell(Struct, frozen=True, tag=True):
    """Down: what has this process counted?"""

    number: int


class Told(Struct, frozen=True, tag=True):
    """Up: the answer to Tell, or the last words of a process."""

    number: int
    snapshot: Snapshot


LAST_WORDS = 0
"""The number of what a process tells unasked, at its end."""
LINE_BYTES = 16 * 1024 * 1024
"""The longest line of counts."""


def packed(start: Start) -> bytes:
    """A pickle, because settings written as text have their secrets masked."""
    body = pickle.dumps(start)
    return len(body).to_bytes(_LENGTH, "big") + body


def read_start(pipe: BinaryIO) -> Start:
    """Raises EOFError when the supervisor is gone."""
    head = pipe.read(_LENGTH)
    body = pipe.read(int.from_bytes(head, "big"))
    start = pickle.loads(body)  # noqa: S301 (comes from the process that started us)
    assert isinstance(start, Start)
    return start
