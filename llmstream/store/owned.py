"""Which jobs are whose: the latest ones of each principal, for its own lists."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from llmstream.store.connection import Arg
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Script, Sender
from llmstream.types import Job

OWNED_JOBS = 1000
"""A principal's list remembers so many."""
GATHER_S = 0.02
"""Jobs accepted within this time are noted together; other replicas list them so much later."""

_NOTE = Script(
    "note-owned",
    """
-- KEYS jobs; ARGV ttl_ms, jobs kept, then created at and id of each new job.
redis.call('ZADD', KEYS[1], unpack(ARGV, 3))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -ARGV[2] - 1)
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
""",
)

logger = logging.getLogger(__name__)


class Owned:
    """Lists of jobs by principal. A job that one lacks is all there, and can be read by its id."""

    def __init__(self, pipeline: Sender, keys: Keys, *, ttl_s: float) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._ttl_ms = int(ttl_s * 1000)
        self._new: dict[str, list[Arg]] = {}
        self._delay_s = 0.0
        """The longest time that one of these jobs sleeps before it begins."""
        self._flying: set[asyncio.Future[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def note(self, job: Job) -> None:
        """Notes a job as the latest of its principal; nobody waits for it."""
        self._new.setdefault(job.principal, []).extend((repr(job.created_at), job.id))
        self._delay_s = max(self._delay_s, job.delay_s)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self.flush)

    async def latest(self, principal: str, limit: int = OWNED_JOBS) -> list[str]:
        """Ids of a principal's jobs, latest first."""
        self.flush()
        if self._flying:
            await asyncio.wait(list(self._flying))
        found = await self._pipeline.call("ZRANGE", self._keys.owned(principal), 0, limit - 1, "REV")
        return [raw.decode() for raw in found]

    def flush(self) -> None:
        """Sends what was noted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        noted, self._new = self._new, {}
        ttl_ms, self._delay_s = self._ttl_ms + int(self._delay_s * 1000), 0.0
        for principal, jobs in noted.items():
            step = (ttl_ms, OWNED_JOBS, *jobs[-2 * OWNED_JOBS :])
            noting = self._pipeline.run(_NOTE, [self._keys.owned(principal)], *step)
            self._flying.add(noting)
            noting.add_done_callback(self._landed)

    def _landed(self, noting: asyncio.Future[Any]) -> None:
        self._flying.discard(noting)
        if not noting.cancelled() and (error := noting.exception()) is not None:
            logger.warning("jobs will be missing in their principal's list: %s", error)
