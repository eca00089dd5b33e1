"""The recent end of a log in memory; no I/O."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llmstream.store.channel import RING_BYTES, Channel
from llmstream.store.entry import Entry
from llmstream.types import BEGINNING, Delta, Event, EventId, Finished
from tests.logs import events_of

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=30)


def make_log(sizes: list[int], size: int = 10) -> list[tuple[Entry, EventId]]:
    """Entries of one attempt, each with the event before it."""
    log: list[tuple[Entry, EventId]] = []
    previous, seq = BEGINNING, -1
    for count in sizes:
        seq += count
        entry = Entry(EventId(1, seq), [Delta(text="x")] * count, size)
        log.append((entry, previous))
        previous = entry.last
    return log


@given(sizes=SIZES, deliveries=st.lists(st.integers(0, 29), max_size=80), bytes_each=st.sampled_from([10, 9_000]))
def test_what_it_holds_has_no_gap(sizes: list[int], deliveries: list[int], bytes_each: int) -> None:
    """Whatever arrives twice, late or with a gap before it: from the base to the tip every event is there once."""
    log = make_log(sizes, bytes_each)
    whole = [event.id for entry, _ in log for event in entry.events]
    channel = Channel("j")
    for number in deliveries:
        entry, previous = log[number % len(log)]
        channel.publish(entry, previous)
        held = [event.id for event in events_of(channel.behind(channel.base))]
        expected = [event_id for event_id in whole if channel.base < event_id <= channel.tip]
        assert held == expected
        assert channel.base <= channel.tip


@given(sizes=SIZES, at=st.integers(0, 200))
def test_any_held_position_gets_exactly_the_rest(sizes: list[int], at: int) -> None:
    """Reading behind a position, also inside an entry, gives the later events once."""
    log = make_log(sizes)
    channel = Channel("j")
    for entry, previous in log:
        channel.publish(entry, previous)
    whole = [event for entry, _ in log for event in entry.events]
    held = [event.id for event in whole if channel.holds(event.id)]
    position = held[at % len(held)]
    assert events_of(channel.behind(position)) == [event for event in whole if event.id > position]


def test_the_ring_is_bounded() -> None:
    """However long the answer, memory holds the ring and at most one entry more."""
    channel = Channel("j")
    for entry, previous in make_log([1] * 5_000, 500):
        channel.publish(entry, previous)
    held = channel.behind(channel.base)
    assert sum(entry.size for entry in held) <= RING_BYTES
    assert not channel.holds(BEGINNING)
    assert channel.holds(channel.base)
    assert all(a.last.seq + 1 == b.first.seq for a, b in pairwise(held))


def test_one_entry_larger_than_the_ring_is_kept() -> None:
    """The newest entry is always there, whatever its size."""
    channel = Channel("j")
    channel.publish(Entry(EventId(1, 0), [Delta(text="x")], 10 * RING_BYTES), BEGINNING)
    assert events_of(channel.behind(BEGINNING)) == [Event(EventId(1, 0), Delta(text="x"))]


def test_locating_never_goes_back() -> None:
    """An end of the log that was read before later events were published changes nothing."""
    channel = Channel("j")
    for entry, previous in make_log([2, 2]):
        channel.publish(entry, previous)
    channel.locate(EventId(1, 1))
    assert (channel.base, channel.tip) == (BEGINNING, EventId(1, 3))
    channel.locate(EventId(2, 0))
    assert (channel.base, channel.tip) == (EventId(2, 0), EventId(2, 0))
    assert channel.behind(EventId(2, 0)) == []


def test_it_knows_the_end() -> None:
    """A channel is finished when its last event is the terminal one."""
    channel = Channel("j")
    channel.publish(Entry(EventId(1, 0), [Delta(text="x")], 1), BEGINNING)
    assert not channel.finished
    channel.publish(Entry(EventId(1, 1), [Finished(status="completed", at=0.0)], 1), EventId(1, 0))
    assert channel.finished


def test_frames_are_kept_only_for_others() -> None:
    """What one reader was sent is let go at once; where several read, an entry is rendered for all of them."""
    for followers, left in ((1, {}), (2, {"native": b"frame"})):
        channel = Channel("j")
        channel.followers = followers
        channel.listeners.add(lambda entry, _: entry.rendered.update({"native": b"frame"}) if entry else None)
        ((entry, previous),) = make_log([1])
        channel.publish(entry, previous)
        assert entry.rendered == left
