"""The one who may append to a job's log: a single attempt of a single replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from llmstream.errors import Fenced, StoreError, StoreUnavailable
from llmstream.store.channel import Channel
from llmstream.store.entry import FIELD, Entry, encode_payloads
from llmstream.store.jobs import Jobs
from llmstream.store.pipeline import Command, Pipeline
from llmstream.types import EventId, Finished, Payload

CONGESTED_BYTES = 256 * 1024
"""What may wait for the store before the model is asked to wait."""
RETRY_S = 0.1
_REFUSED = "equal or smaller"


class Writer:
    """Appends events in order; each becomes visible only after the store has acknowledged it.

    Everything that gathers while an append is under way travels in the next entry. When the store is away the same
    entry is sent again under the same id until ``outage_s`` has passed. When the store refuses the id, a newer attempt
    owns the log: ``on_lost`` is called with Fenced and nothing more is written.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        key: str,
        channel: Channel,
        jobs: Jobs,
        attempt: int,
        *,
        outage_s: float,
        on_close: Callable[[Channel], None],
    ) -> None:
        self.attempt = attempt
        self.lost: Fenced | StoreUnavailable | None = None
        self.on_lost: Callable[[Fenced | StoreUnavailable], None] | None = None
        self._pipeline = pipeline
        self._key = key
        self._channel = channel
        self._jobs = jobs
        self._outage_s = outage_s
        self._on_close = on_close
        self._logged = EventId(attempt, 0)
        self._pending: list[Payload] = []
        self._pending_bytes = 0
        self._inflight: tuple[Entry, bytes] | None = None
        self._armed = False
        self._failing_since: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def congested(self) -> bool:
        """True while more waits for the store than should be held in memory."""
        return self._pending_bytes > CONGESTED_BYTES

    def append(self, payload: Payload, size: int) -> None:
        """Queues one event of about ``size`` bytes. Raises what made the writer lose the log."""
        if self.lost is not None:
            raise self.lost
        self._pending.append(payload)
        self._pending_bytes += size
        self._arm()

    async def flush(self) -> None:
        """Waits until everything appended so far is acknowledged. Raises Fenced or StoreUnavailable."""
        await self._idle.wait()
        if self.lost is not None:
            raise self.lost

    async def finish(self, finished: Finished) -> None:
        """Logs the terminal event together with what is pending and closes the job's record.

        Raises Fenced when the job moved on, StoreUnavailable when the store stays away.
        """
        await self.flush()
        entry, data = self._entry([finished])
        if not await self._jobs.finish(self._channel.job_id, self.attempt, entry, data):
            raise self._superseded()
        self._publish(entry)

    def close(self) -> None:
        """Gives the log up; what is not acknowledged by now is not written again."""
        self.on_lost = None
        if self.lost is None:
            self.lost = Fenced("The writer is closed.")
        self._on_close(self._channel)

    def _arm(self) -> None:
        if not self._armed and self.lost is None and (self._pending or self._inflight):
            self._armed = True
            self._idle.clear()
            self._pipeline.defer(self._command, self._settle)

    def _command(self) -> Command:
        if self._inflight is None:
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
        if error is None and reply is None:
            self._lose(StoreUnavailable(f"The log of job {self._channel.job_id} is gone from the store."))
        elif error is None:
            self._acknowledged()
        elif isinstance(error, StoreError) and _REFUSED in error.message:
            self._refused()
        elif isinstance(error, StoreUnavailable):
            self._failed(error)
        else:
            self._lose(StoreUnavailable(str(error)))

    def _acknowledged(self) -> None:
        assert self._inflight is not None
        entry, _ = self._inflight
        self._inflight, self._failing_since = None, None
        self._publish(entry)
        if self._pending and self.lost is None:
            self._arm()
        else:
            self._idle.set()

    def _publish(self, entry: Entry) -> None:
        previous, self._logged = self._logged, entry.last
        self._channel.publish(entry, previous)

    def _failed(self, error: StoreUnavailable) -> None:
        loop = asyncio.get_running_loop()
        self._failing_since = self._failing_since or loop.time()
        if self.lost is not None or loop.time() - self._failing_since > self._outage_s:
            self._lose(error)
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
        self._pipeline.defer(("XRANGE", self._key, str(entry.last), str(entry.last)), compare)

    def _superseded(self) -> Fenced:
        return Fenced(f"Attempt {self.attempt} of job {self._channel.job_id} was superseded.")

    def _lose(self, error: Fenced | StoreUnavailable) -> None:
        if self.lost is None:
            self.lost = error
        self._pending, self._pending_bytes, self._inflight = [], 0, None
        self._idle.set()
        if self.on_lost is not None:
            self.on_lost(self.lost)
