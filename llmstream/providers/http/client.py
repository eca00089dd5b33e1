"""Requests to one origin over connections that are kept."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from types import TracebackType

import aiohappyeyeballs

from llmstream.providers.http.connection import Broken, Connection
from llmstream.providers.http.origin import Origin, fields

KEEP_S = 15.0
"""How long a connection that nobody uses is kept."""
LINGER_S = 1.0
"""How long the end of an answer may come after all that was wanted of it."""
NAME_S = 10.0
"""How long the addresses of a name are taken for granted."""
SWEEP_S = 1.0
_NEXT_ADDRESS_S = 0.25
"""How long one address is tried before the next is tried beside it (RFC 8305)."""


class Client:
    """At most ``limit`` connections, each reused for as long as both sides keep it."""

    def __init__(
        self, url: str, *, headers: Mapping[str, str], limit: int, connect_s: float, proxy: str | None = None
    ) -> None:
        self._origin = Origin.of(url)
        self._proxy = Origin.of(proxy) if proxy else None
        self._hop = self._proxy or self._origin
        self._limit = limit
        self._connect_s = connect_s
        sent = {"Host": self._origin.netloc, **headers}
        if self._origin.authorization:
            sent["Authorization"] = self._origin.authorization
        self._base = b""
        if self._proxy and not self._origin.tls:
            self._base = b"http://" + self._origin.netloc.encode()
            sent |= self._proxy.proxy_fields
        self._fields = fields(sent)
        self._tls: ssl.SSLContext | None = None
        if self._origin.tls or self._hop.tls:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        self._turns = asyncio.Semaphore(limit)
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}
        self._lingering: dict[Connection, float] = {}
        """With the time at which each is given up; oldest first."""
        self._addresses: list[aiohappyeyeballs.AddrInfoType] = []
        self._known_until = 0.0
        self._asking = asyncio.Lock()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def close(self) -> None:
        """Breaks everything off."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.abort()

    def post(self, where: bytes, body: bytes, more: bytes = b"") -> Exchange:
        """Sends a request, with ``more`` header lines; the block gets the connection with status and headers. Raises
        Broken.

        Leaving the block by an exception stops the upstream at once; after a plain end what is left of the answer is
        let go by, for a moment, so that the connection can be used again. Redirects are not followed.
        """
        request = b"POST %b%b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (
            self._base,
            where,
            self._fields,
            more,
            len(body),
            body,
        )
        return Exchange(self, request)

    async def begin(self, request: bytes) -> Connection:
        """Waits for a free connection, sends on it and waits for the head of the answer; to be followed by ``end``."""
        await self._turns.acquire()
        try:
            if self._idle:
                kept, _ = self._idle.popitem()
                try:
                    return await _exchange(kept, request)
                except Broken:
                    # The other side may have closed it while the request was on its way.
                    if kept.answered:
                        raise
            return await _exchange(await self._connect(), request)
        except BaseException:
            self._turns.release()
            raise

    def end(self, connection: Connection, *, linger: bool) -> None:
        """Keeps the connection, waits for the end of the answer where that may come soon, or closes."""
        self._turns.release()
        if connection.reusable:
            self._keep(connection)
        elif linger and connection.alive and not connection.complete:
            self._lingering[connection] = asyncio.get_running_loop().time() + LINGER_S
            connection.forget()
            self._sweep_later()
        else:
            connection.abort()

    async def _connect(self) -> Connection:
        if self._closed:
            raise Broken("the client is closed")
        if len(self._open) >= self._limit and self._lingering:
            oldest = next(iter(self._lingering))
            del self._lingering[oldest]
            oldest.abort()
        connection = Connection(self._on_rest)
        self._open.add(connection)
        try:
            async with asyncio.timeout(self._connect_s):
                await self._dial(connection)
        except TimeoutError:
            raise Broken("there was no connection in time") from None
        except OSError as error:
            raise Broken(str(error) or type(error).__name__) from None
        finally:
            if not connection.alive:
                self._open.discard(connection)
        return connection

    async def _dial(self, connection: Connection) -> None:
        addresses = await self._resolve()
        sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_S, interleave=1)
        tunnel = self._proxy is not None and self._origin.tls
        first = Connection(_nobody) if tunnel else connection
        tls, name = (self._tls, self._hop.host) if self._hop.tls else (None, None)
        try:
            await asyncio.get_running_loop().create_connection(lambda: first, sock=sock, ssl=tls, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        if tunnel:
            await self._tunnel(first, connection)

    async def _tunnel(self, outer: Connection, inner: Connection) -> None:
        """Makes ``inner`` a connection to the origin through ``outer``, one to the proxy."""
        assert self._proxy is not None
        assert self._tls is not None
        authority = self._origin.authority
        headers = {"Host": authority, **self._proxy.proxy_fields}
        try:
            await outer.request(b"CONNECT %b HTTP/1.1\r\n%b\r\n" % (authority.encode(), fields(headers)))
            if outer.status != 200:
                raise Broken(f"the proxy {self._proxy.authority} answered HTTP {outer.status}")
            transport = await asyncio.get_running_loop().start_tls(
                outer.transport, inner, self._tls, server_hostname=self._origin.host
            )
        except BaseException:
            outer.abort()
            raise
        assert transport is not None
        inner.connection_made(transport)

    async def _resolve(self) -> list[aiohappyeyeballs.AddrInfoType]:
        loop = asyncio.get_running_loop()
        async with self._asking:
            if loop.time() >= self._known_until:
                found = await loop.getaddrinfo(self._hop.host, self._hop.port, type=socket.SOCK_STREAM)
                self._addresses, self._known_until = list(found), loop.time() + NAME_S
        return self._addresses

    def _on_rest(self, connection: Connection) -> None:
        if self._lingering.pop(connection, None) is not None:
            if connection.reusable:
                self._keep(connection)
            else:
                connection.abort()
        if not connection.alive:
            self._idle.pop(connection, None)
            self._open.discard(connection)

    def _keep(self, connection: Connection) -> None:
        self._idle[connection] = asyncio.get_running_loop().time() + KEEP_S
        self._sweep_later()

    def _sweep_later(self) -> None:
        if self._sweeper is None and not self._closed:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """One timer for all connections."""
        self._sweeper = None
        now = asyncio.get_running_loop().time()
        for waiting in (self._idle, self._lingering):
            for connection in [connection for connection, until in waiting.items() if until <= now]:
                del waiting[connection]
                connection.abort()
        if self._idle or self._lingering:
            self._sweep_later()


class Exchange:
    """The block of :meth:`Client.post`."""

    __slots__ = ("_client", "_connection", "_request")

    def __init__(self, client: Client, request: bytes) -> None:
        self._client = client
        self._request = request

    async def __aenter__(self) -> Connection:
        self._connection = await self._client.begin(self._request)
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.end(self._connection, linger=kind is None)


async def _exchange(connection: Connection, request: bytes) -> Connection:
    try:
        await connection.request(request)
    except BaseException:
        connection.abort()
        raise
    return connection


def _nobody(connection: Connection) -> None:
    pass
