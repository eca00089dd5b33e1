"""Cancelling from another process when no wake-up gets through."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from tests.chaos.fleet import Answer, Fleet, Question, open_fleet
from tests.chaos.models import WORDS, remote
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

CANCEL_S = 1.0
PATIENT = {"deadlines.first_token_s": 60, "deadlines.stall_s": 60}


async def test_a_cancel_without_wake_up_stops_the_model(
    tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Nobody hears the wake-up; still the upstream of a model that talks, and of one that is silent, is hung up on
    within a second after another replica accepted the cancellation."""
    async with Upstream() as upstream, open_fleet(tmp_path, {**remote(upstream), **PATIENT}, count=2) as fleet:
        generating, other = fleet.replicas
        await deafen(fleet)
        upstream.models["plain"] = Reply(WORDS, fault="stall", at=5)
        upstream.models["prefill"] = Reply(WORDS * 20, delay_s=0.02)
        answers = [
            Answer(fleet, Question({"message": "go", "model": model}, ()), random.Random(0))
            for model in upstream.models
        ]
        async with fleet.only(generating):
            for answer in answers:
                await answer.ask(generating)
            await wait_until(lambda: len(upstream.requests) == len(answers))
        reading = [asyncio.create_task(answer.read(other)) for answer in answers]
        await wait_until(lambda: all(len(answer.reader.heard) >= 5 for answer in answers))
        cancelled_at = time.monotonic()
        async with aiohttp.ClientSession(other.url) as http:
            for answer in answers:
                async with http.post(f"/chat/{answer.job_id}/cancel") as response:
                    assert (await response.json())["status"] == "cancelled"
        async with asyncio.timeout(10):
            await asyncio.gather(*(request.hung_up.wait() for request in upstream.requests))
        took_s = time.monotonic() - cancelled_at
        record_testsuite_property("cancel_s", took_s)
        assert took_s <= CANCEL_S
        await asyncio.gather(*reading)
        assert [answer.reader.end for answer in answers] == ["cancelled", "cancelled"]


async def deafen(fleet: Fleet) -> None:
    """Ends all subscriptions and refuses new ones; publishing goes on."""
    async with fleet.inside() as store:
        await store.writes.call("ACL", "SETUSER", "default", "-subscribe")
        await store.writes.call("CLIENT", "KILL", "TYPE", "PUBSUB")
        _, listeners = await store.writes.call("PUBSUB", "NUMSUB", store.keys.cancel)
        assert listeners == 0
