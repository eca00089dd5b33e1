"""Any API that speaks OpenAI's protocol, found by its base URL.

Every answer is asked for as a stream and read as bytes: the objects of the official SDK cost many times the CPU of the
same stream read in one pass. The SDK looks at the API's health.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec
import openai

from llmstream.config import ProviderSettings
from llmstream.errors import ConfigError, ProviderError, UpstreamBroken
from llmstream.providers.chunks import Answer, ChunkStream, WholeAnswer
from llmstream.providers.prefill import produced_tokens, upstream_body, with_earlier
from llmstream.providers.refusals import refusal
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, Kind, ModelInfo

HEALTH_S = 2.0
_EOF_S = 0.05
_ERROR_BODY_S = 2.0
_ERROR_BODY_BYTES = 64 * 1024
_PATHS: Final[dict[Kind, str]] = {"chat": "/chat/completions", "completion": "/completions"}
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)


class OpenAIProvider:
    """One remote API; runs on every replica."""

    pool = "remote"

    def __init__(self, name: str, settings: ProviderSettings, *, slots: int) -> None:
        self.name = name
        self.slots = slots
        self._settings = settings
        self._key = settings.api_key.get_secret_value().strip() if settings.api_key else ""
        root, mark, query = settings.base_url.partition("?")
        self._root, self._query = root.rstrip("/"), query
        self._urls = {kind: f"{self._root}{path}{mark}{query}" for kind, path in _PATHS.items()}
        self._session: aiohttp.ClientSession | None = None
        self._sdk: openai.AsyncOpenAI | None = None

    @property
    def models(self) -> Sequence[ModelInfo]:
        return [ModelInfo(name=model, provider=self.name) for model in self._settings.models]

    async def open(self) -> None:
        self._check_settings()
        # Compressed streams arrive late: what compresses them waits for more text.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "llmstream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connect_s = self._settings.connect_timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.slots),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            proxy=_proxy(self._root),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s),
        )
        self._sdk = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self._root, max_retries=0, default_query=dict(parse_qsl(self._query))
        )
        # The SDK takes these from the environment, and sends OpenAI's to any API.
        self._sdk.organization = self._sdk.project = None

    async def close(self) -> None:
        session, self._session = self._session, None
        sdk, self._sdk = self._sdk, None
        if session is not None:
            await session.close()
        if sdk is not None:
            await sdk.close()

    async def check(self, request: GenerateRequest) -> None:
        """Only the upstream knows what it accepts."""

    def can_continue(self, request: GenerateRequest, so_far: Transcript) -> bool:
        """Structured output is not continued: what enforces its grammar begins anew behind the prefill."""
        shape = request.body.get("response_format") or {"type": "text"}
        return (
            self._settings.continue_by == "assistant_prefill"
            and request.kind == "chat"
            and request.choices == 1
            and isinstance(shape, dict)
            and shape.get("type") == "text"
            and (so_far.empty or so_far.continuable)
        )

    async def generate(
        self, request: GenerateRequest, so_far: Transcript | None
    ) -> AsyncGenerator[Sequence[Delta], None]:
        produced = produced_tokens(so_far)
        if so_far is not None and request.max_tokens is not None and request.max_tokens <= produced:
            yield [Delta(finish_reason="length", usage=so_far.usage)]
            return
        async with self._ask(request.kind, upstream_body(request, so_far)) as response:
            answer = self._answer(response, request.choices)
            while not answer.ended:
                deltas = await self._next(response, answer)
                if so_far is not None:
                    deltas = [with_earlier(delta, so_far, produced) for delta in deltas]
                if deltas:
                    yield deltas
            if answer.failure is not None:
                raise UpstreamBroken(self._says(answer.failure))
            await _drain(response)

    async def health(self) -> dict[str, object]:
        """Asks for the list of models."""
        start = time.perf_counter()
        problem = await self._problem()
        took_ms = round((time.perf_counter() - start) * 1000, 3)
        if problem is None:
            return {"status": "ok", "took_ms": took_ms}
        return {"status": "error", "error": self._says(problem), "took_ms": took_ms}

    async def _problem(self) -> str | None:
        if self._sdk is None:
            return "is not open"
        try:
            async with asyncio.timeout(HEALTH_S):
                bearer = f"Bearer {self._key}" if self._key else openai.Omit()
                listing = await self._sdk.models.with_raw_response.list(extra_headers={"Authorization": bearer})
        except TimeoutError:
            return f"did not answer within {HEALTH_S:g} s"
        except openai.APIStatusError as error:
            return f"answered HTTP {error.status_code} to GET /models"
        except Exception as error:  # the SDK does not say what it may raise, and a look at the health must not fail
            return f"failed: {error.__cause__ or error or type(error).__name__}"
        found = listing.headers.get("content-type", "nothing")
        return None if "json" in found else f"answers {found} where a list of models belongs; check base_url"

    def _check_settings(self) -> None:
        where = f"providers.{self.name}"
        if urlsplit(self._root).username and self._key:
            raise ConfigError(f"{where}: give either a user in base_url or an api_key, not both", param="base_url")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{where}.api_key: has characters that no HTTP header can hold", param="api_key")

    @asynccontextmanager
    async def _ask(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Sends a request; the block gets an answer with status 200. Leaving it stops the upstream."""
        if self._session is None:
            raise ProviderError(self._says("is not open"))
        try:
            response = await self._session.post(self._urls[kind], data=msgspec.json.encode(body), allow_redirects=False)
        except _BROKEN as error:
            # The original may hold the request's headers, and with them the key.
            raise UpstreamBroken(self._says(f"could not be reached: {_describe(error)}")) from None
        try:
            if response.status != 200:
                raise await self._refusal(response)
            yield response
        finally:
            response.close()

    def _answer(self, response: aiohttp.ClientResponse, choices: int) -> Answer:
        kind = response.headers.get("Content-Type", "")
        if kind.startswith("application/json"):
            return WholeAnswer(choices)
        if kind.startswith("text/html"):
            raise UpstreamBroken(self._says(f"answered a web page; check providers.{self.name}.base_url"))
        return ChunkStream(choices)

    @staticmethod
    async def _next(response: aiohttp.ClientResponse, answer: Answer) -> list[Delta]:
        try:
            data = await response.content.readany()
        except _BROKEN as error:
            answer.cut(f"broke the connection off: {_describe(error)}")
            return []
        return answer.feed(data) if data else answer.close()

    async def _refusal(self, response: aiohttp.ClientResponse) -> ProviderError:
        body = bytearray()
        with suppress(*_BROKEN):
            async with asyncio.timeout(_ERROR_BODY_S):
                while len(body) < _ERROR_BODY_BYTES and (data := await response.content.readany()):
                    body += data
        return refusal(response.status, response.headers, self._scrubbed(bytes(body)), provider=self.name)

    def _says(self, what: str) -> str:
        return self._scrubbed(f"The provider {self.name!r} {what}".encode()).decode()

    def _scrubbed(self, text: bytes) -> bytes:
        return text.replace(self._key.encode(), b"********") if self._key else text


def _describe(error: BaseException) -> str:
    """What an error of the connection says, without URLs and headers."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{error.status} {error.message}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer is not whole"
    if isinstance(error, TimeoutError):
        return "there was no connection in time"
    return str(error) or type(error).__name__


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Waits a moment for the end that follows [DONE], so that the connection can be used again."""
    with suppress(*_BROKEN):
        async with asyncio.timeout(_EOF_S):
            while not response.content.at_eof():
                await response.content.readany()


def _proxy(url: str) -> str | None:
    """The proxy that the environment asks for."""
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy.startswith(("http://", "https://")):
        raise ConfigError(f"the environment names a proxy for {parts.hostname} that is not an HTTP proxy")
    return proxy
