"""What no client should send, and what becomes of it: a clear refusal, and a server that goes on."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio

from llmstream.config import ServerSettings
from llmstream.server import Server
from tests.api.reading import conversation, submit
from tests.conftest import echo_settings
from tests.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 64 * 1024
GOOD = json.dumps(conversation()).encode()


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI error body; fails for any other body."""
        assert self.headers["content-type"] == "application/json; charset=utf-8"
        assert self.headers["x-request-id"]
        body = json.loads(self.body)
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["message"]
        error: dict[str, Any] = body["error"]
        return error


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """One server with a small limit for bodies, for all that is sent here: nothing may hurt it."""
    given: Any = {"server": ServerSettings(port=0, shutdown_grace_s=2, max_body_bytes=LIMIT)}
    async with Server(echo_settings(tmp_path_factory.mktemp("bad"), **given)) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def server(shared: Server) -> AsyncIterator[Server]:
    """The server, which must be well and idle, with the tasks it had before, after each test."""
    before = _named_tasks()
    yield shared
    async with aiohttp.ClientSession(shared.url) as http:
        async with http.post("/v1/chat/completions", data=GOOD) as response:
            assert response.status == 200
        await wait_until(lambda: _idle(http))
    assert _named_tasks() == before


def _named_tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if not task.get_name().startswith("Task-")}


async def _jobs(server: Server) -> list[str]:
    return [state.job.id for state in await server.gateway.recent()]


async def _idle(http: aiohttp.ClientSession) -> bool:
    async with http.get("/stats") as response:
        stats = await response.json()
        return bool(stats["running"] == stats["waiting"] == 0)


async def raw(server: Server, *parts: bytes, end: bool = False) -> Reply:
    """Sends bytes as they are and reads the answer until the server closes the connection."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if end:
            writer.write_eof()
        async with asyncio.timeout(5):
            answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return Reply(int(first.split()[1]), headers, body)


def request(body: bytes = b"", *headers: str, line: str = "POST /v1/chat/completions", length: bool = True) -> bytes:
    given = ["Host: x", "Content-Type: application/json", "Connection: close", *headers]
    if length:
        given.append(f"Content-Length: {len(body)}")
    return "\r\n".join([f"{line} HTTP/1.1", *given, "", ""]).encode() + body


def nested(depth: int) -> bytes:
    return (
        b'{"model":"echo","messages":[{"role":"user","content":"x"}],"metadata":' + b"[" * depth + b"]" * depth + b"}"
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"a":1}}',
        b'{"model":"echo","temperature":NaN}',
        b'{"model":"echo","temperature":-Infinity}',
        b'{"model":"echo","temperature":1e999}',
        b'{"model":"echo","seed":' + b"9" * 5000 + b"}",
        b'{"model":"\\ud800"}',
        b'{"model":"\xed\xa0\x80"}',
        b'{"model":"\xff"}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 10_000,
        b"[]",
        b'"text"',
        b"null",
        b"5",
        nested(100),
        nested(500),
        nested(984),
        nested(990),
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_what_is_no_json_object_is_refused(server: Server, body: bytes) -> None:
    """A body that is no sound JSON object gets 400 with the code invalid_json, on every route that takes one."""
    for path in ("/v1/chat/completions", "/chat", "/chat/async"):
        reply = await raw(server, request(body, line=f"POST {path}"))
        assert (reply.status, reply.error["code"]) == (400, "invalid_json")


async def test_nesting_that_is_allowed_works(server: Server) -> None:
    """A hundred brackets inside one another are no reason to refuse."""
    assert (await raw(server, request(nested(99)))).status == 200


async def test_an_announced_body_that_is_too_large_is_refused_at_once(server: Server) -> None:
    """Ten announced gigabytes are answered with 413 before they come, and the connection is closed."""
    reply = await raw(server, request(b"{", "Content-Length: 10000000000", length=False))
    assert (reply.status, reply.error["code"], reply.headers["connection"]) == (413, "body_too_large", "close")


async def test_a_chunked_body_that_grows_too_large_is_cut_off(server: Server) -> None:
    """A body without a length is read up to the limit and no further."""
    head = request(b"", "Transfer-Encoding: chunked", length=False)
    chunks = [b"4000\r\n" + b" " * 0x4000 + b"\r\n"] * 8
    reply = await raw(server, head, *chunks)
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")


async def test_a_small_body_that_unpacks_large_is_cut_off(server: Server) -> None:
    """The limit holds for what a compressed body amounts to."""
    bomb = gzip.compress(b" " * (LIMIT * 100))
    assert len(bomb) < LIMIT
    reply = await raw(server, request(bomb, "Content-Encoding: gzip"))
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bodies_are_read(server: Server, name: str, pack: Any) -> None:
    """A body that is what its Content-Encoding says is taken."""
    assert (await raw(server, request(pack(GOOD), f"Content-Encoding: {name}"))).status == 200


@pytest.mark.parametrize("name", ["gzip", "deflate"])
async def test_bodies_that_are_not_what_they_say_are_refused(server: Server, name: str) -> None:
    """Plain bytes under the name of a compression give 400, whole or cut in two."""
    sent = request(GOOD, f"Content-Encoding: {name}")
    for parts in ([sent], [sent[:-20], sent[-20:]]):
        reply = await raw(server, *parts)
        assert reply.status == 400
        assert "Content-Encoding" in reply.error["message"]
    packed = gzip.compress(GOOD) if name == "gzip" else zlib.compress(GOOD)
    reply = await raw(server, request(packed[: len(packed) // 2], f"Content-Encoding: {name}"))
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("name", ["br", "zstd", "klingon", "gzip, gzip", "x-gzip", "base64"])
async def test_unknown_encodings_are_refused(server: Server, name: str) -> None:
    """A Content-Encoding that is not understood gives 415 or, where a package for it is installed, 400."""
    reply = await raw(server, request(GOOD, f"Content-Encoding: {name}"))
    assert reply.status in {415, 400}
    assert "Content-Encoding" in reply.error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: a\r\n" % n for n in range(500)) + b"\r\n",
        request(b"", "Content-Length: abc", length=False),
        request(b"", "Content-Length: -5", length=False),
        request(b"zz\r\nabc\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
        request(b"3\r\nabcdef\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
        request(b"0\r\n\r\n", "Transfer-Encoding: chunked", "Content-Length: 4", length=False),
        request(b"{}", "Expect: a miracle"),
    ],
    ids=lambda sent: repr(sent[:60]),
)
async def test_what_is_no_http_is_refused_in_the_same_shape(
    server: Server, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    """Broken HTTP gets an OpenAI error body like everything else, and no traceback in the log."""
    reply = await raw(server, sent)
    assert 400 <= reply.status < 500
    assert reply.error["type"] == "invalid_request_error"
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


async def test_a_chunk_that_is_wrong_in_the_middle_is_refused(server: Server) -> None:
    """A body that breaks while a handler reads it ends with 400, not with silence."""
    head = request(b"", "Transfer-Encoding: chunked", length=False)
    reply = await raw(server, head + b"2\r\n{}\r\n", b"zz\r\n\r\n")
    assert reply.status == 400
    assert reply.error


@pytest.mark.parametrize("end", [False, True])
async def test_a_client_that_leaves_while_it_sends_is_no_error(
    server: Server, caplog: pytest.LogCaptureFixture, end: bool
) -> None:
    """A body whose sender goes away leaves neither a job nor a traceback."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    jobs = await _jobs(server)
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(request(GOOD)[:-5])
    await writer.drain()
    async with aiohttp.ClientSession(server.url) as http, http.get("/health"):
        pass  # by now the first request is being read
    if end:
        writer.write_eof()
    writer.transport.abort()
    async with aiohttp.ClientSession(server.url) as http, http.get("/health"):
        pass
    assert await _jobs(server) == jobs
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"priority": 11}, "priority"),
        ({"priority": -11}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
        ({"session_id": "a b"}, "session_id"),
        ({"session_id": ""}, "session_id"),
        ({"session_id": "x" * 129}, "session_id"),
        ({"session_id": "a\n"}, "session_id"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"model": "no-such"}, "model"),
        ({"provider": "no-such"}, "provider"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"echo": {"tokens": -1}}, "echo"),
        ({"echo": 5}, "echo"),
        ({"echo": {"fault": "flood"}}, "echo"),
    ],
    ids=repr,
)
async def test_wrong_fields_are_named(server: Server, change: dict[str, Any], param: str) -> None:
    """Both families of routes name the field that is wrong, and accept nothing of the request."""
    jobs = await _jobs(server)
    async with aiohttp.ClientSession(server.url) as http:
        for path in ("/v1/chat/completions", "/chat/async", "/chat"):
            async with http.post(path, json=conversation() | change) as response:
                error = (await response.json())["error"]
                assert (response.status, error["param"]) == (404 if change == {"model": "no-such"} else 400, param)
                assert error["code"] or param in {"echo", "provider"}
    assert await _jobs(server) == jobs


@pytest.mark.parametrize(
    "body", [{}, {"message": "a", "messages": [{"role": "user", "content": "b"}]}, {"message": ""}]
)
async def test_one_message_or_a_conversation(server: Server, body: dict[str, Any]) -> None:
    """The queue's routes take a message or messages, and exactly one of the two."""
    async with aiohttp.ClientSession(server.url) as http, http.post("/chat/async", json=body) as response:
        assert response.status == 400
        assert "message" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("limit", ["0", "501", "-1", "x", "", "1.5", "1e2"])
async def test_bad_limits_are_named(server: Server, limit: str) -> None:
    """A limit outside 1..500 is refused by name."""
    async with aiohttp.ClientSession(server.url) as http, http.get("/jobs", params={"limit": limit}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "limit")


@pytest.mark.parametrize(
    "path",
    ["/nope", "/", "/v1", "/chat/", "/chat/unknown", "/stream/unknown", "/v1/models/unknown", "/chat/a%00b",
     "/chat/%ff", "/v1/chat/completions/unknown", "/v1/chat/completions/unknown?stream=true", "/stream/%7B%7D",
     "/stream/a:b"],
)  # fmt: skip
async def test_what_is_not_there_is_404(server: Server, path: str) -> None:
    """Unknown routes, jobs, sessions and models give 404 with a message."""
    reply = await raw(server, request(b"", line=f"GET {path}"))
    assert (reply.status, reply.error["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize(
    ("line", "allow"),
    [
        ("PUT /chat", "POST"),
        ("GET /v1/chat/completions", "POST"),
        ("POST /health", "GET,HEAD"),
        ("HEAD /stream/x", "GET"),
        ("HEAD /v1/chat/completions/x", "GET"),
        ("PATCH /chat/x", "DELETE,GET,HEAD"),
    ],
)
async def test_other_methods_are_405_with_allow(server: Server, line: str, allow: str) -> None:
    """A method that a route does not take gives 405 and the methods that it takes."""
    reply = await raw(server, request(b"", line=line))
    assert (reply.status, reply.headers["allow"].upper()) == (405, allow)
    assert line.startswith("HEAD") or reply.error["code"] == "method_not_allowed"


@pytest.mark.parametrize("flag", ["yes", "2", "null"])
async def test_bad_flags_are_named(server: Server, flag: str) -> None:
    """A flag in the query that is neither true nor false is refused by name."""
    async with aiohttp.ClientSession(server.url) as http:
        job = await submit(http)
        async with http.get(f"/v1/chat/completions/{job['task_id']}", params={"stream": flag}) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, "stream")


async def test_every_answer_bears_an_id(server: Server) -> None:
    """A sound x-request-id comes back; any other is replaced."""
    given = await raw(server, request(b"", "x-request-id: mine-1", line="GET /health"))
    assert given.headers["x-request-id"] == "mine-1"
    bad = await raw(server, request(b"", "x-request-id: <script>", line="GET /health"))
    assert len(bad.headers["x-request-id"]) == 16


async def test_a_defect_of_ours_is_500_in_the_same_shape(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What breaks inside tells the client the id under which the log has the details."""

    async def broken(limit: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(server.gateway, "recent", broken)
    reply = await raw(server, request(b"", "x-request-id: mine-2", line="GET /jobs"))
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert "mine-2" in reply.error["message"]
    assert [record for record in caplog.records if record.exc_info]
    monkeypatch.undo()
