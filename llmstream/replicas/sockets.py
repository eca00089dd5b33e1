"""One port for several processes: each listens on a socket of its own, and the kernel spreads the connections.

A bound socket that nobody listens on gets no connections; it only keeps the number for us.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from llmstream.errors import ConfigError


class Address(NamedTuple):
    """What one socket is bound to."""

    family: socket.AddressFamily
    address: tuple[Any, ...]


def reserve(host: str, port: int) -> list[socket.socket]:
    """Binds every address that ``host`` stands for, all on the same port; 0 picks one. Raises OSError."""
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("This system cannot share a port between processes; set server.workers to 1.")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    reserved: list[socket.socket] = []
    try:
        for family, _, _, _, (name, number, *rest) in dict.fromkeys(found):
            if reserved and not number:
                number = reserved[0].getsockname()[1]
            wanted = Address(family, (name, number, *rest))
            # Sharing is for us alone: a port that somebody else holds counts as taken, also when he would share it.
            _bound(wanted, shared=False).close()
            reserved.append(_bound(wanted, shared=True))
    except BaseException:
        close_all(reserved)
        raise
    return reserved


def another(reserved: Sequence[socket.socket]) -> list[socket.socket]:
    """Binds the same addresses once more, for one process to listen on. Raises OSError."""
    return [_bound(Address(own.family, own.getsockname()), shared=True) for own in reserved]


def close_all(sockets: Sequence[socket.socket]) -> None:
    for own in sockets:
        with suppress(OSError):
            own.close()


def _bound(wanted: Address, *, shared: bool) -> socket.socket:
    own = socket.socket(wanted.family, socket.SOCK_STREAM)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if wanted.family == socket.AF_INET6:
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        own.setblocking(False)
        own.bind(wanted.address)
    except BaseException:
        own.close()
        raise
    return own
