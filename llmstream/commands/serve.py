"""``serve``: runs the server until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmstream import __version__
from llmstream.commands.options import program, read_settings
from llmstream.commands.progress import Bars
from llmstream.commands.running import run as run_to_end
from llmstream.commands.server_file import ServerFile
from llmstream.commands.terminal import say
from llmstream.config import Settings, print_config
from llmstream.config_schema import mask_url
from llmstream.telemetry import setup_logging

if TYPE_CHECKING:
    from llmstream.server import Server


def run(args: argparse.Namespace) -> int:
    settings = read_settings(args)
    if args.print_config:
        sys.stdout.write(print_config(settings))
        return 0
    setup_logging(settings.logging)
    grace_s = settings.server.shutdown_grace_s

    def on_stop() -> None:
        say(f"Stopping; what runs gets up to {grace_s:g} s, the rest is kept. Ctrl-C again stops at once.")

    return run_to_end(lambda: _serve(settings), on_stop=on_stop)


async def _serve(settings: Settings) -> int:
    from llmstream.server import Server

    serving = False
    try:
        with Bars() as bars:
            async with Server(settings, progress=bars) as server:
                serving = True
                with _announced(settings, server):
                    for fact in await facts(settings, server):
                        sys.stdout.write(f"{fact}\n")
                    sys.stdout.flush()
                    await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not serving:
            raise
    return 0


async def facts(settings: Settings, server: Server) -> list[str]:
    """What one wants to know about a server that just began to listen, a line for each."""
    models = ", ".join(model.name for model in server.gateway.models)
    return [
        f"llmstream {__version__} listens on {server.url}",
        f"models  {models or 'whatever the providers serve'}",
        f"store   {await _store(settings, server)}",
        f'try     {program()} chat "Why is the sky blue?"',
        f"        curl -N {server.url}/chat -H 'Content-Type: application/json' -d '{{\"message\": \"Hello!\"}}'",
    ]


async def _store(settings: Settings, server: Server) -> str:
    kind = (await server.gateway.health())["store"].get("server", "of unknown kind")
    if settings.store.url is None:
        return f"embedded {kind} in {settings.data_dir.absolute() / 'store'}"
    return f"{kind} at {mask_url(settings.store.url.get_secret_value())}"


@contextmanager
def _announced(settings: Settings, server: Server) -> Iterator[None]:
    """Lets other commands find this server."""
    file = ServerFile(settings.data_dir)
    try:
        file.write(server.url)
    except OSError as error:
        say(f"{file.path} cannot be written ({error.strerror}); other commands need --url {server.url}.")
    try:
        yield
    finally:
        file.remove()
