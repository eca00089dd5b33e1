"""A server as the command line sees it: where it runs, and what it answers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout

from llmstream.commands.options import program
from llmstream.commands.server_file import ServerFile
from llmstream.config import Settings
from llmstream.config_sources import CLIENT_VARIABLE
from llmstream.errors import LLMStreamError

URL_VARIABLE = "LLMSTREAM_URL"
PROBE_S = 3.0
CALL_S = 30.0
SILENCE_S = 60.0
"""A stream that says nothing for so long is dead: the server pings far more often."""


class Unreachable(LLMStreamError):
    """No server answers; trying again can help."""

    code, retryable = "unreachable", True


class Service:
    """One server over HTTP. Raises Unreachable, and LLMStreamError with the server's own message."""

    def __init__(self, http: ClientSession, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._http = http
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def get(self, path: str, **query: str | int) -> dict[str, Any]:
        return await self._call("GET", path, params=query)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return await self._call("POST", path, json=body)

    async def health(self) -> dict[str, Any]:
        """Everything behind the server, also when some of it is missing."""
        return await self._call("GET", "/health/full", accepted=503)

    def stream(
        self, path: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> AbstractAsyncContextManager[ClientResponse]:
        """Opens a stream; the caller looks at its status."""
        timeout = ClientTimeout(total=None, sock_connect=PROBE_S, sock_read=SILENCE_S)
        return self._http.get(self.url + path, params=query, headers={**self._headers, **headers}, timeout=timeout)

    async def healthy(self) -> bool:
        """Whether a server of this kind answers at the URL."""
        try:
            timeout = ClientTimeout(total=PROBE_S)
            async with self._http.get(f"{self.url}/health", headers=self._headers, timeout=timeout) as response:
                body = await response.json()
        except (ClientError, OSError, ValueError, TimeoutError):
            return False
        return isinstance(body, dict) and "model_loaded" in body

    async def _call(self, method: str, path: str, *, accepted: int = 200, **options: Any) -> dict[str, Any]:
        timeout, url = ClientTimeout(total=CALL_S), self.url + path
        try:
            async with self._http.request(method, url, headers=self._headers, timeout=timeout, **options) as response:
                if response.status >= 400 and response.status != accepted:
                    raise await refusal(response)
                body: dict[str, Any] = await response.json()
                return body
        except (ClientError, OSError, ValueError, TimeoutError) as error:
            raise Unreachable(f"The server at {self.url} does not answer: {error or type(error).__name__}.") from error


class Finder:
    """Looks for the server that these settings and flags mean."""

    def __init__(self, http: ClientSession, settings: Settings, url: str | None) -> None:
        self._http = http
        self._key = os.environ.get(CLIENT_VARIABLE)
        self.given = url or os.environ.get(URL_VARIABLE) or None
        self._file = ServerFile(settings.data_dir)
        host = settings.server.host
        self._configured = f"http://{f'[{host}]' if ':' in host else host}:{settings.server.port}"
        self._port_known = settings.server.port != 0

    def at(self, url: str, key: str | None = None) -> Service:
        """The server at a known URL, with a key of its own."""
        return Service(self._http, url, key)

    async def find(self) -> Service | None:
        """The server named by ``--url`` or LLMSTREAM_URL, else the one of the data directory, else of the settings."""
        for url in self._candidates():
            service = Service(self._http, url, self._key)
            if await service.healthy():
                return service
        return None

    async def require(self) -> Service:
        """Like :meth:`find`. Raises Unreachable when there is none."""
        service = await self.find()
        if service is None:
            looked = " and ".join(self._candidates()) or str(self._file.path)
            raise Unreachable(f"No llmstream server answers (looked at {looked}). Start one with: {program()} serve")
        return service

    def _candidates(self) -> list[str]:
        if self.given is not None:
            return [self.given]
        record = self._file.read()
        urls = [record.url] if record is not None else []
        return [*urls, self._configured] if self._port_known and self._configured not in urls else urls


@asynccontextmanager
async def open_finder(settings: Settings, url: str | None) -> AsyncIterator[Finder]:
    """A finder with its HTTP session."""
    async with ClientSession() as http:
        yield Finder(http, settings, url)


async def refusal(response: ClientResponse) -> LLMStreamError:
    """A server's error answer as an error of ours."""
    try:
        error = (await response.json(content_type=None))["error"]
        message, code = str(error["message"]), error.get("code")
    except (ClientError, TimeoutError, ValueError, LookupError, TypeError, AttributeError):
        message, code = f"{response.url} answered with status {response.status}", None
    return LLMStreamError(message, code=code, status=response.status)
