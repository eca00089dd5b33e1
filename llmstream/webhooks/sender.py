"""One request to one receiver: no redirects, no cookies, nothing of the answer but its status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import aiohttp
from aiohttp.client_reqrep import ClientResponse
from yarl import URL

from llmstream.webhooks.reach import AddressRefused, Reach

READ_BYTES = 16 * 1024
"""What is buffered of an answer; nobody reads it."""
HEADERS = {"Content-Type": "application/json", "User-Agent": "llmstream-webhooks/1"}


class Outcome(NamedTuple):
    """What came of one try."""

    kind: Literal["delivered", "gone", "refused", "failed"]
    """``gone``: the receiver wants no more of it. ``refused``: it is where events must not go."""
    status: int | None = None
    error: str | None = None
    """What the job's owner may know; says nothing of the URL or the answer."""
    retry_after_s: float = 0.0


class Sender:
    """Connections to receivers; those that requests name have their addresses checked as they are connected to."""

    def __init__(self, reach: Reach, timeout_s: float, concurrency: int) -> None:
        self._reach = reach
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def open(self) -> None:
        self._sessions = {guarded: self._session(guarded) for guarded in (True, False)}

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    async def post(self, url: URL, body: bytes, headers: Mapping[str, str], *, trusted: bool) -> Outcome:
        """Posts an event; never raises but when cancelled. ``trusted`` where the configuration names the URL."""
        guarded = not trusted and not self._reach.trusts(url.host or "")
        try:
            async with self._sessions[guarded].post(
                url, data=body, headers={**HEADERS, **headers}, allow_redirects=False
            ) as response:
                return _judge(response)
        except TimeoutError:
            return Outcome("failed", error=f"no answer within {self._timeout_s:g} s")
        except aiohttp.ClientConnectorCertificateError:
            return Outcome("failed", error="the receiver's certificate is not valid")
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, AddressRefused):
                return Outcome("refused", error=str(error.os_error))
            return Outcome("failed", error="no connection")
        except (aiohttp.ClientError, OSError, ValueError):
            return Outcome("failed", error="the connection broke, or the answer was not HTTP")

    def _session(self, guarded: bool) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=self._concurrency, socket_factory=self._reach.socket if guarded else None
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding",),
            read_bufsize=READ_BYTES,
        )


def _judge(response: ClientResponse) -> Outcome:
    status = response.status
    if 200 <= status < 300:
        return Outcome("delivered", status)
    if status == 410:
        return Outcome("gone", status, "the receiver wants no more of it (410)")
    if 300 <= status < 400:
        return Outcome("failed", status, f"a redirect ({status}), which is not followed")
    after = response.headers.get("Retry-After", "")
    seconds = float(after) if after.isascii() and after.isdigit() and len(after) < 7 else 0.0
    return Outcome("failed", status, f"the receiver answered {status}", seconds)
