"""Any API that speaks OpenAI's protocol, found by its base URL.

Every answer is asked for as a stream and read as bytes: the objects of the official SDK cost many times the CPU of the
same stream read in one pass. The SDK looks at the API's health.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
import openai

from llmstream.config import ProviderSettings
from llmstream.errors import ConfigError, ProviderError, UpstreamBroken, UpstreamRejected, UpstreamUnreachable
from llmstream.providers.abilities import check_capabilities, plain_text, told
from llmstream.providers.base import CannotContinue, Sink
from llmstream.providers.chunks import Answer, ChunkStream, WholeAnswer
from llmstream.providers.continuing import Continued, produced_tokens
from llmstream.providers.gathering import Gathered
from llmstream.providers.http.client import Client
from llmstream.providers.http.connection import Broken, Connection
from llmstream.providers.http.origin import target
from llmstream.providers.nested import UpstreamJobFailed, UpstreamJobs, is_final, name_of
from llmstream.providers.prefill import upstream_body
from llmstream.providers.refusals import Complaint, refusal, reported
from llmstream.providers.vectors_answer import VectorsAnswer
from llmstream.transcript import Transcript
from llmstream.types import Delta, GenerateRequest, Kind, ModelInfo
from llmstream.vectors import SLICE_INPUTS

HEALTH_S = 2.0
STOP_S = 5.0
_ERROR_BODY_S = 2.0
_ERROR_BODY_BYTES = 64 * 1024
_PATHS: Final[dict[Kind, str]] = {
    "chat": "/chat/completions",
    "completion": "/completions",
    "embedding": "/embeddings",
}


logger = logging.getLogger(__name__)


class OpenAIProvider:
    """One remote API; runs on every replica."""

    pool = "remote"

    def __init__(self, name: str, settings: ProviderSettings, *, slots: int) -> None:
        self.name = name
        self.slots = slots
        self.can = settings.capabilities(name)
        self.models: Sequence[ModelInfo] = [
            ModelInfo(name=model, provider=name, extra={"capabilities": told(self.can)}) for model in settings.models
        ]
        self._settings = settings
        self._key = settings.api_key.get_secret_value().strip() if settings.api_key else ""
        root, mark, query = (settings.url(name) or "").partition("?")
        self._root, self._query = root.rstrip("/"), query
        self._targets = {kind: target(f"{self._root}{path}{mark}{query}") for kind, path in _PATHS.items()}
        continued = (
            urlsplit(self._root)._replace(path=self.can.continue_path).geturl() if self.can.continue_path else root
        )
        self._continued = target(f"{continued.rstrip('/')}{_PATHS['chat']}{mark}{query}")
        self._nested = UpstreamJobs(self._root) if self.can.continue_by == "replay" else None
        self._client: Client | None = None
        self._sdk: openai.AsyncOpenAI | None = None

    async def open(self) -> None:
        self._check_settings()
        # Compressed streams arrive late: what compresses them waits for more text.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "llmstream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connect_s, proxy = self._settings.connect_timeout_s, _proxy(self._root)
        try:
            limit = min(self.slots, self.can.max_parallel or self.slots)
            self._client = Client(self._root, headers=headers, limit=limit, connect_s=connect_s, proxy=proxy)
        except UnicodeError as error:
            raise ConfigError(
                f"providers.{self.name}.base_url: the name of its host, or of the proxy that the environment asks "
                f"for, is not one: {error}",
                param="base_url",
            ) from None
        self._sdk = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self._root, max_retries=0, default_query=dict(parse_qsl(self._query))
        )
        # The SDK takes these from the environment, and sends OpenAI's to any API.
        self._sdk.organization = self._sdk.project = None

    async def close(self) -> None:
        client, self._client = self._client, None
        sdk, self._sdk = self._sdk, None
        if client is not None:
            client.close()
        if sdk is not None:
            await sdk.close()

    async def check(self, request: GenerateRequest) -> None:
        """Only the upstream knows what it accepts; what it cannot do at all is known here."""
        check_capabilities(request, self.can, self.name)

    def can_continue(self, request: GenerateRequest, so_far: Transcript) -> bool:
        """Structured output is not continued by prefill: what enforces its grammar begins anew behind it."""
        if self.can.continue_by == "none" or request.kind != "chat" or request.choices != 1:
            return False
        return (so_far.empty or so_far.continuable) and (self.can.continue_by == "replay" or plain_text(request))

    async def generate(self, request: GenerateRequest, so_far: Transcript | None, sink: Sink) -> None:
        if request.kind == "embedding":
            await self._embed(request, sink)
            return
        if so_far is not None and self._reached_its_limit(request, so_far):
            sink.put([Delta(finish_reason="length", usage=so_far.usage)])
            return
        continued = Continued(request, so_far, self.can) if so_far is not None else None
        try:
            await self._ask(request, so_far, continued, sink)
        except Broken as error:
            raise UpstreamUnreachable(self._says(f"could not be reached: {error}")) from None
        except UpstreamRejected as error:
            if continued is None or self._nested is not None:
                raise
            raise CannotContinue(f"The answer cannot be continued: {error.message}") from None
        if continued is not None and continued.diverged:
            raise CannotContinue(self._says("did not repeat what it had said before it was cut"))

    async def _embed(self, request: GenerateRequest, sink: Sink) -> None:
        """All in one request, as limits of requests and tokens count; what came is logged in bounded entries."""
        made = Gathered()
        try:
            await self._ask(request, None, None, made)
        except Broken as error:
            raise UpstreamUnreachable(self._says(f"could not be reached: {error}")) from None
        for start in range(0, len(made.deltas), SLICE_INPUTS):
            if not sink.put(made.deltas[start : start + SLICE_INPUTS]):
                await sink.drained()

    async def _ask(
        self, request: GenerateRequest, so_far: Transcript | None, continued: Continued | None, sink: Sink
    ) -> None:
        if self._client is None:
            raise ProviderError(self._says("is not open"))
        name = name_of(request) if self._nested else b""
        where = self._targets[request.kind] if continued is None or self._nested else self._continued
        # What is sent gets no name here: the answer may take hours.
        async with self._client.post(where, upstream_body(request, so_far, self.can), name) as response:
            if response.status != 200:
                raise await self._refusal(response)
            if self._nested is not None:
                self._nested.note(request, response)
            await self._read(response, self._answer(response, request), continued, sink)
        if self._nested is not None and not (continued and continued.diverged):
            self._nested.over(request)

    async def stop(self, job_id: str) -> None:
        """Tells another llmstream to end what it still runs for a job that is over. Others notice that we hung up."""
        where = self._nested.cancelling(job_id) if self._nested is not None else None
        if where is None or self._client is None:
            return
        try:
            async with asyncio.timeout(STOP_S), self._client.post(where, b"") as response:
                if response.status != 200:
                    logger.warning("%s", self._says(f"answered HTTP {response.status} to a cancellation"))
        except (Broken, TimeoutError) as error:
            logger.warning("%s", self._says(f"could not be told to stop: {error}"))

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

    def _answer(self, response: Connection, request: GenerateRequest) -> Answer:
        kind, coding = response.headers.get("content-type", ""), response.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise UpstreamBroken(self._says(f"compresses its answers ({coding}), though it is asked not to"))
        if request.kind == "embedding" and not kind.startswith("text/html"):
            return VectorsAnswer(request.choices)
        if kind.startswith("application/json"):
            return WholeAnswer(request.choices)
        if kind.startswith("text/html"):
            raise UpstreamBroken(self._says(f"answered a web page; check providers.{self.name}.base_url"))
        return ChunkStream(request.choices)

    async def _read(self, response: Connection, answer: Answer, continued: Continued | None, sink: Sink) -> None:
        """Reads an answer to its end; raising stops the upstream."""

        def put(deltas: list[Delta]) -> bool:
            if continued is not None:
                deltas = continued.behind(deltas)
                answer.ended = answer.ended or continued.diverged
            return not deltas or sink.put(deltas)

        def take(data: bytes) -> bool:
            return put(answer.feed(data)) and not answer.ended

        try:
            while await response.read(take) and not answer.ended:
                await sink.drained()
            if not answer.ended:
                put(answer.close())
        except Broken as error:
            answer.cut(f"broke the connection off: {error}")
        if answer.failure is not None and self._nested is not None and is_final(answer.complaint):
            raise UpstreamJobFailed(self._says(answer.failure))
        if answer.complaint is not None:
            said = self._scrubbed(msgspec.json.encode(answer.complaint))
            raise reported(msgspec.json.decode(said, type=Complaint), provider=self.name)
        if answer.failure is not None:
            raise UpstreamBroken(self._says(answer.failure))

    async def _refusal(self, response: Connection) -> ProviderError:
        body = bytearray()

        def take(data: bytes) -> bool:
            body.extend(data)
            return len(body) < _ERROR_BODY_BYTES

        with suppress(Broken, TimeoutError):
            async with asyncio.timeout(_ERROR_BODY_S):
                await response.read(take)
        said = self._scrubbed(_unescaped(bytes(body)))
        return refusal(response.status, response.headers, said, provider=self.name)

    def _reached_its_limit(self, request: GenerateRequest, so_far: Transcript) -> bool:
        if self.can.continue_by == "replay" or request.max_tokens is None:
            return False
        return request.max_tokens <= produced_tokens(so_far)

    def _says(self, what: str) -> str:
        return self._scrubbed(f"The provider {self.name!r} {what}".encode()).decode()

    def _scrubbed(self, text: bytes) -> bytes:
        return text.replace(self._key.encode(), b"********") if self._key else text


def _unescaped(body: bytes) -> bytes:
    """JSON without needless escapes, in which a key could hide."""
    try:
        return msgspec.json.encode(msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body


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
