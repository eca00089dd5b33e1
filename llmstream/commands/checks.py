"""What ``doctor`` looks at, one check a function. None changes anything."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from llmstream.commands.options import program
from llmstream.commands.service import Finder, Service
from llmstream.config import ModelSettings, Settings
from llmstream.config_schema import mask_url
from llmstream.errors import LLMStreamError
from llmstream.providers.build import local_models
from llmstream.providers.weights import CATALOGUE, resolve
from llmstream.store.store import open_store

OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 500_000_000
IMPORT_S = 60.0
PACKAGES = {
    "llamacpp": ("xllamacpp", "llmstream[local]"),
    "ctransformers": ("ctransformers", "llmstream[ctransformers]"),
}


class Check(Struct, frozen=True):
    """What one look found, and what to do about it."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str | None = None


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", "problem", version, "Use Python 3.11 or newer.")
    return Check("python", "ok", f"{version} at {sys.executable}")


def data_dir(settings: Settings) -> Check:
    folder = settings.data_dir.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        advice = "Choose another one with --data-dir (DATA_DIR), or change its rights."
        return Check("data directory", "problem", f"{there} cannot be written", advice)
    free = shutil.disk_usage(there).free
    found = f"{folder}{'' if there == folder else ' (made when needed)'}, {free / 1e9:,.1f} GB free"
    if free < LEAST_FREE_BYTES:
        return Check("data directory", "warning", found, "Make room: weights and the store's file need some.")
    return Check("data directory", "ok", found)


async def store(settings: Settings) -> Check:
    """Asks the outside store; starts the embedded one for a moment in a temporary directory."""
    url = settings.store.url
    with tempfile.TemporaryDirectory(prefix="llmstream-doctor-") as folder:
        try:
            async with open_store(settings.store, Path(folder)) as opened:
                health = await opened.health()
        except LLMStreamError as error:
            return Check("store", "problem", error.message, "Set REDIS_URL (store.url) to a Redis 7+ or Valkey 8+.")
    if health["status"] != "ok":
        return Check("store", "problem", str(health["error"]), "See why the store does not answer.")
    where = "embedded, starts" if url is None else f"{mask_url(url.get_secret_value())}, {health['latency_ms']} ms"
    return Check("store", "ok", f"{health['server']}, {where}")


def models(settings: Settings) -> Iterator[Check]:
    """Weights of every local model, and the engines they need."""
    local = local_models(settings)
    for name, model in local.items():
        if model.engine != "echo":
            yield weights(name, model, settings)
    for engine in sorted({model.engine for model in local.values()} & PACKAGES.keys()):
        yield engine_package(engine)
    if not local and not any(provider.models for provider in settings.providers.values()):
        yield Check("models", "warning", "no provider names its models", "List them in providers.NAME.models.")


def weights(name: str, model: ModelSettings, settings: Settings) -> Check:
    title, pull = f"weights of {name}", f"{program()} models pull {model.source}"
    try:
        path = resolve(model.source, settings.data_dir)
    except LLMStreamError as error:
        return Check(title, "problem", error.message, "Correct the model's source.")
    if path is None:
        if model.source.startswith(("/", ".", "~")):
            return Check(title, "problem", f"there is no file {model.source}", "Correct the model's source.")
        return Check(title, "warning", "not here yet; serve gets them when it starts", f"Get them now: {pull}")
    known = CATALOGUE.get(model.source)
    if known is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != known.sha256:
                return Check(title, "problem", f"{path} is damaged", f"Get it again: {pull}")
    return Check(title, "ok", f"{path}, {path.stat().st_size / 1e6:,.0f} MB{', hash checked' if known else ''}")


def engine_package(engine: str) -> Check:
    package, extra = PACKAGES[engine]
    title, advice = f"engine {engine}", f"Install it: pip install '{extra}'"
    if importlib.util.find_spec(package) is None:
        return Check(title, "problem", f"the package {package} is not installed", advice)
    version = importlib.metadata.version(package)
    # In a process of its own: a native library that does not suit the machine ends the process that loads it.
    command = [sys.executable, "-P", "-c", f"import {package}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=IMPORT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return Check(title, "problem", f"{package} {version} did not load within {IMPORT_S:g} s", advice)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"status {done.returncode}"
        return Check(title, "problem", f"{package} {version} cannot be loaded: {why}", advice)
    return Check(title, "ok", f"{package} {version} loads")


def port(settings: Settings, service: Service | None) -> Check:
    host, number = settings.server.host, settings.server.port
    wanted = f"{host}:{number}"
    if number == 0:
        return Check("port", "ok", "any free one")
    if service is not None and service.url.endswith(f":{number}"):
        return Check("port", "ok", f"{wanted} is used by the running server")
    try:
        address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address[4])
    except OSError as error:
        advice = "Choose another one with --port (server.port); 0 picks a free one."
        return Check("port", "problem", f"cannot listen on {wanted}: {error.strerror}", advice)
    return Check("port", "ok", f"{wanted} is free")


async def server(finder: Finder, service: Service | None) -> Check:
    if service is None:
        if finder.given is None:
            return Check("server", "ok", "none is running")
        return Check("server", "problem", f"{finder.given} does not answer", "Check --url (LLMSTREAM_URL).")
    advice = f"Look at its log and at {service.url}/health/full."
    try:
        health = await service.health()
    except LLMStreamError as error:
        return Check("server", "problem", error.message, advice)
    parts = {"store": health["store"], **health["providers"]}
    ill = [f"{name}: {part.get('error', part['status'])}" for name, part in parts.items() if part["status"] != "ok"]
    if ill:
        return Check("server", "problem", f"{service.url} is {health['status']}; {'; '.join(ill)}", advice)
    return Check("server", "ok", f"{service.url} is healthy")


async def everything(settings: Settings, finder: Finder) -> list[Check]:
    """All checks that need a valid configuration."""
    service = await finder.find()
    return [
        data_dir(settings),
        await store(settings),
        *await asyncio.to_thread(lambda: list(models(settings))),
        port(settings, service),
        await server(finder, service),
    ]
