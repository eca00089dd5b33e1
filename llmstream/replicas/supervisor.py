"""Several replica processes as one server: ``async with Replicas(settings) as replicas: replicas.url``."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from pydantic import SecretStr, ValidationError

from llmstream.config import Settings
from llmstream.errors import ConfigError, LLMStreamError, StoreUnavailable
from llmstream.providers.build import PullProgress, pull_weights
from llmstream.replicas.process import ReplicaProcess
from llmstream.replicas.slot import Slot
from llmstream.replicas.sockets import another, close_all, reserve
from llmstream.replicas.tally import Tally
from llmstream.replicas.wire import Ready
from llmstream.scheduler.scheduler import HARD_STOP_S
from llmstream.server import HANDLER_GRACE_S, cannot_listen, url_of
from llmstream.store.store import Store, open_store

CLOSING_S = 3.0
"""After all its own deadlines: what a replica process gets to close its connections and end."""

logger = logging.getLogger(__name__)


class Replicas:
    """``server.workers`` processes on one port over one store, each replaced when it dies or hangs.

    The store belongs to this process: it outlives the replicas, and what a dead one held goes to the others at once.
    Raises ConfigError on entering when something is missing, saying what to do. ``progress`` hears how far the
    download of missing weights is.
    """

    def __init__(self, settings: Settings, *, progress: PullProgress | None = None) -> None:
        self.settings = settings
        self._progress = progress
        self._stack = AsyncExitStack()
        self._store: Store | None = None
        self._replica_settings = settings
        self._tally = Tally()
        self._processes: set[ReplicaProcess] = set()
        self._slots: list[Slot] = []
        self._restart = asyncio.Event()
        self._port: int | None = None
        self._first: Ready | None = None

    @property
    def url(self) -> str:
        """``http://host:port`` of the open server."""
        assert self._port is not None, "not open"
        return url_of(self.settings.server.host, self._port)

    @property
    def models(self) -> list[str]:
        """What can be asked for."""
        return self._first.models if self._first else []

    @property
    def store(self) -> Store:
        """The open store that all replicas share."""
        assert self._store is not None, "not open"
        return self._store

    def restart(self, settings: Settings | None = None) -> None:
        """Begins to replace the processes one after the other; each new one is ready before an old one goes.

        The new ones take over changed ``settings``, but for what this process decided when it began: address, number
        of workers, store. Raises ConfigError for settings that do not go with these.
        """
        if settings is not None:
            self.settings = _changed(self.settings, settings)
            self._replica_settings = _for_one_replica(self.settings, self.store.url)
        self._restart.set()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            reserved = self._reserve()
            stack.callback(close_all, reserved)
            await pull_weights(self.settings, self._progress)
            self._store = await stack.enter_async_context(open_store(self.settings.store, self.settings.data_dir))
            self._replica_settings = _for_one_replica(self.settings, self._store.url)
            server = self.settings.server
            self._slots = [
                Slot(self, lambda: another(reserved), server.worker_timeout_s) for _ in range(server.workers)
            ]
            stack.push_async_callback(self._tally.close)
            stack.push_async_callback(self._end_processes)
            processes = await _fill(self._slots)
            self._first = processes[0].report
            tasks = [asyncio.create_task(slot.keep(), name="replica-slot") for slot in self._slots]
            tasks.append(asyncio.create_task(self._rolling(), name="rolling-restart"))
            stack.push_async_callback(_cancel, tasks)
            self._port = reserved[0].getsockname()[1]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def launch(self, sockets: list[socket.socket]) -> ReplicaProcess:
        """Starts a process and waits until it is ready. Raises LLMStreamError or OSError."""
        with self._tally.connect() as counts:
            process = await ReplicaProcess.start(self._replica_settings, sockets, counts)
        self._processes.add(process)
        try:
            report = await process.ready()
        except BaseException:
            await process.kill()
            self._processes.discard(process)
            raise
        logger.info("replica %s is ready", report.replica)
        return process

    async def retire(self, process: ReplicaProcess) -> None:
        """Asks a process to hand over and end, and gives the jobs it leaves to others."""
        await process.stop(self.settings.server.shutdown_grace_s + HARD_STOP_S + HANDLER_GRACE_S + CLOSING_S)
        await self.bury(process)

    async def bury(self, process: ReplicaProcess) -> None:
        """Gives the jobs of a dead process to others."""
        self._processes.discard(process)
        if process.report is None:
            return
        try:
            for pool in process.report.pools:
                await self.store.lanes(pool, self.settings.scheduler).leave(process.report.replica)
        except StoreUnavailable as error:
            logger.warning("the lease of %s lapses by itself: %s", process.report.replica, error.message)

    def _reserve(self) -> list[socket.socket]:
        server = self.settings.server
        try:
            return reserve(server.host, server.port)
        except OSError as error:
            raise cannot_listen(server.host, server.port, error) from error

    async def _rolling(self) -> None:
        while True:
            await self._restart.wait()
            self._restart.clear()
            logger.info("replacing all replica processes")
            try:
                for slot in self._slots:
                    await slot.renew()
            except (LLMStreamError, OSError) as error:
                logger.error("the rolling restart stops here; the other replicas stay as they are: %s", error)
            else:
                logger.info("all replica processes are new")

    async def _end_processes(self) -> None:
        for slot in self._slots:
            slot.close()
        await asyncio.gather(*(self.retire(process) for process in list(self._processes)))


def _changed(old: Settings, new: Settings) -> Settings:
    kept = {name: getattr(old.server, name) for name in ("host", "port", "workers", "worker_timeout_s")}
    fields = {name: getattr(new, name) for name in Settings.model_fields}
    fields |= {"server": new.server.model_copy(update=kept), "store": old.store, "data_dir": old.data_dir}
    try:
        return Settings(**fields)
    except ValidationError as error:
        reasons = "; ".join(str(each["msg"]) for each in error.errors(include_url=False, include_input=False))
        raise ConfigError(f"The changed configuration does not go with the running server: {reasons}") from None


def _for_one_replica(settings: Settings, store_url: str) -> Settings:
    store = settings.store.model_copy(update={"url": SecretStr(store_url)})
    return settings.model_copy(update={"store": store})


async def _fill(slots: Sequence[Slot]) -> list[ReplicaProcess]:
    """Fills all at once; where one cannot be filled, none is."""
    tasks = [asyncio.create_task(slot.fill(), name="replica-start") for slot in slots]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await _cancel(tasks)
        raise


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
