"""The one who may append to a job's log: a single attempt of a single replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llmstream.errors import Fenced, StoreError, StoreUnavailable
from llmstream.store.channel import Channel
from llmstream.store.entry import FIELD, Entry, encode_payloads
from llmstream.store.jobs import Begun, Jobs
from llmstream.store.pipeline import NOTHING, Command, Lazy, Sender
from llmstream.store.presence import Presence
from llmstream.store.recent import RETRY_S, Recent, Trail
from llmstream.types import EventId, Finished, Payload, Restart

CONGESTED_BYTES = 256 * 1024
"""What may wait for the store before the model is asked to wait."""
SUPERSEDED = "superseded"
"""The code of an attempt that the store has let write no more."""
_REFUSED = "equal or smaller"

logger = logging.getLogger(__name__)


class Writer:
    """Appends events in order; each becomes visible only after the store has acknowledged it.

    Everything that gathers while an append is under way travels in the next entry. When the store is away the same
    entry is sent again under the same id until ``outage_s`` has passed. When another server answers, what it has lost
    of the last seconds is written again before anything else. When the store refuses the id, a newer attempt owns the
    log: ``on_lost`` is called with Fenced and nothing more is written.
    """

    def __init__(
        self,
        sender: Sender,
        key: str,
        channel: Channel,
        jobs: Jobs,
        presence: Presence,
        recent: Recent,
        begun: Begun,
        *,
        outage_s: float,
        on_close: Callable[[Writer], None],
    ) -> None:
        self.attempt = begun.attempt
        self.channel = channel
        self.lost: Fenced | StoreUnavailable | None = None
        self.on_lost: Callable[[Fenced | StoreUnavailable], None] | None = None
        self._sender = sender
        self._key = key
        self._jobs = jobs
        self._presence = presence
        self._recent = recent
        self._life = begun.life
        """The server's life that is known to hold everything acknowledged."""
        self._asked_life: int | None = None
        """The life that is being asked what it holds."""
        self._bridge: Entry | None = None
        """The entry that will say that a part of the answer is lost."""
        self._trail = begun.trail()
        self._again = _Again(sender, jobs, presence, self._trail)
        self._outage_s = outage_s
        self._on_close = on_close
        self._logged = begun.previous
        self._pending: list[Payload] = []
        self._pending_bytes = 0
        self._inflight: tuple[Entry, bytes] | None = None
        self._armed = False
        self._failing_since: float | None = None
        self._ending = False
        """Whether what is pending goes with the terminal event."""
        self._finished = False
        self._idle = True
        """Whether everything appended so far is acknowledged."""
        self._flushed: asyncio.Event | None = None
        """Set, and let go, as soon as that is so; there only while somebody waits for it."""
        self._take(begun.entry, encode_payloads(begun.entry.payloads))

    def append(self, payload: Payload, size: int) -> None:
        """Queues one event of about ``size`` bytes. Raises what made the writer lose the log."""
        self.extend((payload,), size)

    def extend(self, payloads: Sequence[Payload], size: int) -> bool:
        """Queues events, like :meth:`append`; False while more waits for the store than should be held in memory."""
        if self.lost is not None:
            raise self.lost
        self._pending += payloads
        self._pending_bytes += size
        if not self._armed:
            self._arm()
        return self._pending_bytes <= CONGESTED_BYTES

    async def flush(self) -> None:
        """Waits until everything appended so far is acknowledged. Raises Fenced or StoreUnavailable."""
        if not self._idle:
            self._flushed = self._flushed or asyncio.Event()
            await self._flushed.wait()
        if self.lost is not None:
            raise self.lost

    async def finish(self, finished: Finished) -> None:
        """Logs the terminal event together with what is pending and closes the job's record.

        Raises Fenced when the job moved on, StoreUnavailable when the store stays away.
        """
        await self._presence.recovered()  # an end that somebody was told of may be about to be written again
        self._ending = True
        if self._inflight is None and self._life == self._presence.life:
            self._rest()  # what is pending need not go ahead of the end
        await self.flush()
        entry, data = self._entry([finished])
        while True:
            life = self._life  # what was lost may be back before we hear that it was
            outcome = await self._again.close(entry, data)
            if outcome == "ok":
                break
            if outcome == "fenced" or life == self._presence.life:
                raise self._superseded()
            self.verify()
            await self.flush()
        self._finished = True
        again = self._again
        end = Entry(entry.last, [finished], len(data))
        self._recent.remember(lambda: again.finish(end, data), len(data))
        self.channel.publish(entry, self._logged)

    def verify(self) -> None:
        """Looks whether the server that answers now holds everything acknowledged; writes again what it lost."""
        self._arm()

    def close(self) -> None:
        """Gives the log up; what is not acknowledged by now is not written again."""
        self.on_lost = None
        if not self._finished and not isinstance(self.lost, StoreUnavailable):
            self._recent.remember(self._again.write, 0)
        if self.lost is None:
            self.lost = Fenced("The writer is closed.")
        self._on_close(self)

    def _arm(self) -> None:
        if self._armed or self.lost is not None:
            return
        if (self._pending and not self._ending) or self._inflight or self._life != self._presence.life:
            self._armed = True
            self._idle = False
            # Somebody may wait for the first token; the others come in a row anyway.
            patient = self._logged.seq > 0 or not self.channel.hurried
            self._sender.defer(Lazy(self._key, self._command, patient), self._settle)
        else:
            self._rest()

    def _rest(self) -> None:
        self._idle = True
        if self._flushed is not None:
            self._flushed.set()
            self._flushed = None

    def _command(self) -> Command:
        if self._life != self._presence.life:
            self._asked_life = self._presence.life
            return self._jobs.restoration(self._trail)
        if self._inflight is None:
            if self._ending:
                self._armed = False
                return NOTHING
            self._inflight = self._entry([])
        entry, data = self._inflight
        # NOMKSTREAM: an expired log must not come back without its time to live.
        return ("XADD", self._key, "NOMKSTREAM", str(entry.last), FIELD, data)

    def _entry(self, more: list[Payload]) -> tuple[Entry, bytes]:
        payloads = self._pending + more
        self._pending, self._pending_bytes = [], 0
        data = encode_payloads(payloads)
        return Entry(EventId(self.attempt, self._logged.seq + len(payloads)), payloads, len(data)), data

    def _settle(self, reply: Any, error: Exception | None) -> None:
        self._armed = False
        if self._asked_life is not None:
            self._restored(reply, error)
        elif reply is not None:
            self._acknowledged()
        elif error is None:
            self._lose(StoreUnavailable(f"The log of job {self.channel.job_id} is gone from the store."))
        elif isinstance(error, StoreError) and _REFUSED in error.message:
            self._refused()
        elif isinstance(error, StoreUnavailable):
            self._failed(error)
        else:
            self._lose(StoreUnavailable(str(error)))

    def _acknowledged(self) -> None:
        assert self._inflight is not None
        entry, data = self._inflight
        self._inflight = self._failing_since = None
        self._take(entry, data)
        self._arm()

    def _take(self, entry: Entry, data: bytes) -> None:
        previous, self._logged = self._logged, entry.last
        self._recent.keep(self._trail, previous, entry.last, data)
        self.channel.publish(entry, previous)

    def _restored(self, reply: Any, error: Exception | None) -> None:
        life, self._asked_life = self._asked_life, None
        if error is not None:
            self._failed(error)
        elif reply == b"fenced":
            self._lose(self._superseded())
        elif reply == b"hole" and self._presence.recovering:
            # Who wrote what stands before our part may be about to write it again.
            asyncio.get_running_loop().call_later(RETRY_S, self._arm)
        elif reply == b"hole":
            self._abandon()
        elif self._bridge is not None:
            self.channel.publish(self._bridge, self._logged)
            self._lose(StoreUnavailable(f"The store has lost a part of job {self.channel.job_id}."))
        else:
            assert life is not None
            self._life = life
            self._arm()

    def _abandon(self) -> None:
        """More is lost than was kept. The log says so, and another attempt begins anew."""
        payloads: list[Payload] = [Restart("the store lost a part of the answer")]
        data = encode_payloads(payloads)
        self._bridge = Entry(EventId(self.attempt, self._logged.seq + 1), payloads, len(data))
        self._pending, self._pending_bytes, self._inflight = [], 0, None
        self._recent.bridge(self._trail, self._bridge.last, data)
        self._arm()

    def _failed(self, error: Exception) -> None:
        loop = asyncio.get_running_loop()
        self._failing_since = self._failing_since or loop.time()
        if self.lost is not None or loop.time() - self._failing_since > self._outage_s:
            self._lose(error if isinstance(error, StoreUnavailable) else StoreUnavailable(str(error)))
        else:
            loop.call_later(RETRY_S, self._arm)

    def _refused(self) -> None:
        """The id is taken: by ourselves, if an earlier answer was lost, or by a newer attempt."""
        if self._failing_since is None or self._inflight is None:
            self._lose(self._superseded())
            return
        entry, data = self._inflight

        def compare(reply: Any, error: Exception | None) -> None:
            self._armed = False
            if error is not None:
                self._settle(None, error)
            elif reply and reply[0][1] == [FIELD, data]:
                self._acknowledged()
            else:
                self._lose(self._superseded())

        self._armed = True
        self._sender.defer(("XRANGE", self._key, str(entry.last), str(entry.last)), compare)

    def _superseded(self) -> Fenced:
        return Fenced(f"Attempt {self.attempt} of job {self.channel.job_id} was superseded.", code=SUPERSEDED)

    def _lose(self, error: Fenced | StoreUnavailable) -> None:
        if self.lost is None:
            self.lost = error
        self._pending, self._pending_bytes, self._inflight = [], 0, None
        self._rest()
        if self.on_lost is not None:
            self.on_lost(self.lost)


class _Again:
    """The end of an attempt's log, and its way back after a server has lost a part of it.

    Outlives the writer in :class:`Recent`, so of the answer it holds the trail only.
    """

    def __init__(self, sender: Sender, jobs: Jobs, presence: Presence, trail: Trail) -> None:
        self._sender = sender
        self._jobs = jobs
        self._presence = presence
        self._trail = trail

    async def write(self) -> Any:
        reply = await self._sender.call(*self._jobs.restoration(self._trail))
        if reply == b"hole" and self._presence.recovering:
            raise StoreUnavailable("What stands before the lost part is not back yet.")
        return reply

    async def close(self, entry: Entry, data: bytes) -> Literal["ok", "fenced", "behind"]:
        """Logs the terminal entry behind the last one of the trail and closes the record."""
        trail = self._trail
        return await self._jobs.finish(self._sender, trail.job.id, trail.attempt, entry, data, trail.logged)

    async def finish(self, entry: Entry, data: bytes) -> None:
        """Writes the log again, its end included."""
        reply = await self.write()
        if reply == b"ok":
            reply = await self.close(entry, data)
        if reply != "ok":
            logger.error("the store has lost the end of a job", extra={"job_id": self._trail.job.id})
