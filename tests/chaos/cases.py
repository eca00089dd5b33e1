"""What can happen to a fleet, and to whom."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tests.chaos.fleet import QUIET_S, Answer, Fleet, Question, Replica, running
from tests.chaos.row import Row
from tests.waiting import wait_until

FEW = 3
"""Tokens that every client has when the trouble begins."""
ROUND_S = 120

Count = Literal["retries", "crashes", "reconnects", "restarts"]
Ask = Callable[[random.Random], Question]
"""Makes the question of one client."""


@dataclass
class Scene:
    """One round of a case: who generates all answers, who serves them all, and the answers under way."""

    fleet: Fleet
    pool: str
    generating: Replica
    serving: Replica
    answers: Sequence[Answer]

    async def until_taken_over(self) -> None:
        """Waits until another replica has begun to go on with every answer."""
        jobs = [answer.job_id for answer in self.answers]
        async with self.fleet.inside() as store:

            async def moved() -> bool:
                states = await store.jobs.find_all(jobs)
                return all(state.done or not self.generating.owns(state.replica) for state in states)

            await wait_until(moved, timeout=20)


@dataclass(frozen=True)
class Case:
    """A trouble that strikes one replica by the part it plays."""

    name: str
    strike: Callable[[Scene], Awaitable[int]]
    """Makes something go wrong and mends it; the number of processes killed."""
    never: frozenset[Count] = frozenset()
    """What must not happen."""
    due: frozenset[Count] = frozenset()
    """What must happen, or the case was none."""
    cut: Literal["generating", "serving"] | None = None
    """Who is to sit behind the network that can be cut."""
    victims: int = 1
    quiet_s: float = QUIET_S


async def run_case(case: Case, fleet: Fleet, pool: str, ask: Ask, *, seed: int, rounds: int, jobs: int) -> Row:
    """Plays a case; the seed decides who is struck and when."""
    row = Row(case.name, rounds)
    for number in range(rounds):
        rng = random.Random(f"{seed} {case.name} {number}")
        row.kills += await _round(case, fleet, pool, ask, row, rng, jobs)
    return judged(row, case.never, case.due)


def judged(row: Row, never: frozenset[Count], due: frozenset[Count] = frozenset()) -> Row:
    row.wrong += [f"{getattr(row, name)} {name}, and there should be none" for name in never if getattr(row, name)]
    row.wrong += [f"there should be {name}" for name in due if not getattr(row, name)]
    return row


async def _round(case: Case, fleet: Fleet, pool: str, ask: Ask, row: Row, rng: random.Random, jobs: int) -> int:
    parts = _cast(case, fleet.replicas, rng)
    answers = [Answer(fleet, ask(rng), random.Random(rng.random()), case.quiet_s) for _ in range(jobs)]
    scene = Scene(fleet, pool, *parts, answers)
    first = rng.randint(FEW, 12)
    reading: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(ROUND_S):
            await _submit(scene)
            reading = [asyncio.create_task(answer.read(scene.serving)) for answer in answers]
            await wait_until(
                lambda: (
                    all(len(answer.reader.heard) >= FEW for answer in answers) and len(answers[0].reader.heard) >= first
                )
            )
            kills = await case.strike(scene)
            await asyncio.gather(*reading)
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    await row.add(fleet, answers)
    return kills


def _cast(case: Case, replicas: Sequence[Replica], rng: random.Random) -> tuple[Replica, Replica]:
    if case.cut is None:
        generating, serving = rng.sample(replicas, 2)
        return generating, serving
    *others, behind = replicas
    other = rng.choice(others)
    return (behind, other) if case.cut == "generating" else (other, behind)


async def _submit(scene: Scene) -> None:
    async with scene.fleet.only(scene.generating), scene.fleet.inside() as store:
        await asyncio.gather(*(answer.ask(scene.generating) for answer in scene.answers))

        async def all_run() -> bool:
            return await running(store, scene.pool, scene.generating) == len(scene.answers)

        await wait_until(all_run)


async def _kill(*victims: Replica) -> int:
    await asyncio.gather(*(victim.end() for victim in victims))
    await asyncio.gather(*(victim.start() for victim in victims))
    return len(victims)


async def kill_generating(scene: Scene) -> int:
    return await _kill(scene.generating)


async def kill_serving(scene: Scene) -> int:
    return await _kill(scene.serving)


async def kill_both(scene: Scene) -> int:
    return await _kill(scene.generating, scene.serving)


async def stop_generating(scene: Scene) -> int:
    scene.generating.send(signal.SIGSTOP)
    await scene.until_taken_over()
    scene.generating.send(signal.SIGCONT)
    return 0


async def stop_serving(scene: Scene) -> int:
    """Goes on only when every client has lost its patience."""
    scene.serving.send(signal.SIGSTOP)
    await wait_until(lambda: all(answer.reader.connections > 1 for answer in scene.answers), timeout=20)
    scene.serving.send(signal.SIGCONT)
    return 0


async def cut_generating(scene: Scene) -> int:
    scene.fleet.proxy.refuse()
    scene.fleet.proxy.cut()
    await scene.until_taken_over()
    scene.fleet.proxy.refuse(False)
    return 0


async def silence_generating(scene: Scene) -> int:
    """Nothing comes through any more, and nobody is told."""
    scene.fleet.proxy.swallow()
    await scene.until_taken_over()
    scene.fleet.proxy.resume()
    return 0


async def cut_serving(scene: Scene) -> int:
    scene.fleet.proxy.refuse()
    scene.fleet.proxy.cut()
    await asyncio.sleep(1)
    scene.fleet.proxy.refuse(False)
    return 0


RETRIED: frozenset[Count] = frozenset({"retries"})
CRASHED: frozenset[Count] = frozenset({"crashes"})
MOVED: frozenset[Count] = frozenset({"reconnects"})
RESTARTED: frozenset[Count] = frozenset({"restarts"})

KILL_GENERATING = Case("kill -9 generating", kill_generating, never=MOVED | RESTARTED, due=RETRIED)
KILL_SERVING = Case("kill -9 serving", kill_serving, never=RETRIED | RESTARTED, due=MOVED)
KILL_BOTH = Case("kill -9 both at once", kill_both, victims=2, never=RESTARTED, due=RETRIED | MOVED)
PARTED = (
    Case("SIGSTOP, SIGCONT generating", stop_generating, never=MOVED | RESTARTED, due=RETRIED),
    Case("SIGSTOP, SIGCONT serving", stop_serving, never=RETRIED | RESTARTED, due=MOVED, quiet_s=2.0),
    Case("generating cut off the store", cut_generating, cut="generating", never=MOVED | RESTARTED, due=RETRIED),
    Case("serving cut off the store", cut_serving, cut="serving", never=RETRIED | MOVED | RESTARTED),
)
SILENT = Case("generating, store silent", silence_generating, cut="generating", never=MOVED | RESTARTED, due=RETRIED)


class Kill(NamedTuple):
    """Who is killed, and how long after the last one is up again."""

    victim: int
    pause_s: float


def plan(seed: int, kills: int, replicas: int) -> list[Kill]:
    """The same seed kills the same replicas in the same order."""
    rng = random.Random(f"{seed} one after the other")
    return [Kill(rng.randrange(replicas), rng.uniform(0.2, 1.5)) for _ in range(kills)]


Trouble = Callable[[Fleet], Awaitable[int]]
"""Like a strike, whoever runs what."""


async def under_load(
    name: str, fleet: Fleet, trouble: Trouble, ask: Ask, *, seed: int, clients: int, never: frozenset[Count]
) -> Row:
    """Clients ask and read one answer after the other, anywhere, until the trouble is over; half of them come when it
    has begun."""
    row, answers, begun, over = Row(name, rounds=1), list[Answer](), asyncio.Event(), asyncio.Event()

    async def read_on(rng: random.Random, late: bool) -> None:
        if late:
            await begun.wait()
        while not over.is_set():
            answer = Answer(fleet, ask(rng), rng)
            answers.append(answer)
            await answer.ask()
            await answer.read()

    def busy() -> bool:
        return len(answers) >= clients // 2 and all(
            len(answer.reader.heard) >= FEW for answer in answers[: clients // 2]
        )

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(read_on(random.Random(f"{seed} {name} {number}"), late=number >= clients // 2))
        await wait_until(busy)
        begun.set()
        row.kills = await trouble(fleet)
        over.set()
    await row.add(fleet, answers)
    return judged(row, never)


async def all_at_once(
    name: str, fleet: Fleet, ask: Ask, *, seed: int, jobs: int, never: frozenset[Count], due: frozenset[Count]
) -> Row:
    """Clients ask anywhere at the same time, and what goes wrong does so behind the replicas."""
    rng = random.Random(f"{seed} {name}")
    answers = [Answer(fleet, ask(rng), random.Random(rng.random())) for _ in range(jobs)]

    async def read(answer: Answer) -> None:
        await answer.ask()
        await answer.read()

    async with asyncio.timeout(ROUND_S):
        await asyncio.gather(*map(read, answers))
    row = Row(name, rounds=1)
    await row.add(fleet, answers)
    return judged(row, never, due)


def one_after_the_other(kills: Sequence[Kill], progress: Callable[[str], None]) -> Trouble:
    async def trouble(fleet: Fleet) -> int:
        for number, (victim, pause_s) in enumerate(kills, 1):
            await asyncio.sleep(pause_s)
            await _kill(fleet.replicas[victim])
            progress(f"kill {number} of {len(kills)}: r{victim} after {pause_s:.2f} s")
        return len(kills)

    return trouble


def without_store(seconds: float) -> Trouble:
    async def trouble(fleet: Fleet) -> int:
        await fleet.store.kill()
        await asyncio.sleep(seconds)
        await fleet.store.start()
        return 0

    return trouble


async def roll(fleet: Fleet) -> int:
    for replica in fleet.replicas:
        assert await replica.end(signal.SIGTERM) == 0
        await replica.start()
    return 0
