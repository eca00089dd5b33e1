"""What stands behind the store's URL: one server, or the nodes of a Redis Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

from llmstream.config import StoreSettings, store_urls
from llmstream.errors import ConfigError, StoreUnavailable
from llmstream.store.cluster import Cluster
from llmstream.store.connection import LOST, Connection, Refusal, connector
from llmstream.store.keys import Keys
from llmstream.store.node import Node
from llmstream.store.pipeline import Sender
from llmstream.store.presence import Presence, parse_info


class Servers(Protocol):
    """A :class:`Node` by itself, or a :class:`Cluster`."""

    @property
    def presence(self) -> Presence: ...

    @property
    def nodes(self) -> Collection[Node]: ...

    @property
    def kind(self) -> str:
        """What to add to the server's name and version."""

    @property
    def writes(self) -> Sender: ...

    @property
    def synced(self) -> Sender:
        """For writes that count once they are on the disk."""

    @property
    def reads(self) -> Sender:
        """For what may take long and is to delay no write."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def connect(self) -> Connection:
        """Makes a connection to any server."""

    def renew(self) -> None:
        """Begins new connections."""

    async def probe(self) -> None:
        """Writes something to every server. Raises StoreUnavailable."""


async def find_servers(url: str, settings: StoreSettings) -> Servers:
    """Asks the first host in ``url`` that answers whether it is part of a cluster.

    Raises StoreUnavailable when none answers, ConfigError for a URL that does not suit what does.
    """
    urls = store_urls(url)
    keys = Keys(settings.prefix)
    if await _is_cluster(urls, settings.timeout_s):
        if url.startswith("unix:"):
            raise ConfigError("A Redis Cluster is reached by a redis:// URL (store.url, REDIS_URL), not by a socket.")
        return Cluster(urls, settings.timeout_s, Presence(), keys)
    if len(urls) > 1:
        raise ConfigError("store.url (REDIS_URL) names several hosts, but the first that answers is not in a cluster.")
    return Node(connector(url, settings.timeout_s), settings.timeout_s, Presence(), keys.probe)


async def _is_cluster(urls: list[str], timeout_s: float) -> bool:
    unanswered = StoreUnavailable("No host is named.")
    for url in urls:
        connection = connector(url, timeout_s)()
        try:
            async with asyncio.timeout(timeout_s):
                await connection.connect()
                return parse_info(await connection.ask("INFO", "cluster")).get("cluster_enabled") == "1"
        except (*LOST, Refusal) as error:
            unanswered = StoreUnavailable(f"The store does not answer ({type(error).__name__}: {error}).")
        finally:
            await connection.close()
    raise unanswered
