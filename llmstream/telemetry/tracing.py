"""OpenTelemetry: a job's spans and the GenAI metrics. Imported only where they are asked for (extra ``otel``).

A trace goes from the request over the submission to every attempt, on whichever replica that is: the job keeps the
context. Where to, how often and under which name is said by the standard ``OTEL_*`` variables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import context, trace
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llmstream.errors import LLMStreamError
from llmstream.types import GenerateRequest, Job

if TYPE_CHECKING:
    from llmstream.telemetry.observer import Attempt, Produced

_NS = 1_000_000_000
_NAME = "llmstream"
_OPERATIONS = {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}
_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKENS = tuple(4**power for power in range(14))
_PARAMETERS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "seed": "gen_ai.request.seed",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
}

Attributes = dict[str, Any]


class Tracing:
    """Writes spans and the GenAI metrics through the given providers."""

    def __init__(self, traces: TracerProvider, metrics: MeterProvider) -> None:
        self._tracer = traces.get_tracer(_NAME)
        self._propagator = TraceContextTextMapPropagator()
        meter = metrics.get_meter(_NAME)
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "Duration of an attempt",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._first_chunk = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "From the start of an attempt to its first tokens",
            explicit_bucket_boundaries_advisory=_FIRST_S,
        )
        self._usage = meter.create_histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens of a job", explicit_bucket_boundaries_advisory=_TOKENS
        )
        self._first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "From a job's acceptance to its first token",
            explicit_bucket_boundaries_advisory=_FIRST_S,
        )
        self._served = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "From a job's acceptance to its end",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )

    @contextmanager
    def request(self, method: str, route: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """The span of an HTTP request, below the one that its ``traceparent`` names; the current one meanwhile."""
        parent = self._propagator.extract({name.lower(): value for name, value in headers.items()})
        attributes = {"http.request.method": method, "http.route": route}
        span = self._tracer.start_span(f"{method} {route}", parent, SpanKind.SERVER, attributes)
        token = context.attach(trace.set_span_in_context(span, parent))
        try:
            yield span
        finally:
            context.detach(token)
            span.end()

    @staticmethod
    def answered(span: Span, status: int) -> None:
        """Says how a request ended."""
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", str(status))

    def traceparent(self) -> str:
        """The current context as a job keeps it; without one a new trace begins."""
        here = context.get_current()
        if not trace.get_current_span(here).get_span_context().is_valid:
            root = self._tracer.start_span("job")
            root.end()
            here = trace.set_span_in_context(root)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, here)
        return carrier["traceparent"]

    def submitted(self, job: Job) -> None:
        """A job was accepted."""
        self._span("submit", job, job.created_at, time.time(), SpanKind.PRODUCER, {"llmstream.lane": job.lane})

    def waited(self, job: Job, until: float) -> None:
        """A job's first attempt begins."""
        self._span("wait", job, job.created_at, until, SpanKind.CONSUMER, {"llmstream.lane": job.lane})

    def attempted(
        self, attempt: Attempt, outcome: str, produced: Produced | None, error: LLMStreamError | None
    ) -> None:
        """An attempt is over."""
        job, now = attempt.job, time.time()
        common = _common(attempt, error)
        span: Attributes = {
            **common,
            **_asked(job.request),
            "llmstream.attempt": attempt.number,
            "llmstream.outcome": outcome,
            "llmstream.replica": attempt.replica,
        }
        if produced is not None and produced.reasons:
            span["gen_ai.response.finish_reasons"] = [produced.reasons[index] for index in sorted(produced.reasons)]
        usage = produced.usage if produced is not None else None
        if usage is not None:
            for kind, tokens in (("input", usage.prompt_tokens), ("output", usage.completion_tokens)):
                span[f"gen_ai.usage.{kind}_tokens"] = tokens
                self._usage.record(tokens, {**common, "gen_ai.token.type": kind})
        name = f"{common['gen_ai.operation.name']} {job.request.model}"
        self._span(name, job, attempt.at, now, SpanKind.CLIENT, span, error)
        self._duration.record(max(0.0, now - attempt.at), common)
        if attempt.first_token_at is not None:
            self._first_chunk.record(max(0.0, attempt.first_token_at - attempt.at), common)
            if attempt.fresh:
                self._first_token.record(max(0.0, attempt.first_token_at - job.created_at - job.delay_s), common)
        if outcome in {"completed", "incomplete", "failed", "cancelled"}:
            self._served.record(max(0.0, now - job.created_at - job.delay_s), common)

    def _span(
        self,
        name: str,
        job: Job,
        start: float,
        end: float,
        kind: SpanKind,
        attributes: Attributes,
        error: LLMStreamError | None = None,
    ) -> None:
        parent = self._propagator.extract(
            {"traceparent": job.traceparent} if job.traceparent else {}, context.Context()
        )
        attributes["llmstream.job.id"] = job.id
        if job.session_id is not None:
            attributes["gen_ai.conversation.id"] = job.session_id
        span = self._tracer.start_span(name, parent, kind, attributes, start_time=int(start * _NS))
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error.message))
        span.end(max(int(start * _NS), int(end * _NS)))


def _common(attempt: Attempt, error: LLMStreamError | None) -> Attributes:
    request = attempt.job.request
    attributes: Attributes = {
        "gen_ai.operation.name": _OPERATIONS.get(request.kind, request.kind),
        "gen_ai.provider.name": attempt.provider,
        "gen_ai.request.model": request.model,
    }
    if error is not None:
        attributes["error.type"] = error.error_code or error.type
    return attributes


def _asked(request: GenerateRequest) -> Attributes:
    """The request's parameters. Neither prompt nor answer ever goes into a span."""
    attributes: Attributes = {
        attribute: request.body[field]
        for field, attribute in _PARAMETERS.items()
        if request.body.get(field) is not None
    }
    if request.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = request.max_tokens
    if request.choices > 1:
        attributes["gen_ai.request.choice.count"] = request.choices
    return attributes
