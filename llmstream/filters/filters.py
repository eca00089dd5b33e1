"""The filters of the settings: at requests before anything of them is kept, at answers before they are logged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from msgspec.structs import replace

from llmstream.config_filters import FilterSettings, PresidioSettings, redacted
from llmstream.filters.answer import AnswerFilter, Replacing, placeholders
from llmstream.filters.presidio import Recognize, Sentences, load
from llmstream.filters.texts import Names, Part, mapped, replaced
from llmstream.patterns.scanner import Found, Pattern, Scanner, Scans
from llmstream.telemetry.metrics import Counter
from llmstream.types import GenerateRequest, encode

LARGE_BYTES = 32 * 1024
"""A request of this size is looked at in a thread."""

Look = Callable[[Found, str], str]
"""Says what stands in the place of a match with a text."""


class Filters:
    """Without any in the settings, requests and answers pass untouched, at the cost of one look for each."""

    def __init__(
        self, settings: Mapping[str, FilterSettings], presidio: PresidioSettings, counter: Counter | None = None
    ) -> None:
        self._counter = counter or Counter("", "", ("filter", "direction", "action"))
        self._presidio = presidio
        redacting = {name: each for name, each in settings.items() if each.action == "redact"}
        self._redact_in = _Search({name: each for name, each in redacting.items() if each.direction != "out"})
        self._redact_out = _Search({name: each for name, each in redacting.items() if each.direction != "in"})
        self._restore = _Search({name: each for name, each in settings.items() if each.action == "restore"})

    async def open(self) -> None:
        """Loads what takes long. Raises ConfigError where it is missing."""
        searches = (self._redact_in, self._redact_out, self._restore)
        if entities := {name: entity for search in searches for name, entity in search.entities.items()}:
            recognize = await asyncio.to_thread(load, self._presidio, entities)
            for search in searches:
                search.use(recognize, self._presidio.max_hold_chars)

    async def redacted(self, request: GenerateRequest) -> GenerateRequest:
        """The request without what may never be kept. Doing it twice is fine."""
        if request.redacted or not self._redact_in.sought:
            return request
        changed = await self._changed(request, self._redact_in, "redact", lambda found, _: redacted(found.name))
        return replace(changed, redacted=True)

    async def masked(self, request: GenerateRequest) -> GenerateRequest:
        """The request with placeholders for what the model is not to see."""
        if request.names is not None or not self._restore.sought:
            return request
        names = Names(encode(request.body).decode())
        changed = await self._changed(request, self._restore, "restore", names.of)
        return replace(changed, redacted=request.redacted, names=names.originals) if names.originals else request

    def outward(self, request: GenerateRequest) -> AnswerFilter | None:
        """What the answer goes through; None: it needs nothing."""
        search = self._redact_out
        if (not search.sought and not request.names) or request.kind == "embedding":  # whose answer is no text
            return None
        scanner = search.with_placeholders if request.names else search.scanner
        replacing = Replacing(request.names or {}, self._counted("out", "redact"), self._counted("out", "restore"))
        return AnswerFilter(scanner, replacing, slow=bool(search.entities))

    def _counted(self, direction: str, action: str) -> Callable[[str], None]:
        return lambda name: self._counter.add(name, direction, action)

    async def _changed(self, request: GenerateRequest, search: _Search, action: str, look: Look) -> GenerateRequest:
        seen: list[str] = []

        def change(text: str) -> str:
            found, _ = search.scanner.scan(text)
            seen.extend(each.name for each in found)
            return replaced(
                text, [Part(each.start, each.end, look(each, text[each.start : each.end]), True) for each in found]
            )

        if search.entities or len(request.raw) > LARGE_BYTES:
            body = await asyncio.to_thread(mapped, request.body, change)
        else:
            body = mapped(request.body, change)
        for name in seen:
            self._counter.add(name, "in", action)
        return GenerateRequest.of(request.kind, request.model, body, request.provider) if seen else request


class _Search:
    """What some filters look for."""

    def __init__(self, sought: Mapping[str, FilterSettings]) -> None:
        self.sought = sought
        self.entities = {name: each.entity for name, each in sought.items() if each.entity is not None}
        self._patterns = [each.sought(name) for name, each in sought.items() if each.entity is None]
        self._recognize: Recognize = lambda _: ()
        self._max_hold = 0

    def use(self, recognize: Recognize, max_hold: int) -> None:
        names = self.entities.keys()
        self._recognize = lambda text: [each for each in recognize(text) if each.name in names]
        self._max_hold = max_hold

    @cached_property
    def scanner(self) -> Scans:
        return self._scanner(())

    @cached_property
    def with_placeholders(self) -> Scans:
        return self._scanner([placeholders()])

    def _scanner(self, more: Sequence[Pattern]) -> Scans:
        patterns = [*self._patterns, *more]
        scanner = Scanner(patterns) if patterns else None
        if self.entities:
            return Sentences(self._recognize, scanner, self._max_hold)
        assert scanner is not None
        return scanner
