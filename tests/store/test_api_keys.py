"""Records of API keys, and the secret that replicas share."""

from __future__ import annotations

from llmstream.access.credentials import issue
from llmstream.store.store import Store
from llmstream.types import ApiKey

NOW = 1_800_000_000.0


def new(name: str, seconds: float) -> ApiKey:
    return issue(name, scopes=["generate"], models=["gpt-*"], now=NOW, expires_at=NOW + seconds)[1]


async def test_keys_are_found_listed_and_revoked(store: Store) -> None:
    """A record comes back as it went in, until the key is revoked; revoking twice is fine."""
    keys = [new("alice", 100), new("bob", 200)]
    for key in keys:
        await store.api_keys.add(key, NOW)
    assert sorted(await store.api_keys.all(), key=lambda key: key.name) == keys
    assert await store.api_keys.find(keys[0].id) == keys[0]
    assert await store.api_keys.revoke(keys[0].id)
    assert not await store.api_keys.revoke(keys[0].id)
    assert await store.api_keys.find(keys[0].id) is None
    assert await store.api_keys.all() == keys[1:]


async def test_the_record_lives_as_long_as_its_longest_key(store: Store) -> None:
    """A short-lived key neither shortens nor outlives the others."""
    lives = []
    for seconds in (100, 50, 1000, 10):
        await store.api_keys.add(new("alice", seconds), NOW)
        lives.append(round(await store.writes.call("PTTL", store.keys.api_keys) / 1000))
    assert lives == [100, 100, 1000, 1000]


async def test_expired_keys_make_room(store: Store) -> None:
    """Adding a key removes those that have expired."""
    await store.api_keys.add(new("old", 10), NOW)
    young = new("young", 100)
    await store.api_keys.add(young, NOW + 10)
    assert await store.api_keys.all() == [young]


async def test_one_secret_for_all(store: Store) -> None:
    """Whoever comes first decides, and everybody hears the same."""
    assert await store.api_keys.keep_secret(b"first") == b"first"
    assert await store.api_keys.keep_secret(b"second") == b"first"
    assert await store.writes.call("PTTL", store.keys.stream_secret) > 0
