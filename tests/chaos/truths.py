"""What must be true of an answer afterwards, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple

from llmstream.types import Delta, Event, EventId, Finished, Restart, Started
from tests.chaos.reader import Piece
from tests.logs import text_of
from tests.replica import tokens


class Difference(NamedTuple):
    """How far a sequence is from the one it should be."""

    lost: int
    doubled: int


def difference(found: Sequence[Hashable], right: Sequence[Hashable]) -> Difference:
    """What is missing and what is too much; the right things in the wrong order count as one loss."""
    lost, doubled = (Counter(right) - Counter(found)).total(), (Counter(found) - Counter(right)).total()
    return Difference(lost or int(not doubled and list(found) != list(right)), doubled)


def against_log(pieces: Sequence[Piece], log: Sequence[Event]) -> Difference:
    """Compares what a client has with what is logged: the same tokens under the same ids, and no gap between ids."""
    seen, logged = [(piece.id, piece.text) for piece in pieces], answer_in(log)
    gaps = sum(after not in (EventId(at.attempt, at.seq + 1), EventId(at.attempt + 1, 0)) for at, after in steps(log))
    lost, doubled = difference(seen, logged)
    return Difference(lost + gaps, doubled)


def steps(log: Sequence[Event]) -> list[tuple[EventId, EventId]]:
    return list(pairwise(event.id for event in log))


def answer_in(log: Sequence[Event]) -> list[tuple[EventId, str]]:
    """Each logged token with its id, from the last restart on."""
    restarts = [number for number, event in enumerate(log) if isinstance(event.data, Restart)]
    valid = log[restarts[-1] :] if restarts else log
    return [(event.id, event.data.text) for event in valid if isinstance(event.data, Delta) and event.data.text]


def ends_in(log: Sequence[Event]) -> list[str]:
    return [event.data.status for event in log if isinstance(event.data, Finished)]


def attempts_in(log: Sequence[Event]) -> int:
    return sum(isinstance(event.data, Started) for event in log)


def assert_exact(log: Sequence[Event], length: int) -> None:
    """The whole answer of the echo model, no token lost or said twice, one end."""
    assert text_of(log) == tokens(length)
    assert ends_in(log) == ["completed"]
    assert not any(isinstance(event.data, Restart) for event in log)
