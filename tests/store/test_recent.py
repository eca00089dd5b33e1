"""What is kept of acknowledged writes, and for how long."""

from __future__ import annotations

from llmstream.errors import StoreUnavailable
from llmstream.store import recent as module
from llmstream.store.presence import Presence
from llmstream.store.recent import KEEP_S, SPAN_S, Recent, Trail
from llmstream.types import EventId, GenerateRequest, Job

JOB = Job(id="j", request=GenerateRequest.of(kind="chat", model="m", body={}), pool="m", created_at=0.0)


class Books:
    """A clock to turn by hand, and two logs that are written."""

    def __init__(self) -> None:
        self.now = 100.0
        self.presence = Presence()
        self.recent = Recent(self.presence, lambda: self.now)
        self.trails = [Trail(JOB, 1, "r", 0.0, "t") for _ in range(2)]

    def write(self, which: int, seq: int, size: int = 10) -> None:
        self.recent.keep(self.trails[which], EventId(1, seq - 1), EventId(1, seq), b"x" * size)

    def kept(self, which: int) -> list[int]:
        return [kept.last.seq for kept in self.trails[which].entries]


def test_entries_are_kept_for_a_time() -> None:
    """An entry is kept for KEEP_S at least, and not much longer while anything is written."""
    books = Books()
    for seq in range(1, 101):
        books.write(0, seq)
        books.now += 0.1
        oldest = books.kept(0)[0]
        assert seq - 10 * (KEEP_S + 2 * SPAN_S) <= oldest <= max(1, seq - 10 * KEEP_S + 1)
    books.now += KEEP_S + 2 * SPAN_S
    books.write(1, 1)
    assert (books.kept(0), books.kept(1)) == ([], [1])


def test_time_stands_still_while_the_store_is_away() -> None:
    """What was acknowledged before an outage is still there after it, however long that was."""
    books = Books()
    books.write(0, 1)
    books.presence.trouble = StoreUnavailable("away")
    books.now += 60
    books.write(1, 1)
    assert (books.kept(0), books.kept(1)) == ([1], [1])
    books.presence.trouble = None
    books.now += 60
    books.write(1, 2)
    assert (books.kept(0), books.kept(1)) == ([], [2])


def test_memory_is_bounded() -> None:
    """The oldest goes first when too much is kept, of one log and of all."""
    books = Books()
    for seq in range(1, 200):
        books.write(0, seq, 10_000)
    assert sum(len(kept.data) for kept in books.trails[0].entries) <= module.KEEP_BYTES_OF_ONE
    books.now += SPAN_S
    books.recent.remember(_nothing, module.KEEP_BYTES)
    assert books.kept(0) == []
    books.write(1, 1)
    assert books.recent.bytes < 1000


def test_memory_is_bounded_at_any_speed() -> None:
    """Also what comes at one moment, while the store is away, is kept in part only: the latest."""
    books = Books()
    books.presence.trouble = StoreUnavailable("away")
    books.trails = [Trail(JOB, 1, "r", 0.0, "t") for _ in range(2 * module.KEEP_BYTES // module.KEEP_BYTES_OF_ONE)]
    for which in range(len(books.trails)):
        books.write(which, 1, module.KEEP_BYTES_OF_ONE)
    assert (books.kept(0), books.kept(-1)) == ([], [1])
    assert books.recent.bytes <= module.KEEP_BYTES
    assert sum(len(kept.data) for trail in books.trails for kept in trail.entries) <= module.KEEP_BYTES


async def _nothing() -> None:
    return None
