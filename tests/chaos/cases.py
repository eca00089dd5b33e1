"""What can happen to a fleet under load, and what must have become of every answer afterwards."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llmstream.config import SchedulerSettings
from llmstream.types import EventId, Finished
from tests.chaos.fleet import Answer, Fleet, Replica
from tests.chaos.test_kill import attempts_in
from tests.logs import stored, text_of
from tests.replica import MODEL, tokens
from tests.waiting import wait_until


@dataclass
class Row:
    """One line of the table."""

    case: str
    kills: int = 0
    jobs: int = 0
    lost: int = 0
    doubled: int = 0
    unfinished: int = 0
    attempts: int = 0
    takeovers: list[float] = field(default_factory=list)
    """Seconds without a token around each take-over."""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.unfinished)

    def __str__(self) -> str:
        times = sorted(self.takeovers)
        p50, p99 = (f"{times[int(len(times) * share)]:.2f}" if times else "-" for share in (0.5, 0.99))
        return (
            f"{self.case:36}{self.kills:>6}{self.jobs:>6}{self.attempts:>9}{self.lost:>6}{self.doubled:>9}"
            f"{self.unfinished:>12}{p50:>8}{p99:>8}"
        )


_COLUMNS = f"{'lost':>6}{'doubled':>9}{'unfinished':>12}{'p50 s':>8}{'p99 s':>8}"
HEAD = f"{'case':36}{'kills':>6}{'jobs':>6}{'attempts':>9}{_COLUMNS}"

Trouble = Callable[[Fleet], Awaitable[int]]
"""Makes something go wrong and mends it; the number of processes killed."""


async def under_load(fleet: Fleet, case: str, trouble: Trouble, jobs: int, length: int) -> Row:
    """Runs jobs with a client each, makes trouble in the middle of them, and counts what is wrong in the end."""
    answers = [Answer(fleet, length) for _ in range(jobs)]
    reading = [asyncio.create_task(answer.ask_and_read()) for answer in answers]
    try:
        async with asyncio.timeout(120):
            await wait_until(lambda: all(len(answer.arrivals) > 3 for answer in answers), timeout=60)
            kills = await trouble(fleet)
            await asyncio.gather(*reading)
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    return await tally(fleet, Row(case, kills), answers)


async def tally(fleet: Fleet, row: Row, answers: Sequence[Answer]) -> Row:
    """Compares every answer with its log and with what an undisturbed model says."""
    async with fleet.inside() as store:
        for answer in answers:
            whole, log = tokens(answer.length), await stored(store, answer.job_id)
            ids = [event.id for event in log]
            steps = [(a, b) for a, b in pairwise(ids) if b not in (EventId(a.attempt, a.seq + 1), (a.attempt + 1, 0))]
            ends = [event.data for event in log if isinstance(event.data, Finished)]
            state = await store.jobs.find(answer.job_id)
            row.jobs += 1
            row.attempts += attempts_in(log)
            for text in (answer.text, text_of(log)):
                row.lost += len(text) < len(whole) or (len(text) == len(whole) and text != whole) or bool(steps)
                row.doubled += len(text) > len(whole)
            ended = state is not None and state.status == "completed" and len(ends) == 1 and not answer.faults
            row.unfinished += not (ended and answer.status == "complete")
            gaps = sorted(b - a for a, b in pairwise(answer.arrivals))
            row.takeovers += gaps[len(gaps) - (attempts_in(log) - 1) :]
    return row


async def _again(*replicas: Replica) -> None:
    await asyncio.gather(*(replica.start() for replica in replicas))


async def _running(fleet: Fleet) -> dict[int, int]:
    """How many jobs are claimed by each process."""
    async with fleet.inside() as store:
        census = await store.lanes(MODEL, SchedulerSettings()).census()
    return {int(name.rsplit("-", 2)[1]): count for name, count in census.running.items()}


async def _busiest(fleet: Fleet) -> list[Replica]:
    """All replicas, the one that generates most first."""
    running = await _running(fleet)
    return sorted(fleet.replicas, key=lambda replica: -running.get(replica.process.pid, 0))


async def _runs_alone(fleet: Fleet, replica: Replica) -> bool:
    return (await _running(fleet)).keys() <= {replica.process.pid}


async def kill_one(fleet: Fleet) -> int:
    victim = (await _busiest(fleet))[0]
    await victim.end()
    await _again(victim)
    return 1


async def kill_two(fleet: Fleet) -> int:
    victims = (await _busiest(fleet))[:2]
    await asyncio.gather(*(victim.end() for victim in victims))
    await _again(*victims)
    return 2


async def stop_one(fleet: Fleet) -> int:
    zombie = (await _busiest(fleet))[0]
    zombie.send(signal.SIGSTOP)
    await asyncio.sleep(3.5)  # longer than the lease
    zombie.send(signal.SIGCONT)
    return 0


async def kill_store(fleet: Fleet) -> int:
    await fleet.store.kill()
    await fleet.store.start()
    return 1


def lose_store(seconds: float) -> Trouble:
    async def trouble(fleet: Fleet) -> int:
        await fleet.store.kill()
        await asyncio.sleep(seconds)
        await fleet.store.start()
        return 1

    return trouble


async def cut_network(fleet: Fleet) -> int:
    """Cuts the one replica behind the proxy, after the others were stopped until it ran everything."""
    *others, victim = fleet.replicas
    for replica in others:
        replica.send(signal.SIGSTOP)
    await wait_until(lambda: _runs_alone(fleet, victim), timeout=20)
    for replica in others:
        replica.send(signal.SIGCONT)
    fleet.proxy.refuse()
    fleet.proxy.cut()
    await asyncio.sleep(3.5)  # longer than the lease
    fleet.proxy.refuse(False)
    return 0


async def roll(fleet: Fleet) -> int:
    for replica in fleet.replicas:
        assert await replica.end(signal.SIGTERM) == 0
        await replica.start()
    return 0


async def many_kills(fleet: Fleet, kills: int, readers: int, progress: Callable[[str], None]) -> Row:
    """Kills one replica after the other under constant load; each is started again while the others take over."""
    answers: list[Answer] = []
    enough = asyncio.Event()

    async def read_on() -> None:
        while not enough.is_set():
            answer = Answer(fleet, fleet.rng.randint(50, 200))
            answers.append(answer)
            await answer.ask_and_read()

    async with asyncio.TaskGroup() as group:
        for _ in range(readers):
            group.create_task(read_on())
        for number in range(1, kills + 1):
            await asyncio.sleep(fleet.rng.uniform(0.2, 1.5))
            victim = (await _busiest(fleet))[fleet.rng.randrange(2)]
            await victim.end()
            await victim.start()
            progress(f"kill {number} of {kills}, {len(answers)} jobs")
        enough.set()
    return await tally(fleet, Row("kill -9 one after the other", kills), answers)


def cases(outage_s: float) -> dict[str, Trouble]:
    """Every trouble by its name in the table."""
    return {
        "kill -9 one (generates and serves)": kill_one,
        "kill -9 two of three at once": kill_two,
        "SIGSTOP, SIGCONT behind the lease": stop_one,
        "kill -9 the store, start it": kill_store,
        f"no store for {outage_s:g} s": lose_store(outage_s),
        "cut one replica from the store": cut_network,
        "rolling restart of all": roll,
    }
