"""What the service and an engine's process say to each other: length-prefixed messages on a socket."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from llmstream.providers.engines.base import EngineInfo, EngineSpec, Generation
from llmstream.types import Delta, Failure, GenerateRequest


class Load(Struct, frozen=True, tag="load"):
    """The first message: what to load."""

    spec: EngineSpec


class Count(Struct, frozen=True, tag="count"):
    id: int
    request: GenerateRequest


class Start(Struct, frozen=True, tag="start"):
    generation: Generation


class Cancel(Struct, frozen=True, tag="cancel"):
    id: int


class Ready(Struct, frozen=True, tag="ready"):
    """The weights are loaded."""

    info: EngineInfo


class Unloadable(Struct, frozen=True, tag="unloadable"):
    """The weights cannot be loaded; the process ends."""

    message: str


class Counted(Struct, frozen=True, tag="counted"):
    id: int
    tokens: int = 0
    failure: Failure | None = None


class Emitted(Struct, frozen=True, tag="emitted"):
    id: int
    deltas: list[Delta]
    failure: Failure | None = None
    done: bool = False


ToChild = Load | Count | Start | Cancel
FromChild = Ready | Unloadable | Counted | Emitted

_LENGTH = struct.Struct("!I")


def frame(message: ToChild | FromChild) -> bytes:
    """Encodes one message with its length in front."""
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a byte stream back into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes the next bytes of the stream; gives the bodies of the messages that are complete now."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body
