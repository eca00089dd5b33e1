"""Names of keys: what changes together lives together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from llmstream.store import keys as module
from llmstream.store.keys import BUDGET_PARTS, OUTBOX_PARTS, QUEUE_PARTS, Keys

KEYS = Keys("llmstream")
names = st.text(min_size=1, max_size=40)


@given(job_id=st.from_regex(r"[0-9a-hjkmnp-tv-z]{26}", fullmatch=True))
def test_a_job_lives_in_one_slot(job_id: str) -> None:
    """Record and log of a job share a hash slot, so one script can change both on a cluster."""
    assert key_slot(KEYS.job(job_id).encode()) == key_slot(KEYS.log(job_id).encode())


@given(pool=names)
def test_a_queue_lives_in_one_slot(pool: str) -> None:
    """All keys of a pool share a hash slot, whatever the pool is called."""
    assert len({key_slot(key.encode()) for key in (*KEYS.queue(pool), *KEYS.outbox(pool))}) == 1
    assert KEYS.outbox(pool)[0] in KEYS.queue(pool)


@given(target=names, other=names)
def test_limits_and_breakers_live_in_one_slot(target: str, other: str) -> None:
    """All keys of a target's limits share a hash slot; so do those of all breakers, and all buckets of a caller."""
    assert len({key_slot(key.encode()) for key in KEYS.budget(target)}) == 1
    assert len({key_slot(key.encode()) for key in KEYS.breakers(target, other)}) == 1
    assert key_slot(KEYS.bucket(target, "requests").encode()) == key_slot(KEYS.bucket(target, "tokens").encode())


@given(owner=names)
def test_a_cache_and_a_conversation_live_in_one_slot(owner: str) -> None:
    """The keys of an owner's cache share a hash slot, and so do those of a session."""
    assert len({key_slot(key.encode()) for key in KEYS.cache(owner)}) == 1
    assert len({key_slot(key.encode()) for key in KEYS.conversation("p", owner)}) == 1


@given(one=names, other=names)
def test_names_do_not_collide(one: str, other: str) -> None:
    """Different pools and sessions never share a key."""
    if one != other:
        assert not set(KEYS.queue(one)) & set(KEYS.queue(other))
        assert KEYS.session(one) != KEYS.session(other)
        assert not set(KEYS.budget(one)) & set(KEYS.budget(other))
        assert KEYS.breakers(one) != KEYS.breakers(other)
        assert KEYS.bucket(one, "requests") != KEYS.bucket(other, "requests")

        assert not set(KEYS.cache(one)) & set(KEYS.cache(other))
        assert not set(KEYS.conversation(one, other)) & set(KEYS.conversation(other, one))


@pytest.mark.parametrize("part", QUEUE_PARTS)
def test_every_part_is_explained(part: str) -> None:
    """The module's docstring names every key of a queue."""
    assert module.__doc__ is not None
    assert f"{{q:POOL}}:{part} " in module.__doc__


@pytest.mark.parametrize("part", OUTBOX_PARTS)
def test_every_part_of_an_outbox_is_explained(part: str) -> None:
    """The module's docstring names every key of a pool's deliveries."""
    assert module.__doc__ is not None
    assert f"{{q:POOL}}:{part} " in module.__doc__


@pytest.mark.parametrize("part", BUDGET_PARTS)
def test_every_part_of_a_budget_is_explained(part: str) -> None:
    """The module's docstring names every key of a target's limits."""
    assert module.__doc__ is not None
    assert f"{{t:TARGET}}:{part} " in module.__doc__
