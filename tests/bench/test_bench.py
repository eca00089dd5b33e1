"""The benchmark runs, and its load generator is not easily satisfied."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from tests.bench import scale
from tests.bench.machine import ROOT
from tests.bench.report import Report
from tests.bench.targets import verdicts
from tests.bench.tools import Answers, Load, build, generating

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("cc", "taskset", "setpriv"))), reason="needs a C compiler and util-linux"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tools are built, once for all tests."""
    folder = tmp_path_factory.mktemp("cache")
    build(folder / "tools")
    return folder


def test_one_comparison_runs_and_every_answer_is_right(cache: Path, tmp_path: Path) -> None:
    """``python -m tests.bench --quick --only burst`` measures llmstream and writes what it found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--quick", "--only", "burst", "--systems", "llmstream", "--port", port]
    places = ["--cache", str(cache), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tests.bench", *words, *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_bytes())
    figures = {(figure["system"], figure["unit"]): figure for figure in found["figures"]}
    assert figures["llmstream", "µs CPU per chunk"]["median"] > 0
    assert figures["llmstream", "µs CPU per chunk"]["note"].endswith(" answers right")
    assert figures["direct", "chunks per second"]["median"] > 0
    assert found["machine"]["cpu"]
    assert "llmstream" in done.stdout


@pytest.mark.parametrize(
    ("events", "counter"),
    [
        (["tok0000", "tok0001", "[DONE]"], "ok"),
        (["tok0000", "[DONE]"], "incomplete"),
        (["tok0000", "tok0001"], "incomplete"),
        (["tok0001", "tok0000", "[DONE]"], "wrong_content"),
        (["tok0000", "tok0001", "tok0001", "[DONE]"], "wrong_content"),
        (["tok0000", "tok0001", "tok0002", "[DONE]"], "wrong_content"),
    ],
    ids=["right", "a token lost", "no end", "out of order", "doubled", "one too many"],
)
async def test_wrong_answers_are_counted(cache: Path, events: Sequence[str], counter: str) -> None:
    """Only the whole answer, in order and with its end, is right."""
    async with _answering(events) as port:
        answers = await _ask(cache, port)
    assert (answers.begun, getattr(answers, counter)) == (3, 3), answers
    assert bool(answers.faults) == (counter != "ok")


async def test_a_refusal_is_shown(cache: Path) -> None:
    """What a server says when it refuses is part of what the benchmark reports."""
    async with _answering([], status=503) as port:
        answers = await _ask(cache, port)
    assert answers.wrong_status == 3
    assert "HTTP 503: overloaded" in answers.faults


def test_a_target_is_met_missed_or_not_measured() -> None:
    """The verdict follows from the figures of one run."""
    report = Report()
    report.add("burst", "llmstream", "µs CPU per chunk", [9.0, 8.0, 10.0])
    report.add("burst", "smg", "µs CPU per chunk", [9.0])
    report.add("burst", "nginx", "µs CPU per chunk", [3.0])
    found = {row["target"]: row for row in verdicts(report)}
    assert found["burst: CPU per chunk, llmstream : smg"]["verdict"] == "met"
    assert found["burst: CPU per chunk, llmstream : nginx"]["verdict"] == "MISSED"
    assert found["idle memory, MB"]["verdict"] == "not measured"


async def _ask(cache: Path, port: int) -> Answers:
    load = Load(tokens=2, requests=3, seconds=5)
    async with generating(build(cache / "tools"), load, port, core="0-1023", headers={}) as answers:
        return await answers


@asynccontextmanager
async def _answering(events: Sequence[str], status: int = 200) -> AsyncIterator[int]:
    """A server that gives everybody the same events."""

    async def answer(_: web.Request) -> web.Response:
        body = "".join(f"data: {event}\n\n" for event in events) if status == 200 else "overloaded"
        return web.Response(text=body, status=status)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def test_the_scale_page_shows_what_the_constants_give() -> None:
    """Whoever changes a constant of the arithmetic changes the page."""
    assert scale.table() in (Path(__file__).parent / "SCALE.md").read_text()


def test_a_million_streams_need_more_of_everything() -> None:
    """Work, memory and network follow the number of streams; a store keeps what its retention time asks for."""
    few, many = scale.Plan(10_000, 1.0), scale.Plan(1_000_000, 1.0)
    assert many.replica_cores == pytest.approx(100 * few.replica_cores)
    assert many.client_gbit == pytest.approx(100 * few.client_gbit)
    assert few.replicas * few.headroom >= few.replica_cores
    assert scale.Plan(10_000, 1.0, retention_s=60).store_gb == pytest.approx(few.store_gb / 60)
    assert scale.Plan(100, 1.0).first_limit == "nothing"
    assert scale.Plan(10_000, 20.0).first_limit == "one replica's core"
