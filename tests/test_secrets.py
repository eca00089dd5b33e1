"""Planted secrets: nothing that the service writes, says or stores holds one of them."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import aiohttp
import pytest
from pydantic import SecretStr

from llmstream.access.credentials import issue
from llmstream.api import chat
from llmstream.cli import main
from llmstream.config import BreakerSettings, ProviderSettings, RetrySettings, Settings, load
from llmstream.config_security import KeySettings
from llmstream.errors import ConfigError
from llmstream.server import Server
from llmstream.telemetry.logs import ConsoleFormatter, JsonFormatter
from tests.api.keyed import client
from tests.conftest import echo_settings
from tests.waiting import wait_until

PLANTED = {
    "named key": "planted-named-0123456789",
    "single key": "planted-single-0123456789",
    "second single key": "planted-second-0123456789",
    "stream secret": "planted-stream-0123456789",
    "provider key": "sk-planted-provider-0123456789",
    "webhook secret": "whsec_cGxhbnRlZC13ZWJob29rLXNlY3JldC0w",
    "webhook secret of a key": "whsec_cGxhbnRlZC13ZWJob29rLW9mLWEta2V5",
    "receiver secret": "whsec_cGxhbnRlZC1yZWNlaXZlci1zZWNyZXQt",
    "receiver path": "/planted-receiver-path-0123456789",
}
UNKNOWN = "planted-unknown-0123456789"
"""Shown by a client, known to nobody: somebody's key for another service, perhaps."""


def planted_settings(data_dir: Path) -> Settings:
    return echo_settings(
        data_dir,
        keys={
            "alice": KeySettings(
                value=SecretStr(PLANTED["named key"]), webhook_secret=SecretStr(PLANTED["webhook secret of a key"])
            )
        },
        webhooks={"secret": PLANTED["webhook secret"]},
        webhook_receivers={
            "audit": {
                "url": f"http://127.0.0.1:9{PLANTED['receiver path']}",
                "secret": PLANTED["receiver secret"],
            }
        },
        security={
            "api_key": f"{PLANTED['single key']},{PLANTED['second single key']}",
            "stream_secret": PLANTED["stream secret"],
        },
        retry=RetrySettings(base_s=0.01),
        breaker=BreakerSettings(failures=1000),
        providers={
            "up": ProviderSettings(
                base_url="http://127.0.0.1:9/v1", api_key=SecretStr(PLANTED["provider key"]), models=["up"]
            )
        },
    )


async def everything(server: Server, keys: list[str]) -> str:
    """All that the server answers to good and bad requests with these keys in them."""
    said: list[str] = []

    async def ask(method: str, path: str, headers: dict[str, str], **more: object) -> str:
        async with (
            aiohttp.ClientSession(server.url) as http,
            http.request(method, path, headers=headers, **more) as response,  # type: ignore[arg-type]
        ):
            text = await response.text()
            said.append(f"{response.status} {dict(response.headers)} {text}")
            return text

    for key in keys:
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}, {"Authorization": f"Basic {key}"}):
            for path in (
                "/jobs",
                "/webhooks/deliveries",
                "/webhooks/secret",
                "/stats",
                "/v1/models",
                "/health/full",
                "/chat/unknown",
                "/nowhere",
                f"/jobs?limit={0}",
            ):
                await ask("GET", path, headers)
            for model in ("echo", "up", "unknown"):
                for body in ({"message": "Hello", "model": model}, {"message": 5}, {}):
                    await ask("POST", "/chat", headers, json=body)
                    await ask("POST", "/chat/async", headers, json=body)
        for raw in (
            f"GET /jobs HTTP/1.1\r\nAuthorization Bearer {key}\r\n\r\n",
            f"GET /jobs HTTP/1.1\r\nX-API-Key: {key}\x00\r\n\r\n",
            f"GET /jobs HTTP/1.1\r\nHost: x\r\nX-API-Key: {key * 1000}\r\n\r\n",
            f"GET /jobs {key} HTTP/1.1\r\n\r\n",
            f"{key}\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            writer.write(raw.encode())
            async with asyncio.timeout(10):
                said.append((await reader.read()).decode())
            writer.close()
    return "\n".join(said)


def files_below(folder: Path) -> bytes:
    """All that was written: the store's log of changes holds every command that it ever took."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Every message of every logger: ours as our formatters write them, others as they are."""
    lines = [f"{record.name} {record.getMessage()} {record.exc_text}" for record in caplog.records if not _ours(record)]
    for formatter in (ConsoleFormatter(), JsonFormatter()):
        lines += [formatter.format(record) for record in caplog.records if _ours(record)]
    return "\n".join(lines)


def _ours(record: logging.LogRecord) -> bool:
    return record.name.startswith("llmstream")


async def test_nothing_said_logged_or_stored_holds_a_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good keys, wrong keys and broken requests, at the most talkative level: no answer, log line or stored byte has
    a secret in it, nor has what goes wrong inside."""
    caplog.set_level(logging.DEBUG)
    async with Server(planted_settings(tmp_path)) as server:
        made, key = issue("carol", scopes=["generate"], models=None, now=time.time(), expires_at=time.time() + 60)
        await server.gateway._store.api_keys.add(key, time.time())
        keys = [*PLANTED.values(), UNKNOWN, made]
        said = await everything(server, keys)

        async def broken(*_: object) -> None:
            raise RuntimeError(f"with Authorization: Bearer {PLANTED['named key']} and X-API-Key: {made}")

        with monkeypatch.context() as patched:
            patched.setattr(chat, "read_json", broken)
            async with client(server, PLANTED["named key"]) as http, http.post("/chat", json={}) as response:
                assert response.status == 500
                said += await response.text()
        await server.gateway._store.api_keys.revoke(key.id)

        async def told() -> bool:
            async with client(server, made) as http, http.get("/jobs") as response:
                return response.status == 401

        await wait_until(told)
    stored = files_below(tmp_path)
    assert b"alice" in stored
    assert "Something went wrong" in said
    assert "RuntimeError" in logged(caplog)
    for secret in keys:
        assert secret not in said
        assert secret not in logged(caplog)
        assert secret.encode() not in stored


def test_stream_tokens_are_masked() -> None:
    """A URL in a log line loses its token."""
    record = logging.LogRecord(
        "llmstream", 20, "", 0, "GET /stream/s?task_id=1&token=6b01.abc_-.alice failed", (), None
    )
    assert "abc_-" not in ConsoleFormatter().format(record)


def test_the_printed_configuration_holds_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """--print-config masks every secret, and what it prints is refused as a configuration with keys."""
    monkeypatch.setenv("API_KEYS", PLANTED["single key"])
    monkeypatch.setenv("KEYS__ALICE__VALUE", PLANTED["named key"])
    monkeypatch.setenv("SECURITY__STREAM_SECRET", PLANTED["stream secret"])
    monkeypatch.setenv("WEBHOOKS__SECRET", PLANTED["webhook secret"])
    monkeypatch.setenv("KEYS__ALICE__WEBHOOK_SECRET", PLANTED["webhook secret of a key"])
    monkeypatch.setenv("WEBHOOK_RECEIVERS__AUDIT__SECRET", PLANTED["receiver secret"])
    monkeypatch.setenv("WEBHOOK_RECEIVERS__AUDIT__URL", f"https://h{PLANTED['receiver path']}")
    monkeypatch.setenv("PROVIDERS__UP__BASE_URL", "http://h/v1")
    monkeypatch.setenv("PROVIDERS__UP__API_KEY", PLANTED["provider key"])
    assert main(["serve", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert not [secret for secret in PLANTED.values() if secret in printed]
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    with pytest.raises(ConfigError, match=r"keys\.alice\.value"):
        load(file, {})


@pytest.mark.parametrize(
    "env",
    [
        {"API_KEYS": "tiny-secret"},
        {"API_KEYS": f"{PLANTED['single key']},tiny-secret"},
        {"KEYS__A__VALUE": "tiny-secret"},
        {"KEYS__A__VALUE": "tiny-secret with a space"},
        {"KEYS__A__VALUE": PLANTED["single key"], "API_KEYS": PLANTED["single key"]},
        {"SECURITY__STREAM_SECRET": "tiny-secret"},
        {"WEBHOOKS__SECRET": "whsec_tiny-secret"},
        {"WEBHOOK_RECEIVERS__A__URL": "tiny-secret", "WEBHOOK_RECEIVERS__A__SECRET": "whsec_tiny-secret"},
        {"KEYS__A__VALUE": "file:/nowhere/tiny-secret-is-a-path"},
    ],
)
def test_a_refused_configuration_does_not_show_its_secrets(env: dict[str, str]) -> None:
    """What is wrong with a key is said without the key."""
    with pytest.raises(ConfigError) as refused:
        load(env=env)
    assert PLANTED["single key"] not in str(refused.value)
    assert "tiny-secret" not in str(refused.value).replace("tiny-secret-is-a-path", "")


def test_references_keep_secrets_out_of_the_file(tmp_path: Path) -> None:
    """Keys may be references; a file may hold several single keys, one a line."""
    (tmp_path / "keys").write_text(f"{PLANTED['single key']}\n{PLANTED['second single key']}\n")
    config = tmp_path / "llmstream.yaml"
    config.write_text("security: {api_key: file:keys}\nkeys: {alice: {value: env:ALICE}}\n")
    settings = load(config, {"ALICE": PLANTED["named key"]})
    assert settings.security.api_keys == [PLANTED["single key"], PLANTED["second single key"]]
    assert settings.keys["alice"].value.get_secret_value() == PLANTED["named key"]


def test_settings_in_a_message_show_nothing(tmp_path: Path) -> None:
    """Settings that end up in a log line show no secret."""
    record = logging.LogRecord("llmstream", 20, "", 0, "settings %r", (planted_settings(tmp_path),), None)
    printed = ConsoleFormatter().format(record)
    assert "alice" in printed
    assert not [secret for secret in PLANTED.values() if secret in printed]
