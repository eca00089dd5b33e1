"""API keys: who gets in, with which rights, and what those hear who do not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from llmstream.access import keyring
from llmstream.access.credentials import issue
from llmstream.config import ServerSettings, Settings
from llmstream.server import Server
from llmstream.types import ApiKey
from tests.api.keyed import client, keyed_settings, secret
from tests.api.pair import two_servers
from tests.api.reading import Json, conversation, submit
from tests.conftest import echo_settings
from tests.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    settings = keyed_settings(
        tmp_path_factory.mktemp("keys"), security={"api_key": "first-of-two-keys,second-of-two-keys"}
    )
    async with Server(settings) as server:
        yield server


async def refusal(http: aiohttp.ClientSession, method: str, path: str, **more: object) -> tuple[int, Json, str | None]:
    async with http.request(method, path, **more) as response:  # type: ignore[arg-type]
        body = await response.json()
        return response.status, body["error"], response.headers.get("WWW-Authenticate")


async def status_with(server: Server, path: str = "/v1/models", **headers: str) -> int:
    async with client(server) as http, http.get(path, headers=headers) as response:
        return response.status


async def new_key(
    server: Server, name: str, *, seconds: float = 3600, models: list[str] | None = None
) -> tuple[str, ApiKey]:
    now = time.time()
    made, key = issue(name, scopes=["generate"], models=models, now=now, expires_at=now + seconds)
    await server.gateway._store.api_keys.add(key, now)
    return made, key


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {secret('alice')}"},
        {"Authorization": f"bearer  {secret('alice')} "},
        {"X-API-Key": secret("alice")},
        {"Authorization": "Basic dXNlcjpwdw==", "X-API-Key": secret("alice")},
        {"X-API-Key": "second-of-two-keys"},
    ],
)
async def test_a_valid_key_gets_in(server: Server, headers: dict[str, str]) -> None:
    """Keys of the configuration are taken from either header, also beside what a proxy needs."""
    assert await status_with(server, **headers) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong-key-0123456789abcdef"},
        {"Authorization": f"Bearer {secret('alice')}x"},
        {"Authorization": f"Bearer {secret('alice')[:-1]}"},
        {"Authorization": f"Bearer {secret('alice').upper()}"},
        {"Authorization": "Bearer first-of-two-keys,second-of-two-keys"},
        {"Authorization": "Bearer sk-0123456789-0123456789012345678901234567890123456789012"},
        {"Authorization": "Bearer ********"},
        {"Authorization": "Bearer wrong", "X-API-Key": secret("alice")},
    ],
)
async def test_any_other_key_is_refused(server: Server, headers: dict[str, str]) -> None:
    """A wrong key gets 401 as an OpenAI error that does not repeat it, and says how to show one."""
    async with client(server) as http:
        code, error, challenge = await refusal(http, "GET", "/v1/models", headers=headers)
    assert (code, error["code"], challenge) == (401, "invalid_api_key", 'Bearer realm="llmstream"')
    assert not any(value.removeprefix("Bearer ") in error["message"] for value in headers.values())


async def test_a_key_that_is_no_text(server: Server) -> None:
    """Bytes that are no UTF-8 are a wrong key like any other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(b"GET /stats HTTP/1.1\r\nHost: x\r\nX-API-Key: \xff\xfe\x80" + b"\xff" * 20 + b"\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, {"Authorization": ""}, {"X-API-Key": ""}])
async def test_no_key_is_refused(server: Server, headers: dict[str, str]) -> None:
    """Without a key there is 401, and a hint how to send one; what is open stays open."""
    async with client(server) as http:
        code, error, challenge = await refusal(
            http, "POST", "/v1/chat/completions", json=conversation(), headers=headers
        )
        assert (code, error["code"], challenge) == (401, "missing_api_key", 'Bearer realm="llmstream"')
        assert "Authorization: Bearer KEY" in error["message"]
        for path in ("/health", "/ready", "/health/full"):
            async with http.get(path, headers=headers) as response:
                assert response.status == 200
        async with http.get("/nowhere", headers=headers) as response:
            assert response.status == 404


async def test_open_routes_can_be_closed(tmp_path: Path) -> None:
    """security.open takes a group of routes back; a key opens them then."""
    async with Server(keyed_settings(tmp_path, security={"open": []})) as closed:
        for path in ("/health", "/ready", "/health/full"):
            assert await status_with(closed, path) == 401
            assert await status_with(closed, path, **{"X-API-Key": secret("reader")}) == 200


async def test_a_scope_limits_a_key(server: Server) -> None:
    """A key that may only read can look and list, and gets 403 for everything that does something."""
    async with client(server, secret("reader")) as http:
        async with http.get("/jobs") as response:
            assert response.status == 200
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/chat"),
            ("POST", "/chat/async"),
            ("POST", "/chat/x/cancel"),
            ("DELETE", "/chat/x"),
            ("POST", "/jobs/x/requeue"),
        ):
            code, error, challenge = await refusal(http, method, path, json=conversation())
            assert (code, error["code"]) == (403, "insufficient_permissions")
            assert "'generate'" in error["message"]
            assert challenge == 'Bearer realm="llmstream", error="insufficient_scope"'


async def test_a_key_sees_its_models_only(server: Server) -> None:
    """A model that the key's patterns do not name is in no list, and asking for it gives 404."""
    async with client(server, secret("bob")) as http:
        async with http.get("/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["echo"]
        assert (await refusal(http, "GET", "/v1/models/other"))[0] == 404
        body = {**conversation(), "model": "other"}
        for path in ("/v1/chat/completions", "/chat", "/chat/async"):
            code, error, _ = await refusal(http, "POST", path, json=body)
            assert (code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert (await submit(http))["status"] == "queued"
    async with client(server, secret("alice")) as http, http.get("/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["echo", "other"]


async def test_the_official_client_with_its_key(server: Server) -> None:
    """The OpenAI client works with a key, and raises its own classes without a valid one or a needed right."""
    for key in (secret("alice"), "first-of-two-keys"):
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as openai_client:
            answer = await openai_client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": "Hello you"}]
            )
            assert answer.choices[0].message.content == "Hello you"
    for key, error in (("nobody's", openai.AuthenticationError), (secret("reader"), openai.PermissionDeniedError)):
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as openai_client:
            with pytest.raises(error):
                await openai_client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x"}])


async def test_a_key_of_the_configuration_expires(tmp_path: Path) -> None:
    """From its expiry on a configured key is refused."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    keys = {"brief": {"value": secret("brief"), "expires": soon}}
    async with Server(keyed_settings(tmp_path, keys=keys)) as server, client(server, secret("brief")) as http:

        async def refused() -> bool:
            async with http.get("/v1/models") as response:
                return response.status == 401

        await wait_until(refused)
        assert datetime.now(UTC) >= soon


async def test_a_key_of_the_store(server: Server) -> None:
    """A key made while the server runs is taken at once, with its models; the store has its hash and never the key."""
    made, key = await new_key(server, "carol", models=["other"])
    async with client(server, made) as http, http.get("/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["other"]
    raw = await server.gateway._store.writes.call("HGETALL", "llmstream:api_keys")
    assert key.id.encode() in raw
    assert made.encode() not in b"".join(raw)
    assert made.rpartition("-")[2].encode() not in b"".join(raw)


async def test_a_key_of_the_store_is_not_another(server: Server) -> None:
    """The id in a key says which one it is; without its secret it is nothing."""
    made, _ = await new_key(server, "dora")
    other, _ = await new_key(server, "eve")
    forged = made[:14] + other[14:]
    assert await status_with(server, **{"X-API-Key": forged}) == 401
    assert await status_with(server, **{"X-API-Key": made}) == 200


async def test_a_revoked_key_ends_everywhere(tmp_path: Path) -> None:
    """Revoking a key in the store ends it on all replicas at once, although they remember it."""
    async with two_servers(tmp_path, keys=keyed_settings(tmp_path).keys) as servers:
        made, key = await new_key(servers[0], "frank")
        for server in servers:
            assert await status_with(server, **{"X-API-Key": made}) == 200
        assert await servers[1].gateway._store.api_keys.revoke(key.id)
        for server in servers:

            async def refused(server: Server = server) -> bool:
                return await status_with(server, **{"X-API-Key": made}) == 401

            await wait_until(refused, timeout=5)


async def test_a_revocation_that_nobody_hears_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wake-up a revoked key is refused as soon as what is remembered of it is no longer fresh."""
    monkeypatch.setattr(keyring, "FRESH_S", 0.2)
    async with Server(keyed_settings(tmp_path)) as server:
        server.gateway._store.signals.on_revoked = None
        made, key = await new_key(server, "grace")
        assert await status_with(server, **{"X-API-Key": made}) == 200
        await server.gateway._store.api_keys.revoke(key.id)

        async def refused() -> bool:
            return await status_with(server, **{"X-API-Key": made}) == 401

        await wait_until(refused)


async def test_a_known_key_costs_no_look_into_the_store(server: Server) -> None:
    """Once it was seen, a key of the store is recognised without asking."""
    made, _ = await new_key(server, "heidi")
    assert await status_with(server, **{"X-API-Key": made}) == 200
    keys = server.gateway._store.api_keys
    asked: list[str] = []
    find = keys.find

    async def counted(key_id: str) -> ApiKey | None:
        asked.append(key_id)
        return await find(key_id)

    keys.find = counted  # type: ignore[method-assign]
    try:
        statuses = await asyncio.gather(*(status_with(server, **{"X-API-Key": made}) for _ in range(10)))
    finally:
        keys.find = find  # type: ignore[method-assign]
    assert (statuses, asked) == ([200] * 10, [])


async def test_a_key_of_the_store_expires(server: Server) -> None:
    """From its expiry on a key of the store is refused, remembered or not."""
    made, _ = await new_key(server, "ivan", seconds=1)
    assert await status_with(server, **{"X-API-Key": made}) == 200

    async def refused() -> bool:
        return await status_with(server, **{"X-API-Key": made}) == 401

    await wait_until(refused)


async def test_keys_of_the_store_alone(tmp_path: Path) -> None:
    """With security.keys_required the configuration needs to name no key."""
    settings = echo_settings(tmp_path, security={"keys_required": True})
    async with Server(settings) as server:
        assert await status_with(server) == 401
        made, _ = await new_key(server, "judy")
        assert await status_with(server, **{"X-API-Key": made}) == 200


async def test_without_keys_any_key_is_welcome(tmp_path: Path) -> None:
    """A server without keys does not mind what SDKs send as a key, and gives its stream URLs no token."""
    async with Server(echo_settings(tmp_path)) as server, client(server, "unused") as http:
        answer = await submit(http)
        assert answer["stream_url"] == f"/stream/{answer['session_id']}"


@pytest.mark.parametrize("name", ["0.0.0.0", "::"])
async def test_with_keys_any_address(tmp_path: Path, name: str) -> None:
    """With keys the server may listen on all addresses, and does."""
    settings = keyed_settings(tmp_path, server=ServerSettings(host=name, port=0, shutdown_grace_s=1))
    assert isinstance(settings, Settings)
    async with Server(settings) as server:
        port = server.url.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}" if name == "0.0.0.0" else f"http://[::1]:{port}"
        async with aiohttp.ClientSession() as http, http.get(f"{url}/stats") as response:
            assert response.status == 401
