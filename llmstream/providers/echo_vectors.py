"""Vectors without weights: texts that share words point the same way. Pure."""

from __future__ import annotations

import math
from zlib import crc32

DIMENSIONS = 64


def vector(value: str | list[int]) -> list[float]:
    """A bag of words, or of token ids, hashed into ``DIMENSIONS`` numbers and scaled to length 1."""
    words = value.lower().split() if isinstance(value, str) else [str(token) for token in value]
    bag = [0.0] * DIMENSIONS
    for word in words or [""]:
        number = crc32(word.encode(errors="replace"))
        bag[number % DIMENSIONS] += 1.0 if number & DIMENSIONS else -1.0
    length = math.sqrt(sum(each * each for each in bag))
    return [each / length for each in bag] if length else [1.0, *bag[1:]]


def tokens(value: str | list[int]) -> int:
    """Words of a text, ids of a list of these."""
    return len(value.split()) if isinstance(value, str) else len(value)
