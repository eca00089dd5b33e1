"""``keys``: makes, lists and revokes the API keys that all replicas share."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from msgspec import to_builtins
from pydantic import SecretStr
from rich.table import Table
from rich.text import Text

from llmstream.access.credentials import issue
from llmstream.commands.options import read_settings
from llmstream.commands.running import run as run_to_end
from llmstream.commands.terminal import say, stdout_console
from llmstream.config import Settings
from llmstream.config_security import KEY_NAME_PATTERN, KEY_NAME_RULE, MAX_LIMIT
from llmstream.errors import ConfigError, Conflict, NotFound
from llmstream.store.api_keys import ApiKeys
from llmstream.store.embedded import find_running
from llmstream.store.store import open_store
from llmstream.types import ApiKey, CallerLimits

UNITS = {"h": 3600, "d": 86400}
MAX_DAYS = 3650
COLUMNS = ("id", "name", "scopes", "models", "limits", "created", "expires")

Step = Callable[[ApiKeys], Coroutine[Any, Any, int]]


def create(args: argparse.Namespace) -> int:
    settings, now = read_settings(args), time.time()
    if not KEY_NAME_PATTERN.fullmatch(args.name):
        raise ConfigError(f"The name {args.name[:80]!r} is not allowed; expected {KEY_NAME_RULE}.")
    limits = _limits(args, settings)
    secret, key = issue(
        args.name,
        scopes=args.scopes or ["generate"],
        models=args.models,
        now=now,
        expires_at=expiry(args.expires, now),
        limits=limits,
    )

    async def add(keys: ApiKeys) -> int:
        names = {other.name for other in await keys.all() if other.expires_at > now} | set(settings.keys)
        if key.name in names and not args.add:
            raise Conflict(
                f"There is a key of {key.name!r} already. A second one shares its jobs: ask for it with --add, or "
                "revoke the first."
            )
        await keys.add(key, now)
        sys.stdout.write(f"{secret}\n")
        if limits is not None and not settings.rate_limit.enabled:
            say("Limits are switched off here (rate_limit.enabled).")
        say(f"Key {key.id} of {key.name}, valid until {_day(key.expires_at)}. It is not shown again.")
        if not settings.authenticated:
            say("Servers ask for keys where API_KEYS, keys or security.keys_required is set; here none is.")
        return 0

    return _run(settings, add)


def list_all(args: argparse.Namespace) -> int:
    async def show(keys: ApiKeys) -> int:
        found = [key for key in await keys.all() if key.expires_at > time.time()]
        if args.json:
            sys.stdout.write(json.dumps([_row(key) for key in found], indent=2) + "\n")
        elif found:
            stdout_console().print(_table(found))
        else:
            say("There are no keys in the store.")
        return 0

    return _run(read_settings(args), show)


def revoke(args: argparse.Namespace) -> int:
    async def end(keys: ApiKeys) -> int:
        found = [key for key in await keys.all() if args.key in (key.id, key.name)]
        if not found:
            raise NotFound(f"No key has the id or name {args.key!r}; 'keys list' shows those that there are.")
        for key in found:
            await keys.revoke(key.id)
            sys.stdout.write(f"{key.id} of {key.name} is revoked\n")
        return 0

    return _run(read_settings(args), end)


def expiry(text: str, now: float) -> float:
    """Reads ``90d``, ``12h`` or a date as seconds since the epoch. Raises ConfigError."""
    if span := re.fullmatch(r"(\d{1,6})([hd])", text):
        moment = now + int(span[1]) * UNITS[span[2]]
    else:
        try:
            day = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(f"--expires {text!r}: expected for example 90d, 12h or 2030-01-31.") from None
        moment = (day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp()
    if not now < moment <= now + MAX_DAYS * 86400:
        raise ConfigError(f"--expires {text!r}: a key has to expire in the future, within {MAX_DAYS} days.")
    return moment


def _limits(args: argparse.Namespace, settings: Settings) -> CallerLimits | None:
    given = {name: getattr(args, name) for name in CallerLimits.__struct_fields__}
    said = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        if not 0 <= value <= MAX_LIMIT:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a number from 0 to {MAX_LIMIT}.")
    if said.get("queued_jobs") and settings.broker.kind == "rabbitmq" and settings.broker.consume:
        raise ConfigError(
            "--queued-jobs: jobs wait in RabbitMQ here, where they are not counted by caller; leave it out."
        )
    return CallerLimits(**said) if said else None


def _run(settings: Settings, step: Step) -> int:
    async def main() -> int:
        async with _open_keys(settings) as keys:
            return await step(keys)

    return run_to_end(main)


@asynccontextmanager
async def _open_keys(settings: Settings) -> AsyncIterator[ApiKeys]:
    """The keys of the configured store; the embedded one is shared with the server that runs it, or started."""
    store = settings.store
    if store.url is None and (url := await find_running(settings.data_dir)) is not None:
        store = store.model_copy(update={"url": SecretStr(url)})
    async with open_store(store, settings.data_dir) as opened:
        yield opened.api_keys


def _row(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "models": list(key.models or ["*"]),
        "limits": {} if key.limits is None else to_builtins(key.limits),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }


def _table(keys: list[ApiKey]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for key in keys:
        texts = (key.id, key.name, ", ".join(key.scopes), ", ".join(key.models or ["*"]), _shown(key.limits))
        table.add_row(*map(Text, texts), _day(key.created_at), _day(key.expires_at))
    return table


def _shown(limits: CallerLimits | None) -> str:
    said = {} if limits is None else to_builtins(limits)
    return ", ".join(f"{name}={value}" for name, value in said.items())


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
