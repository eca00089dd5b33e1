"""A browser's EventSource knows nothing but a URL: what it opens, and what it does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from llmstream.server import Server
from tests.api.keyed import client, keyed_settings, secret
from tests.api.pair import two_servers
from tests.api.reading import read_some, submit, tokens
from tests.sse import Frame, Parser
from tests.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with Server(keyed_settings(tmp_path_factory.mktemp("urls"))) as server:
        yield server


async def made(server: Server, **body: object) -> str:
    """The stream URL of a new job of alice's."""
    async with client(server, secret("alice")) as http:
        return str((await submit(http, **body))["stream_url"])


async def opened(server: Server, url: str, method: str = "GET") -> int:
    async with client(server) as http, http.request(method, url) as response:
        return response.status


async def test_a_browser_reads_and_resumes(server: Server) -> None:
    """With the URL alone a client reads the answer, and after a cut goes on with Last-Event-ID at the same URL."""
    url = await made(server, echo={"tokens": 50})
    seen: list[Frame] = []
    async with client(server) as http:
        while True:
            headers = {"Last-Event-ID": str(seen[-1].id)} if seen else {}
            async with http.get(url, headers=headers) as response:
                if response.status == 204:
                    break
                assert response.status == 200
                frames, _ = await read_some(response, Parser(), 700)
                seen += [frame for frame in frames if frame.id]
    assert "".join(frame.json.get("content", "") for frame in seen) == tokens(50)
    assert len({frame.id for frame in seen}) == len(seen)


@pytest.mark.parametrize("body", [{}, {"session_id": "mine"}, {"durability": "memory"}])
async def test_the_url_opens_its_stream_only(server: Server, body: dict[str, str]) -> None:
    """The URL opens that stream, also for others; changed in any part, or on any other route, it is worth nothing."""
    url = await made(server, **body)
    assert await opened(server, url) == 200
    path, _, token = url.partition("token=")
    other = await made(server, session_id="other")
    own, foreign = url.split("?")[0], other.split("?")[0]
    for wrong in (
        path.rstrip("&?"),
        f"{path}token=",
        f"{path}token={token[:-1]}",
        f"{path}token={token}x",
        f"{path}token={token.replace('alice', 'bob')}",
        f"{path}token={'f' + token}",
        f"{path}token={other.partition('token=')[2]}",
        url.replace(own, foreign),
        f"{own}?token={token}&task_id=another",
        f"/chat/{own.rpartition('/')[2]}?token={token}",
        f"/jobs?token={token}",
        f"/v1/models?token={token}",
        f"/v1/chat/completions/chatcmpl-{own.rpartition('/')[2]}?stream=true&token={token}",
    ):
        assert await opened(server, wrong) == 401, wrong
    task = url.partition("task_id=")[2].partition("&")[0] or own.rpartition("/")[2]
    for method, wrong in (
        ("DELETE", f"/chat/{task}"),
        ("POST", f"/chat/{task}/cancel"),
        ("POST", f"/jobs/{task}/requeue"),
    ):
        assert await opened(server, f"{wrong}?token={token}", method) == 401


async def test_a_wrong_key_is_not_saved_by_a_token(server: Server) -> None:
    """A key that is shown counts, also beside a good token."""
    url = await made(server)
    async with client(server, "wrong-key-0123456789") as http, http.get(url) as response:
        assert response.status == 401
    async with client(server, secret("bob")) as http, http.get(url) as response:
        assert response.status == 404


async def test_the_url_expires(tmp_path: Path) -> None:
    """After security.stream_url_s the URL is refused with its own code; the key still opens the stream."""
    async with Server(keyed_settings(tmp_path, security={"stream_url_s": 1})) as server:
        url = await made(server)
        assert await opened(server, url) == 200

        async def refused() -> bool:
            return await opened(server, url) == 401

        await wait_until(refused)
        async with client(server) as http, http.get(url) as response:
            assert (await response.json())["error"]["code"] == "expired_token"
        async with client(server, secret("alice")) as http, http.get(url) as response:
            assert response.status == 200


@pytest.mark.parametrize("security", [{}, {"stream_secret": "signs-all-stream-urls"}], ids=["stored", "configured"])
async def test_replicas_take_each_others_urls(tmp_path: Path, security: dict[str, str]) -> None:
    """A URL that one replica signed opens the stream at another; a configured secret never reaches the store."""
    sections = keyed_settings(tmp_path, security=security)
    async with two_servers(tmp_path, keys=sections.keys, security=sections.security) as (one, two):
        url = await made(one, echo={"tokens": 5})
        async with client(two) as http, http.get(url) as response:
            assert response.status == 200
            assert "complete" in await response.text()
        stored = await one.gateway._store.writes.call("GET", "llmstream:stream_secret")
        assert (stored is None) == bool(security)


async def test_requeue_and_chat_hand_out_urls_too(server: Server) -> None:
    """The Location of POST /chat and the stream_url of a requeued job open without a key."""
    async with client(server, secret("alice")) as http:
        async with http.post("/chat", json={"message": "Hello"}) as response:
            location = response.headers["Location"]
            await response.read()
        job = await submit(http, echo={"tokens": 5, "fault": "crash", "at": 2, "attempts": 1})
        async with http.get(job["stream_url"]) as response:
            await response.read()
        async with http.post(f"/jobs/{job['task_id']}/requeue") as response:
            again = (await response.json())["stream_url"]
    for url in (location, again):
        assert await opened(server, url) == 200


async def test_a_mounted_service_signs_the_same(tmp_path: Path) -> None:
    """Mounted under a prefix, the URL has the prefix and works."""
    from aiohttp import web
    from aiohttp.test_utils import TestServer

    import llmstream

    outer = web.Application()
    outer.add_subapp("/llm/", llmstream.create_app(keyed_settings(tmp_path)))
    async with TestServer(outer) as mounted, aiohttp.ClientSession(mounted.make_url("/")) as http:
        key = {"X-API-Key": secret("alice")}
        async with http.post("/llm/chat/async", json={"message": "x", "model": "echo"}, headers=key) as response:
            url = (await response.json())["stream_url"]
        assert url.startswith("/llm/stream/")
        async with http.get(url) as response:
            assert response.status == 200
        async with http.get("/llm/jobs") as response:
            assert response.status == 401
