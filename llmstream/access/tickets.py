"""Signed, expiring tokens in URLs, for clients that cannot send headers: each opens one stream, for reading only."""

from __future__ import annotations

import hmac
from asyncio import Future
from base64 import urlsafe_b64encode
from collections.abc import Callable

import msgspec

from llmstream.errors import LLMStreamError, Unauthorized
from llmstream.types import Clock, Principal

RENEW_S = 3600.0
"""The shared secret is kept alive in the store so often while it is used."""
RETRY_S = 5.0
"""After a token that was not signed here, the store is asked for another secret at most so often."""

Keep = Callable[[bytes], "Future[bytes]"]
"""Keeps the secret in the store unless it has one, and tells which one it is from now on."""


class Tickets:
    """Signs with the first of its secrets and accepts all of them."""

    def __init__(self, secret: bytes, lifetime_s: float, clock: Clock, keep: Keep | None = None) -> None:
        self._secrets: tuple[bytes, ...] = (secret,)
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._keep = keep
        self._kept_at = clock()

    def issue(self, principal: str, session_id: str, job_id: str | None) -> str:
        """A token for the stream of a session, or of one job of it. Costs no wait for the store."""
        now = self._clock()
        if self._keep is not None and now >= self._kept_at + RENEW_S:
            self._kept_at = now
            self._keep(self._secrets[0]).add_done_callback(self._adopt)
        until = format(int(now + self._lifetime_s), "x")
        return f"{until}.{_signature(self._secrets[0], principal, session_id, job_id, until)}.{principal}"

    async def check(self, token: str, session_id: str, job_id: str | None) -> Principal:
        """Who gave the token away, with the one right that it carries. Raises Unauthorized."""
        until, _, rest = token.partition(".")
        signature, _, principal = rest.partition(".")
        signed = (principal, session_id, job_id, until)
        if not self._signed(signature, signed):
            await self._look_for_another_secret()
            if not self._signed(signature, signed):
                raise Unauthorized("The token in the URL does not open this stream; use stream_url as it was given.")
        if self._clock() >= int(until, 16):
            raise Unauthorized(
                "The stream URL has expired; open the stream with the API key, or ask for a new URL.",
                code="expired_token",
            )
        return Principal(id=principal, scopes=("read",))

    def _signed(self, signature: str, signed: tuple[str, str, str | None, str]) -> bool:
        given = signature.encode("utf-8", "surrogatepass")
        return any(hmac.compare_digest(_signature(secret, *signed).encode(), given) for secret in self._secrets)

    async def _look_for_another_secret(self) -> None:
        # A store that lost its data got a new secret from whichever replica renewed it first.
        now = self._clock()
        if self._keep is not None and now >= self._kept_at + RETRY_S:
            self._kept_at = now
            try:
                self._take(await self._keep(self._secrets[0]))
            except LLMStreamError:
                return

    def _adopt(self, kept: Future[bytes]) -> None:
        if not kept.cancelled() and kept.exception() is None:
            self._take(kept.result())

    def _take(self, secret: bytes) -> None:
        if secret != self._secrets[0]:
            self._secrets = (secret, self._secrets[0])


def _signature(secret: bytes, principal: str, session_id: str, job_id: str | None, until: str) -> str:
    message = msgspec.json.encode(["stream", principal, session_id, job_id, until])
    return urlsafe_b64encode(hmac.digest(secret, message, "sha256")).rstrip(b"=").decode()
