"""What the document says about an operation and its route, rule and handler do not say themselves.

A family of routes has a module beside this one that calls :func:`describe` for each of its handlers. Method, path,
summary and description, scopes and what a body or a key can be refused for come from the application itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]
EVENT_STREAM = "text/event-stream"


class Parameter(NamedTuple):
    """Something in the path, the query or the headers of a request."""

    name: str
    type: Any
    """As pydantic takes it; the schema is made from it."""
    meaning: str
    where: Literal["path", "query", "header"] = "query"
    example: Any = None
    default: Any = None


class Answer(NamedTuple):
    """A good answer."""

    meaning: str
    type: Any = None
    """Of the body, or of the data of each event of a stream; None: there is no body."""
    example: Any = None
    media: str = "application/json"
    headers: Sequence[str] = ()
    """Names of :data:`llmstream.api.docs.common.HEADERS` that it always bears."""


@dataclass(frozen=True, slots=True)
class Operation:
    tag: str
    answers: Mapping[int, Sequence[Answer]]
    body: Any = None
    """The model that validates it, or a union of models where there are several."""
    examples: Mapping[str, Json] = field(default_factory=dict)
    """Bodies to send, by what they show."""
    parameters: Sequence[Parameter] = ()
    """Of query and headers. Those in the path are found there."""
    errors: Sequence[int] = ()
    """Statuses beside those that follow from a body, parameters and the rule."""
    path: Mapping[str, str] = field(default_factory=dict)
    """Examples for parts of the path where the usual one will not do."""


OPERATIONS: dict[Callable[..., Any], Operation] = {}
"""By handler."""


def describe(
    handler: Callable[..., Any],
    tag: str,
    *,
    answers: Mapping[int, Answer | Sequence[Answer]],
    body: Any = None,
    examples: Mapping[str, Json] | None = None,
    parameters: Sequence[Parameter] = (),
    errors: Sequence[int] = (),
    path: Mapping[str, str] | None = None,
) -> None:
    """Puts a handler into the document. ``answers`` are the good ones by status, several where a status has several
    media types; the members are those of :class:`Operation`."""
    given = {status: [each] if isinstance(each, Answer) else each for status, each in answers.items()}
    OPERATIONS[handler] = Operation(tag, given, body, examples or {}, parameters, errors, path or {})
