"""One server of the store."""

from __future__ import annotations

from collections.abc import Callable, Collection

from llmstream.errors import StoreError
from llmstream.store.connection import Connect
from llmstream.store.pipeline import Command, Pipeline
from llmstream.store.presence import Guard, Presence, parse_info
from llmstream.store.synced import Synced

TOUCH_TTL_MS = 60_000


class Node:
    """One server and the connections to it, each made when it is first needed."""

    kind = ""

    def __init__(
        self,
        connect: Connect,
        timeout_s: float,
        presence: Presence,
        own_key: Callable[[], str],
        *,
        stranger: bool = False,
    ) -> None:
        self.presence = presence
        self.nodes: Collection[Node] = (self,)
        self.connect = connect
        self._own_key = own_key
        guard = Guard(presence, stranger=stranger)
        self.writes = Pipeline(connect, timeout_s, "writes", guard)
        self.reads = Pipeline(connect, timeout_s, "reads")
        self._syncs = Pipeline(connect, timeout_s, "syncs", guard)
        self.synced = Synced(self._syncs, timeout_s, self.touch)
        self._pipelines = (self.writes, self.reads, self._syncs)

    async def open(self) -> None:
        """Nothing is connected before it is needed."""

    async def close(self) -> None:
        for pipeline in reversed(self._pipelines):
            await pipeline.close()

    def renew(self) -> None:
        for pipeline in self._pipelines:
            pipeline.renew()

    def touch(self) -> Command:
        """A write that means nothing: a server that is full or read-only still answers every PING."""
        return ("SET", self._own_key(), 1, "PX", TOUCH_TTL_MS)

    async def probe(self) -> None:
        await self.writes.call(*self.touch())

    async def version(self) -> tuple[str, tuple[int, ...]]:
        """The server's name and version, for example ``("valkey", (9, 1, 2))``."""
        info = parse_info(await self.writes.call("INFO", "server"))
        name = "valkey" if "valkey_version" in info else "redis"
        number = info.get("valkey_version") or info.get("redis_version") or "0"
        return name, tuple(int(part) for part in number.split(".") if part.isdigit())

    async def learn(self) -> str | None:
        """Finds out how the server confirms that a write is on its disk; returns why it cannot."""
        info = parse_info(await self.writes.call("INFO", "persistence"))
        if info.get("aof_enabled") != "1":
            return "needs a store with appendonly yes; this one has no log on its disk."
        try:
            await self.writes.call("WAITAOF", 0, 0, 1)
        except StoreError as error:
            self.synced.waits = False  # with appendfsync always the answer itself comes after the disk
            if not await self._always_syncs():
                return f"needs Valkey, Redis 7.2 or later, or appendfsync always ({error.message})."
        return None

    async def _always_syncs(self) -> bool:
        try:
            _, value = await self.writes.call("CONFIG", "GET", "appendfsync")
        except StoreError:
            return False
        return bool(value == b"always")
