"""The store as the rest of the house sees it: jobs, logs and queues behind a constant number of connections."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from llmstream.config import SchedulerSettings, StoreSettings
from llmstream.errors import ConfigError, LLMStreamError
from llmstream.store.connection import connector
from llmstream.store.embedded import EmbeddedStore
from llmstream.store.jobs import Jobs
from llmstream.store.keys import Keys
from llmstream.store.lanes import Lanes
from llmstream.store.log import Log
from llmstream.store.pipeline import Pipeline
from llmstream.store.readers import Readers
from llmstream.store.repeats import Repeats
from llmstream.store.signals import Signals
from llmstream.store.tail import Tail

OLDEST_REDIS = (7, 0)


class Store:
    """Four connections, however many clients and jobs: writes, reads, the tail of foreign logs, wake-ups."""

    def __init__(self, url: str, settings: StoreSettings, *, embedded: EmbeddedStore | None = None) -> None:
        self.embedded = embedded
        self.keys = Keys(settings.prefix)
        self._settings = settings
        connect = connector(url, settings.timeout_s)
        self.writes = Pipeline(connect, settings.timeout_s, "writes")
        self.reads = Pipeline(connect, settings.timeout_s, "reads")
        self.tail = Tail(connect, self.writes, self.keys)
        self.signals = Signals(connect, self.keys)
        self.jobs = Jobs(
            self.writes,
            self.keys,
            retention_s=settings.retention_s,
            unfinished_retention_s=settings.unfinished_retention_s,
            outage_s=settings.outage_s,
        )
        self.readers = Readers(self.writes, self.keys)
        self.repeats = Repeats(self.writes, self.keys)
        self.log = Log(self.writes, self.reads, self.jobs, self.keys, self.tail, outage_s=settings.outage_s)

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
        for part in (self.writes, self.reads, self.tail, self.signals):
            await part.open()

    async def close(self) -> None:
        for part in (self.signals, self.tail, self.reads, self.writes):
            await part.close()

    async def ping(self) -> float:
        """Seconds of one round trip. Raises StoreUnavailable."""
        start = time.perf_counter()
        await self.writes.call("PING")
        return time.perf_counter() - start

    async def version(self) -> tuple[str, tuple[int, ...]]:
        """The server's name and version, for example ``("valkey", (9, 1, 2))``."""
        info = _parse_info(await self.writes.call("INFO", "server"))
        name = "valkey" if "valkey_version" in info else "redis"
        number = info.get("valkey_version") or info.get("redis_version") or "0"
        return name, tuple(int(part) for part in number.split(".") if part.isdigit())

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
        yield store


def _parse_info(raw: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in raw.decode("utf-8", "replace").splitlines())
    return {key: value.strip() for key, colon, value in lines if colon}
