"""What is kept from models, and from those who read their answers: personal data and other texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from llmstream.config_schema import Section
from llmstream.patterns.known import KNOWN, known
from llmstream.patterns.scanner import Pattern, Scanner

Action = Literal["redact", "restore"]
Direction = Literal["in", "out", "both"]
FILTER_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


class FilterSettings(Section):
    pattern: str | None = None
    """What to look for, a regular expression whose matches are 512 characters long at most; None: what the name stands
    for (``email``, ``phone``, ``card``, ``iban``, ``ip``, ``ssn``)."""
    entity: str | None = None
    """In place of a pattern an entity of Presidio's, for example ``PERSON`` (``pip install 'llmstream[presidio]'``)."""
    action: Action = "redact"
    """``redact`` puts ``[NAME]`` in its place for good; ``restore`` shows the model ``<NAME_1>`` and the caller, where
    the model repeats that, the original."""
    direction: Direction = "both"
    """Where ``redact`` looks: at requests (``in``), at answers (``out``)."""

    @field_validator("pattern")
    @classmethod
    def _readable(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            Pattern("", pattern)
        return pattern

    def sought(self, name: str) -> Pattern:
        """The pattern of the filter ``name``, which is none of Presidio's."""
        return known(name) if self.pattern is None else Pattern(name, self.pattern)


class PresidioSettings(Section):
    language: str = "en"
    """Language of the texts, as Presidio's recognizers know it."""
    model: str | None = None
    """Installed spaCy model, for example ``en_core_web_lg``, for entities such as ``PERSON``; None: only what Presidio
    recognizes without one."""
    score: Annotated[float, Field(ge=0, le=1)] = 0.4
    """How sure Presidio has to be."""
    max_hold_chars: Annotated[int, Field(ge=40, le=4000)] = 400
    """Answers are looked at sentence by sentence; a sentence that is longer is looked at in parts of this length."""


def redacted(name: str) -> str:
    """What stands in the place of what the filter ``name`` took out."""
    return f"[{name.upper()}]"


def placeholder(name: str, number: int) -> str:
    """What the model sees in the place of what is put back later."""
    return f"<{name.upper()}_{number}>"


def filter_problems(filters: Mapping[str, FilterSettings]) -> Iterator[str]:
    """What is wrong with the filters together."""
    for name, settings in filters.items():
        if not FILTER_NAME.fullmatch(name):
            yield (
                f"filters: the name {name[:80]!r} is not allowed; expected up to 32 lower-case letters, digits and _ "
                "that begin with a letter"
            )
        elif settings.pattern is None and settings.entity is None and name not in KNOWN:
            yield f"filters.{name}.pattern is required: what to look for; only {', '.join(KNOWN)} are known by name"
        elif settings.pattern is not None and settings.entity is not None:
            yield f"filters.{name}: pattern and entity are two ways to say what to look for; leave one of them out"
        elif settings.pattern is not None and (taken := _placeholder_matched(Pattern(name, settings.pattern), filters)):
            yield f"filters.{name}.pattern also matches {taken}, which filters put into texts; make it more exact"
        if settings.action == "restore" and settings.direction != "both":
            yield f"filters.{name}.direction = {settings.direction!r}: restore works in both; leave it out"


def _placeholder_matched(pattern: Pattern, filters: Mapping[str, FilterSettings]) -> str | None:
    scanner = Scanner([pattern])
    texts = [text for name in filters for text in (redacted(name), placeholder(name, 1))]
    return next((text for text in texts if scanner.find(text)), None)
