"""A long batch of embeddings outlives the replica that makes it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from llmstream.providers import echo_vectors
from llmstream.types import Delta
from llmstream.vectors import SLICE_INPUTS
from tests.chaos.fleet import Replica, open_fleet
from tests.conftest import assert_every_key_expires
from tests.logs import stored
from tests.waiting import wait_until

TEXTS = [f"text number {number}" for number in range(6 * SLICE_INPUTS)]
SETTINGS = {"models.echo.engine": "echo", "models.echo.delay_ms": 6, "scheduler.lease_s": 0.5}


async def status(replica: Replica, job_id: str) -> dict[str, Any]:
    async with aiohttp.ClientSession(replica.url) as http, http.get(f"/embeddings/{job_id}") as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def test_a_killed_replicas_batch_goes_on_with_the_next_slice(tmp_path: Path) -> None:
    """After ``kill -9`` another replica makes the vectors that are missing, and no slice twice."""
    async with open_fleet(tmp_path, SETTINGS, count=2) as fleet:
        first, second = fleet.replicas
        async with fleet.only(first), aiohttp.ClientSession(first.url) as http:
            body = {"model": "echo", "texts": TEXTS}
            async with http.post("/embeddings", json=body) as response:
                job_id = (await response.json())["task_id"]

            async def two_slices() -> bool:
                return bool((await status(first, job_id))["done"] >= 2 * SLICE_INPUTS)

            await wait_until(two_slices)
            first.send(signal.SIGKILL)

        async def completed() -> bool:
            return bool((await status(second, job_id))["ready"])

        await wait_until(completed, timeout=30)
        answer = await status(second, job_id)
        expected = [np.array(echo_vectors.vector(text), np.float32).tolist() for text in TEXTS]
        assert answer["result"]["embeddings"] == expected
        assert answer["result"]["usage"]["prompt_tokens"] == 3 * len(TEXTS)
        async with fleet.inside() as store:
            made = [event for event in await stored(store, job_id) if isinstance(event.data, Delta)]
            await assert_every_key_expires(store)
        assert [event.data.index for event in made if isinstance(event.data, Delta)] == list(range(len(TEXTS)))
        by_second = [event for event in made if event.id.attempt == 2]
        assert 0 < len(by_second) <= len(TEXTS) - 2 * SLICE_INPUTS
