"""The OpenAPI document: valid, complete, made of what validates."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from openapi_spec_validator import OpenAPIV31SpecValidator

from llmstream.api import chat
from llmstream.api.access import needs
from llmstream.api.app import create_app
from llmstream.api.body import validate
from llmstream.api.docs.document import FAMILIES, TAGS, document, undescribed
from llmstream.api.docs.operation import OPERATIONS
from llmstream.api.schemas import ChatBody
from llmstream.config import Settings
from llmstream.errors import BadRequest
from tests.api.keyed import keyed_settings
from tests.docs.reading import Document, Json


@pytest.fixture(scope="module")
def app() -> web.Application:
    return create_app(keyed_settings(Path("unused")))


@pytest.fixture(scope="module")
def made(app: web.Application) -> Document:
    return Document(document(app, authenticated=True, open_groups=["health", "metrics", "docs"]))


def test_it_is_valid(made: Document) -> None:
    """The document is OpenAPI 3.1."""
    assert made.json["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(made.json).validate()


def test_every_route_is_described(app: web.Application) -> None:
    """No route is missing in the document."""
    missing = [
        f"{place.method} {place.path} is not described: call describe({place.handler.__module__.rpartition('.')[2]}."
        f"{place.handler.__name__}, …) in one of llmstream/api/docs/{{{','.join(FAMILIES)}}}.py"
        for place in undescribed(app)
    ]
    assert not missing, "\n".join(missing)


def test_a_route_without_description_is_seen(app: web.Application) -> None:
    """The test above does not overlook a new route."""
    new = web.Application()

    @needs("read")
    async def handler(request: web.Request) -> web.Response:
        """Answers."""
        return web.Response()

    new.router.add_get("/new/{part}", handler)
    assert [(place.method, place.path) for place in undescribed(new)] == [("GET", "/new/{part}")]


def test_every_operation_is_explained(made: Document) -> None:
    """Operations have a summary, a known tag and an id of their own; parameters have a meaning, bodies an example."""
    ids = [operation.says["operationId"] for operation in made.operations]
    assert len(ids) == len(set(ids))
    for operation in made.operations:
        assert operation.says["summary"], f"{operation.name}: its handler has no docstring"
        assert set(operation.says["tags"]) <= TAGS.keys(), f"{operation.name}: name the tag in document.TAGS"
        for each in operation.says["parameters"]:
            assert each["description"], f"{operation.name}: say in common.PATH what {{{each['name']}}} is"
        if operation.body is not None:
            assert operation.body["examples"], operation.name


def test_bodies_are_what_validates(made: Document) -> None:
    """The schema of a body has the limits of the model that checks it, and its texts."""
    schema = made.resolved((made.operation("POST", "/chat/async").body or {})["schema"])
    assert schema["properties"]["priority"].items() >= {"minimum": -10, "maximum": 10, "default": 0}.items()
    assert "Extension" not in schema["properties"]["priority"]["description"]
    completion = made.resolved((made.operation("POST", "/v1/chat/completions").body or {})["schema"])
    assert completion["required"] == ["model", "messages"]
    assert completion["additionalProperties"] is True


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"message": "Hello!"},
        {"messages": [{"role": "user", "content": "Hello!"}]},
        {"message": "Hello!", "messages": None},
        {"message": None, "messages": [{"role": "user", "content": "Hello!"}]},
        {"message": "Hello!", "messages": [{"role": "user", "content": "Hello!"}]},
        {"message": None},
    ],
)
def test_one_of_both(made: Document, body: Json) -> None:
    """The schema allows a message and a conversation together as little as the model does."""
    try:
        validate(ChatBody, body)
        allowed = True
    except BadRequest:
        allowed = False
    assert (made.complaints({"$ref": "#/components/schemas/ChatBody"}, body) == []) is allowed


def test_what_a_mistake_costs_is_told(made: Document) -> None:
    """Errors have one schema, and the codes of the tree of errors."""
    responses = made.json["components"]["responses"]
    assert all(
        answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
        for answer in responses.values()
    )
    assert "`model_not_found`" in responses["404"]["description"]
    assert "Retry-After" in responses["429"]["headers"]


def test_who_may_call_is_told(made: Document, app: web.Application) -> None:
    """Keys are asked for where the rules say so, and are optional on a server without keys."""
    stream = made.operation("GET", "/stream/{session_id}").says["security"]
    assert stream == [{"bearer": []}, {"apiKey": []}, {"streamToken": []}]
    assert made.operation("GET", "/health").says["security"] == []
    without = Document(document(app, authenticated=False, open_groups=[]))
    assert without.operation("GET", "/stats").says["security"] == [{}, {"bearer": []}, {"apiKey": []}]


def test_described_handlers_are_routes(app: web.Application) -> None:
    """Nothing is described that no route leads to."""
    handlers = {route.handler for route in app.router.routes()}
    assert chat.chat in OPERATIONS
    assert {handler.__name__ for handler in OPERATIONS if handler not in handlers} == set()


async def test_mounted_under_a_prefix(tmp_path: Path) -> None:
    """Below a prefix the paths are the same, and the server is where the document is."""
    from aiohttp.test_utils import TestClient, TestServer

    from tests.conftest import echo_settings

    outer = web.Application()
    outer.add_subapp("/llm/", create_app(echo_settings(tmp_path)))
    async with TestClient(TestServer(outer)) as http, http.get("/llm/openapi.json") as response:
        body = await response.json()
    assert "/chat/{task_id}" in body["paths"]
    assert body["servers"][0]["url"] == "."


async def test_it_can_be_switched_off(tmp_path: Path) -> None:
    """Without ``server.docs`` there is no such route."""
    from llmstream.server import Server
    from tests.conftest import echo_settings

    settings: Settings = echo_settings(tmp_path, server={"port": 0, "docs": False})
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        for path in ("/openapi.json", "/docs", "/redoc", "/docs/page.css"):
            async with http.get(path) as response:
                assert response.status == 404
