"""A replica in the simulation: the real scheduler, workers, writers and store objects, on a simulated network."""

from __future__ import annotations

import asyncio
from typing import cast
from unittest.mock import patch

from llmstream.config import DeadlineSettings, ModelSettings, SchedulerSettings, StoreSettings
from llmstream.errors import NotFound, StoreUnavailable
from llmstream.providers.echo import EchoProvider
from llmstream.routing.router import Router
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store import store as store_module
from llmstream.store.connection import Connection
from llmstream.store.store import Store
from llmstream.types import Finished, Job
from tests.simulation.loop import Process, VirtualLoop
from tests.simulation.network import EPOCH, Link, Server

MODEL = "echo"
MAX_ATTEMPTS = 4
STORE = StoreSettings(timeout_s=0.5, outage_s=3.0)
SCHEDULER = SchedulerSettings(lease_s=2.0, max_attempts=MAX_ATTEMPTS)
DEADLINES = DeadlineSettings(total_s=300, first_token_s=1.5, stall_s=1.5)
MODELS = {slots: ModelSettings(engine="echo", slots=slots) for slots in (1, 2)}
RETRY_S = 0.2


def store_of(server: Server, process: Process) -> Store:
    """A store whose connections are links of ``process``."""

    def connect() -> Connection:
        return cast(Connection, Link(server, process.name))

    with patch.object(store_module, "connector", lambda *_: connect):
        return Store("", STORE)


class Owner:
    """A replica that claims and runs jobs from :meth:`start` to its end, whatever kind of end that is."""

    def __init__(self, loop: VirtualLoop, server: Server, name: str, slots: int, skew_s: float) -> None:
        self.process = Process(name)
        self.dead = False
        self.closing = False
        self._loop = loop
        self._server = server
        self._skew_s = skew_s
        self._slots = slots

    def start(self) -> None:
        self._spawn(self._open(), "open")

    async def _open(self) -> None:
        self.store = store_of(self._server, self.process)
        for part in (self.store.writes, self.store.reads, self.store.signals):
            await part.open()
        self.scheduler = Scheduler(
            self.store,
            Router([EchoProvider(MODEL, MODELS[self._slots])]),
            self.process.name,
            settings=SCHEDULER,
            deadlines=DEADLINES,
            clock=lambda: EPOCH + self._loop.time() + self._skew_s,
        )
        while True:
            try:
                return await self.scheduler.open()
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)

    def _spawn(self, work: object, name: str) -> None:
        self.last = self._loop.spawn(self.process, work, f"{self.process.name}-{name}")  # type: ignore[arg-type,var-annotated]

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.frozen = True

    def thaw(self) -> None:
        """SIGCONT; the dead do not hear it."""
        if not self.dead:
            self._loop.thaw(self.process)

    def kill(self) -> None:
        """SIGKILL: what was sent may still arrive, nothing else happens."""
        self.dead = True
        self.process.frozen = True
        for link in [link for link in self._server.links if link.owner == self.process.name]:
            link.shatter()

    def close(self, grace_s: float) -> None:
        """SIGTERM."""
        if not self.closing and hasattr(self, "scheduler"):
            self.closing = True
            self._spawn(self.scheduler.close(grace_s), "close")


class Client:
    """Submits and cancels jobs through a process of its own, and repeats what it got no answer to."""

    def __init__(self, loop: VirtualLoop, server: Server) -> None:
        self._loop = loop
        self._process = Process("client")
        self._store = store_of(server, self._process)
        self._lanes = self._store.lanes(MODEL, SCHEDULER)
        self.tasks: list[asyncio.Task[None]] = []
        self.cancelled: set[str] = set()

    def start(self) -> None:
        self._run(self._store.writes.open())

    def submit(self, job: Job) -> None:
        self._run(self._submit(job))

    def cancel(self, job_id: str) -> None:
        self.cancelled.add(job_id)
        self._run(self._cancel(job_id))

    @property
    def busy(self) -> bool:
        return not all(task.done() for task in self.tasks)

    def _run(self, work: object) -> None:
        self.tasks.append(self._loop.spawn(self._process, work, "client"))  # type: ignore[arg-type]

    async def _submit(self, job: Job) -> None:
        while True:
            try:
                assert await self._store.jobs.create(job)
                assert await self._lanes.push(job)
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _cancel(self, job_id: str) -> None:
        while True:
            try:
                await self._store.jobs.end(job_id, Finished(status="cancelled", at=EPOCH + self._loop.time()))
                await self._lanes.remove(job_id)
            except (NotFound, StoreUnavailable):  # not accepted yet, or no answer
                await asyncio.sleep(RETRY_S)
            else:
                return
