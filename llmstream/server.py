"""The embedded server: ``async with Server(settings) as server: server.url``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from aiohttp import web

from llmstream.api.app import create_app
from llmstream.api.protocol import Runner
from llmstream.config import Settings
from llmstream.errors import ConfigError
from llmstream.gateway import Gateway
from llmstream.opening import open_gateway
from llmstream.providers.build import PullProgress

BACKLOG = 4096
"""Clients that may wait to be accepted, as far as the system lets them. With 128 a busy moment loses some: they
believe that they are connected, and are cut or kept waiting for seconds."""
HANDLER_GRACE_S = 2.0
"""What request handlers get to end after their streams were closed."""


class Server:
    """One replica, listening while the context is open.

    Raises ConfigError on entering when something it needs is missing, saying what to do. ``progress`` hears how far
    the download of missing weights is. ``sockets`` are bound already and listened on instead of the address in the
    settings; the server closes them.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        sockets: Sequence[socket.socket] = (),
        progress: PullProgress | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self._sockets = sockets
        self._progress = progress
        self._stack = AsyncExitStack()
        self._port: int | None = None
        self._gateway: Gateway | None = None

    @property
    def url(self) -> str:
        """``http://host:port`` of the open server."""
        if self._port is None:
            raise RuntimeError("The server is not open; use 'async with Server(settings) as server'.")
        return url_of(self.settings.server.host, self._port)

    @property
    def gateway(self) -> Gateway:
        """The open gateway, for callers in the same process."""
        if self._gateway is None:
            raise RuntimeError("The server is not open; use 'async with Server(settings) as server'.")
        return self._gateway

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._gateway = await stack.enter_async_context(open_gateway(self.settings, progress=self._progress))
            server = self.settings.server
            runner = Runner(
                create_app(self.settings, gateway=self._gateway),
                header_timeout_s=server.header_timeout_s,
                max_line_size=server.max_header_bytes,
                max_field_size=server.max_header_bytes,
                access_log=None,
                shutdown_timeout=HANDLER_GRACE_S,
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await self._listen(runner)
            self._port = runner.addresses[0][1]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._port = None
        await self._stack.aclose()

    async def _listen(self, runner: Runner) -> None:
        server = self.settings.server
        sites: list[web.BaseSite] = [web.SockSite(runner, own, backlog=BACKLOG) for own in self._sockets]
        for site in sites or [web.TCPSite(runner, server.host, server.port, backlog=BACKLOG)]:
            try:
                await site.start()
            except OSError as error:
                raise cannot_listen(server.host, server.port, error) from error


def url_of(host: str, port: int) -> str:
    """Where a client finds what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    """Says what to do about a taken or forbidden address."""
    return ConfigError(
        f"Cannot listen on {host}:{port} ({error.strerror or error}). "
        "Choose another port with --port (server.port); 0 picks a free one."
    )
