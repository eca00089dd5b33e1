"""The header of a GGUF file: what a model says about itself, read without loading it."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from msgspec import Struct

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Elements and bytes of one block of each tensor type that existed in 2023.
_BLOCKS = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    9: (32, 36),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
}


class Header(Struct, frozen=True):
    """Metadata by key, and the type number of each tensor by name."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, int]

    @property
    def newer_types(self) -> bool:
        """Whether some tensor has a type that did not exist in 2023."""
        return not _BLOCKS.keys() >= set(self.tensors.values())


def read_version(path: Path) -> int | None:
    """The GGUF version of a file; None for a file that is not GGUF."""
    with path.open("rb") as file:
        start = file.read(8)
    return int(struct.unpack_from("<I", start, 4)[0]) if start[:4] == MAGIC and len(start) == 8 else None


def read_header(path: Path) -> Header:
    """Reads the header and checks that all tensors lie inside the file. Raises ValueError for a damaged one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(data).header()
        except (
            struct.error,
            ValueError,
            TypeError,
            OverflowError,
            MemoryError,
            RecursionError,
            ArithmeticError,
        ) as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}; get it again") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(MAGIC)
        self._version: int = self._one("I")

    def header(self) -> Header:
        tensors, pairs = self._length(), self._length()
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._one("I"))
        kinds: dict[str, int] = {}
        end = 0
        for _ in range(tensors):
            name = self._string()
            size = math.prod(self._length() for _ in range(self._one("I")))
            kinds[name], offset = self._one("I"), self._one("Q")
            elements, width = _BLOCKS.get(kinds[name], (1, 0))
            end = max(end, offset + size // elements * width)
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        if start + end > len(self._data):
            raise ValueError(f"its tensors need {start + end} bytes and it has {len(self._data)}")
        return Header(self._version, metadata, kinds)

    def _one(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _length(self) -> int:
        length: int = self._one("I" if self._version == 1 else "Q")
        if length > len(self._data):
            raise ValueError(f"a length of {length} at byte {self._at}")
        return length

    def _string(self) -> str:
        return self._bytes(self._length()).decode("utf-8", "replace")

    def _bytes(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise ValueError(f"it ends before byte {self._at + size}")
        self._at += size
        return self._data[self._at - size : self._at]

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._one(_scalar(kind))
        item, count = self._one("I"), self._length()
        if item in (_STRING, _ARRAY):
            return [self._value(item) for _ in range(count)]
        layout = f"<{count}{_scalar(item)}"
        return list(struct.unpack(layout, self._bytes(struct.calcsize(layout))))


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"value type {kind}")
    return _SCALARS[kind]
