"""Traces of real jobs, on one replica and across two, and what is sent to a collector."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from llmstream.config import ServerSettings, Settings
from llmstream.errors import ConfigError
from llmstream.server import Server
from llmstream.telemetry.tracing import Tracing
from llmstream.types import GenerateRequest
from tests.api.reading import conversation, finished, submit
from tests.conftest import echo_settings
from tests.waiting import wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
CHAT = "/v1/chat/completions"


class Collected:
    """What one replica would send."""

    def __init__(self, server: Server) -> None:
        self._spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        traces = TracerProvider()
        traces.add_span_processor(SimpleSpanProcessor(self._spans))
        server.gateway.observer.tracing = Tracing(traces, MeterProvider([self._reader]))

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        return [span for span in self._spans.get_finished_spans() if name in (None, span.name)]

    def points(self) -> dict[str, list[Any]]:
        """Data points by metric."""
        found = self._reader.get_metrics_data()
        assert found is not None
        scopes = [scope for resource in found.resource_metrics for scope in resource.scope_metrics]
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def parents(spans: Sequence[ReadableSpan]) -> dict[str, str | None]:
    """Each span's parent by name; an id where the parent is none of these."""
    names = {span.context.span_id: span.name for span in spans if span.context}
    return {
        span.name: None if span.parent is None else names.get(span.parent.span_id, f"{span.parent.span_id:016x}")
        for span in spans
    }


async def test_a_request_is_one_trace(http: aiohttp.ClientSession, server: Server) -> None:
    """The caller's trace goes on with the request, and below it the submission, the wait and the attempt."""
    collected = Collected(server)
    body = conversation(echo={"tokens": 3}, temperature=0.5, max_tokens=64, session_id="talk")
    async with http.post(CHAT, json=body, headers=TRACEPARENT) as response:
        job_id = response.headers["x-job-id"]
        await response.read()
    await wait_until(lambda: len(collected.spans()) == 4)
    assert {trace_of(span) for span in collected.spans()} == {TRACE}
    request = f"POST {CHAT}"
    assert parents(collected.spans()) == {request: PARENT, "submit": request, "wait": request, "chat echo": request}
    (asked,) = collected.spans(request)
    assert asked.kind == SpanKind.SERVER
    assert asked.attributes is not None
    assert (asked.attributes["http.route"], asked.attributes["http.response.status_code"]) == (CHAT, 200)
    (attempt,) = collected.spans("chat echo")
    assert attempt.kind == SpanKind.CLIENT
    assert attempt.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "echo",
        "gen_ai.request.model": "echo",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.conversation.id": "talk",
        "llmstream.attempt": 1,
        "llmstream.job.id": job_id,
        "llmstream.outcome": "completed",
        "llmstream.replica": server.gateway.replica,
    }
    (wait,) = collected.spans("wait")
    assert wait.start_time
    assert wait.end_time
    assert attempt.start_time
    assert wait.start_time <= wait.end_time <= attempt.start_time + 1_000_000


async def test_the_trace_goes_on_on_another_replica(tmp_path: Path) -> None:
    """A job accepted by one replica and run by another one is one trace: the context travels with the job."""
    async with (
        Server(echo_settings(tmp_path, slots=1)) as first,
        Server(echo_settings(tmp_path / "2", slots=1, store={"url": first.gateway._store.url})) as second,
        aiohttp.ClientSession(first.url) as http,
    ):
        for _ in range(2):  # a slot that is taken on each; then the first accepts, and only the second gets free
            await submit(http, echo={"tokens": 1, "fault": "stall"})
        await wait_until(lambda: first.gateway._scheduler.running == second.gateway._scheduler.running == 1)
        here, there = Collected(first), Collected(second)
        async with http.post("/chat/async", json={"message": "go"}, headers=TRACEPARENT) as response:
            job_id = (await response.json())["task_id"]
        (stuck,) = second.gateway._scheduler.pools["echo"].running
        await second.gateway.cancel(stuck)
        state = await finished(first, job_id)
        assert state.replica == second.gateway.replica
        await wait_until(lambda: len(there.spans("chat echo")) == 2)
        mine = [*here.spans(), *(span for span in there.spans() if trace_of(span) == TRACE)]
        assert {span.name for span in here.spans()} == {"POST /chat/async", "submit"}
        assert {trace_of(span) for span in mine} == {TRACE}
        assert parents(mine) == {
            "POST /chat/async": PARENT,
            "submit": "POST /chat/async",
            "wait": "POST /chat/async",
            "chat echo": "POST /chat/async",
        }


async def test_a_job_without_a_request_is_one_trace(server: Server) -> None:
    """A job submitted by a program that has no trace begins one of its own."""
    collected = Collected(server)
    job = await server.gateway.submit(GenerateRequest.of("chat", "echo", conversation()))
    await finished(server, job.id)
    await wait_until(lambda: len(collected.spans()) == 4)
    assert parents(collected.spans()) == {"job": None, "submit": "job", "wait": "job", "chat echo": "job"}


async def test_a_failed_attempt_says_why(http: aiohttp.ClientSession, server: Server) -> None:
    """Each attempt has its span; one that failed bears the error's code and message, and the metrics its type."""
    collected = Collected(server)
    job = await submit(http, echo={"tokens": 3, "fault": "cut", "at": 2, "attempts": 1})
    await finished(server, job["task_id"])
    await wait_until(lambda: len(collected.spans("chat echo")) == 2)
    first, second = collected.spans("chat echo")
    assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert first.attributes is not None
    assert second.attributes is not None
    assert first.attributes["error.type"] == "upstream_broken"
    assert (first.attributes["llmstream.outcome"], second.attributes["llmstream.outcome"]) == ("retried", "completed")
    points = collected.points()
    durations = {
        point.attributes.get("error.type"): point.count for point in points["gen_ai.client.operation.duration"]
    }
    assert durations == {"upstream_broken": 1, None: 1}


async def test_the_metrics_of_the_conventions_are_recorded(http: aiohttp.ClientSession, server: Server) -> None:
    """Token usage, durations and times to the first token, under the conventions' names and attributes."""
    collected = Collected(server)
    for tokens in (3, 5):
        async with http.post(CHAT, json=conversation(echo={"tokens": tokens})) as response:
            await response.read()
    points = collected.points()
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "echo",
        "gen_ai.request.model": "echo",
    }
    used = {
        point.attributes["gen_ai.token.type"]: (point.count, point.sum) for point in points["gen_ai.client.token.usage"]
    }
    assert used == {"input": (2, 4), "output": (2, 8)}
    for name in (
        "gen_ai.client.operation.duration",
        "gen_ai.client.operation.time_to_first_chunk",
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
    ):
        (point,) = points[name]
        assert dict(point.attributes) == common
        assert point.count == 2
        assert point.sum > 0


async def test_nothing_that_was_said_goes_into_a_span(http: aiohttp.ClientSession, server: Server) -> None:
    """Neither prompt nor answer nor key."""
    collected = Collected(server)
    headers = {"Authorization": "Bearer hunter2-hunter2", "X-API-Key": "hunter2-hunter2"}
    async with http.post(CHAT, json=conversation("swordfish please"), headers=headers) as response:
        assert "swordfish" in await response.text()
    await wait_until(lambda: len(collected.spans()) == 4)
    told = " ".join(span.to_json() for span in collected.spans()) + str(collected.points())
    assert "swordfish" not in told
    assert "hunter2" not in told


async def test_a_collector_gets_traces_and_metrics(tmp_path: Path) -> None:
    """With ``telemetry.otlp_endpoint`` both arrive there over HTTP, at the latest when the server ends."""
    got: dict[str, list[bytes]] = {"/v1/traces": [], "/v1/metrics": []}

    async def take(request: web.Request) -> web.Response:
        body = await request.read()
        got[request.path].append(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        return web.Response()

    app = web.Application()
    app.add_routes([web.post(path, take) for path in got])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        named = ServerSettings(port=0, name="our service")
        settings = echo_settings(tmp_path, telemetry={"otlp_endpoint": endpoint}, server=named)
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
            async with http.post(CHAT, json=conversation(), headers=TRACEPARENT) as response:
                await response.read()
            replica = server.gateway.replica
    finally:
        await runner.cleanup()
    traces = [ExportTraceServiceRequest.FromString(body) for body in got["/v1/traces"]]
    resources = [resource for trace in traces for resource in trace.resource_spans]
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {f"POST {CHAT}", "submit", "wait", "chat echo"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    known = {each.key: each.value.string_value for each in resources[0].resource.attributes}
    assert (known["service.name"], known["service.instance.id"]) == ("our service", replica)
    metrics = [ExportMetricsServiceRequest.FromString(body) for body in got["/v1/metrics"]]
    names = {
        metric.name
        for request in metrics
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert "gen_ai.client.token.usage" in names


async def test_without_the_extra_the_setting_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector without OpenTelemetry is a configuration error, not a service that sends nothing."""
    monkeypatch.setitem(sys.modules, "llmstream.telemetry.otlp", None)
    settings = echo_settings(tmp_path, telemetry={"otlp_endpoint": "http://127.0.0.1:9"})
    with pytest.raises(ConfigError, match=r"pip install 'llmstream\[otel\]'"):
        async with Server(settings):
            pass


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://x", "http://user:hunter2@host:4318", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    """Only an HTTP URL without credentials will do."""
    with pytest.raises(ValueError, match="URL"):
        Settings.model_validate({"telemetry": {"otlp_endpoint": endpoint}})
