"""``/metrics``: each figure against jobs whose numbers are known."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import ModelSettings, ProviderSettings
from llmstream.server import Server
from llmstream.telemetry.metrics import Metrics
from llmstream.types import Started
from tests.api.reading import conversation, finished, read_some, submit
from tests.conftest import echo_settings
from tests.scrape import Scrape, scrape
from tests.sse import Parser
from tests.upstream import Upstream
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"


async def ask(http: aiohttp.ClientSession, tokens: int, **more: Any) -> bytes:
    async with http.post(CHAT, json=conversation(echo={"tokens": tokens}, **more)) as response:
        return await response.read()


async def test_every_metric_is_there_from_the_start(http: aiohttp.ClientSession) -> None:
    """The first scrape names every metric, so that dashboards and alerts find what they ask for."""
    found = await scrape(http)
    for metric in Metrics():
        assert f"# TYPE {metric.name} {metric.kind}\n" in found.text


async def test_requests_jobs_tokens_and_times_are_counted(http: aiohttp.ClientSession) -> None:
    """Three answers, streamed and whole, move exactly the figures that they should, by exactly their numbers."""
    for count, stream, priority in ((17, True, 10), (1, True, 0), (4, False, 0)):
        answer = await ask(http, count, stream=stream, priority=priority)
    prompt = json.loads(answer)["usage"]["prompt_tokens"]
    found = await scrape(http)
    here = {"method": "POST", "endpoint": CHAT}
    assert found.value("http_requests_total", **here, status="200") == 3
    assert found.value("http_request_duration_seconds_count", **here) == 3
    assert found.value("tokens_generated_total", model="echo") == 22
    assert found.value("llmstream_prompt_tokens_total", model="echo") == 3 * prompt
    assert found.value("llmstream_jobs_total", pool="echo", lane="high") == 1
    assert found.value("llmstream_jobs_total", pool="echo", lane="default") == 2
    assert found.value("llmstream_queue_wait_seconds_count", pool="echo", lane="high") == 1
    assert found.value("llmstream_queue_wait_seconds_count", pool="echo", lane="default") == 2
    assert found.value("llmstream_time_to_first_token_seconds_count", model="echo") == 3
    assert found.value("llmstream_overhead_seconds_count") == 3
    completed = {"model": "echo", "provider": "echo", "outcome": "completed"}
    assert found.value("llmstream_attempts_total", **completed) == found.total("llmstream_attempts_total") == 3
    assert found.value("llmstream_inter_token_seconds_count", model="echo") > 0
    assert found.value("process_cpu_seconds_total") > 0
    assert found.value("process_resident_memory_bytes") > 10_000_000
    assert found.value("llmstream_processes") == 1


async def test_the_times_are_the_right_ones(http: aiohttp.ClientSession) -> None:
    """With a pause of 50 ms before each of ten tokens, the first token and the gaps take about that, and the overhead
    holds none of it."""
    await ask(http, 10, stream=True)
    before = await scrape(http)
    async with http.post(CHAT, json=conversation(stream=True, echo={"tokens": 10, "delay_ms": 50})) as response:
        await response.read()
    after = await scrape(http)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert 0.05 <= grown("llmstream_time_to_first_token_seconds_sum", model="echo") < 0.5
    gaps = grown("llmstream_inter_token_seconds_count", model="echo")
    assert gaps == 2  # the first and the ninth arrival behind the first
    assert 0.045 <= grown("llmstream_inter_token_seconds_sum", model="echo") / gaps < 0.3
    request_s = grown("http_request_duration_seconds_sum", method="POST", endpoint=CHAT)
    overhead_s = grown("llmstream_overhead_seconds_sum")
    assert request_s >= 0.5
    assert 0 < overhead_s <= request_s - 0.5


async def test_what_runs_and_waits_is_shown(tmp_path: Path) -> None:
    """Running and waiting jobs by pool and lane, open streams, and the three gauges that inference gateways read."""
    async with Server(echo_settings(tmp_path, slots=2)) as server, aiohttp.ClientSession(server.url) as http:
        stuck = {"echo": {"tokens": 1, "fault": "stall"}}
        for _ in range(2):
            await submit(http, **stuck)
        await wait_until(lambda: server.gateway._scheduler.running == 2)
        jobs = [await submit(http, priority=priority, **stuck) for priority in (10, -10, -10)]
        async with http.get(jobs[0]["stream_url"]):
            found = await scrape(http)
        assert found.value("llmstream_jobs_running", pool="echo") == 2
        assert found.value("llmstream_slots", pool="echo") == 2
        waiting = [found.value("llmstream_jobs_waiting", pool="echo", lane=lane) for lane in ("high", "default", "low")]
        assert waiting == [1, 0, 2]
        assert found.value("llmstream_subscribers") == 1
        assert found.value("vllm:num_requests_running") == 2
        assert found.value("vllm:num_requests_waiting") == 3
        assert found.value("vllm:kv_cache_usage_perc") == 1
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            assert sum(known == name for known, _ in found.samples) == 1, "gateways expect one series"
        assert found.value("llmstream_store_up") == 1
        await submit(http, durability="memory", **stuck)
        assert (await scrape(http)).value("llmstream_memory_jobs_waiting", pool="echo") == 1


async def test_the_lag_of_the_event_loop_is_measured(http: aiohttp.ClientSession) -> None:
    """Every heartbeat looks how late it is."""

    async def measured() -> bool:
        return (await scrape(http)).value("llmstream_event_loop_lag_seconds_count") > 0

    await wait_until(measured)


@pytest.mark.parametrize(
    ("echo", "outcome"),
    [
        ({"tokens": 3, "fault": "reject"}, {"failed": 1}),
        ({"tokens": 3, "fault": "cut", "at": 2, "attempts": 1}, {"retried": 1, "completed": 1}),
    ],
)
async def test_attempts_are_counted_by_outcome(
    http: aiohttp.ClientSession, server: Server, echo: dict[str, object], outcome: dict[str, int]
) -> None:
    """Each attempt counts once, under the way it ended; a retry is none of the takeovers."""
    job = await submit(http, echo=echo)
    await finished(server, job["task_id"])
    await wait_until(lambda: server.gateway._scheduler.running == 0)
    found = await scrape(http)
    for name, count in outcome.items():
        labels = {"model": "echo", "provider": "echo", "outcome": name}
        assert found.value("llmstream_attempts_total", **labels) == count
    assert found.total("llmstream_attempts_total") == sum(outcome.values())
    assert found.total("llmstream_takeovers_total") == 0


@pytest.mark.parametrize(("at", "attempt"), [(0, "second"), (2, "first")])
async def test_the_first_token_is_counted_once(
    http: aiohttp.ClientSession, server: Server, at: int, attempt: str
) -> None:
    """Whichever attempt brings it, a job has one first token, which came when a client could first see one."""
    job = await submit(http, echo={"tokens": 3, "fault": "cut", "at": at, "attempts": 1})
    await finished(server, job["task_id"])
    found = await scrape(http)
    assert found.value("llmstream_time_to_first_token_seconds_count", model="echo") == 1
    state = await server.gateway.job(job["task_id"])
    log = [event async for event in server.gateway._store.log.events(job["task_id"])]
    second_at = next(event.data.at for event in log if isinstance(event.data, Started) and event.id.attempt == 2)
    waited_s = found.value("llmstream_time_to_first_token_seconds_sum", model="echo")
    assert (waited_s > second_at - state.job.created_at) == (attempt == "second")


async def test_a_job_that_is_handed_over_is_no_failure(tmp_path: Path) -> None:
    """A replica that shuts down counts the attempts that others go on with as handed over."""
    async with Server(echo_settings(tmp_path)) as server, aiohttp.ClientSession(server.url) as http:
        job = await submit(http, echo={"tokens": 300, "delay_ms": 10})
        await wait_until(lambda: _tokens_logged(server, job["task_id"], 1))
        observer = server.gateway.observer
    ended = {series.labels: series.value for series in observer.metrics.attempts.read()}
    assert ended == {("echo", "echo", "handed_over"): 1}


async def test_a_cancelled_job_counts_what_it_generated(http: aiohttp.ClientSession, server: Server) -> None:
    """A job that is cancelled half-way ends one attempt as cancelled, with the tokens that came until then."""
    job = await submit(http, echo={"tokens": 5, "fault": "stall", "at": 3})
    await wait_until(lambda: _tokens_logged(server, job["task_id"], 3))
    async with http.post(f"/chat/{job['task_id']}/cancel"):
        pass
    await wait_until(lambda: server.gateway._scheduler.running == 0)
    found = await scrape(http)
    assert found.value("llmstream_attempts_total", model="echo", provider="echo", outcome="cancelled") == 1
    assert found.value("tokens_generated_total", model="echo") == 3


async def _tokens_logged(server: Server, job_id: str, count: int) -> bool:
    return len((await server.gateway.transcript(job_id)).tokens) >= count


async def test_resumes_are_counted_by_protocol(http: aiohttp.ClientSession) -> None:
    """Who comes back and reads on counts, under the protocol it speaks; who reads from the beginning does not."""
    job = await submit(http, session_id="s", echo={"tokens": 30})
    async with http.get("/stream/s") as response:
        frames, _ = await read_some(response, Parser(), 400)
    for _ in range(2):
        async with http.get("/stream/s", headers={"Last-Event-ID": frames[-1].id or ""}) as response:
            await response.read()
    async with http.get(f"{CHAT}/{job['task_id']}?stream=true&starting_after={frames[-1].id}") as response:
        await response.read()
    found = await scrape(http)
    assert found.value("llmstream_resumes_total", protocol="event-stream") == 2
    assert found.value("llmstream_resumes_total", protocol="openai") == 1
    assert found.total("llmstream_resumes_total") == 3


async def test_takeovers_and_fenced_writes_are_counted(tmp_path: Path) -> None:
    """A replica whose job was taken from it finds its next write refused; the other one counts a takeover."""
    async with Server(echo_settings(tmp_path, slots=1)) as old:
        settings = echo_settings(tmp_path / "new", store={"url": old.gateway._store.url})
        async with aiohttp.ClientSession(old.url) as http:
            job = await submit(http, echo={"tokens": 300, "delay_ms": 10})
            await wait_until(lambda: _tokens_logged(old, job["task_id"], 1))
            async with Server(settings) as new, aiohttp.ClientSession(new.url) as other:
                # What happens to the claims of a replica that is silent for too long.
                await old.gateway._scheduler.pools["echo"].lanes.leave(old.gateway.replica)
                await wait_until(lambda: old.gateway._scheduler.running == 0)
                mine = await scrape(http)
                await finished(new, job["task_id"])
                theirs = await scrape(other)
    assert mine.value("llmstream_fenced_writes_total") == 1
    assert mine.value("llmstream_attempts_total", model="echo", provider="echo", outcome="superseded") == 1
    assert mine.total("llmstream_takeovers_total") == 0
    assert theirs.value("llmstream_takeovers_total", pool="echo") == 1
    assert theirs.total("llmstream_queue_wait_seconds_count") == 0, "it began to wait when it was accepted, once"
    assert theirs.total("llmstream_time_to_first_token_seconds_count") == 0


async def test_what_clients_send_never_becomes_a_label(tmp_path: Path) -> None:
    """Unknown routes, methods, models and ids, a thousand times, add no series: whoever calls cannot fill the memory of
    the service or of its Prometheus."""
    async with Upstream() as upstream:
        any_model = ProviderSettings(base_url=upstream.url, models=["*"])
        settings = echo_settings(tmp_path, models={"echo": ModelSettings(engine="echo")}, providers={"up": any_model})
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:

            async def unknown(name: str) -> None:
                for method, path in (("GET", f"/{name}"), ("PROPFIND", "/health"), ("GET", f"/chat/{name}")):
                    async with http.request(method, path) as response:
                        await response.read()
                async with http.post(CHAT, json=conversation(model=name) | {"model": name}) as response:
                    assert response.status == 200

            await unknown("marker0")
            before = await scrape(http)
            for number in range(1, 40):
                await unknown(f"marker{number}")
            after = await scrape(http)
    assert not [value for value in after.label_values() if "marker" in value.lower() or value == "PROPFIND"]
    assert after.samples.keys() - before.samples.keys() <= _metrics_route(after)
    assert after.value("tokens_generated_total", model="other") == 3 * 40


def _metrics_route(found: Scrape) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {key for key in found.samples if ("endpoint", "/metrics") in key[1]}


async def test_requests_that_are_no_http_count_too(http: aiohttp.ClientSession, server: Server) -> None:
    """What is refused before any handler sees it is a request all the same."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    writer.write(b"nonsense\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert b"x-process-time: 0.000000\r\n" in answer.lower()
    found = await scrape(http)
    assert found.value("http_requests_total", method="other", endpoint="unknown", status="400") == 1


async def test_openmetrics_is_spoken_too(http: aiohttp.ClientSession) -> None:
    """A scraper that prefers OpenMetrics gets it; one that asks for nonsense gets plain text."""
    async with http.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert (await response.text()).endswith("# EOF\n")
    for version in ("x", "1.x", "", "99.0.0", "1.0.0;escaping=nonsense"):
        accept = {"Accept": f"application/openmetrics-text;version={version}"}
        async with http.get("/metrics", headers=accept) as response:
            assert response.status == 200
            assert b"llmstream_slots" in await response.read()


@pytest.mark.parametrize("wanted", [True, False])
async def test_process_time_and_memory_stand_in_the_headers(tmp_path: Path, wanted: bool) -> None:
    """Every response bears ``X-Process-Time`` in seconds; memory in MB only where that is wanted."""
    settings = echo_settings(tmp_path, telemetry={"memory_headers": wanted})
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        for method, path, body in (
            ("GET", "/health", None),
            ("GET", "/nowhere", None),
            ("PUT", "/health", None),
            ("POST", CHAT, {"broken": True}),
            ("POST", CHAT, conversation(stream=True)),
            ("POST", CHAT, conversation()),
        ):
            async with http.request(method, path, data=json.dumps(body) if body else None) as response:
                assert 0 <= float(response.headers["X-Process-Time"]) < 10
                assert ("X-Memory-Used" in response.headers) == ("X-Memory-Delta" in response.headers) == wanted
                if wanted:
                    assert 10 < float(response.headers["X-Memory-Used"]) < 10_000
                    assert abs(float(response.headers["X-Memory-Delta"])) < 1_000


async def test_a_scrape_waits_for_a_silent_store_only_for_a_moment(tmp_path: Path) -> None:
    """A store that does not answer costs the scrape its own deadline, not that of the store's commands."""
    settings = echo_settings(tmp_path, store={"timeout_s": 60})
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
        embedded = server.gateway._store.embedded
        assert embedded is not None
        assert embedded.pid is not None
        os.kill(embedded.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(20):
                found = await scrape(http)
        finally:
            os.kill(embedded.pid, signal.SIGCONT)
        assert "llmstream_jobs_waiting{" not in found.text
        assert found.value("llmstream_slots", pool="echo") == 4


async def test_a_scrape_does_not_wait_for_a_store_that_is_away(tmp_path: Path) -> None:
    """While the store is away the metrics say so, within their deadline, without the numbers that it would give."""
    async with Server(echo_settings(tmp_path)) as server, aiohttp.ClientSession(server.url) as http:
        embedded = server.gateway._store.embedded
        assert embedded is not None
        await embedded.close()
        await wait_until(lambda: server.gateway.unready is not None)
        found = await scrape(http)
        assert found.value("llmstream_store_up") == 0
        assert "llmstream_jobs_waiting{" not in found.text
        assert found.value("llmstream_slots", pool="echo") == 4
