"""The store as the rest of the house sees it: jobs, logs and queues behind a constant number of connections."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from llmstream.config import SchedulerSettings, StoreSettings
from llmstream.errors import BadRequest, ConfigError, LLMStreamError, StoreError
from llmstream.store.connection import connector
from llmstream.store.embedded import EmbeddedStore
from llmstream.store.jobs import Jobs
from llmstream.store.keys import Keys
from llmstream.store.lanes import Lanes
from llmstream.store.log import Log
from llmstream.store.pipeline import Pipeline
from llmstream.store.presence import Presence, parse_info
from llmstream.store.recent import Recent
from llmstream.store.signals import Signals
from llmstream.store.synced import Synced
from llmstream.store.tail import Tail
from llmstream.types import Durability

OLDEST_REDIS = (7, 0)


class Store:
    """Five connections, however many clients and jobs: writes, writes that wait for the disk (made when first needed),
    reads, the tail of foreign logs, wake-ups.
    """

    def __init__(self, url: str, settings: StoreSettings, *, embedded: EmbeddedStore | None = None) -> None:
        self.embedded = embedded
        self.keys = Keys(settings.prefix)
        self._settings = settings
        connect = connector(url, settings.timeout_s)
        self.presence = Presence(self.keys.probe)
        self.recent = Recent(self.presence)
        self.writes = Pipeline(connect, settings.timeout_s, "writes", self.presence)
        self.reads = Pipeline(connect, settings.timeout_s, "reads")
        self._syncs = Pipeline(connect, settings.timeout_s, "syncs", self.presence)
        self.synced = Synced(self._syncs, settings.timeout_s, self.keys.probe)
        self._sync_problem: str | None = None
        self.tail = Tail(connect, self.writes, self.keys)
        self.signals = Signals(connect, self.keys)
        self.jobs = Jobs(
            self.writes,
            self.synced,
            self.keys,
            self.presence,
            self.recent,
            retention_s=settings.retention_s,
            unfinished_retention_s=settings.unfinished_retention_s,
            outage_s=settings.outage_s,
        )
        self.log = Log(
            self.writes,
            self.synced,
            self.reads,
            self.jobs,
            self.keys,
            self.tail,
            self.presence,
            self.recent,
            outage_s=settings.outage_s,
        )

    def lanes(self, pool: str, settings: SchedulerSettings) -> Lanes:
        """The queue of one pool."""
        return Lanes(
            self.writes,
            self.keys,
            pool,
            ageing_s=settings.ageing_s,
            max_waiting=settings.max_waiting,
            lease_s=settings.lease_s,
            ttl_s=self._settings.unfinished_retention_s,
            retention_s=self._settings.retention_s,
        )

    async def open(self) -> None:
        for part in (self.writes, self.reads, self._syncs, self.tail, self.signals):
            await part.open()
        self.presence.open(self.writes.call)

    async def close(self) -> None:
        await self.presence.close()
        await self.recent.close()
        for part in (self.signals, self.tail, self._syncs, self.reads, self.writes):
            await part.close()

    async def ping(self) -> float:
        """Seconds of one round trip. Raises StoreUnavailable."""
        start = time.perf_counter()
        await self.writes.call("PING")
        return time.perf_counter() - start

    async def version(self) -> tuple[str, tuple[int, ...]]:
        """The server's name and version, for example ``("valkey", (9, 1, 2))``."""
        info = parse_info(await self.writes.call("INFO", "server"))
        name = "valkey" if "valkey_version" in info else "redis"
        number = info.get("valkey_version") or info.get("redis_version") or "0"
        return name, tuple(int(part) for part in number.split(".") if part.isdigit())

    def check(self, durability: Durability) -> None:
        """Raises BadRequest when the server cannot give what ``durability`` promises."""
        if durability == "fsync" and self._sync_problem is not None:
            raise BadRequest(f"durability 'fsync' {self._sync_problem}", param="durability")

    async def learn(self) -> None:
        """Finds out whether and how the server can confirm that a write is on its disk."""
        info = parse_info(await self.writes.call("INFO", "persistence"))
        self._sync_problem = None
        if info.get("aof_enabled") != "1":
            self._sync_problem = "needs a store with appendonly yes; this one has no log on its disk."
            return
        try:
            await self.writes.call("WAITAOF", 0, 0, 1)
        except StoreError as error:
            self.synced.waits = False  # with appendfsync always the answer itself comes after the disk
            if not await self._always_syncs():
                self._sync_problem = f"needs Valkey, Redis 7.2 or later, or appendfsync always ({error.message})."

    async def _always_syncs(self) -> bool:
        try:
            _, value = await self.writes.call("CONFIG", "GET", "appendfsync")
        except StoreError:
            return False
        return bool(value == b"always")

    async def health(self) -> dict[str, Any]:
        """A quick look: status, server and time of a round trip; never raises."""
        try:
            seconds = await self.ping()
            name, version = await self.version()
        except LLMStreamError as error:
            return {"status": "error", "error": error.message}
        return {
            "status": "ok",
            "server": f"{name} {'.'.join(map(str, version))}",
            "embedded": self.embedded is not None,
            "latency_ms": round(seconds * 1000, 3),
        }


@asynccontextmanager
async def open_store(settings: StoreSettings, data_dir: Path) -> AsyncIterator[Store]:
    """Connects to ``settings.url``, or starts the embedded Valkey in ``data_dir`` when there is none.

    Raises ConfigError when neither can be had, saying what to do.
    """
    async with AsyncExitStack() as stack:
        embedded: EmbeddedStore | None = None
        if settings.url is None:
            embedded = await stack.enter_async_context(EmbeddedStore(data_dir, settings.sync))
        url = settings.url.get_secret_value() if settings.url is not None else embedded.url if embedded else ""
        store = Store(url, settings, embedded=embedded)
        await store.open()
        stack.push_async_callback(store.close)
        try:
            name, version = await store.version()
        except LLMStreamError as error:
            raise ConfigError(
                f"The store cannot be used: {error.message} Check REDIS_URL (store.url) and that the server runs."
            ) from error
        if name == "redis" and version[:2] < OLDEST_REDIS:
            found = ".".join(map(str, version))
            raise ConfigError(f"The store is Redis {found}; llmstream needs Redis 7.0 or later, or Valkey 8 or later.")
        await store.learn()
        try:
            store.check(settings.durability)
        except BadRequest as error:
            raise ConfigError(f"store.durability: {error.message}") from error
        yield store
