"""Who may add to a conversation, and what is on record of it."""

from __future__ import annotations

import asyncio

from llmstream.store.sessions import Conversation
from llmstream.store.store import Store

ONE = Conversation([{"role": "user", "content": "x"}], [{"role": "user", "content": "y"}], "job", 1)


async def test_only_the_first_may_write(store: Store) -> None:
    """Turns come one after the other, in the order of their arrival."""
    sessions = store.sessions(60)
    assert (await sessions.enter("p", "s", "a", 10)).first
    assert not (await sessions.enter("p", "s", "b", 10)).first
    assert (await sessions.enter("p", "other", "b", 10)).first
    assert (await sessions.enter("q", "s", "b", 10)).first
    assert not await sessions.write("p", "s", "b", ONE)
    assert await sessions.find("p", "s") is None
    assert await sessions.write("p", "s", "a", ONE)
    await sessions.leave("p", "s", "a")
    place = await sessions.enter("p", "s", "b", 10)
    assert (place.first, place.conversation) == (True, ONE)
    assert await sessions.find("q", "s") is None


async def test_a_lapsed_lease_gives_no_right(store: Store) -> None:
    """Who was silent for too long may not write, whether or not somebody else came, and stands behind the others when
    it comes back."""
    sessions = store.sessions(60)
    await sessions.enter("p", "s", "a", 0.05)
    await asyncio.sleep(0.06)
    assert not await sessions.write("p", "s", "a", ONE)
    assert (await sessions.enter("p", "s", "b", 10)).first
    assert not await sessions.write("p", "s", "a", ONE)
    assert not (await sessions.enter("p", "s", "a", 10)).first


async def test_what_the_store_forgot_is_written_again(store: Store) -> None:
    """A conversation that the store lost comes back; a newer one is not overwritten."""
    sessions = store.sessions(60)
    await sessions.enter("p", "s", "a", 10)
    newer = Conversation(ONE.messages, ONE.said, "later", 2)
    assert await sessions.write("p", "s", "a", ONE)
    assert await sessions.write("p", "s", "a", newer)
    await sessions.leave("p", "s", "a")
    redos = [redo for span in store.recent._spans for redo in span.redos]
    await redos[0]()
    found = await sessions.find("p", "s")
    assert found is not None
    assert found[0] == newer
    await store.writes.call("DEL", store.keys.conversation("p", "s")[0])
    for redo in redos:
        await redo()
    found = await sessions.find("p", "s")
    assert found is not None
    assert found[0] == newer
    assert await sessions.forget("p", "s")
    for redo in redos:
        await redo()
    assert await sessions.find("p", "s") is None
    assert (await sessions.enter("p", "s", "b", 10)).conversation == Conversation(version=3)
