"""A replica in the simulation: the real scheduler, workers, writers and store objects, on a simulated network."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, cast
from unittest.mock import patch

from pydantic import SecretStr

from llmstream.acceptance import Submission
from llmstream.config import DeadlineSettings, ModelSettings, RetrySettings, SchedulerSettings, Settings, StoreSettings
from llmstream.config_webhooks import ReceiverSettings
from llmstream.duplicates import Identity
from llmstream.errors import NotFound, StoreUnavailable
from llmstream.gateway import Gateway
from llmstream.providers.echo import EchoProvider
from llmstream.providers.tokens import Tokenizer, estimated
from llmstream.routing.retry import Backoff
from llmstream.routing.router import Router
from llmstream.scheduler.accounts import Accounts
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store import store as store_module
from llmstream.store.connection import Connection
from llmstream.store.node import Node
from llmstream.store.presence import Presence
from llmstream.store.recent import Recent
from llmstream.store.store import Store
from llmstream.telemetry.metrics import Metrics
from llmstream.types import Clock, Job, Lane, Principal
from llmstream.webhooks.dispatcher import Dispatcher
from llmstream.webhooks.receivers import Receivers
from llmstream.webhooks.sender import Sender
from llmstream.webhooks.webhooks import Webhooks
from tests.simulation.loop import Process, VirtualLoop
from tests.simulation.network import EPOCH, Link, Server
from tests.simulation.truths import RECEIVER

MODEL = "echo"
MAX_ATTEMPTS = 4
STORE = StoreSettings(timeout_s=0.5, outage_s=3.0)
SCHEDULER = SchedulerSettings(lease_s=2.0, max_attempts=MAX_ATTEMPTS)
DEADLINES = DeadlineSettings(total_s=300, first_token_s=1.5, stall_s=1.5)
SETTINGS = Settings(
    store=STORE,
    scheduler=SCHEDULER,
    deadlines=DEADLINES,
    webhook_receivers={
        RECEIVER: ReceiverSettings(url=SecretStr("https://example.com"), secret=SecretStr(f"whsec_{'k' * 32}"))
    },
)
MODELS = {slots: ModelSettings(engine="echo", slots=slots) for slots in (1, 2)}
RETRY_S = 0.2


class _HereAndNow(Tokenizer):
    """Needs no thread, of which the virtual loop has none."""

    async def count(self, texts: Iterable[str]) -> int:
        return sum(map(estimated, texts))


ACCOUNTS = Accounts({}, _HereAndNow())
BACKOFF = Backoff(RetrySettings(base_s=0.4, cap_s=10), chance=lambda: 0.5)


def store_of(loop: VirtualLoop, server: Server, process: Process) -> Store:
    """A store whose connections are links of ``process`` and whose clock is the simulation's."""

    def connect() -> Connection:
        return cast(Connection, Link(server, process.name))

    with patch.object(store_module, "Recent", functools.partial(Recent, clock=loop.time)):
        return Store("", STORE, Node(connect, STORE.timeout_s, Presence(), lambda: "llmstream:probe"))


class Owner:
    """A replica that claims and runs jobs from :meth:`start` to its end, whatever kind of end that is."""

    def __init__(self, loop: VirtualLoop, server: Server, name: str, slots: int, skew_s: float) -> None:
        self.process = Process(name)
        self.dead = False
        self.doomed = False
        """Whether it is going to be killed."""
        self.closing = False
        self._loop = loop
        self._server = server
        self._skew_s = skew_s
        self._slots = slots

    def start(self) -> None:
        self._spawn(self._open(), "open")

    async def _open(self) -> None:
        self.store = store_of(self._loop, self._server, self.process)
        (node,) = self.store.nodes
        await node.open()
        await self.store.signals.open()
        self.store.presence.open(node.probe)
        self.scheduler = Scheduler(
            self.store,
            Router([EchoProvider(MODEL, MODELS[self._slots])]),
            self.process.name,
            settings=SCHEDULER,
            deadlines=DEADLINES,
            backoff=BACKOFF,
            clock=lambda: EPOCH + self._loop.time() + self._skew_s,
            accounts=ACCOUNTS,
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
            self._spawn(self._leave(grace_s), "close")

    async def _leave(self, grace_s: float) -> None:
        await self.scheduler.close(grace_s)
        self.kill()


def _nobody_delivers(store: Store, clock: Clock) -> Webhooks:
    """Events come into the outbox and stay there, to be looked at in the end."""
    receivers, limits = Receivers(SETTINGS), SETTINGS.webhooks
    sender = Sender(receivers.reach, limits.timeout_s, limits.concurrency)
    dispatcher = Dispatcher(store, receivers, sender, limits, retention_s=1, clock=clock, metrics=Metrics())
    return Webhooks(store, receivers, dispatcher)


class Client:
    """Submits and cancels jobs at a gateway in a process of its own, and repeats what it got no answer to."""

    def __init__(self, loop: VirtualLoop, server: Server, principal: Principal) -> None:
        self._loop = loop
        self._principal = principal
        self._process = Process("client")
        self._store = store_of(loop, server, self._process)
        self.tasks: list[asyncio.Task[None]] = []
        self.cancelled: set[str] = set()
        self.told: dict[str, str] = {}
        """How jobs have ended, as far as an answer said so."""
        self.paused: tuple[Lane | None, str | None] | None = None
        """What is paused, as far as an answer said so."""
        nothing = Router([])
        clock = self._clock
        idle = Scheduler(
            self._store,
            nothing,
            "client",
            settings=SCHEDULER,
            deadlines=DEADLINES,
            backoff=BACKOFF,
            clock=clock,
            accounts=ACCOUNTS,
        )
        self._gateway = Gateway(SETTINGS, self._store, Router([EchoProvider(MODEL, MODELS[1])]), idle, clock)
        self._gateway.acceptance.webhooks = _nobody_delivers(self._store, clock)

    def _clock(self) -> float:
        return EPOCH + self._loop.time()

    def start(self) -> None:
        self._loop.spawn(self._process, self._live(), "client")

    def submit(self, job: Job) -> None:
        self._run(self._submit(job))

    def pause(self, lane: Lane | None, model: str | None, seconds: float) -> None:
        self._run(self._pause(lane, model, seconds))

    def cancel(self, job_id: str) -> None:
        self.cancelled.add(job_id)
        self._run(self._cancel(job_id))

    @property
    def who(self) -> str | None:
        """Whose limits hold; None where nobody's do."""
        return None if self._principal.metered is None else self._principal.metered.who

    @property
    def busy(self) -> bool:
        return not all(task.done() for task in self.tasks)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(self._loop.spawn(self._process, work, "client"))

    async def _live(self) -> None:
        (node,) = self._store.nodes
        await node.open()
        self._store.presence.open(node.probe)
        while True:  # as the heartbeats of a scheduler do, it finds out which server answers
            await asyncio.sleep(0.5)
            with contextlib.suppress(StoreUnavailable):
                await self._store.ping()

    async def _submit(self, job: Job) -> None:
        identity = Identity(fingerprint=job.id, job_id=job.id)
        given = Submission(
            priority=job.priority,
            deadline_s=None if job.expires_at is None else job.expires_at - EPOCH,
            not_before=job.not_before,
            principal=self._principal,
        )
        while True:
            try:
                await self._gateway.submit(job.request, identity=identity, **given)
            except StoreUnavailable:
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _pause(self, lane: Lane | None, model: str | None, seconds: float) -> None:
        control = self._gateway.control
        await _insist(lambda: control.hold("paused", lane, model, "client"))
        self.paused = (lane, model)
        await asyncio.sleep(seconds)
        self.paused = None
        await _insist(control.resume_all)

    async def _cancel(self, job_id: str) -> None:
        while True:
            try:
                self.told[job_id] = (await self._gateway.cancel(job_id)).status
            except (NotFound, StoreUnavailable):  # not accepted yet, or no answer
                await asyncio.sleep(RETRY_S)
            else:
                return


async def _insist(step: Callable[[], Awaitable[object]]) -> None:
    while True:
        try:
            await step()
        except StoreUnavailable:
            await asyncio.sleep(RETRY_S)
        else:
            return
