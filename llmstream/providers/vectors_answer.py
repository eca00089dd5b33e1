"""An upstream's embeddings to deltas. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from llmstream.providers.chunks import Answer, usage_of
from llmstream.providers.refusals import complaint
from llmstream.types import Delta
from llmstream.vectors import dimensions, encode_floats, vector_delta

MAX_BYTES = 128 * 1024 * 1024
"""Largest answer: 2048 vectors of 3072 numbers as text are nearly as large."""


class _Vector(Struct, gc=False):
    embedding: str | list[float]
    index: int | None = None


class _Vectors(Struct, gc=False):
    data: list[_Vector] | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Vectors).decode


class VectorsAnswer(Answer):
    """One vector for each input, in one JSON object; as base64 or as numbers, in any order."""

    def __init__(self, choices: int) -> None:
        super().__init__(choices)
        self._body = bytearray()

    def feed(self, data: bytes) -> list[Delta]:
        self._body += data
        if len(self._body) > MAX_BYTES:
            return self._fail(f"sent an answer of more than {MAX_BYTES} bytes")
        return []

    def close(self) -> list[Delta]:
        try:
            said = _decode(self._body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return self._fail(f"sent something malformed: {error}")
        if said.error:
            self.complaint = complaint(said.error)
            return self._fail(f"reported an error instead of an answer: {self.complaint.message}")
        try:
            deltas = self._deltas(said.data or [])
        except ValueError as error:
            return self._fail(f"sent vectors that are none: {error}")
        if said.usage:
            deltas[-1] = replace(deltas[-1], usage=usage_of(said.usage))
        self.ended = True
        return deltas

    def _deltas(self, data: list[_Vector]) -> list[Delta]:
        places = [at if each.index is None else each.index for at, each in enumerate(data)]
        if sorted(places) != list(range(self._choices)):
            raise ValueError(f"there are {len(data)} for {self._choices} inputs, or their numbers are wrong")
        texts = [each.embedding if isinstance(each.embedding, str) else encode_floats(each.embedding) for each in data]
        if len({dimensions(text) for text in texts}) > 1 or not dimensions(texts[0]):
            raise ValueError("they have no dimensions, or not all the same")
        return [vector_delta(place, text) for place, text in sorted(zip(places, texts, strict=True))]
