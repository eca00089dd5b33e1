"""A batch of embeddings moves between replicas slice by slice."""

from __future__ import annotations

import time

from llmstream.config import SchedulerSettings
from llmstream.store.store import Store
from llmstream.types import Delta, GenerateRequest, Job, new_id
from llmstream.vectors import SLICE_INPUTS
from tests.logs import stored
from tests.proxy import distant
from tests.replica import MODEL, echo, lanes_of, replica
from tests.waiting import wait_until

INPUTS = [f"text {number}" for number in range(4 * SLICE_INPUTS)]
SETTINGS = SchedulerSettings(lease_s=5)


async def vectors(store: Store, job_id: str) -> list[tuple[int, int]]:
    """Attempt and input of every vector in the log."""
    events = await stored(store, job_id)
    return [(event.id.attempt, event.data.index) for event in events if isinstance(event.data, Delta)]


async def test_a_closing_replica_hands_a_batch_over(store: Store) -> None:
    """A replica that closes gives its batch to another one between two slices; no attempt is used up, no slice is made
    twice."""
    request = GenerateRequest.of("embedding", MODEL, {"input": INPUTS})
    job = Job(id=new_id(), request=request, pool=MODEL, created_at=time.time())
    async with distant(store) as (far, _), replica(store, echo(delay_ms=4), settings=SETTINGS, grace_s=30) as first:
        assert await store.jobs.create(job)
        assert await lanes_of(store, SETTINGS).push(job)

        async def begun() -> bool:
            return bool(await vectors(store, job.id))

        await wait_until(begun)
        async with replica(far, echo(), name="r2", settings=SETTINGS):
            await first.close(30)

            async def done() -> bool:
                return (await store.jobs.get(job.id)).done

            await wait_until(done)
    made = await vectors(store, job.id)
    assert [index for _, index in made] == list(range(len(INPUTS)))
    assert made[0][0] == 1
    assert made[-1][0] == 2
    assert await store.writes.call("HGET", store.keys.job(job.id), "handed_over") == b"1"
