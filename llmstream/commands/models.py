"""``models``: what can be asked for, and how weights get here."""

from __future__ import annotations

import argparse
import sys

from rich.table import Table
from rich.text import Text

from llmstream.commands.options import program, read_settings
from llmstream.commands.progress import Bars
from llmstream.commands.running import run as run_to_end
from llmstream.commands.service import Service, Unreachable, open_finder
from llmstream.commands.terminal import say, stdout_console
from llmstream.config import ModelSettings, Settings
from llmstream.errors import ConfigError
from llmstream.providers.build import local_models
from llmstream.providers.weights import pull, resolve


def run(args: argparse.Namespace) -> int:
    if args.action == "pull" and args.source is None:
        raise ConfigError("models pull needs a SOURCE: a name such as smollm2, or owner/repo/file.gguf.")
    if args.action == "list" and args.source is not None:
        raise ConfigError("models list takes no SOURCE.")
    settings = read_settings(args)
    return run_to_end(lambda: _pull(args.source, settings) if args.action == "pull" else _list(args, settings))


async def _pull(source: str, settings: Settings) -> int:
    with Bars() as bars:
        path = await pull(source, settings.data_dir, bars(source))
    sys.stdout.write(f"{path}\n")
    return 0


async def _list(args: argparse.Namespace, settings: Settings) -> int:
    async with open_finder(settings, args.url) as finder:
        service = await finder.find()
        if service is not None:
            say(f"Served at {service.url}:")
            stdout_console().print(await _served(service))
            return 0
        if finder.given is not None:
            raise Unreachable(f"No llmstream server answers at {finder.given}.")
    say("No server is running; the configuration names:")
    stdout_console().print(configured(settings))
    return 0


async def _served(service: Service) -> Table:
    table = _table("model", "provider", "context")
    for model in (await service.get("/v1/models"))["data"]:
        context = model.get("context_length")
        table.add_row(Text(model["id"]), Text(model["owned_by"]), "-" if context is None else str(context))
    return table


def configured(settings: Settings) -> Table:
    """The models of the configuration and where their weights are."""
    table = _table("model", "engine", "weights")
    for name, model in local_models(settings).items():
        table.add_row(Text(name), model.engine, Text(_weights(model, settings)))
    for name, provider in settings.providers.items():
        for model_name in provider.models or ["*"]:
            table.add_row(Text(model_name), Text(f"remote: {name}"), "-")
    return table


def _weights(model: ModelSettings, settings: Settings) -> str:
    if model.engine == "echo":
        return "needs none"
    try:
        path = resolve(model.source, settings.data_dir)
    except ConfigError as error:
        return error.message
    return str(path) if path else f"not here yet; get them with: {program()} models pull {model.source}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
