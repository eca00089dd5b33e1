"""Limits and breakers of a target hold over several replicas, and through the death of any of them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp

from llmstream.store.breakers import Policy
from llmstream.store.budgets import Spent
from tests.chaos.fleet import Fleet, Replica, open_fleet
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

SLOTS = 4
LEASE_S = 1.0


def settings(upstream: Upstream, **provider: object) -> dict[str, object]:
    return {
        "providers.far.base_url": upstream.url,
        "providers.far.models": "m",
        "scheduler.lease_s": LEASE_S,
        "scheduler.max_attempts": 10,
        "retry.base_s": 0.01,
        **{f"providers.far.{name}": value for name, value in provider.items()},
    }


async def submit(replica: Replica, **body: object) -> str:
    asked = {"message": "hi", "model": "m", **body}
    async with aiohttp.ClientSession(replica.url) as http, http.post("/chat/async", json=asked) as answer:
        assert answer.status == 202, await answer.text()
        return str((await answer.json())["task_id"])


async def ended(fleet: Fleet, jobs: list[str]) -> list[str]:
    """Waits for the end of jobs, and tells how it was."""
    async with fleet.inside() as store:

        async def done() -> bool:
            return all(state.done for state in await store.jobs.find_all(jobs))

        await wait_until(done, timeout=60)
        return [state.status for state in await store.jobs.find_all(jobs)]


async def spent(fleet: Fleet) -> Spent:
    async with fleet.inside() as store:
        return await store.budgets("looks", lease_s=LEASE_S).spent("far/m")


async def test_slots_hold_through_kills(tmp_path: Path, upstream: Upstream) -> None:
    """Three replicas hammer one target, two are killed in the middle of answers: never more than its slots at once, all
    slots in use, none lost, and every job ends whole."""
    upstream.models["m"] = Reply([" word"] * 6, delay_s=0.02)
    async with open_fleet(tmp_path, settings(upstream, concurrency=SLOTS)) as fleet:
        jobs = await asyncio.gather(*(submit(fleet.replicas[number % 3]) for number in range(120)))
        for victim in fleet.replicas[:2]:
            before = len(upstream.requests)
            await wait_until(lambda before=before: len(upstream.requests) > before + 20)  # type: ignore[misc]
            await victim.end(signal.SIGKILL)
            await victim.start()
        assert await ended(fleet, jobs) == ["completed"] * len(jobs)
        assert upstream.most_busy == SLOTS

        async def free() -> bool:
            return (await spent(fleet)).slots == 0

        await wait_until(free)


async def test_requests_a_minute_hold_through_kills(tmp_path: Path, upstream: Upstream) -> None:
    """Requests a minute: exactly as many as allowed arrive, also after a replica was killed with some under way."""
    upstream.models["m"] = Reply(delay_s=0.02)
    async with open_fleet(tmp_path, settings(upstream, rpm=18)) as fleet:
        jobs = await asyncio.gather(*(submit(fleet.replicas[number % 3]) for number in range(40)))
        await wait_until(lambda: len(upstream.requests) >= 6)
        await fleet.replicas[0].end(signal.SIGKILL)
        await fleet.replicas[0].start()
        await wait_until(lambda: len(upstream.requests) >= 18, timeout=40)
        await asyncio.sleep(3 * LEASE_S)  # more would have come by now
        assert len(upstream.requests) == 18
        assert (await spent(fleet)).requests == 18
        async with fleet.inside() as store:
            states = await store.jobs.find_all(jobs)
        # What the killed replica had begun waits for its second request as what it is: begun.
        assert {state.status for state in states} <= {"completed", "queued", "in_progress"}


async def test_an_open_breaker_outlives_who_opened_it(tmp_path: Path, upstream: Upstream) -> None:
    """Failures that one replica saw keep the others, and its successor, from asking: what they accept waits, and
    costs no attempt. The first probe closes it for all."""
    upstream.models["m"] = Reply(status=500, body={})
    more = {"breaker.failures": 3, "breaker.open_s": 8, "scheduler.max_attempts": 1}
    async with open_fleet(tmp_path, {**settings(upstream), **more}) as fleet, fleet.inside() as store:
        breakers = store.breakers("looks", Policy(), lease_s=LEASE_S)

        async def is_open() -> bool:
            await breakers.refresh()
            return breakers.states.get("far/m") == "open"

        first, *others = fleet.replicas
        async with fleet.only(first):
            assert await ended(fleet, [await submit(first) for _ in range(3)]) == ["failed"] * 3
        await first.end(signal.SIGKILL)
        upstream.models["m"] = Reply()
        jobs = [await submit(replica) for replica in others for _ in range(3)]

        async def begun() -> bool:
            return all(state.status == "in_progress" for state in await store.jobs.find_all(jobs))

        await wait_until(begun)
        asked = len(upstream.requests)
        assert await is_open()
        assert asked == 3
        await first.start()
        jobs += [await submit(first) for _ in range(3)]
        assert await ended(fleet, jobs) == ["completed"] * len(jobs)
        assert {state.attempt for state in await store.jobs.find_all(jobs)} == {1}
        assert len(upstream.requests) == 3 + len(jobs)
