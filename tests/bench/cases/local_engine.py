"""A local model under llmstream and the same engine called directly: tokens per second of eight streams."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import aiohttp

from llmstream.config import default_data_dir
from llmstream.providers.weights import resolve
from tests.bench.bench import Bench, Running
from tests.bench.machine import ROOT
from tests.bench.processes import Unavailable
from tests.bench.systems.base import run
from tests.bench.systems.llmstream import Llmstream

MODEL = "smollm2"
STREAMS = 8
TOKENS = 64
QUESTIONS = [f"Tell me a long story about lighthouse number {number}." for number in range(STREAMS)]


async def local_engine(bench: Bench, case: str) -> None:
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        raise Unavailable("the engine is not installed (pip install -e '.[local]')") from None
    weights = _find_weights()
    cores = bench.cores.all
    direct, under = [], []
    settings = {"models.smollm2.source": weights, "models.smollm2.slots": STREAMS}
    async with Llmstream(settings).serve(bench, core=cores) as server:
        await _ask_all(server)
        for _ in range(bench.effort.rounds):
            words = ("taskset", "-c", cores, sys.executable, "-m", "tests.bench.cases.engine_direct", weights)
            direct.append(float((await run(*words, cwd=ROOT)).splitlines()[-1]))
            under.append(await _ask_all(server))
    bench.report.add(case, "engine", "tokens per second", direct)
    bench.report.add(case, "llmstream", "tokens per second", under)
    ratios = [ours / theirs for ours, theirs in zip(under, direct, strict=True)]
    bench.report.add(case, "llmstream", "× tokens per second of the engine", ratios)


def _find_weights() -> Path:
    for folder in (default_data_dir(), Path("~/.cache/llmstream-tests").expanduser()):
        if found := resolve(MODEL, folder):
            return found
    raise Unavailable(f"the weights are not here (python -m llmstream models pull {MODEL})")


async def _ask_all(server: Running) -> float:
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(total=300)) as http:
        start = time.perf_counter()
        counts = await asyncio.gather(*(_ask(http, question) for question in QUESTIONS))
        return sum(counts) / (time.perf_counter() - start)


async def _ask(http: aiohttp.ClientSession, question: str) -> int:
    """Streams one answer; the number of tokens it had."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = 0
    async with http.post("/v1/chat/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {") and (usage := json.loads(line[6:]).get("usage")):
                tokens = int(usage["completion_tokens"])
    return tokens
