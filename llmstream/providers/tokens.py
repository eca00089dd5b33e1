"""How many tokens a text has, for upstreams that do not say: counted if a tokenizer is installed, else estimated.

It is OpenAI's vocabulary ``o200k_base`` or a rule of thumb, and so not quite the model's own count either way.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Final

from llmstream.transcript import Transcript
from llmstream.types import GenerateRequest

_PACKAGE: Final = "bpe_openai"
_SLICE: Final = 4000
"""Characters that are counted in one go; meanwhile the rest of the process may have to wait."""
_BYTES_PER_TOKEN: Final = 4
_FRAME: Final = 4
"""Tokens around a message: who speaks, where it begins and ends."""


def estimated(text: str) -> int:
    """A token for every four bytes, as in English; what needs more bytes a character has more tokens, too."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


class Tokenizer:
    """Counts tokens off the event loop."""

    def __init__(self, *, exact: bool = False) -> None:
        """``exact``: by the vocabulary, if its package is installed. It is loaded when somebody first needs it, which
        takes a moment and 140 MB."""
        self._exact = exact and find_spec(_PACKAGE) is not None
        self._encoding: Any = None
        self._loading = threading.Lock()

    async def count(self, texts: Iterable[str]) -> int:
        """The tokens of some texts together."""
        return await asyncio.to_thread(lambda: sum(map(self._count, texts)))

    def _count(self, text: str) -> int:
        if not self._exact:
            return estimated(text)
        encoding = self._loaded()
        slices = (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
        return sum(len(encoding.encode_ordinary(piece)) for piece in slices)

    def _loaded(self) -> Any:
        with self._loading:
            if self._encoding is None:
                import bpe_openai

                self._encoding = bpe_openai.get_encoding("o200k_base")
            return self._encoding


def asked(request: GenerateRequest) -> tuple[list[str], int]:
    """The texts of a prompt, and the tokens that stand between them. Images and audio count nothing."""
    if request.kind == "completion":
        return list(_texts(request.body.get("prompt"))), 0
    if request.kind == "embedding":
        texts = [value for value in request.inputs if isinstance(value, str)]
        return texts, sum(len(value) for value in request.inputs if not isinstance(value, str))
    texts = [text for message in request.messages for text in _texts(message)]
    texts += _texts(request.body.get("tools"))
    return texts, _FRAME * len(request.messages)


def answered(transcript: Transcript) -> list[str]:
    """The texts of an answer: what was said and thought, and the calls of tools."""
    return [text for choice in transcript.choices.values() for text in _texts(choice.message)]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a message or a part of one, but for what only says which kind it is or holds data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in {"role", "type", "id", "tool_call_id", "image_url", "input_audio", "audio", "file", "images"}:
                yield from _texts(item)
