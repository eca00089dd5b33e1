"""Where events may go: no request may make the server talk to what only the server can reach."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from yarl import URL

from llmstream.errors import BadRequest

MAX_URL = 2048
HTTPS_PORT, FIRST_FREE_PORT = 443, 1024
PARAM = "webhook.url"
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_PRIVATE_NAMES = ("localhost", "local", "internal", "intranet", "lan", "home", "corp")
"""Last labels of names that no public server has."""


class AddressRefused(OSError):
    """A host's address is none that events may go to."""


class Reach:
    """What requests may name: public hosts over https, and what ``webhooks.allow`` lists."""

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self._networks: list[Network] = []
        self._hosts: list[str] = []
        for entry in allow:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self._hosts.append(entry.lower())

    def check(self, url: str) -> URL:
        """A URL that may be used as far as can be told before its host is looked up. Raises BadRequest, which does not
        show it."""
        if len(url) > MAX_URL:
            raise _refused(f"is longer than {MAX_URL} characters")
        if not re.fullmatch(r"[!-\[\]-~]+", url):
            raise _refused("has characters that a URL cannot have; write them as %XX, and a host's name in punycode")
        try:
            parsed = URL(url)
            host, port = parsed.host, parsed.port
        except ValueError:
            raise _refused("is none; expected https:// with a host") from None
        if parsed.scheme not in ("http", "https") or not host or port is None:
            raise _refused("must be https:// with a host, for example https://example.com/hook")
        if parsed.user is not None or parsed.password is not None:
            raise _refused("must not have a user or password in it; the signature tells who sends")
        if not self.trusts(host):
            self._check_public(parsed, host, port)
        return parsed.with_fragment(None)

    def trusts(self, host: str) -> bool:
        """Whether the configuration names the host, so that it may be anywhere."""
        address = _literal(host)
        if address is not None:
            return any(address in network for network in self._networks)
        return any(fnmatchcase(host.lower().rstrip("."), pattern) for pattern in self._hosts)

    def socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for an address that a host's name was resolved to, of all that is connected to. Raises
        AddressRefused. There is no moment between the check and the use in which the name could change."""
        family, kind, protocol, _, where = info
        address = ipaddress.ip_address(str(where[0]).partition("%")[0])
        if not is_public(address) and not any(address in network for network in self._networks):
            raise AddressRefused("the host's address is not a public one (webhooks.allow)")
        return socket.socket(family=family, type=kind, proto=protocol)

    @staticmethod
    def _check_public(url: URL, host: str, port: int) -> None:
        if url.scheme != "https":
            raise _refused("must begin with https:// unless webhooks.allow names its host")
        if port != HTTPS_PORT and port < FIRST_FREE_PORT:
            raise _refused(f"names port {port}; 443 and those from {FIRST_FREE_PORT} on are allowed")
        address, labels = _literal(host), host.lower().rstrip(".").split(".")
        if _is_private_name(labels) if address is None else not is_public(address):
            raise _refused("names a host that is not public; webhooks.allow in the configuration may name it")


def is_public(address: Address) -> bool:
    """Whether everybody on the internet means the same host by it. What stands for an IPv4 address counts as that."""
    inner = _inside(address) if isinstance(address, ipaddress.IPv6Address) else None
    if inner is not None:
        return is_public(inner)
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not (address.is_multicast or address.is_reserved or site_local)


def _inside(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


def _is_private_name(labels: list[str]) -> bool:
    return len(labels) < 2 or labels[-1] in _PRIVATE_NAMES or not labels[-1][:1].isalpha()


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _refused(why: str) -> BadRequest:
    return BadRequest(f"{PARAM} {why}.", param=PARAM)
