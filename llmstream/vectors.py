"""Embeddings as a job's log holds them: one delta for each input, in the order of the inputs. Pure.

A vector is kept as the base64 of its little-endian 32-bit floats, which is also how official clients ask for it.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from struct import error, pack, unpack
from typing import Any, Final

from llmstream.transcript import Choice, Transcript
from llmstream.types import Delta, Usage

EMBEDDING: Final = "embedding"
"""The member of a delta that holds the vector."""
TOKENS: Final = "tokens"
"""The member that holds the tokens of the slice that ends with this delta."""
MODEL: Final = "model"
"""The member that says which model here made the vector: those of different models must not be mixed."""
FLOAT_BYTES: Final = 4

SLICE_INPUTS: Final = 32
SLICE_BYTES: Final = 4096
"""What is worked through in one go: about a thousand tokens, half a second of one core for a small model."""

Input = str | list[int]


def slices(inputs: Sequence[Input], start: int = 0) -> Iterator[range]:
    """Cuts the inputs from ``start`` on into slices; one that is larger than a slice stands alone."""
    first, held = start, 0
    for at in range(start, len(inputs)):
        weight = _bytes(inputs[at])
        if at > first and (held + weight > SLICE_BYTES or at - first == SLICE_INPUTS):
            yield range(first, at)
            first, held = at, 0
        held += weight
    if first < len(inputs):
        yield range(first, len(inputs))


def _bytes(value: Input) -> int:
    return len(value.encode(errors="replace")) if isinstance(value, str) else FLOAT_BYTES * len(value)


def vector_delta(index: int, vector: str) -> Delta:
    """The whole answer to one input."""
    return Delta(index=index, fields={EMBEDDING: vector}, finish_reason="stop")


class Slices:
    """Makes the deltas of one model's vectors, slice by slice, and counts the tokens of all."""

    def __init__(self, inputs: Sequence[Input], model: str, so_far: Transcript | None) -> None:
        self._inputs, self._model = inputs, model
        self._begin, self._tokens = (so_far.ended, _used(so_far)) if so_far is not None else (0, 0)

    def __iter__(self) -> Iterator[range]:
        return slices(self._inputs, self._begin)

    def deltas(self, part: range, vectors: Iterable[str], tokens: int) -> list[Delta]:
        """What to log of a slice that took ``tokens``; behind the last one comes the usage of the whole request."""
        self._tokens += tokens
        made = []
        for index, vector in zip(part, vectors, strict=True):
            fields = {EMBEDDING: vector, MODEL: self._model, **({TOKENS: tokens} if index == part[-1] else {})}
            usage = Usage(prompt_tokens=self._tokens) if index == len(self._inputs) - 1 else None
            made.append(Delta(index=index, fields=fields, finish_reason="stop", usage=usage))
        return made


def encode_floats(floats: Sequence[float]) -> str:
    """Raises ValueError for what is no vector of 32-bit floats."""
    try:
        return b64encode(pack(f"<{len(floats)}f", *floats)).decode()
    except (error, OverflowError, TypeError) as wrong:
        raise ValueError(f"it is no list of numbers: {wrong}") from None


def decode_floats(vector: str) -> tuple[float, ...]:
    """The numbers of a vector, exactly. Raises ValueError for what is none."""
    data = b64decode(vector, validate=True)
    if len(data) % FLOAT_BYTES or not data:
        raise ValueError(f"{len(data)} bytes are no 32-bit floats")
    return unpack(f"<{len(data) // FLOAT_BYTES}f", data)


def dimensions(vector: str) -> int:
    """How many numbers a vector has."""
    return (len(vector) // 4 * 3 - vector.endswith("=") - vector.endswith("==")) // FLOAT_BYTES


def vectors(transcript: Transcript) -> list[str]:
    """All vectors of a job, in the order of its inputs."""
    return [_member(choice, EMBEDDING) for _, choice in sorted(transcript.choices.items())]


def _used(transcript: Transcript) -> int:
    """Tokens of the inputs that have their vectors."""
    return sum(_member(choice, TOKENS) or 0 for choice in transcript.choices.values())


def made_by(transcript: Transcript, model: str) -> bool:
    """Whether all vectors so far are from this model."""
    return all(not choice.fields or _member(choice, MODEL) == model for choice in transcript.choices.values())


def _member(choice: Choice, name: str) -> Any:
    return next((fields[name] for fields in choice.fields if name in fields), None)
