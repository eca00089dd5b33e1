"""A receiver of events: checks their signatures with the official library and answers as it is told."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import web
from standardwebhooks import Webhook

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def new_secret(letter: str = "k") -> str:
    """A signing secret as the configuration takes it."""
    return f"whsec_{b64encode(letter.encode() * 32).decode()}"


SECRET = new_secret()


class Receiver:
    """Keeps every event whose signature is right, and counts all requests."""

    def __init__(self, secret: str = SECRET, port: int = 0) -> None:
        self.events: list[dict[str, Any]] = []
        self.ids: list[str] = []
        """The ``webhook-id`` of each request."""
        self.bad: list[BaseException] = []
        """What was wrong with signatures."""
        self.requests: Counter[str] = Counter()
        """By path."""
        self.raw: list[tuple[bytes, dict[str, str]]] = []
        self.open, self.most_open = 0, 0
        self.answers: list[int | Answer] = []
        """What the next requests get; then 204."""
        self._webhook = Webhook(secret)
        self._port = port

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._receive)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/hook"

    def of(self, job_id: str) -> list[dict[str, Any]]:
        """The events that tell of a job."""
        return [event for event in self.events if event["data"]["task_id"] == job_id]

    async def _receive(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.path] += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            body, headers = await request.read(), {name.lower(): value for name, value in request.headers.items()}
            self.raw.append((body, headers))
            self.ids.append(headers["webhook-id"])
            try:
                self.events.append(self._webhook.verify(body, headers))
            except Exception as error:
                self.bad.append(error)
            answer = self.answers.pop(0) if self.answers else 204
            return web.Response(status=answer) if isinstance(answer, int) else await answer(request)
        finally:
            self.open -= 1


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()
