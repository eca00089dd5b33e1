"""Pages of other origins: nothing for them unless the configuration names them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio

from llmstream.server import Server
from tests.api.keyed import client, keyed_settings, secret
from tests.api.reading import submit
from tests.conftest import echo_settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

APP = "https://app.example.com"
ASK = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    settings = keyed_settings(
        tmp_path_factory.mktemp("cors"), security={"cors_origins": [APP, "http://localhost:3000"]}
    )
    async with Server(settings) as server:
        yield server


def cors(response: aiohttp.ClientResponse) -> set[str]:
    return {name for name in response.headers if name.lower().startswith("access-control-")}


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000"])
async def test_a_named_origin_may_ask(server: Server, origin: str) -> None:
    """A preflight needs no key and allows what the page announced; there are no credentials in it."""
    headers = {"Origin": origin, **ASK}
    async with client(server) as http, http.options("/v1/chat/completions", headers=headers) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == origin
        assert response.headers["Access-Control-Allow-Methods"] == "GET, POST, DELETE"
        assert response.headers["Access-Control-Allow-Headers"] == ASK["Access-Control-Request-Headers"]
        assert "Access-Control-Allow-Credentials" not in response.headers
        assert response.headers["Vary"] == "Origin"


async def test_a_named_origin_may_read(server: Server) -> None:
    """Answers, streams and refusals can be read by the page, with the headers that it needs to go on."""
    async with client(server, secret("alice")) as http:
        url = (await submit(http))["stream_url"]
        for path in (url, "/v1/models", "/chat/unknown"):
            async with http.get(path, headers={"Origin": APP}) as response:
                assert response.headers["Access-Control-Allow-Origin"] == APP
                exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
                assert {"x-request-id", "x-job-id", "Location", "Retry-After"} <= set(exposed)
    async with client(server) as http, http.get("/v1/models", headers={"Origin": APP}) as response:
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, APP)


@pytest.mark.parametrize(
    "origin", ["https://evil.example.com", f"{APP}.evil.com", "null", "http://app.example.com", "*"]
)
async def test_other_origins_get_nothing(server: Server, origin: str) -> None:
    """Any other origin is told nothing; caches know that the answer depends on it."""
    async with client(server, secret("alice")) as http:
        async with http.get("/v1/models", headers={"Origin": origin}) as response:
            assert (response.status, cors(response), response.headers["Vary"]) == (200, set(), "Origin")
        async with http.options("/v1/models", headers={"Origin": origin, **ASK}) as response:
            assert (response.status, cors(response)) == (405, set())


async def test_off_unless_configured(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without origins in the configuration no response speaks of them."""
    async with Server(echo_settings(tmp_path_factory.mktemp("off"))) as server, client(server) as http:
        async with http.get("/v1/models", headers={"Origin": APP}) as response:
            assert not cors(response)
        async with http.options("/v1/models", headers={"Origin": APP, **ASK}) as response:
            assert (response.status, cors(response)) == (405, set())


async def test_all_origins(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With * every page may call."""
    settings = echo_settings(tmp_path_factory.mktemp("all"), security={"cors_origins": "*"})
    async with Server(settings) as server, client(server) as http:
        async with http.get("/v1/models", headers={"Origin": APP}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "*"
        async with http.options("/chat", headers={"Origin": APP, **ASK}) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "*")
