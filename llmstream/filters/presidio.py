"""What Microsoft Presidio recognizes in texts, sentence by sentence. Slow: call it from a thread."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmstream.config_filters import PresidioSettings
from llmstream.errors import ConfigError
from llmstream.patterns.scanner import Found, Scanner

Recognize = Callable[[str], Sequence[Found]]

_END = re.compile(r"[.!?…]+(?=\s)|[\u3002\uff01\uff1f](?=.)|(?<=\S)(?=\n)", re.DOTALL)
_WHITE = re.compile(r"(?<=\S)(?=\s)")


def load(settings: PresidioSettings, entities: Mapping[str, str]) -> Recognize:
    """Loads what recognizes ``entities``, named by their filters. Takes seconds. Raises ConfigError."""
    try:
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry

        nlp = _nlp_engine(settings)
    except ImportError as error:
        raise ConfigError(
            f"filters with an entity need Presidio ({error.name} is missing): pip install 'llmstream[presidio]'"
        ) from None
    language = settings.language
    registry = RecognizerRegistry(supported_languages=[language])
    registry.load_predefined_recognizers(languages=[language], nlp_engine=nlp)
    engine = AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=[language])
    by_model = set() if settings.model else set(nlp.get_supported_entities())
    known = set(engine.get_supported_entities(language)) - by_model
    names = {entity: name for name, entity in entities.items()}
    for entity, name in names.items():
        if entity in by_model:
            raise ConfigError(f"filters.{name}.entity = {entity!r} is recognized by a model only: set presidio.model")
        if entity not in known:
            raise ConfigError(
                f"filters.{name}.entity = {entity!r}: Presidio recognizes no such entity in language {language!r}; "
                f"known: {', '.join(sorted(known))}"
            )

    def recognize(text: str) -> Sequence[Found]:
        found = engine.analyze(text, language=language, entities=list(names), score_threshold=settings.score)
        return [Found(names[each.entity_type], each.start, each.end) for each in found]

    return recognize


def _nlp_engine(settings: PresidioSettings) -> Any:
    import spacy
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    try:
        loaded = spacy.load(settings.model) if settings.model else spacy.blank(settings.language)
    except (OSError, ImportError) as error:
        said = (
            f"presidio.model = {settings.model!r}" if settings.model else f"presidio.language = {settings.language!r}"
        )
        raise ConfigError(f"{said}: spaCy cannot load it; install the model as a package: {error}") from None
    engine = SpacyNlpEngine(models=[{"lang_code": settings.language, "model_name": settings.model or "blank"}])
    engine.nlp = {settings.language: loaded}  # type: ignore[assignment, unused-ignore]
    return engine


class Sentences:
    """Looks for patterns, and for what it takes a whole sentence to recognize.

    Where a sentence ends depends on the text alone, so an answer comes out the same whatever pieces it came in.
    """

    def __init__(self, recognize: Recognize, patterns: Scanner | None, max_hold: int) -> None:
        self._recognize = recognize
        self._patterns = patterns
        self._max_hold = max_hold

    def scan(self, text: str, start: int = 0, *, over: bool = True) -> tuple[list[Found], int]:
        """See :class:`~llmstream.patterns.scanner.Scans`; what is settled ends with a sentence."""
        exact, safe = self._patterns.scan(text, start, over=over) if self._patterns is not None else ([], len(text))
        found: list[Found] = []
        while (end := self._end(text, start, exact, safe, over=over)) > start:
            said = [each for each in exact if start <= each.start < end]
            guessed = [
                Found(each.name, each.start + start, each.end + start) for each in self._recognize(text[start:end])
            ]
            found += apart([*said, *guessed])
            start = end
        return found, start

    def _end(self, text: str, start: int, exact: Sequence[Found], safe: int, *, over: bool) -> int:
        """Where the sentence at ``start`` ends; ``start`` when that is not known yet."""

        def allowed(at: int) -> bool:
            return start < at <= safe and not any(each.start < at < each.end for each in exact)

        first = text[start:].lstrip()
        begin = len(text) - len(first)
        limit = begin + self._max_hold
        for end in _END.finditer(text, begin, min(limit + 1, len(text))):
            if allowed(end.end()):
                return end.end()
        if len(text) > limit:
            spaces = [each.start() for each in _WHITE.finditer(text, begin, limit)]
            later = range(limit, len(text) + 1)
            return next((at for at in (*reversed(spaces), *later) if allowed(at)), start)
        return len(text) if over else start


def apart(found: Sequence[Found]) -> list[Found]:
    """What does not overlap: the leftmost, of those the longest."""
    kept: list[Found] = []
    for each in sorted(found, key=lambda each: (each.start, -each.end)):
        if not kept or each.start >= kept[-1].end:
            kept.append(each)
    return kept
