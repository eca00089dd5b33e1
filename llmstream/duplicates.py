"""A request that comes again is the same job: under the caller's own id, an Idempotency-Key, or as an SDK's retry."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from llmstream.errors import Conflict
from llmstream.store.repeats import digest
from llmstream.store.store import Store
from llmstream.types import Job, own_id

_VOID = frozenset({"failed", "cancelled"})
"""An SDK that tries again wants an answer, not the old error."""


class Identity(NamedTuple):
    """By what a request is known when it comes again."""

    fingerprint: str
    """Digest of the request as the caller sent it."""
    job_id: str | None = None
    """The caller's own id for the job; goes before the key."""
    key: str | None = None
    """``Idempotency-Key``."""
    retry: int | None = None
    """How often the caller's SDK has sent this request before; None: it does not say."""

    @property
    def named(self) -> bool:
        """Whether the job may exist already."""
        return self.job_id is not None or self.key is not None or bool(self.retry)

    def conflict(self) -> Conflict:
        """What to say when the name belongs to another request."""
        if self.job_id is not None:
            return Conflict(
                f"The job id {self.job_id!r} is taken by a different request; choose another id.", param="job_id"
            )
        return Conflict(
            f"The Idempotency-Key {self.key!r} was used with a different request; a new request needs a new key.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
            status=422,
        )


class Duplicates:
    """Finds the id under which a request is, or has to become, a job."""

    def __init__(self, store: Store, *, key_s: float, retry_window_s: float) -> None:
        self._store = store
        self._key_s = key_s
        self._window_s = retry_window_s

    async def identify(self, job: Job, identity: Identity | None) -> Job:
        """The job under the id that its request is known by; a first request keeps its new one and leaves a trace."""
        if identity is None:
            return job
        job = replace(job, fingerprint=digest(job.principal, identity.fingerprint))
        if identity.named:  # a name that seems free may be about to be written again
            await self._store.presence.recovered()
        if identity.job_id is not None:
            return replace(job, id=own_id(job.principal, identity.job_id))
        if identity.key is not None:
            name = digest("key", job.principal, identity.key)
            return replace(job, id=await self._store.repeats.point(name, job.id, self._key_s))
        if identity.retry is None or not self._window_s:
            return job
        name = digest("retry", job.fingerprint or "")
        if identity.retry == 0:
            self._store.repeats.note(name, job.id, self._window_s)
            return job
        return replace(job, id=await self._retried(name, job.id))

    async def _retried(self, name: str, new_id: str) -> str:
        found = await self._store.repeats.point(name, new_id, self._window_s)
        if found == new_id:
            return new_id
        state = await self._store.jobs.find(found)
        if state is None or state.status not in _VOID:
            return found
        return await self._store.repeats.point(name, new_id, self._window_s, instead_of=found)
