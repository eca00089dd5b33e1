"""Makes the OpenAPI document of an application: routes, rules, docstrings, schemas, and what families add."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

from aiohttp import web
from pydantic.json_schema import JsonSchemaMode

from llmstream.api.access import RULES, TOKEN, UNDECIDED, Rule
from llmstream.api.docs.common import EVERYWHERE, HEADERS, MEANINGS, PATH, error_answer
from llmstream.api.docs.operation import EVENT_STREAM, OPERATIONS, Answer, Json, Operation, Parameter
from llmstream.api.docs.schema import plain, schemas_of

FAMILIES = ("chat", "openai", "embeddings", "jobs", "queues", "services", "monitoring", "webhooks")
"""Modules beside this one that describe handlers."""
ABOUT = (
    "Answers of language models that are not lost: every answer is a job, every job is a log, and every stream can be "
    "read on behind the last event that was seen."
)
TAGS = {
    "Chat": "Jobs with priorities, read as server-sent events.",
    "OpenAI": "For OpenAI clients. Fields that are not listed here go to the provider as they are.",
    "Embeddings": "Texts as vectors.",
    "Jobs": "What was done lately, what was given up, and giving it another chance.",
    "Queues": "What waits where, and which parts of it are paused or drained.",
    "Sessions": "The conversations that the server keeps.",
    "Webhooks": "Events that tell of the end of jobs, to whom a request's `webhook` names.",
    "Model service": "A service around one model.",
    "LLM core": "A queue in front of a model, with the caller's own job ids.",
    "Question answering": "A text in, a text out.",
    "Proxy": "A streaming proxy for several providers.",
    "Monitoring": "What one looks at first when something is wrong.",
}
EVENT: Json = {
    "id": {"type": "string", "description": "Where the event stands in the log; `Last-Event-ID` names it."},
    "retry": {"type": "integer", "minimum": 0},
}
"""The fields of a server-sent event beside its data."""


class Place(NamedTuple):
    """A route that the document has to show."""

    method: str
    path: str
    handler: Callable[..., Any]

    @property
    def rule(self) -> Rule:
        return RULES.get(self.handler, UNDECIDED)


def places(app: web.Application) -> Iterator[Place]:
    """Every route of the application apart from the document's own."""
    for route in app.router.routes():
        resource = route.resource
        place = Place(route.method, re.sub(r":[^{}]*}", "}", resource.canonical) if resource else "", route.handler)
        if resource is not None and route.method != "HEAD" and place.rule.group != "docs":
            yield place


def undescribed(app: web.Application) -> list[Place]:
    """Routes that no family describes."""
    _load()
    return [place for place in places(app) if place.handler not in OPERATIONS]


def document(app: web.Application, *, authenticated: bool, open_groups: Collection[str], base: str = "") -> Json:
    """The document. ``base`` is where the application is mounted, which paths begin with and should not."""
    _load()
    found = [place for place in places(app) if place.handler in OPERATIONS]
    making = _Making(found, authenticated=authenticated, open_groups=open_groups)
    paths: dict[str, Json] = {}
    for place in found:
        paths.setdefault(place.path.removeprefix(base), {})[place.method.lower()] = making.operation(place)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "llmstream",
            "version": version("llmstream"),
            "description": ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": ".", "description": "This server."}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": making.named,
            "headers": {name: _header(name, text) for name, text in HEADERS.items()},
            "responses": {str(status): making.answers([error_answer(status)]) for status in MEANINGS},
            "securitySchemes": _security_schemes(),
        },
    }


def _load() -> None:
    for family in FAMILIES:
        importlib.import_module(f"{__package__}.{family}")


class _Making:
    def __init__(self, found: list[Place], *, authenticated: bool, open_groups: Collection[str]) -> None:
        self._authenticated = authenticated
        self._open_groups = open_groups
        self._ids: set[str] = set()
        self._schemas, self.named = schemas_of(_types([OPERATIONS[place.handler] for place in found]))

    def operation(self, place: Place) -> Json:
        described, rule = OPERATIONS[place.handler], place.rule
        first, _, rest = inspect.cleandoc(place.handler.__doc__ or "").partition("\n\n")
        texts = [plain(rest)] if rest else []
        made: Json = {
            "operationId": self._id(place),
            "tags": [described.tag],
            "summary": plain(first).rstrip(".").replace("`", ""),
            "description": "\n\n".join([*texts, _who(rule)]),
            "parameters": [self._parameter(each) for each in _parameters(place, described)],
            "responses": {
                **{str(status): self.answers(each) for status, each in described.answers.items()},
                **{str(status): {"$ref": f"#/components/responses/{status}"} for status in _errors(place, described)},
                "default": {"$ref": "#/components/responses/500"},
            },
            "security": self._security(rule),
        }
        if described.body is not None:
            examples = {_slug(name): {"summary": name, "value": body} for name, body in described.examples.items()}
            content: Json = {"schema": self._schemas[id(described.body), "validation"], "examples": examples}
            made["requestBody"] = {"required": True, "content": {"application/json": content}}
        return made

    def answers(self, answers: Any) -> Json:
        """A response: what it means, its headers, and each form that its body can have."""
        headers = [*EVERYWHERE, *dict.fromkeys(name for each in answers for name in each.headers)]
        made: Json = {
            "description": " Or: ".join(each.meaning for each in answers),
            "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        }
        content = {each.media: self._content(each) for each in answers if each.media and each.type is not None}
        return {**made, "content": content} if content else made

    def _content(self, answer: Answer) -> Json:
        schema = self._schemas[id(answer.type), "serialization"]
        if answer.media != EVENT_STREAM:
            return {"schema": schema, "example": answer.example}
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
        event = {"type": "object", "required": ["data"], "properties": {**EVENT, "data": data}}
        # What OpenAPI 3.2 calls itemSchema: in 3.1 a stream is one text.
        kinds = [each["$ref"].rpartition("/")[2] for each in schema.get("anyOf", [schema]) if "$ref" in each]
        text = {"type": "string", "description": f"Server-sent events; the data of each: {', '.join(kinds)}."}
        return {"schema": text, "x-itemSchema": event, "example": answer.example}

    def _parameter(self, parameter: Parameter) -> Json:
        schema = self._schemas[id(parameter.type), "validation"]
        if parameter.default is not None:
            schema = {**schema, "default": parameter.default}
        made: Json = {"name": parameter.name, "in": parameter.where, "description": parameter.meaning, "schema": schema}
        if parameter.where == "path":
            made["required"] = True
        return made if parameter.example is None else {**made, "example": parameter.example}

    def _security(self, rule: Rule) -> list[Json]:
        if rule.group in self._open_groups:
            return []
        schemes: list[Json] = [{"bearer": []}, {"apiKey": []}]
        if rule.ticket:
            schemes.append({"streamToken": []})
        return schemes if self._authenticated else [{}, *schemes]

    def _id(self, place: Place) -> str:
        name = f"{place.handler.__module__.rpartition('.')[2]}_{place.handler.__name__}"
        name = f"{name}_{place.method.lower()}" if name in self._ids else name
        self._ids.add(name)
        return name


def _types(operations: list[Operation]) -> Iterator[tuple[Any, JsonSchemaMode]]:
    seen: set[tuple[int, str]] = set()
    wanted: list[tuple[Any, JsonSchemaMode]] = []
    for operation in operations:
        wanted += [(each.type, "validation") for each in (*operation.parameters, *PATH.values())]
        wanted += [(operation.body, "validation")]
        wanted += [(each.type, "serialization") for answers in operation.answers.values() for each in answers]
    wanted += [(error_answer(status).type, "serialization") for status in MEANINGS]
    for type_, mode in wanted:
        if type_ is not None and (id(type_), mode) not in seen:
            seen.add((id(type_), mode))
            yield type_, mode


def _parameters(place: Place, operation: Operation) -> Iterator[Parameter]:
    for name in re.findall(r"{(\w+)}", place.path):
        usual = PATH.get(name, Parameter(name, str, "", "path"))
        yield usual._replace(example=operation.path.get(name, usual.example))
    yield from operation.parameters


def _errors(place: Place, operation: Operation) -> list[int]:
    found = set(operation.errors)
    if operation.body is not None:
        found |= {400, 408, 413, 415}
    if operation.parameters:
        found.add(400)
    if "{" in place.path:
        found.add(404)
    found |= {401} if place.rule.scope == "read" else {401, 403}
    return sorted(found)


def _who(rule: Rule) -> str:
    if rule.group is not None:
        return f"Needs no API key where `security.open` names `{rule.group}`, as it does by default."
    ticket = ", or the token of a `stream_url`" if rule.ticket else ""
    return f"Where there are API keys: needs one with the scope `{rule.scope}`{ticket}."


def _header(name: str, text: str) -> Json:
    numeric = name in {"X-Process-Time", "Retry-After", "retry-after-ms"}
    return {"description": text, "schema": {"type": "number" if numeric else "string"}}


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def _security_schemes() -> Json:
    return {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key as `Authorization: Bearer KEY`."},
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
        "streamToken": {
            "type": "apiKey",
            "in": "query",
            "name": TOKEN,
            "description": "The token in a `stream_url`: opens this one stream, for a while.",
        },
    }
