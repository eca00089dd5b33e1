"""Signed URLs: what one opens, for how long, and who agrees on it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstream.access.tickets import RENEW_S, RETRY_S, Tickets
from llmstream.errors import StoreUnavailable, Unauthorized

SECRET = b"0123456789abcdef"


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def opens(tickets: Tickets, token: str, session_id: str = "s", job_id: str | None = "j") -> bool:
    async def check() -> bool:
        try:
            await tickets.check(token, session_id, job_id)
        except Unauthorized:
            return False
        return True

    return asyncio.run(check())


def test_a_ticket_carries_one_right() -> None:
    """Who shows a ticket may read, in the name of who gave it away, and nothing else."""
    tickets = Tickets(SECRET, 60, Clock())
    principal = asyncio.run(tickets.check(tickets.issue("al.ice", "s", "j"), "s", "j"))
    assert (principal.id, principal.scopes, principal.is_admin) == ("al.ice", ("read",), False)


def test_a_ticket_expires() -> None:
    """It opens up to its last moment, and not from then on."""
    clock = Clock()
    tickets = Tickets(SECRET, 60, clock)
    token = tickets.issue("alice", "s", "j")
    clock.now += 59.9
    assert opens(tickets, token)
    clock.now += 0.1
    assert not opens(tickets, token)


@given(st.integers(0, 200), st.characters(codec="utf-8"))
def test_no_character_can_be_changed(position: int, other: str) -> None:
    """A token with any change is worth nothing."""
    tickets = Tickets(SECRET, 60, Clock())
    token = tickets.issue("alice", "s", "j")
    position %= len(token) + 1
    changed = token[:position] + other + token[position + 1 :]
    assert opens(tickets, changed) == (changed == token)


@given(st.text(max_size=80))
def test_any_text_is_a_wrong_token(text: str) -> None:
    """Whatever stands in its place is refused, without an error of ours."""
    assert not opens(Tickets(SECRET, 60, Clock()), text)


@given(st.tuples(st.text(), st.none() | st.text()), st.tuples(st.text(), st.none() | st.text()))
def test_a_ticket_is_for_one_stream(one: tuple[str, str | None], other: tuple[str, str | None]) -> None:
    """The ticket of a session is none for one of its jobs, nor the other way round, nor for anything else."""
    tickets = Tickets(SECRET, 60, Clock())
    assert opens(tickets, tickets.issue("alice", *one), *other) == (one == other)


def test_secrets_differ() -> None:
    """A token signed with another secret opens nothing."""
    assert not opens(Tickets(b"another-secret-0", 60, Clock()), Tickets(SECRET, 60, Clock()).issue("alice", "s", "j"))


class Shelf:
    """A store that keeps one secret."""

    def __init__(self, secret: bytes) -> None:
        self.secret: bytes | None = secret
        self.asked = 0
        self.away = False

    def keep(self, secret: bytes) -> asyncio.Future[bytes]:
        self.asked += 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.away:
            answer.set_exception(StoreUnavailable("away"))
            return answer
        self.secret = self.secret or secret
        answer.set_result(self.secret)
        return answer


async def test_replicas_agree_after_the_store_forgot() -> None:
    """When the store lost the secret and another replica put its own there, both accept what either signs."""
    shelf, clock = Shelf(SECRET), Clock()
    one, two = (Tickets(SECRET, 10 * RENEW_S, clock, shelf.keep) for _ in range(2))
    old = one.issue("alice", "s", "j")
    shelf.secret = b"fedcba9876543210"
    clock.now += RENEW_S
    one.issue("alice", "s", "j")
    await asyncio.sleep(0)
    new = one.issue("alice", "s", "j")
    assert new.partition(".")[2] != old.partition(".")[2]
    for token in (old, new):
        for tickets in (one, two):
            await tickets.check(token, "s", "j")


async def test_wrong_tokens_do_not_flood_the_store() -> None:
    """The store is asked for another secret once in a while, however many wrong tokens come, and may be away."""
    shelf, clock = Shelf(SECRET), Clock()
    tickets = Tickets(SECRET, 60, clock, shelf.keep)
    shelf.away = True
    for expected in (0, 1, 2):
        for _ in range(100):
            with pytest.raises(Unauthorized):
                await tickets.check("1.x.alice", "s", "j")
        assert shelf.asked == expected
        clock.now += RETRY_S


async def test_signing_never_waits() -> None:
    """The secret is kept alive once an hour at most, and a store that is away is no hindrance."""
    shelf, clock = Shelf(SECRET), Clock()
    tickets = Tickets(SECRET, 60, clock, shelf.keep)
    shelf.away = True
    for _ in range(3):
        clock.now += RENEW_S
        for _ in range(10):
            await tickets.check(tickets.issue("alice", "s", "j"), "s", "j")
    assert shelf.asked == 3
