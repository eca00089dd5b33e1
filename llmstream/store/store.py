"""The store as the rest of the house sees it: jobs, logs and queues behind a constant number of connections."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from llmstream.config import SchedulerSettings, StoreSettings
from llmstream.errors import BadRequest, ConfigError, LLMStreamError
from llmstream.store.api_keys import ApiKeys
from llmstream.store.breakers import Breakers, Policy
from llmstream.store.budgets import Budgets
from llmstream.store.cache import CacheIndex
from llmstream.store.cluster import Cluster
from llmstream.store.control import Control
from llmstream.store.embedded import EmbeddedStore
from llmstream.store.jobs import Jobs
from llmstream.store.keys import Keys
from llmstream.store.lanes import Lanes
from llmstream.store.log import Log
from llmstream.store.memory import Memory, in_memory
from llmstream.store.node import Node
from llmstream.store.outbox import Outbox
from llmstream.store.owned import Owned
from llmstream.store.pipeline import Sender
from llmstream.store.rate_limits import RateLimits
from llmstream.store.readers import Readers
from llmstream.store.recent import Recent
from llmstream.store.repeats import Repeats
from llmstream.store.results import Results
from llmstream.store.servers import Servers, find_servers
from llmstream.store.sessions import Sessions
from llmstream.store.signals import Signals
from llmstream.store.tail import BlockingTail, PollingTail, Tail
from llmstream.types import Clock, Durability

OLDEST_REDIS = (7, 0)

logger = logging.getLogger(__name__)


class Store:
    """A constant number of connections, however many clients and jobs: one for wake-ups, one for the tail of foreign
    logs where the store is a single server, and those of each :class:`Node`.
    """

    def __init__(
        self, url: str, settings: StoreSettings, servers: Servers, *, embedded: EmbeddedStore | None = None
    ) -> None:
        self.url = url
        """Where other processes reach the same store; may hold a password."""
        self.embedded = embedded
        self.keys = Keys(settings.prefix)
        self._settings = settings
        self._servers = servers
        self.presence = servers.presence
        self.recent = Recent(self.presence)
        self.writes, self.synced, self.reads = servers.writes, servers.synced, servers.reads
        self._sync_problem: str | None = None
        self.tail: Tail
        if isinstance(servers, Cluster):
            self.tail = PollingTail(self.keys, self.reads)
        else:
            self.tail = BlockingTail(self.keys, servers.connect, self.writes)
        self.signals = Signals(servers.connect, self.keys)
        # What still answers elsewhere may be the old server, cut off from the new one.
        for part in (servers, self.tail, self.signals):
            self.presence.on_rebirth.append(part.renew)
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
        self.readers = Readers(self.writes, self.keys)
        self.control = Control(self.writes, self.keys)
        self.rate_limits = RateLimits(self.writes, self.keys, note_s=settings.unfinished_retention_s)
        self.owned = Owned(self.writes, self.keys, ttl_s=settings.unfinished_retention_s)
        self.api_keys = ApiKeys(self.writes, self._surest, self.keys)
        self.repeats = Repeats(self.writes, self.keys, self.recent)
        self.cache = CacheIndex(self.writes, self.keys)
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
        self.memory = Memory(
            self.log,
            max_bytes=settings.memory_bytes,
            max_answer_bytes=settings.memory_answer_bytes,
            retention_s=settings.memory_retention_s,
        )

    def records(self, job_id: str) -> Jobs | Memory:
        """Where a job is on record."""
        return self.memory if in_memory(job_id) else self.jobs

    def lanes(self, pool: str, settings: SchedulerSettings) -> Lanes:
        """The queue of one pool."""
        return Lanes(
            self.writes,
            self.keys,
            pool,
            ageing_s=settings.ageing_s,
            max_waiting=settings.max_waiting,
            max_scheduled=settings.max_scheduled,
            lease_s=settings.lease_s,
            ttl_s=self._settings.unfinished_retention_s,
            retention_s=self._settings.retention_s,
        )

    def outbox(self, pool: str, clock: Clock | None = None) -> Outbox:
        """The events of one pool that are to be delivered; ``clock`` stands in for the store's."""
        ttl_s = max(self._settings.unfinished_retention_s, self._settings.retention_s)
        return Outbox(self.writes, self.keys, pool, ttl_s=ttl_s, clock=clock)

    def budgets(self, replica: str, *, lease_s: float) -> Budgets:
        """What the replica has reserved of the limits of targets."""
        budgets = Budgets(self.writes, self.keys, self.presence, replica, lease_s=lease_s)
        self.signals.on_room = budgets.wake
        return budgets

    def breakers(self, replica: str, policy: Policy, *, lease_s: float) -> Breakers:
        """The replica's view of the breakers of targets."""
        breakers = Breakers(self.writes, self.keys, replica, policy, lease_s=lease_s)
        self.signals.on_breaker = breakers.look
        return breakers

    def sessions(self, ttl_s: float) -> Sessions:
        """Conversations, each kept for so long; never longer than the logs of the jobs that answered."""
        return Sessions(self.writes, self.keys, self.recent, ttl_s=min(ttl_s, self._settings.retention_s))

    def results(self, prefix: str) -> Results:
        """Where those who post orders to a queue look for the answers."""
        return Results(self.writes, prefix, self._settings.retention_s)

    def announce_over(self, job_id: str) -> None:
        """Tells all replicas that a job is over, with the next batch."""
        self.writes.defer(("PUBLISH", self.keys.over, job_id), _announced)

    async def pools(self) -> list[str]:
        """Names of all pools that some replica has served within the retention time."""
        names = await self.writes.call("ZRANGE", self.keys.pools, 0, -1)
        return [name.decode() for name in names]

    @property
    def nodes(self) -> Collection[Node]:
        """The servers that the store consists of."""
        return self._servers.nodes

    async def open(self) -> None:
        """Raises StoreUnavailable when a cluster is not complete."""
        for part in (self._servers, self.tail, self.signals):
            await part.open()
        self.presence.open(self._servers.probe)

    async def close(self) -> None:
        await self.presence.close()
        await self.recent.close()
        self.owned.flush()
        for part in (self.signals, self.tail, self._servers):
            await part.close()

    async def ping(self) -> float:
        """Seconds of one round trip, to the slowest node. Raises StoreUnavailable."""
        start = time.perf_counter()
        await asyncio.gather(*(node.writes.call("PING") for node in self.nodes))
        return time.perf_counter() - start

    async def version(self) -> tuple[str, tuple[int, ...]]:
        """The server's name and version, for example ``("valkey", (9, 1, 2))``; of several the oldest."""
        return min(await asyncio.gather(*(node.version() for node in self.nodes)), key=lambda found: found[1])

    def check(self, durability: Durability) -> None:
        """Raises BadRequest when the server cannot give what ``durability`` promises."""
        if durability == "fsync" and self._sync_problem is not None:
            raise BadRequest(f"durability 'fsync' {self._sync_problem}", param="durability")

    def _surest(self) -> Sender:
        return self.synced if self._sync_problem is None else self.writes

    async def learn(self) -> None:
        """Finds out whether the server can confirm that a write is on its disk."""
        problems = await asyncio.gather(*(node.learn() for node in self.nodes))
        self._sync_problem = next(filter(None, problems), None)

    async def health(self) -> dict[str, Any]:
        """A quick look: status, server and time of a round trip; never raises."""
        try:
            seconds = await self.ping()
            name, version = await self.version()
        except LLMStreamError as error:
            return {"status": "error", "error": error.message}
        return {
            "status": "ok",
            "server": f"{name} {'.'.join(map(str, version))}{self._servers.kind}",
            "embedded": self.embedded is not None,
            "latency_ms": round(seconds * 1000, 3),
        }


def _announced(_reply: Any, error: Exception | None) -> None:
    if error is not None:
        logger.debug("a job's end is found out by looking: %s", error)


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
        try:
            servers = await find_servers(url, settings)
            store = Store(url, settings, servers, embedded=embedded)
            stack.push_async_callback(store.close)
            await store.open()
            name, version = await store.version()
        except ConfigError:
            raise
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
