"""One schedule: a few jobs, three owners, one store, and everything that a seed makes go wrong between them."""

from __future__ import annotations

import gc
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from llmstream.store.channel import Channel
from llmstream.store.keys import QUEUE_PARTS
from llmstream.types import CallerLimits, GenerateRequest, Job, Lane, Metered, Principal, QueueRule
from tests.simulation.loop import OUTSIDE, VirtualLoop
from tests.simulation.lua import Mutate
from tests.simulation.network import EPOCH, Executed, Server
from tests.simulation.owner import MAX_ATTEMPTS, MODEL, Client, Owner
from tests.simulation.truths import KEYS, Limits, Seen, broken, is_terminal, queue_is_empty, record_of

CALLER = Principal(metered=Metered("a", CallerLimits(tokens_per_minute=1_000_000, concurrent_jobs=1)))
CHAOS_S = 2.0
"""Until then things may begin to go wrong."""
MAX_LOST_S = 2.0
"""How much of what it acknowledged a store forgets at most."""
BEGINNING_S = 0.5
"""By then most jobs have begun, and many of them ended: a good time for trouble."""
FORGETTING = "store writes no more"
COMMANDS = ("create", "push", "claim", "begin", "XADD", "finish", "end", "hand_over", "settle", "release", "heartbeat")
"""Steps that matter: an answer that gets lost costs no job an attempt, and trouble comes while they are under way."""
AWAY_S = 3.3
"""Long enough that a lease lapses and somebody else has begun."""
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


class Step(NamedTuple):
    """A part of a trouble."""

    delay: float
    what: str
    action: Callable[..., object]
    args: tuple[object, ...] = ()


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
        forgets: bool | None = None,
        strike: tuple[str, str] | None = None,
        held: bool | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop()  # type: ignore[abstract]  # nobody asks for the rest
        self.server = Server(self.loop, self.rng, ordered=ordered, mutate=mutate)
        if traced:
            self.server.trace = []
        self.seen = Seen(self.server.memory)
        self._held = random.Random(f"held {seed}") if (seed % 5 == 0 if held is None else held) else None
        """Decides what is scheduled and paused, where anything is."""
        self._claims = KEYS.queue(MODEL)[QUEUE_PARTS.index("claims")].encode()
        self._too_early: list[str] = []
        self._loss = loss
        self._forgets = self.rng.random() < 0.1 if forgets is None else forgets
        """Whether the store comes back without its last writes."""
        self._strike_at = strike
        """A trouble that each owner has, and the command at which it comes."""
        self._alone = self._forgets and strike is None and self.rng.random() < 0.7
        """Whether nothing else goes wrong, so that everybody is there to write them again in time."""
        # By dice of its own, so that a seed stays the schedule that it was.
        limited = random.Random(f"caller of {seed}").random() < 0.3
        self.client = Client(self.loop, self.server, CALLER if limited else Principal())
        self.owners: list[Owner] = []
        self.jobs: list[Job] = []
        self.plan: list[str] = []
        self._mended_at = 0.2
        self._last_at = 0.0
        self._troubles: Counter[str] = Counter()
        self._outages = 0
        self._outage_at = 0.0
        self._traps = 0

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
            memory,
            self.seen,
            self.jobs,
            MODEL,
            Limits(
                MAX_ATTEMPTS,
                self._causes(),
                self._troubles,
                self.client.cancelled,
                self.client.told,
                forgets=self._forgets and not self._alone,
                who=None if self._forgets else self.client.who,
            ),
        )
        yield from self._too_early
        for uncaught in loop.errors:
            yield f"uncaught: {uncaught.get('exception') or uncaught}"
        for task in self.client.tasks:
            if task.done() and (error := task.exception()):
                yield f"the client broke: {error!r}"

    def _causes(self) -> int:
        """Attempts that the network and the store explain. A store that is away costs none by itself; one that forgets
        a claim costs one if the job had not begun."""
        forgiven = self._forgets and (not self._alone or self._outage_at < BEGINNING_S)
        excused = self._traps or not self.server.swift or forgiven
        return self.server.faults + (self._outages if excused else 0)

    def _at(self, when: float, what: str, action: object, *args: object) -> None:
        self.plan.append(f"{when:.3f} {what}")
        self._last_at = max(self._last_at, when)
        self.loop.call_at(when, action, *args, context=OUTSIDE)  # type: ignore[arg-type]

    def _prepare(self) -> None:
        rng = self.rng
        self.server.swift = self._alone or rng.random() < 0.3
        if not self.server.swift:
            self.server.loss = rng.choice((0.0, 0.0, 0.02, 0.1)) if self._loss is None else self._loss
        self.client.start()
        for _ in range(3):
            self._add_owner()
        for number in range(rng.choice((1, 1, 2, 3))):
            self._add_job(number)
        self._add_troubles()
        for _ in range(0 if self._alone else rng.choice((0, 0, 1, 2))):
            name, when = rng.choice(COMMANDS), rng.uniform(0.0, BEGINNING_S)
            self._traps += 1
            self._at(when, f"lose-answer {name}", self.server.traps.append, name)
        self._add_outages()
        if self._held is not None:
            self._add_pause(self._held)

    def _add_pause(self, rng: random.Random) -> None:
        """Something is paused for a while; what must not begin is looked for at every claim."""
        commands = self.server.memory.commands
        write = commands[b"HSET"]

        def watched(key: bytes, *pairs: bytes) -> int:
            if key == self._claims:
                self._note_claim(pairs[0].decode())
            written: int = write(key, *pairs)
            return written

        commands[b"HSET"] = watched
        lanes: tuple[Lane | None, ...] = (None, "high", "default", "low")
        lane, model = rng.choice(lanes), rng.choice((None, MODEL, f"{MODEL[0]}*", "another"))
        when, seconds = rng.uniform(0, BEGINNING_S), rng.uniform(0.1, CHAOS_S)
        self._at(when, f"pause {lane} {model} for {seconds:.3f} s", self.client.pause, lane, model, seconds)

    def _note_claim(self, job_id: str) -> None:
        job = next(each for each in self.jobs if each.id == job_id)
        now = self.server.memory.now_ms / 1000
        if job.not_before is not None and now < job.not_before:
            self._too_early.append(f"job {job_id} was claimed {job.not_before - now:.3f} s before its time")
        if self.client.paused is not None and not self._forgets:
            lane, model = self.client.paused
            if QueueRule(mode="paused", lane=lane, model=model).covers(job):
                self._too_early.append(f"job {job_id} was claimed although it was paused")

    def _add_troubles(self) -> None:
        if self._strike_at is not None:
            kind, command = self._strike_at
            for owner in self.owners:
                self._ambush(owner, command, self._trouble(owner, kind))
        elif not self._alone:
            for _ in range(self.rng.choice((0, 1, 1, 2, 3))):
                self._add_trouble()

    def _add_outages(self) -> None:
        rng = self.rng
        if rng.random() < 0.1 or self._forgets:
            when = self._outage_at = rng.uniform(0, CHAOS_S)
            self._outages += 1
            self._at(when, "store down", self.server.stop)
            self._at(when + rng.uniform(0.05, 2), "store up", self.server.start)
            if self._forgets:
                self._at(when - min(when, rng.uniform(0, MAX_LOST_S)), FORGETTING, self.server.fall_behind)
        if rng.random() < 0.1 and not self._alone:
            when = rng.uniform(0, CHAOS_S)
            self._outages += 1
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
        echo: dict[str, object] = {"tokens": rng.randint(0, 9), "delay_ms": rng.choice((0, 1, 20, 60, 200, 200))}
        if rng.random() < 0.2:
            fault = rng.choice(("crash", "cut", "stall"))
            echo |= {
                "fault": fault,
                "at": rng.randint(0, int(str(echo["tokens"]))),
                "attempts": rng.choice((1, 1, 2, 9)),
            }
        request = GenerateRequest.of(kind="chat", model=MODEL, body={"echo": echo, "nonce": number})
        job = Job(
            id=f"job{number}",
            request=request,
            pool=MODEL,
            created_at=EPOCH,
            priority=rng.choice((-10, 0, 0, 10)),
            expires_at=EPOCH + rng.uniform(1, 10) if rng.random() < 0.1 else None,
            not_before=self._time_of_begin(),
        )
        self.jobs.append(job)
        start = rng.uniform(0, 0.3)
        self._at(start, f"submit {job.id} {echo}", self.client.submit, job)
        if rng.random() < (0.4 if self._alone else 0.2):
            self._at(start + rng.uniform(0, CHAOS_S), f"cancel {job.id}", self.client.cancel, job.id)

    def _time_of_begin(self) -> float | None:
        rng = self._held
        return EPOCH + rng.uniform(0, 1) if rng is not None and rng.random() < 0.5 else None

    def _add_trouble(self) -> None:
        """Something happens to an owner, at some time or as it sends a certain command."""
        rng = self.rng
        owner = rng.choice(self.owners[:3])
        steps = self._trouble(owner)
        if rng.random() < 0.5:
            when = rng.uniform(0.0, CHAOS_S if rng.random() < 0.5 else BEGINNING_S)
            self._mended_at = max(self._mended_at, when + 0.1)
            self._strike(owner, when, steps)
        else:
            self._ambush(owner, rng.choice(COMMANDS), steps)

    def _ambush(self, owner: Owner, command: str, steps: list[Step]) -> None:
        delay = self.rng.choice((0.0, 0.003))
        self._mended_at = CHAOS_S
        self.server.ambushes[owner.process.name, command] = lambda: self._strike(owner, self.loop.time() + delay, steps)

    def _trouble(self, owner: Owner, kind: str | None = None) -> list[Step]:
        rng = self.rng
        match kind or rng.choice(("kill", "freeze", "cut", "close")):
            case "kill":
                return [Step(0.0, "kill", owner.kill)]
            case "freeze":
                until = rng.uniform(0.1, AWAY_S)
                steps = [Step(0.0, "freeze", owner.freeze), Step(until, "thaw", owner.thaw)]
                if rng.random() < 0.2:
                    steps.append(Step(until + rng.uniform(0, 0.5), "kill", owner.kill))
                return steps
            case "cut":
                return [
                    Step(0.0, "cut", self.server.sever, (owner.process.name,)),
                    Step(rng.uniform(0.1, AWAY_S), "rejoin", self.server.cut.discard, (owner.process.name,)),
                ]
            case _:
                return [Step(0.0, "close", owner.close, (rng.choice((0.0, 0.3, 2.0)),))]

    def _strike(self, owner: Owner, when: float, steps: list[Step]) -> None:
        self._troubles[owner.process.name] += sum(step.what not in ("thaw", "rejoin") for step in steps)
        owner.doomed = any(step.what == "kill" for step in steps)
        for step in steps:
            self._at(when + step.delay, f"{step.what} {owner.process}", step.action, *step.args)

    def _mend(self) -> None:
        """From here on the network is reliable and somebody works. Outages end as planned, zombies may wake up."""
        self.server.loss = 0.0
        self.server.ambushes.clear()
        if all(owner.doomed or owner.dead or owner.closing or owner.process.frozen for owner in self.owners):
            self._add_owner()

    def destroy(self) -> None:
        """Ends all tasks, also those of the dead, so that nothing is left to the garbage collector."""
        self.server.stop()
        for owner in self.owners:
            self.loop.thaw(owner.process)
        for _ in range(20):
            pending = [task for task in self.loop.tasks if not task.done()]
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


_COMPLAINTS = Complaints()


@contextmanager
def complaints() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("llmstream"), _COMPLAINTS
    handler.found = []
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def simulate(seed: int, **world_options: Any) -> Outcome:
    """Runs the schedule of one seed; the same seed gives the same schedule. The options are those of :class:`World`."""
    world = World(seed, **world_options)
    shown = patch.object(Channel, "publish", lambda *entry: world.seen.publish(*entry))
    with world.loop.running(), complaints() as complained, shown:
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
    return Outcome(seed, (*faults, *complained), tuple(world.plan), tuple(statuses), attempts, commands, trace)


@contextmanager
def uncollected() -> Iterator[None]:
    """Spares many short schedules the search for garbage that each of them frees by itself."""
    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(300_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
