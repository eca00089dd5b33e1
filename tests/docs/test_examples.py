"""The examples of the document are sent to a server, and the server does what the document says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from llmstream.config import DeadlineSettings, ModelSettings, RetrySettings, SchedulerSettings, Settings
from llmstream.server import Server
from tests.api.keyed import client, keyed_settings, secret
from tests.api.reading import finished, submit
from tests.conftest import echo_settings
from tests.docs.reading import Document, Documented, Json
from tests.sse import parse
from tests.webhooks.receiver import SECRET

pytestmark = pytest.mark.asyncio(loop_scope="module")

CRASHED = {"tokens": 9, "fault": "crash", "at": 3}


def settings_of(data_dir: Path) -> Settings:
    """Settings of a server with the model of the examples, and a key that may do everything."""
    return echo_settings(
        data_dir,
        keys={"admin": {"value": secret("admin"), "scopes": ["admin"]}},
        models={"smollm2": ModelSettings(engine="echo", slots=8)},
        scheduler=SchedulerSettings(max_attempts=1),
        retry=RetrySettings(base_s=0.01),
        deadlines=DeadlineSettings(total_s=60),
        webhooks={"secret": SECRET, "allow": ["127.0.0.1"], "base_s": 3600},
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with Server(settings_of(tmp_path_factory.mktemp("examples"))) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    async with client(server, secret("admin")) as http:
        yield http


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(http: aiohttp.ClientSession) -> Document:
    async with http.get("/openapi.json") as response:
        assert response.status == 200
        return Document(await response.json())


async def prepare(server: Server, http: aiohttp.ClientSession) -> None:
    """Makes what the examples' paths name. A new route with a part of its own needs a line here."""
    made = [
        await submit(http, job_id="order-17", session_id="demo"),
        await submit(http, job_id="order-18", echo=CRASHED),
        await submit(http, job_id="order-29", webhook="http://127.0.0.1:9/hook"),
    ]
    async with http.post("/embeddings", json={"job_id": "order-20", "texts": ["x"]}) as response:
        assert response.status == 202, await response.text()
        made.append(await response.json())
    for job in made:
        await finished(server, job["task_id"])
    said = {"session_id": "demo", "messages": [{"role": "user", "content": "x"}]}
    async with http.post("/v1/chat", json=said) as response:
        assert response.status == 200, await response.text()


def in_order(document: Document) -> list[Documented]:
    """The operations; those that take away what others need come last."""
    return sorted(document.operations, key=lambda each: (each.method == "DELETE", "cancel" in each.path))


async def complaints(document: Document, operation: Documented, response: aiohttp.ClientResponse) -> list[str]:
    """What an answer does that is not documented."""
    text = await response.text()
    answer = document.answer(operation, response.status)
    if answer is None:
        return [f"{response.status} is not documented: {text}"]
    missing = [f"header {name} is missing" for name in answer["headers"] if name not in response.headers]
    if "content" not in answer:
        return [*missing, *([f"there is a body: {text}"] if text else [])]
    if response.content_type not in answer["content"]:
        return [*missing, f"{response.content_type} is not documented"]
    content = answer["content"][response.content_type]
    if response.content_type == "text/event-stream":
        return [*missing, *_stream_complaints(document, content, text)]
    value = json.loads(text) if response.content_type == "application/json" else text
    return [*missing, *document.complaints(content["schema"], value)]


def _stream_complaints(document: Document, content: Json, text: str) -> list[str]:
    schema = content["x-itemSchema"]["properties"]["data"]["contentSchema"]
    frames = parse(text.encode())
    values = [frame.data if frame.data == "[DONE]" else frame.json for frame in frames]
    return [each for value in values for each in document.complaints(schema, value)] if frames else ["it is empty"]


def requests(operation: Documented) -> Iterator[tuple[str, Json]]:
    """Every example of an operation, with its optional parameters and without, as arguments for a request."""
    given = {"params": operation.examples("query"), "headers": operation.examples("header")}
    for name, body in operation.bodies.items():
        sent: Json = {} if body is None else {"json": body}
        yield name, sent
        if any(given.values()):
            yield f"{name} with parameters", {**sent, **given}


async def test_every_example_works(server: Server, http: aiohttp.ClientSession, document: Document) -> None:
    """Each example of each operation is answered with one of the good statuses and what is documented for it."""
    await prepare(server, http)
    wrong: list[str] = []
    for operation in in_order(document):
        for name, sent in requests(operation):
            async with http.request(operation.method, operation.url, **sent) as response:
                found = await complaints(document, operation, response)
                if response.status >= 300:
                    found.append(f"{response.status}: {await response.text()}")
            wrong += [f"{operation.name} ({name}): {each}" for each in found]
    assert not wrong, "\n".join(wrong)


async def test_examples_of_answers_are_valid(document: Document) -> None:
    """The answers that the document shows have the schemas beside them, and are shown for every answer with a body."""
    wrong: list[str] = []
    for operation in document.operations:
        for status in operation.says["responses"]:
            answer = document.resolved(operation.says["responses"][status])
            for media, content in answer.get("content", {}).items():
                example = content["example"]
                found = (
                    _stream_complaints(document, content, example)
                    if media == "text/event-stream"
                    else document.complaints(content["schema"], example)
                )
                wrong += [f"{operation.name} {status}: {each}" for each in found]
    assert not wrong, "\n".join(wrong)


def impossible(document: Document, schema: Json) -> list[Any]:
    """Values that a field of a body with this schema must not have, where there are any."""
    kinds = {document.resolved(shape).get("type") for shape in schema.get("anyOf", [schema])}
    return [value for kind, value in (("object", {"no": "where"}), ("array", [["no"]])) if kind not in kinds]


def variants(document: Document, operation: Documented) -> Iterator[tuple[Json, Json]]:
    """Each schema that a body may have, with an example."""
    if operation.body is None:
        return
    for each in operation.body["schema"].get("anyOf", [operation.body["schema"]]):
        fitting = [body for body in operation.bodies.values() if body and not document.complaints(each, body)]
        assert fitting, f"{operation.name} has no example for {each}"
        yield document.resolved(each), fitting[0]


async def test_what_is_documented_is_checked(server: Server, http: aiohttp.ClientSession, document: Document) -> None:
    """A field of a body, or a parameter, with a value that its schema does not allow is refused by its name."""
    await prepare(server, http)
    wrong: list[str] = []

    async def refused(operation: Documented, name: str, **more: Any) -> None:
        async with http.request(operation.method, operation.url, **more) as response:
            found = await complaints(document, operation, response)
            if response.status != 400:
                found.append(f"{response.status} instead of 400")
            elif name not in ((await response.json())["error"]["param"] or "").split("."):
                found.append(f"the error names another field: {await response.text()}")
        wrong.extend(f"{operation.name}, {name}: {each}" for each in found)

    for operation in document.operations:
        for schema, good in variants(document, operation):
            for name, field in schema["properties"].items():
                for value in impossible(document, field):
                    await refused(operation, name, json={**good, name: value})
        for parameter in operation.parameters("query"):
            if parameter["schema"].keys() & {"minimum", "pattern", "enum"}:
                query = {**operation.examples("query"), parameter["name"]: "no such thing"}
                await refused(operation, parameter["name"], params=query)
    assert not wrong, "\n".join(wrong)


async def test_keys_are_needed_where_the_document_says_so(tmp_path: Path) -> None:
    """Without a key, and with one of a smaller scope, each operation answers what the document says."""
    async with (
        Server(keyed_settings(tmp_path, security={"open": ["docs", "metrics"]})) as server,
        client(server) as nobody,
        client(server, secret("reader")) as reader,
    ):
        async with nobody.get("/openapi.json") as response:
            document = Document(await response.json())
        wrong: list[str] = []
        for operation in document.operations:
            security, body = operation.says["security"], next(iter(operation.bodies.values()))
            more: dict[str, Any] = {} if body is None else {"json": body}
            async with nobody.request(operation.method, operation.url, **more) as response:
                if (response.status == 401) != bool(security):
                    wrong.append(f"{operation.name} without a key: {response.status}")
                wrong += [f"{operation.name}: {each}" for each in await complaints(document, operation, response)]
            async with reader.request(operation.method, operation.url, **more) as response:
                if (response.status == 403) != ("403" in operation.says["responses"]):
                    wrong.append(f"{operation.name} with too small a scope: {response.status}")
                wrong += [f"{operation.name}: {each}" for each in await complaints(document, operation, response)]
        assert not wrong, "\n".join(wrong)
