"""The log of each job: append, read, follow from any position."""

from __future__ import annotations

from collections.abc import AsyncIterator

from llmstream.store.channel import Channel
from llmstream.store.entry import Entry, decode_entry
from llmstream.store.follower import PAGE, Follower, Pages
from llmstream.store.insisting import insist
from llmstream.store.jobs import Begun, Ended, Jobs
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Sender
from llmstream.store.presence import Presence
from llmstream.store.recent import Recent
from llmstream.store.tail import Tail
from llmstream.store.writer import Writer
from llmstream.types import BEGINNING, Durability, Event, EventId


class Log:
    """All logs that this process writes or follows.

    ``writes`` carries appends, ``reads`` carries history, so that a long replay delays nobody's tokens.
    """

    def __init__(
        self,
        writes: Sender,
        synced: Sender,
        reads: Sender,
        jobs: Jobs,
        keys: Keys,
        tail: Tail,
        presence: Presence,
        recent: Recent,
        *,
        outage_s: float,
    ) -> None:
        self._senders: dict[Durability, Sender] = {"full": writes, "fsync": synced}
        self._reads = reads
        self._jobs = jobs
        self._keys = keys
        self._tail = tail
        self._presence = presence
        self._recent = recent
        self._outage_s = outage_s
        self._writers: dict[Writer, None] = {}
        presence.on_rebirth.append(self._verify)
        self._channels = tail.channels

    def writer(self, begun: Begun) -> Writer:
        """The writer of an attempt that has begun. Close it when the attempt is over."""
        job_id = begun.job.id
        channel = self._channels.get(job_id)
        if channel is None:
            channel = self._channels[job_id] = Channel(job_id)
        channel.owned = channel.located = True
        writer = Writer(
            self._senders[begun.job.durability],
            self._keys.log(job_id),
            channel,
            self._jobs,
            self._presence,
            self._recent,
            begun,
            outage_s=self._outage_s,
            on_close=self._disown,
        )
        self._tail.update(channel)
        self._writers[writer] = None
        return writer

    def _verify(self) -> None:
        for writer in self._writers:
            writer.verify()

    def _disown(self, writer: Writer) -> None:
        channel = writer.channel
        self._writers.pop(writer, None)
        channel.owned = False
        self._release(channel)
        self._tail.update(channel)

    def adopt(self, channel: Channel) -> None:
        """Lets a log be followed that is only in memory."""
        channel.owned = True
        self._channels[channel.job_id] = channel

    def drop(self, channel: Channel) -> None:
        """Lets go of a log that was only in memory."""
        channel.owned = False
        channel.clear()
        self._release(channel)

    def note_end(self, job_id: str, ended: Ended) -> None:
        """Shows followers in this process a terminal entry that was written by ``Jobs.end``."""
        channel = self._channels.get(job_id)
        if channel is not None and ended.entry is not None:
            channel.publish(ended.entry, ended.previous)

    async def read(self, job_id: str, after: EventId = BEGINNING, limit: int = PAGE) -> list[Entry]:
        """Reads up to ``limit`` entries behind a position from the store; an empty list at the end of the log.

        A log that is only in memory comes as a whole.
        """
        channel = self._channels.get(job_id)
        if channel is not None and channel.whole:
            return channel.behind(after)
        start = "-" if after == BEGINNING else f"({after}"
        raw = await self._reads.call("XRANGE", self._keys.log(job_id), start, "+", "COUNT", limit)
        return [decode_entry(entry_id, fields).after(after) for entry_id, fields in raw]

    async def recall(self, job_id: str, after: EventId) -> list[Entry]:
        """Like :meth:`read`, for whoever goes on with a job: while the store is away it is asked again, for up to
        ``outage_s``. Raises StoreUnavailable."""
        return await insist(lambda: self.read(job_id, after), self._outage_s)

    async def end(self, job_id: str) -> EventId:
        """The last event of a log; ``BEGINNING`` while there is none."""
        raw = await self._reads.call("XREVRANGE", self._keys.log(job_id), "+", "-", "COUNT", 1)
        return EventId.parse(raw[0][0]) if raw else BEGINNING

    async def events(self, job_id: str) -> AsyncIterator[Event]:
        """Every event that is logged by now, in order."""
        position, pages = BEGINNING, Pages()
        while entries := await self.read(job_id, position, pages.limit):
            pages.fit(entries)
            position = entries[-1].last
            for entry in entries:
                for event in entry.events:
                    yield event

    def follow(self, job_id: str, after: EventId = BEGINNING, *, newborn: bool = False) -> Follower:
        """Follows a log from behind ``after``; use it as a context manager and iterate.

        ``newborn`` says that the job is only being created: its log is known to be empty and needs no look-up.
        """
        channel = self._channels.get(job_id)
        if channel is None:
            channel = self._channels[job_id] = Channel(job_id, newborn=newborn)
        return Follower(self, self._jobs, self._tail, channel, after, on_close=self._release)

    def _release(self, channel: Channel) -> None:
        if not channel.followers and not channel.owned and self._channels.get(channel.job_id) is channel:
            del self._channels[channel.job_id]
