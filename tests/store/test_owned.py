"""Each principal's list of its jobs."""

from __future__ import annotations

from llmstream.store.owned import OWNED_JOBS, Owned
from llmstream.store.store import Store
from llmstream.types import GenerateRequest, Job
from tests.waiting import wait_until


def job(number: int, principal: str) -> Job:
    request = GenerateRequest.of("chat", "m", {})
    return Job(id=f"{principal}-{number}", request=request, pool="p", created_at=float(number), principal=principal)


async def test_each_principal_has_its_own_list(store: Store) -> None:
    """Lists hold a principal's jobs, latest first, as soon as they are asked for."""
    for number in range(5):
        for principal in ("alice", "bob"):
            store.owned.note(job(number, principal))
    assert await store.owned.latest("alice") == [f"alice-{number}" for number in (4, 3, 2, 1, 0)]
    assert await store.owned.latest("bob", 2) == ["bob-4", "bob-3"]
    assert await store.owned.latest("carol") == []


async def test_other_replicas_hear_of_it_by_themselves(store: Store) -> None:
    """What was noted is written after a moment, also when nobody asks here."""
    store.owned.note(job(1, "alice"))
    other = Owned(store.writes, store.keys, ttl_s=60)

    async def listed() -> bool:
        return await other.latest("alice") == ["alice-1"]

    await wait_until(listed)


async def test_the_lists_are_bounded(store: Store) -> None:
    """A list remembers the latest jobs only, however many come at once."""
    for number in range(3 * OWNED_JOBS):
        store.owned.note(job(number, "alice"))
    assert await store.owned.latest("alice") == [f"alice-{3 * OWNED_JOBS - 1 - back}" for back in range(OWNED_JOBS)]
    assert await store.writes.call("ZCARD", store.keys.owned("alice")) == OWNED_JOBS
