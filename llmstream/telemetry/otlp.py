"""Sends traces and metrics to an OTLP collector, in the background. What it imports is the extra ``otel``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from llmstream.telemetry.tracing import Tracing


@asynccontextmanager
async def exporting(endpoint: str, replica: str, service: str) -> AsyncIterator[Tracing]:
    """Sends to ``endpoint``; what is left goes out at the end, or is lost after the exporters' own deadlines."""
    root, resource = endpoint.rstrip("/"), _resource(replica, service)
    traces = TracerProvider(resource=resource, shutdown_on_exit=False)
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{root}/v1/traces")))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{root}/v1/metrics"))
    metrics = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    try:
        yield Tracing(traces, metrics)
    finally:
        await asyncio.gather(*map(asyncio.to_thread, (traces.shutdown, metrics.shutdown)))


def _resource(replica: str, service: str) -> Resource:
    """Who we are; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` may say it otherwise."""
    said = Resource.create({"service.instance.id": replica})
    named = not str(said.attributes[SERVICE_NAME]).startswith("unknown_service")
    return said if named else said.merge(Resource({SERVICE_NAME: service}))
