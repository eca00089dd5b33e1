"""A replica without HTTP: a scheduler over a store, and jobs submitted to it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from llmstream.config import DeadlineSettings, ModelSettings, RetrySettings, SchedulerSettings
from llmstream.providers.base import Provider, Sink
from llmstream.providers.echo import EchoProvider
from llmstream.routing.gates import Gates
from llmstream.routing.retry import Backoff
from llmstream.routing.router import Router
from llmstream.scheduler.scheduler import Scheduler
from llmstream.store.breakers import Policy
from llmstream.store.lanes import Lanes
from llmstream.store.store import Store
from llmstream.transcript import Transcript
from llmstream.types import Clock, Delta, GenerateRequest, Job, ModelInfo, new_id

MODEL = "echo"
FAST = SchedulerSettings(lease_s=0.4)
SHORTLY = Backoff(RetrySettings(base_s=0.01))

Script = Callable[[GenerateRequest, Transcript | None], AsyncGenerator[Sequence[Delta], None]]


def echo(slots: int = 4, **settings: Any) -> EchoProvider:
    return EchoProvider(MODEL, ModelSettings(engine="echo", slots=slots, **settings))


class Scripted:
    """A provider that does what a test says and can never continue."""

    name = pool = MODEL
    models: tuple[ModelInfo, ...] = (ModelInfo(name=MODEL, provider=MODEL),)

    def __init__(self, script: Script, slots: int = 4, continues: bool = False) -> None:
        self._script = script
        self.slots = slots
        self._continues = continues

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def check(self, request: GenerateRequest) -> None: ...

    def can_continue(self, request: GenerateRequest, so_far: Transcript) -> bool:
        return self._continues

    async def generate(self, request: GenerateRequest, so_far: Transcript | None, sink: Sink) -> None:
        async with aclosing(self._script(request, so_far)) as batches:
            async for batch in batches:
                if not sink.put(batch):
                    await sink.drained()

    async def health(self) -> dict[str, object]:
        return {"status": "ok"}


@asynccontextmanager
async def replica(
    store: Store,
    *providers: Provider,
    name: str = "r1",
    settings: SchedulerSettings = FAST,
    deadlines: DeadlineSettings | None = None,
    clock: Clock = time.time,
    grace_s: float = 0.5,
) -> AsyncIterator[Scheduler]:
    """A scheduler that claims and runs jobs while the context is open."""
    scheduler = Scheduler(
        store,
        Router(providers or (echo(),)),
        name,
        settings=settings,
        deadlines=deadlines or DeadlineSettings(),
        backoff=SHORTLY,
        clock=clock,
    )
    await scheduler.open()
    try:
        yield scheduler
    finally:
        await scheduler.close(grace_s)


def gates_of(store: Store, replica: str = "r1") -> Gates:
    return Gates(store.budgets(replica, lease_s=1.0), store.breakers(replica, Policy(), lease_s=1.0))


def lanes_of(store: Store, settings: SchedulerSettings = FAST) -> Lanes:
    return store.lanes(MODEL, settings)


async def submit(
    store: Store,
    *,
    settings: SchedulerSettings = FAST,
    priority: int = 0,
    expires_at: float | None = None,
    not_before: float | None = None,
    **echo: Any,
) -> Job:
    """Accepts a job for the echo model; keywords are its ``echo`` options."""
    request = GenerateRequest.of(kind="chat", model=MODEL, body={"echo": echo, "nonce": new_id()})
    job = Job(
        id=new_id(),
        request=request,
        pool=MODEL,
        created_at=time.time(),
        priority=priority,
        expires_at=expires_at,
        not_before=not_before,
    )
    assert await store.jobs.create(job)
    assert await lanes_of(store, settings).push(job)
    return job


def tokens(count: int) -> str:
    """What the echo model says when asked for ``count`` tokens."""
    return "".join(f" tok{number:04d}" for number in range(count))
