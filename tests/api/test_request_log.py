"""The log of a real server: a line for each request, and ids that lead from it to the job, on every replica."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmstream.config import LoggingSettings, ProviderSettings, Settings, load, print_config
from llmstream.errors import ConfigError
from llmstream.server import Server
from llmstream.telemetry import setup_logging
from tests.api.reading import conversation, finished, submit
from tests.conftest import echo_settings
from tests.scrape import scrape
from tests.upstream import Reply, Upstream
from tests.waiting import wait_until

JSON = LoggingSettings(format="json")
CHAT = "/v1/chat/completions"


pytestmark = pytest.mark.usefixtures("restored_logging")


class Lines:
    """Logging as ``serve`` sets it up, in JSON, and the lines written since."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(JSON)
        self._capsys = capsys
        self.text = ""

    def read(self) -> list[dict[str, Any]]:
        self.text += self._capsys.readouterr().err
        return [json.loads(line) for line in self.text.splitlines()]

    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.read() if line["logger"] == "llmstream.requests"]


async def test_each_request_is_a_line_with_the_documented_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Timestamp, level, logger, message, method, route, status_code and latency_ms, with the ids of request and job."""
    lines = Lines(capsys)
    async with Server(echo_settings(tmp_path, logging=JSON)) as server, aiohttp.ClientSession(server.url) as http:
        headers = {"x-request-id": "mine-1"}
        async with http.post(CHAT, json=conversation(), headers=headers) as response:
            await response.read()
            job_id = response.headers["x-job-id"]
        async with http.get("/chat/nothing") as response:
            other = response.headers["x-request-id"]
        await wait_until(lambda: len(lines.requests()) == 2)
    first, second = lines.requests()
    assert first.pop("timestamp").endswith("Z")
    assert 0 < first.pop("latency_ms") < 60_000
    assert first == {
        "level": "INFO",
        "logger": "llmstream.requests",
        "message": f"POST {CHAT} - 200",
        "method": "POST",
        "route": CHAT,
        "status_code": 200,
        "request_id": "mine-1",
        "job_id": job_id,
    }
    assert (second["message"], second["route"]) == ("GET /chat/nothing - 404", "/chat/{task_id}")
    assert second["request_id"] == other
    assert "job_id" not in second


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [({"format": "json"}, 1), ({"format": "json", "requests": "never"}, 0), ({}, 0), ({"requests": "always"}, 1)],
)
async def test_the_lines_can_be_had_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: dict[str, Any], expected: int
) -> None:
    """JSON logs have them unless they are switched off, console logs where they are switched on."""
    chosen = LoggingSettings.model_validate(wanted)
    setup_logging(chosen)
    given = echo_settings(tmp_path, logging=chosen)
    async with Server(given) as server, aiohttp.ClientSession(server.url) as http, http.get("/health"):
        pass
    assert capsys.readouterr().err.count("GET /health - 200") == expected


async def test_a_job_carries_the_request_id_to_the_replica_that_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the running replica logs about a job bears the id of the request that another replica accepted."""
    lines = Lines(capsys)
    async with (
        Server(echo_settings(tmp_path, slots=1)) as first,
        Server(echo_settings(tmp_path / "2", slots=1, store={"url": first.gateway._store.url})) as second,
        aiohttp.ClientSession(first.url) as http,
    ):
        for _ in range(2):
            await submit(http, echo={"tokens": 1, "fault": "stall"})
        await wait_until(lambda: first.gateway._scheduler.running == second.gateway._scheduler.running == 1)
        body = {"message": "go", "echo": {"tokens": 1, "fault": "reject"}}
        async with http.post("/chat/async", json=body, headers={"x-request-id": "from-afar"}) as response:
            job_id = (await response.json())["task_id"]
        (stuck,) = second.gateway._scheduler.pools["echo"].running
        await second.gateway.cancel(stuck)
        state = await finished(first, job_id)
        assert state.replica == second.gateway.replica
    (failed,) = [line for line in lines.read() if line["message"].startswith("job failed")]
    assert (failed["request_id"], failed["job_id"]) == ("from-afar", job_id)


async def test_a_line_break_in_a_path_forges_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path with an encoded line break stays on its line."""
    setup_logging(LoggingSettings(requests="always"))
    settings = echo_settings(tmp_path, logging=LoggingSettings(requests="always"))
    async with Server(settings) as server, aiohttp.ClientSession(server.url) as http, http.get("/x%0Aforged%1b[31m"):
        pass
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "forged" in line]
    assert "\\n" in line


SECRET = "hunter2-hunter2-hunter2"


async def test_planted_secrets_show_up_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key of a provider, keys that callers send, and a password in a URL are in no log line at the most talkative
    level, no metric, no error and no printed configuration, also when everything goes wrong."""
    talkative = LoggingSettings(level="DEBUG", format="json", requests="always")
    setup_logging(talkative)
    answers: list[str] = []
    async with Upstream() as upstream:
        upstream.models["up"] = Reply(status=401, body={"error": {"message": f"Incorrect API key: {SECRET}"}})
        upstream.models["refused"] = Reply(status=400, body={"error": {"message": f"{SECRET} may not do this"}})
        upstream.models["broken"] = Reply(fault="reset", at=1)
        providers = {
            "up": ProviderSettings.model_validate(
                {"base_url": upstream.url, "api_key": SECRET, "models": ["up", "broken", "refused"]}
            )
        }
        settings = echo_settings(tmp_path, logging=talkative, providers=providers)
        async with Server(settings) as server, aiohttp.ClientSession(server.url) as http:
            sent = {"Authorization": f"Bearer {SECRET}", "X-API-Key": SECRET, "Cookie": f"session={SECRET}"}
            for model in ("echo", "up", "broken", "refused", "unknown"):
                for stream in (True, False):
                    body = conversation(stream=stream) | {"model": model}
                    async with http.post(CHAT, json=body, headers=sent) as response:
                        answers.append(await response.text() + str(response.headers))
            async with http.get(f"/v1/models?api_key={SECRET}", headers=sent) as response:
                answers.append(await response.text())
            answers.append((await scrape(http)).text)
            async with http.get("/health/full") as response:
                answers.append(await response.text())
    logged = capsys.readouterr().err
    assert logged.count("llmstream.requests") >= 10
    assert "hunter2" not in logged
    assert not [answer for answer in answers if "hunter2" in answer]
    assert "hunter2" not in print_config(settings)


def test_a_refused_collector_url_does_not_show_its_password() -> None:
    """The error about a URL with a password does not repeat it."""
    with pytest.raises(ConfigError) as refused:
        load(env={}, flags={"telemetry.otlp_endpoint": "http://user:hunter2@host:4318"})
    assert "OTEL_EXPORTER_OTLP_HEADERS" in refused.value.message
    assert "hunter2" not in refused.value.message
    assert Settings().telemetry.otlp_endpoint is None
