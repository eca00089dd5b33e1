"""One schedule: a few jobs, three owners, one store, and everything that a seed makes go wrong between them."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from llmstream.types import GenerateRequest, Job
from tests.simulation.loop import OUTSIDE, VirtualLoop
from tests.simulation.lua import Mutate
from tests.simulation.network import EPOCH, Executed, Server
from tests.simulation.owner import MAX_ATTEMPTS, MODEL, Client, Owner
from tests.simulation.truths import Limits, broken, is_terminal, queue_is_empty, record_of

CHAOS_S = 2.0
"""Until then things may begin to go wrong."""
PATIENCE_S = 90.0
AFTERMATH_S = 0.3
"""What late messages and owners that woke up get to do harm after the last job has ended."""


class Outcome(NamedTuple):
    """What became of one schedule."""

    seed: int
    faults: tuple[str, ...]
    """What did not hold."""
    plan: tuple[str, ...]
    statuses: tuple[str, ...]
    attempts: int
    commands: int
    trace: list[Executed]


class World:
    """Everything that a seed decides."""

    def __init__(
        self,
        seed: int,
        *,
        ordered: bool = True,
        mutate: Mutate | None = None,
        traced: bool = False,
        loss: float | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop()  # type: ignore[abstract]  # nobody asks for the rest
        self.server = Server(self.loop, self.rng, ordered=ordered, mutate=mutate)
        if traced:
            self.server.trace = []
        self._loss = loss
        self.client = Client(self.loop, self.server)
        self.owners: list[Owner] = []
        self.jobs: list[Job] = []
        self.plan: list[str] = []
        self._mended_at = 0.2
        self._last_at = 0.0
        self._troubles = 0
        self._unreliable = False

    def run(self) -> Iterator[str]:
        """Runs the schedule to its end and yields what did not hold."""
        self._prepare()
        loop, memory = self.loop, self.server.memory
        loop.run(lambda: False, self._mended_at)
        self._mend()

        def over() -> bool:
            return (
                queue_is_empty(memory, MODEL)
                and all(is_terminal(memory, job.id) for job in self.jobs)
                and not self.client.busy
            )

        if not loop.run(over, PATIENCE_S):
            yield "it never ends"
        loop.run(lambda: False, max(loop.time(), self._last_at) + AFTERMATH_S)
        if not loop.run(over, loop.time() + PATIENCE_S):  # a late push may have put a job in line that has ended
            yield "it does not come to rest"
        yield from broken(
            memory, self.jobs, MODEL, Limits(MAX_ATTEMPTS, self._explained_attempts(), self.client.cancelled)
        )
        for task in self.client.tasks[1:]:
            if task.done() and (error := task.exception()):
                yield f"the client broke: {error!r}"

    def _explained_attempts(self) -> int:
        """A lossy network or an absent store may cost a job any number of attempts, any other trouble two: one when the
        job is taken over, one when an owner comes back whose begin had not arrived and takes it again."""
        if self._unreliable:
            return 1_000
        faulty = any("fault" in job.request.body["echo"] for job in self.jobs)
        return 1 + 2 * self._troubles + (len(self.owners) if faulty else 0)

    def _at(self, when: float, what: str, action: object, *args: object) -> None:
        self.plan.append(f"{when:.3f} {what}")
        self._last_at = max(self._last_at, when)
        self.loop.call_at(when, action, *args, context=OUTSIDE)  # type: ignore[arg-type]

    def _prepare(self) -> None:
        rng = self.rng
        self.server.loss = rng.choice((0.0, 0.02, 0.1)) if self._loss is None else self._loss
        self._unreliable = self.server.loss > 0
        self.client.start()
        for _ in range(3):
            self._add_owner()
        for number in range(rng.choice((1, 1, 2, 3))):
            self._add_job(number)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            self._add_trouble()
        if rng.random() < 0.2:
            when = rng.uniform(0, CHAOS_S)
            self._unreliable = True
            self._at(when, "store down", self.server.stop)
            self._at(when + rng.uniform(0.05, 2), "store up", self.server.start)
        if rng.random() < 0.1:
            when = rng.uniform(0, CHAOS_S)
            self._unreliable = True
            self._at(when, "store refuses", setattr, self.server, "refusing", True)
            self._at(when + rng.uniform(0.05, 2), "store accepts", setattr, self.server, "refusing", False)

    def _add_owner(self) -> Owner:
        rng = self.rng
        name = f"r{len(self.owners) + 1}"
        owner = Owner(self.loop, self.server, name, rng.choice((1, 2)), rng.uniform(-1, 1))
        self.owners.append(owner)
        owner.start()
        return owner

    def _add_job(self, number: int) -> None:
        rng = self.rng
        echo: dict[str, object] = {"tokens": rng.randint(0, 9), "delay_ms": rng.choice((0, 1, 20, 60, 200))}
        if rng.random() < 0.2:
            fault = rng.choice(("crash", "cut", "stall"))
            echo |= {"fault": fault, "at": rng.randint(0, int(str(echo["tokens"]))), "attempts": 1}
        request = GenerateRequest(kind="chat", model=MODEL, body={"echo": echo, "nonce": number})
        job = Job(
            id=f"job{number}",
            request=request,
            pool=MODEL,
            created_at=EPOCH,
            priority=rng.choice((-10, 0, 0, 10)),
            expires_at=EPOCH + rng.uniform(1, 10) if rng.random() < 0.1 else None,
        )
        self.jobs.append(job)
        start = rng.uniform(0, 0.3)
        self._at(start, f"submit {job.id} {echo}", self.client.submit, job)
        if rng.random() < 0.2:
            self._at(start + rng.uniform(0, 1.5), f"cancel {job.id}", self.client.cancel, job.id)

    def _add_trouble(self) -> None:
        rng = self.rng
        self._troubles += 1
        owner, when = rng.choice(self.owners[:3]), rng.uniform(0.1, CHAOS_S)
        self._mended_at = max(self._mended_at, when + 0.1)
        match rng.randrange(4):
            case 0:
                self._at(when, f"kill {owner.process}", owner.kill)
            case 1:
                self._at(when, f"freeze {owner.process}", owner.freeze)
                self._at(when + rng.uniform(0.1, 4), f"thaw {owner.process}", owner.thaw)
            case 2:
                self._at(when, f"cut {owner.process}", self.server.sever, owner.process.name)
                rejoin = self.server.cut.discard
                self._at(when + rng.uniform(0.1, 4), f"rejoin {owner.process}", rejoin, owner.process.name)
            case _:
                self._at(when, f"close {owner.process}", owner.close, rng.choice((0.0, 0.3, 2.0)))

    def _mend(self) -> None:
        """From here on the network is reliable and somebody works. Outages end as planned, zombies may wake up."""
        self.server.loss = 0.0
        if all(owner.dead or owner.closing or owner.process.frozen for owner in self.owners):
            self._add_owner()

    def destroy(self) -> None:
        """Ends all tasks, also those of the dead, so that nothing is left to the garbage collector."""
        self.server.stop()
        for owner in self.owners:
            self.loop.thaw(owner.process)
        for _ in range(20):
            pending = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
            if not pending:
                break
            for task in pending:
                task.cancel()
            self.loop.run(lambda: True, self.loop.time())


class Complaints(logging.Handler):
    """Collects the tracebacks that the service logs: each is a defect that it survived."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(f"logged: {record.getMessage()}: {record.exc_info[1]!r}")


@contextmanager
def complaints() -> Iterator[Complaints]:
    logger, handler = logging.getLogger("llmstream"), Complaints()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def simulate(
    seed: int, *, ordered: bool = True, mutate: Mutate | None = None, traced: bool = False, loss: float | None = None
) -> Outcome:
    """Runs the schedule of one seed; the same seed gives the same schedule."""
    world = World(seed, ordered=ordered, mutate=mutate, traced=traced, loss=loss)
    with world.loop.running(), complaints() as complained:
        faults = list(world.run())
        memory = world.server.memory
        trace = world.server.trace or []
        statuses, attempts = [], 0
        for job in world.jobs:
            record = record_of(memory, job.id)
            statuses.append(record.get(b"status", b"?").decode())
            attempts += int(record.get(b"attempt", b"0"))
        commands, world.server.trace = world.server.executed, None
        world.destroy()
    return Outcome(seed, (*faults, *complained.found), tuple(world.plan), tuple(statuses), attempts, commands, trace)


@contextmanager
def uncollected() -> Iterator[None]:
    """Spares many short schedules the search for garbage that each of them frees by itself."""
    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
