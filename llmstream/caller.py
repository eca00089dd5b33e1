"""The gateway as one principal may use it: what belongs to others does not exist."""

from __future__ import annotations

from typing import Any, Literal

from llmstream.config_webhooks import NOTHING_SIGNS
from llmstream.errors import NotFound
from llmstream.gateway import Gateway
from llmstream.selection import Cancelled, JobFilter, cancel_all
from llmstream.store.memory import in_memory
from llmstream.types import LOCAL, Job, JobState, ModelInfo, Principal, own_id


class Caller:
    """Every way from an id that a client sends to a job leads through here."""

    def __init__(self, gateway: Gateway, principal: Principal) -> None:
        self.principal = principal
        self._gateway = gateway

    async def job(self, job_id: str) -> JobState:
        """The record of a job of the principal's, also by the id that it chose. Raises NotFound, and Conflict for a
        memory job of another replica."""
        state = await self._find(job_id)
        if state is None and not in_memory(job_id):  # whose ids are never chosen
            state = await self._find(own_id(self.principal.id, job_id))
        if state is None:
            raise NotFound(
                f"There is no job {job_id!r} for this API key; it never existed, its retention time is over, or it "
                "belongs to somebody else."
            )
        return state

    async def latest_job(self, session_id: str) -> JobState:
        """The latest job of a session of the principal's. Raises NotFound."""
        try:
            return await self.job(await self._gateway.latest_job(session_id, self.principal.id))
        except NotFound:
            if self.principal.is_admin:
                raise
            raise NotFound(
                f"There is no session {session_id!r} for this API key; it never existed, its retention time is over, "
                "or it belongs to somebody else."
            ) from None

    async def cancel(self, job_id: str) -> JobState:
        """Ends a job of the principal's; see :meth:`Gateway.cancel`."""
        return await self._gateway.cancel(await self._own(job_id))

    async def cancel_all(self, wanted: JobFilter, limit: int) -> Cancelled:
        """Ends those of the principal's jobs that fit; everybody's for an admin. Others' jobs do not exist."""
        if not self.principal.is_admin:
            if wanted.principal not in (None, self.principal.id):
                return Cancelled([], more=False)
            wanted = wanted._replace(principal=self.principal.id)
        return await cancel_all(self._gateway, wanted, limit)

    async def requeue(self, job_id: str) -> Job:
        """Runs a job of the principal's once more; see :meth:`Gateway.requeue`."""
        return await self._gateway.requeue(await self._own(job_id), self.principal)

    async def recent(self, limit: int) -> list[JobState]:
        """The principal's latest jobs, newest first; everybody's for an admin."""
        return await self._gateway.recent(limit, self._whose)

    async def dead(self, limit: int) -> list[JobState]:
        """The principal's jobs that failed after all their attempts, latest first; everybody's for an admin."""
        return await self._gateway.dead(limit, self._whose)

    async def deliveries(self, kind: Literal["waiting", "dead"], limit: int) -> list[dict[str, Any]]:
        """Events to the URLs that the principal's requests named; everybody's, and those to the receivers of the
        configuration, for an admin."""
        webhooks = self._gateway.webhooks
        return [] if webhooks is None else await webhooks.deliveries(kind, limit, self._whose)

    async def send_again(self, job_id: str) -> tuple[str, list[str]]:
        """Sends the event of a job's end once more; an admin's call to all receivers. Raises NotFound, Conflict."""
        state = await self.job(job_id)
        if self._gateway.webhooks is None:
            raise NotFound(NOTHING_SIGNS)
        names = await self._gateway.webhooks.send_again(state, all_receivers=self.principal.is_admin)
        return state.job.id, names

    def webhook_secrets(self) -> list[str]:
        """What verifies the events of the principal's jobs. Raises NotFound."""
        if self._gateway.webhooks is None:
            raise NotFound(NOTHING_SIGNS)
        return self._gateway.webhooks.secrets(self.principal)

    @property
    def models(self) -> list[ModelInfo]:
        """What the principal can ask for by name."""
        return [model for model in self._gateway.models if self.principal.may_use(model.name)]

    @property
    def _whose(self) -> str | None:
        return None if self.principal.is_admin else self.principal.id

    async def _own(self, job_id: str) -> str:
        if self.principal.is_admin and self.principal.id == LOCAL:
            return job_id  # spares a look into the store, where there is nothing to find out
        return (await self.job(job_id)).job.id

    async def _find(self, job_id: str) -> JobState | None:
        try:
            state = await self._gateway.job(job_id)
        except NotFound:
            if self.principal.is_admin and self.principal.id == LOCAL:
                raise
            return None
        return state if self.principal.owns(state.job) else None
