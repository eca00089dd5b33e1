"""An equal request may get an answer that is there already. A cached answer is the log of the job that gave it."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from llmstream.config_routes import CacheSettings
from llmstream.duplicates import Reserved
from llmstream.store.cache import ANY
from llmstream.store.repeats import digest
from llmstream.store.store import Store
from llmstream.types import GenerateRequest, JobState, Principal, new_id

READING = frozenset({"stream", "stream_options", "encoding_format"})
"""Fields that say how an answer is read and not what it is."""
EVERYBODY = "*"
TRIES = 3


class Found(NamedTuple):
    """What the cache knows of a request."""

    hit: JobState | None = None
    """The job that has answered it."""
    reserved: Reserved | None = None
    """The id under which it has to become a job, or is one that runs."""


class Cache:
    """Finds the job that has answered an equal request, or is about to."""

    def __init__(self, store: Store, settings: CacheSettings, retention_s: float) -> None:
        self._store = store
        self._settings = settings
        self._ttl_s = min(settings.ttl_seconds, retention_s)

    async def look(self, request: GenerateRequest, principal: Principal, *, refresh: bool = False) -> Found:
        """Finds an answer, or reserves a place for the one to come; ``refresh`` wants a new one whatever is there."""
        owner, name, mine = self._owner(principal), _name(request), new_id()
        instead_of, share = ANY if refresh else "", self._settings.share_in_flight
        for _ in range(TRIES):
            held = await self._store.cache.point(
                owner, name, mine, ttl_s=self._ttl_s, size=self._settings.size, instead_of=instead_of
            )
            if held == mine:
                self._store.cache.count(owner, "misses")
                return Found(reserved=Reserved(mine, name if share else None))
            state = await self._store.jobs.find(held)
            if state is not None and _answered(state):
                self._store.cache.count(owner, "hits")
                return Found(hit=state)
            coming = state is None or not state.done
            if coming and share:
                self._store.cache.count(owner, "shared")
                return Found(reserved=Reserved(held, name))
            if state is not None and not state.done:
                break
            instead_of = held
        self._store.cache.count(owner, "misses")
        return Found()

    async def describe(self, principal: Principal) -> dict[str, Any]:
        """The cache as its owner sees it."""
        settings = self._settings
        about: dict[str, Any] = {"enabled": settings.enabled, "max_size": settings.size, "ttl_seconds": self._ttl_s}
        if not settings.enabled:
            return about
        entries, counts = await self._store.cache.statistics(self._owner(principal))
        looks = counts["hits"] + counts["misses"] + counts["shared"]
        return {**about, "size": entries, **counts, "hit_rate": round(counts["hits"] / looks, 4) if looks else 0.0}

    def _owner(self, principal: Principal) -> str:
        return EVERYBODY if self._settings.shared else principal.id


def _answered(state: JobState) -> bool:
    """Whether asking again could give no better answer: one that reached its own limit would again."""
    return state.status == "completed" or (state.status == "incomplete" and state.reason == "length")


def _name(request: GenerateRequest) -> str:
    asked = {name: value for name, value in request.body.items() if name not in READING}
    body = msgspec.json.encode(asked, order="deterministic").decode()
    return digest(request.kind, request.model, request.provider or "", body)
