"""Sees what the service does and says it in metrics and, where they are asked for, in traces.

The parts tell the observer what happened; what is counted, and under which labels, is decided here. Labels come from
the configuration or from fixed sets: nothing that a client sends becomes one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from llmstream.config import TelemetrySettings
from llmstream.errors import ConfigError, LLMStreamError
from llmstream.telemetry.metrics import Metrics
from llmstream.telemetry.process import resident_bytes
from llmstream.telemetry.snapshot import Snapshot
from llmstream.types import Job, Usage

if TYPE_CHECKING:
    from llmstream.telemetry.tracing import Tracing

OTHER = "other"
"""Stands for every model that is not configured by name, and for every method that HTTP does not know."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OUTCOMES = frozenset(
    {"completed", "incomplete", "failed", "cancelled", "retried", "handed_over", "superseded", "interrupted"}
)
"""How an attempt ends."""


class Produced(Protocol):
    """What an attempt brought."""

    chunks: int
    usage: Usage | None
    reasons: dict[int, str]


class Observer:
    """The one of a replica. Cheap enough to be asked about everything."""

    def __init__(self, models: Collection[str] = (), tracing: Tracing | None = None) -> None:
        self.metrics = Metrics()
        self.tracing = tracing
        self.before_scrape: list[Callable[[], Awaitable[None]]] = []
        """Called before the values are read; must not raise, and not take long."""
        self.gather: Callable[[], Awaitable[list[Snapshot]]] = self._own
        """Brings the snapshots of all processes behind this port."""
        self._models = {name: name for name in models}
        self.metrics.processes.source = lambda: {(): 1}
        self.metrics.memory.source = lambda: {(): resident_bytes()}
        self._cpu = 0.0

    def model(self, name: str) -> str:
        """The label of a model."""
        return self._models.get(name, OTHER)

    async def snapshot(self) -> Snapshot:
        """What this process has counted."""
        for refresh in self.before_scrape:
            await refresh()
        return self.counted()

    def counted(self) -> Snapshot:
        """Like :meth:`snapshot`, with what the store said last."""
        before, self._cpu = self._cpu, time.process_time()
        self.metrics.cpu.add(by=self._cpu - before)
        return self.metrics.snapshot()

    def requested(
        self, method: str, endpoint: str, status: int, seconds: float, upstream_s: float | None = None
    ) -> None:
        """A request is answered, or its client has left; ``upstream_s`` where it waited for a provider that long."""
        metrics = self.metrics
        method = method if method in _METHODS else OTHER
        metrics.http_requests.add(method, endpoint, str(status))
        metrics.http_seconds.of(method, endpoint).add(seconds)
        # A repeated request may have come to an answer that was half-way.
        if upstream_s is not None and seconds >= upstream_s:
            metrics.overhead.of().add(seconds - upstream_s)

    def traceparent(self) -> str | None:
        """What a job keeps, so that whoever runs it goes on with the trace."""
        return None if self.tracing is None else self.tracing.traceparent()

    def accepted(self, job: Job) -> None:
        """A job is on record and in line."""
        self.metrics.jobs.add(job.pool, job.lane)
        if self.tracing is not None:
            self.tracing.submitted(job)

    def begun(self, job: Job, number: int, replica: str, at: float, *, again: bool) -> Attempt:
        """Attempt ``number`` of a job begins at ``at`` seconds since the epoch; ``again`` where this replica made the
        one before."""
        if number == 1:
            self.metrics.queue_wait.of(job.pool, job.lane).add(max(0.0, at - job.created_at - job.delay_s))
            if self.tracing is not None:
                self.tracing.waited(job, at)
        elif not again:
            self.metrics.takeovers.add(job.pool)
        return Attempt(self, job, number, replica, at)

    async def _own(self) -> list[Snapshot]:
        return [await self.snapshot()]


@asynccontextmanager
async def open_tracing(settings: TelemetrySettings, replica: str, service: str) -> AsyncIterator[Tracing | None]:
    """What sends traces, where they are asked for. Raises ConfigError without the extra ``otel``."""
    if settings.otlp_endpoint is None:
        yield None
        return
    try:
        from llmstream.telemetry.otlp import exporting
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"telemetry.otlp_endpoint needs OpenTelemetry ({error.name} is missing): pip install 'llmstream[otel]'."
        ) from None
    async with exporting(settings.otlp_endpoint, replica, service) as tracing:
        yield tracing


class Attempt:
    """One execution of a job as it is seen from outside."""

    __slots__ = (
        "_gaps",
        "_model",
        "_observer",
        "_over",
        "at",
        "earlier_tokens",
        "first_token_at",
        "fresh",
        "job",
        "number",
        "provider",
        "replica",
    )

    def __init__(self, observer: Observer, job: Job, number: int, replica: str, at: float) -> None:
        self.job = job
        self.number = number
        self.replica = replica
        self.at = at
        self.provider = "none"
        """Whom it was asked of."""
        self.first_token_at: float | None = None
        self.fresh = True
        """Whether no earlier attempt brought a token."""
        self.earlier_tokens = 0
        """Of the answer's tokens, those of earlier attempts."""
        self._observer = observer
        self._over = False
        self._model = observer.model(job.request.model)
        self._gaps = observer.metrics.gaps.of(self._model)

    def got_token(self) -> None:
        """The first token is here."""
        self.first_token_at = time.time()
        if self.fresh:
            waited = max(0.0, self.first_token_at - self.job.created_at - self.job.delay_s)
            self._observer.metrics.first_token.of(self._model).add(waited)

    def gap(self, seconds: float) -> None:
        """So long no token came."""
        self._gaps.add(seconds)

    def end(self, outcome: str, produced: Produced | None = None, error: LLMStreamError | None = None) -> None:
        """The attempt is over; the first call says how, with one of ``OUTCOMES``."""
        if self._over:
            return
        self._over = True
        metrics = self._observer.metrics
        metrics.attempts.add(self._model, self.provider, outcome)
        if produced is not None:
            usage = produced.usage
            tokens = produced.chunks if usage is None else usage.completion_tokens - self.earlier_tokens
            metrics.tokens.add(self._model, by=max(0, tokens))
            if usage is not None:
                metrics.prompt_tokens.add(self._model, by=usage.prompt_tokens)
        if self._observer.tracing is not None:
            self._observer.tracing.attempted(self, outcome, produced, error)
