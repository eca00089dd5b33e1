"""The HTTP server under the application: what is no proper HTTP never reaches a middleware and is answered here."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from typing import Any

from aiohttp import http_exceptions, web
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo

from llmstream.api.body import slow_sender, unreadable, unsupported_encoding
from llmstream.api.keys import GATEWAY
from llmstream.api.middleware import refusal
from llmstream.api.observing import UNKNOWN
from llmstream.api.pings import STALL_S
from llmstream.errors import BadRequest, LLMStreamError, error_body
from llmstream.telemetry.observer import OTHER, Observer
from llmstream.types import Failure

LINGER_S = 1.0
"""How long a body that nobody wants is read and thrown away, so that its sender sees the answer before the end."""

_TCP_USER_TIMEOUT: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)

logger = logging.getLogger(__name__)


class Runner(web.AppRunner):
    """Runs an application on connections that answer broken requests in the same shape as all others.

    A sender gets ``header_timeout_s`` to begin, and again to complete, the headers of a request.
    """

    def __init__(self, app: web.Application, *, header_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(app, **kwargs)
        self._header_timeout_s = header_timeout_s

    async def _make_server(self) -> web.Server:
        # Does what the application needs to start; its server only lends the two functions that lead into it.
        server = await super()._make_server()
        gateway = self.app.get(GATEWAY)
        observer = gateway.observer if gateway is not None else Observer()
        handler = _in_one_shape(server.request_handler, observer)
        made_with = {"header_timeout_s": self._header_timeout_s, "observer": observer, **self._kwargs}
        return _Server(handler, request_factory=server.request_factory, **made_with)


def _in_one_shape(handler: Any, observer: Observer) -> Any:
    """Some refusals, that of an unknown ``Expect`` for one, are raised before the middlewares are entered."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            answer: web.StreamResponse = await handler(request)
        except web.HTTPException as error:
            observer.requested(request.method, UNKNOWN, error.status, 0.0)
            return refusal(request, error)
        return answer

    return handle


class _Server(web.Server):
    def __init__(self, handler: Any, *, request_factory: Any, observer: Observer, **kwargs: Any) -> None:
        super().__init__(handler, request_factory=request_factory)
        self.observer = observer
        self._made_with = kwargs

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=asyncio.get_running_loop(), lingering_time=LINGER_S, **self._made_with)


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_began", "_header_deadline", "_header_timeout_s")

    def __init__(self, manager: web.Server, *, header_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._header_timeout_s = header_timeout_s
        self._header_deadline: asyncio.TimerHandle | None = None
        self._began = False
        """Whether the client has said anything."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._began = True
        waiter = self._waiter
        if self._messages or self._request_in_progress or (waiter is not None and waiter.done()):
            if self._header_deadline is not None:
                self._header_deadline.cancel()
                self._header_deadline = None
        elif self._header_deadline is None:
            self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._header_deadline = self._loop.call_later(self._header_timeout_s, self._cut_slow_sender)

    def _cut_slow_sender(self) -> None:
        waiter = self._waiter
        if not self._began or waiter is None or waiter.done():
            self.force_close()  # an answer to nothing would be taken for one to the next request
            return
        error = slow_sender("headers", "header_timeout_s", self._header_timeout_s)
        self._messages.append((_ErrInfo(status=error.http_status, exc=error, message=error.message), EMPTY_PAYLOAD))
        waiter.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_headers()
        connection = transport.get_extra_info("socket")
        if _TCP_USER_TIMEOUT is not None and connection is not None and connection.family in _TCP_FAMILIES:
            # A host that vanished without a word would otherwise keep its streams for a quarter of an hour.
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, int(STALL_S * 1000))

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Logs what is wrong with us; a client that leaves or sends a broken body is none of that."""
        if isinstance(kw.get("exc_info"), web.RequestPayloadError | ConnectionError):
            logger.debug("the client broke off", exc_info=kw["exc_info"])
        else:
            super().log_exception(*args, **kw)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what could not be parsed, or what went wrong outside of the middlewares; ends the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of another answer has been sent already")
        request_id = secrets.token_hex(8)
        if isinstance(exc, http_exceptions.HttpProcessingError | LLMStreamError):
            error = exc if isinstance(exc, LLMStreamError) else _refusal(exc)
            logger.info("refused bytes of %s: %s", request.remote, error.message, extra={"request_id": request_id})
            failure, status = error.failure(), error.http_status
        else:
            if not isinstance(exc, ConnectionError):
                logger.error("a request failed", exc_info=exc, extra={"request_id": request_id})
            failure = Failure(message=f"Something went wrong inside llmstream ({request_id}).", code="internal_error")
        if isinstance(self._manager, _Server):
            self._manager.observer.requested(OTHER, UNKNOWN, status, 0.0)
        headers = {"x-request-id": request_id, "X-Process-Time": "0.000000"}
        response = web.json_response(error_body(failure), status=status, headers=headers)
        response.force_close()
        return response


def _refusal(error: http_exceptions.HttpProcessingError) -> LLMStreamError:
    if isinstance(error, http_exceptions.ContentEncodingError):
        missing = "install" in error.message  # aiohttp knows it, but not without a package that is not here
        return unsupported_encoding() if missing else unreadable()
    if isinstance(error, http_exceptions.LineTooLong):
        return BadRequest("The request's first line or one of its headers is too long.", status=431, code="too_long")
    said = error.message.strip().partition("\n")[0].rstrip(":.")
    return BadRequest(f"The request is not valid HTTP: {said}.", code="invalid_http")
