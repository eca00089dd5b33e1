"""``serve``: runs the server until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmstream import __version__
from llmstream.commands.options import program, read_settings
from llmstream.commands.progress import Bars
from llmstream.commands.running import run as run_to_end
from llmstream.commands.server_file import ServerFile
from llmstream.commands.terminal import forget_stdout, has_terminal, say
from llmstream.config import Settings, print_config
from llmstream.config_schema import mask_url
from llmstream.errors import ConfigError
from llmstream.processes import collect_less, open_more_files
from llmstream.telemetry import setup_logging

if TYPE_CHECKING:
    from llmstream.replicas.supervisor import Replicas

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    settings = read_settings(args)
    if args.print_config:
        sys.stdout.write(print_config(settings))
        return 0
    setup_logging(settings.logging)
    open_more_files()  # worker processes inherit it
    grace_s = settings.server.shutdown_grace_s

    def on_stop() -> None:
        say(f"Stopping; what runs gets up to {grace_s:g} s, the rest is kept. Ctrl-C again stops at once.")

    if settings.server.workers == 1:
        return run_to_end(lambda: _serve(settings), on_stop=on_stop)
    return run_to_end(lambda: _serve_replicas(settings, lambda: read_settings(args)), on_stop=on_stop)


async def _serve(settings: Settings) -> int:
    from llmstream.server import Server

    serving = False
    try:
        with Bars() as bars:
            async with Server(settings, progress=bars) as server:
                serving = True
                models = [model.name for model in server.gateway.models]
                store = (await server.gateway.health())["store"]
                collect_less()
                await _until_stopped(settings, server.url, facts(settings, server.url, models, store))
    except asyncio.CancelledError:
        if not serving:
            raise
    return 0


async def _serve_replicas(settings: Settings, read_again: Callable[[], Settings]) -> int:
    from llmstream.replicas.supervisor import Replicas

    serving = False
    try:
        with Bars() as bars:
            async with Replicas(settings, progress=bars) as replicas:
                serving = True
                _restart_on_signals(lambda: _restart(replicas, read_again))
                store = await replicas.store.health()
                await _until_stopped(settings, replicas.url, facts(settings, replicas.url, replicas.models, store))
    except asyncio.CancelledError:
        if not serving:
            raise
    return 0


def _restart(replicas: Replicas, read_again: Callable[[], Settings]) -> None:
    try:
        replicas.restart(read_again())
    except ConfigError as error:
        logger.error("nothing is restarted, the old configuration stays: %s", error.message)


def _restart_on_signals(restart: Callable[[], None]) -> None:
    """SIGUSR2 asks for a restart. So does SIGHUP, unless it comes because our terminal was closed: that is the end."""
    had_terminal = has_terminal()

    def on_hangup() -> None:
        if had_terminal and not has_terminal():
            signal.raise_signal(signal.SIGTERM)
        else:
            restart()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR2, restart)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        loop.add_signal_handler(signal.SIGHUP, on_hangup)


async def _until_stopped(settings: Settings, url: str, lines: Sequence[str]) -> None:
    with _announced(settings, url):
        try:
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()
        except OSError:  # whoever closed the terminal or the pipe may want the server all the same
            forget_stdout()
        await asyncio.Event().wait()


def facts(settings: Settings, url: str, models: Sequence[str], store: Mapping[str, Any]) -> list[str]:
    """What one wants to know about a server that just began to listen, a line for each."""
    workers = settings.server.workers
    shown = '-H "Authorization: Bearer $LLMSTREAM_API_KEY" ' if settings.authenticated else ""
    return [
        f"llmstream {__version__} listens on {url}" + (f" with {workers} workers" if workers > 1 else ""),
        f"models  {', '.join(models) or 'whatever the providers serve'}",
        f"store   {_store(settings, store)}",
        *([f"docs    {url}/docs"] if settings.server.docs else []),
        f'try     {program()} chat "Why is the sky blue?"',
        f"        curl -N {url}/chat {shown}-H 'Content-Type: application/json' -d '{{\"message\": \"Hello!\"}}'",
    ]


def _store(settings: Settings, health: Mapping[str, Any]) -> str:
    kind = health.get("server", "of unknown kind")
    if settings.store.url is None:
        return f"embedded {kind} in {settings.data_dir.absolute() / 'store'}"
    return f"{kind} at {mask_url(settings.store.url.get_secret_value())}"


@contextmanager
def _announced(settings: Settings, url: str) -> Iterator[None]:
    """Lets other commands find this server."""
    file = ServerFile(settings.data_dir)
    try:
        file.write(url)
    except OSError as error:
        say(f"{file.path} cannot be written ({error.strerror}); other commands need --url {url}.")
    try:
        yield
    finally:
        file.remove()
