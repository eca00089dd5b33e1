"""Who reads a job, counted over all replicas, where that decides whether it goes on."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from llmstream.store.job_scripts import JOIN_READERS, LEAVE_READERS
from llmstream.store.keys import Keys
from llmstream.store.pipeline import Sender


class Lease(NamedTuple):
    """A reader's name, and for how long it counts without a further word: a replica may die with its readers."""

    reader: str
    seconds: float


NOBODY = "-"
"""The reader that a job may still expect; the first real one takes its place."""


class Readers:
    """The readers of each job, in the job's own hash slot."""

    def __init__(self, pipeline: Sender, keys: Keys) -> None:
        self._pipeline = pipeline
        self._keys = keys

    def join(self, job_id: str, lease: Lease) -> asyncio.Future[Any]:
        """Counts a reader from now on, or goes on counting it; the future tells when."""
        return self._pipeline.run(JOIN_READERS, self._slot(job_id), lease.reader, int(lease.seconds * 1000))

    async def leave(self, job_id: str, reader: str) -> int | None:
        """Counts a reader no more. When it was the last one: the time (ms) at which the job ends unless one comes."""
        due: bytes = await self._pipeline.run(LEAVE_READERS, self._slot(job_id), reader)
        return int(due) if due else None

    def _slot(self, job_id: str) -> list[str]:
        return [self._keys.job(job_id), self._keys.readers(job_id)]
