"""Where texts stand in requests and answers, and what is put in the place of a match. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from llmstream.config_filters import placeholder
from llmstream.patterns.scanner import Found

NO_TEXT: Final = frozenset({
    "role", "type", "id", "tool_call_id", "call_id", "name", "model", "provider", "job_id", "session_id", "object",
    "image_url", "images", "input_audio", "audio", "file", "data", "encrypted_content", "signature", "format",
})  # fmt: skip
"""Members that name things, or hold what is no text."""
IN_JSON: Final = frozenset({"arguments", "partial_json"})
"""Members whose text is JSON itself."""

Path = tuple[str | int, ...]
Count = Callable[[str], None]
"""Hears of every match, by the name of its filter."""


class Part(NamedTuple):
    """What becomes of a piece of text."""

    start: int
    end: int
    text: str
    lost: bool
    """Whether what stood there is kept nowhere."""


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text changed; what has none comes back as it is."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: item if key in NO_TEXT else mapped(item, change) for key, item in value.items()}
    return value


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """The texts of a streamed delta and where each goes on: items of a list are told apart by their ``index``."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for at, item in enumerate(value):
            index = item.get("index", at) if isinstance(item, dict) else at
            yield from leaves(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in NO_TEXT:
                yield from leaves(item, (*path, key))


def with_leaves(value: Any, texts: Mapping[Path, str], path: Path = ()) -> Any:
    """A delta with other texts; those that have become empty are left out."""
    if isinstance(value, list):
        indexes = [item.get("index", at) if isinstance(item, dict) else at for at, item in enumerate(value)]
        return [with_leaves(item, texts, (*path, index)) for index, item in zip(indexes, value, strict=True)]
    if isinstance(value, dict):
        made = {}
        for key, item in value.items():
            if not isinstance(item, str) or key in NO_TEXT:
                made[key] = item if key in NO_TEXT else with_leaves(item, texts, (*path, key))
            elif (text := texts.get((*path, key), item)) or not item:
                made[key] = text
        return made
    return texts.get(path, value)


def at_path(path: Path, text: str) -> Any:
    """A delta with one text."""
    if not path:
        return text
    inner = at_path(path[1:], text)
    first = path[0]
    if isinstance(first, str):
        return {first: inner}
    return [{"index": first, **inner} if isinstance(inner, dict) else inner]


def replaced(text: str, parts: Sequence[Part], start: int = 0, end: int | None = None) -> str:
    """A text, or a part of it, with its matches replaced."""
    pieces = []
    for part in parts:
        pieces += [text[start : part.start], part.text]
        start = part.end
    return "".join((*pieces, text[start:end]))


class Names:
    """Gives each text that is to be restored its placeholder; the same text always the same one."""

    def __init__(self, taken: str) -> None:
        """``taken``: where a placeholder that stands there already would be mistaken for ours."""
        self.originals: dict[str, str] = {}
        self._taken = taken
        self._by_original: dict[tuple[str, str], str] = {}
        self._last: dict[str, int] = {}

    def of(self, found: Found, original: str) -> str:
        known = self._by_original.get((found.name, original))
        if known is not None:
            return known
        number = self._last.get(found.name, 0) + 1
        while (name := placeholder(found.name, number)) in self._taken:
            number += 1
        self._last[found.name] = number
        self._by_original[found.name, original] = name
        self.originals[name] = original
        return name


def escaped(path: Path, text: str) -> str:
    """A text as it stands in the member at ``path``."""
    return json.dumps(text, ensure_ascii=False)[1:-1] if path and path[-1] in IN_JSON else text
