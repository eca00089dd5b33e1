"""A server with keys, and clients that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp

from llmstream.config import DeadlineSettings, ModelSettings, SchedulerSettings, ServerSettings, Settings
from llmstream.server import Server
from tests.conftest import echo_settings

NAMES = ("alice", "bob", "reader", "admin")


def secret(name: str) -> str:
    """The configured key of a principal."""
    return f"key-of-{name}-0123456789abcdef"


def keyed_settings(data_dir: Path, *, security: object = None, **sections: object) -> Settings:
    """Settings of a server with the models ``echo`` and ``other`` and a key for each of NAMES; bob may use ``echo``
    only."""
    keys: dict[str, dict[str, object]] = {name: {"value": secret(name)} for name in NAMES}
    keys["bob"]["models"] = ["ech*"]
    keys["reader"]["scopes"] = ["read"]
    keys["admin"]["scopes"] = ["admin"]
    model = ModelSettings(engine="echo", slots=8)
    given: dict[str, Any] = {
        "server": ServerSettings(port=0, shutdown_grace_s=1),
        "models": {"echo": model, "other": model},
        "scheduler": SchedulerSettings(max_attempts=1),
        "deadlines": DeadlineSettings(total_s=3600, first_token_s=3600, stall_s=3600),
        "keys": keys,
        "security": security or {},
    }
    return echo_settings(data_dir, **{**given, **sections})


def client(server: Server, key: str | None = None) -> aiohttp.ClientSession:
    """A client that shows a key, or none."""
    return aiohttp.ClientSession(server.url, headers={"Authorization": f"Bearer {key}"} if key else {})
