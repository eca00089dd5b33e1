"""Where requests go and how they begin: origins, proxies, and the words on the wire. Pure."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

_PATH = "/%:@!$&'()*+,;=~"
_QUERY = _PATH + "?"


class Origin(NamedTuple):
    """A server: a scheme, a host and a port, and who we are there."""

    tls: bool
    host: str
    port: int
    authorization: str | None

    @classmethod
    def of(cls, url: str) -> Origin:
        """Reads an ``http://`` or ``https://`` URL, whose user becomes Basic credentials."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        authorization = None
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = f"Basic {b64encode(user.encode()).decode()}"
        host = (parts.hostname or "").encode("idna").decode()
        return cls(tls, host, parts.port or (443 if tls else 80), authorization)

    @property
    def authority(self) -> str:
        """Host and port, as CONNECT names them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def netloc(self) -> str:
        """Host and, where it is not the usual one, port."""
        return self.authority.removesuffix(":443" if self.tls else ":80")

    @property
    def proxy_fields(self) -> dict[str, str]:
        """What this proxy wants to be told with a request."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


def target(url: str) -> bytes:
    """The path and query of a URL in the characters that a request line can hold."""
    parts = urlsplit(url)
    query = f"?{quote(parts.query, safe=_QUERY)}" if parts.query else ""
    return ((quote(parts.path, safe=_PATH) or "/") + query).encode()


def fields(headers: Mapping[str, str]) -> bytes:
    """Headers as they are sent. Raises UnicodeEncodeError for what is not Latin-1."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
